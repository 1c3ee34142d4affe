"""Position embeddings for other grids, interpolated as in the code of the weights' authors.

Shapes: N patches, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.config.base import Interpolation
from mimref.devices import send
from mimref.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """How one family obtains the positions of another grid: by bicubic interpolation, unless recomputed."""

    offset: float = 0.0
    """Patches added to the new side in the scale factor, which then replaces the size; 0 interpolates by size."""
    antialias: bool = False
    """Antialias also when enlarging: torch's filter then has another shape."""
    align_corners: bool = False
    """Corner patches keep their positions."""
    recomputed: bool = False
    """Use the `flat_sincos_positions` of the new grid."""

    def __str__(self) -> str:
        if self.recomputed:
            return "recomputed"
        words = ["bicubic", f"by scale factor with an offset of {self.offset:g}" if self.offset else "by size"]
        words += ["antialiased"] * self.antialias + ["corners aligned"] * self.align_corners
        return ", ".join(words)


RULES: dict[Interpolation, Rule] = {
    # facebookresearch/mae util/pos_embed.py, liuxingbin/dbot util/pos_embed.py (CrossMAE and MAWS have MAE's layout),
    # facebookresearch/msn src/deit.py, and BenediktAlkin/KappaModules functional/pos_embed.py, which the MIM-Refiner
    # releases use for every base, data2vec 2.0 included: fairseq's own code supports no other size. Nor does I-JEPA's:
    # its function mistakes the first patch for a CLS token, and fails. Hugging Face's models follow this rule since
    # huggingface/transformers#33226 (2024; before, dinov2's), except Dinov2WithRegisters. OpenMMLab's follow it too.
    "mae": Rule(),
    # facebookresearch/dino, bytedance/ibot models/, sail-sg/mugs src/: vision_transformer.py
    "dino": Rule(offset=0.1),
    # facebookresearch/dinov2 models/vision_transformer.py with the defaults of hub/backbones.py
    "dinov2": Rule(offset=0.1),
    # ... and with those of its models with registers; transformers' Dinov2WithRegisters
    "dinov2_reg": Rule(antialias=True),
    # timm layers/pos_embed.py, resample_abs_pos_embed
    "timm": Rule(antialias=True),
    # torchvision models/vision_transformer.py, interpolate_embeddings
    "torchvision": Rule(align_corners=True),
    # pengzhiliang/MAE-pytorch modeling_finetune.py: a table that is not saved, made for the model's number of patches
    "mae_pytorch": Rule(recomputed=True),
}


def resize_positions(
    positions_1ND: Tensor,
    new_grid: tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
    interpolation: Interpolation = "mae",
) -> Tensor:
    """Interpolate a position embedding to `new_grid` (rows, columns) in float32; unchanged if that is its own grid.

    grid: its own rows and columns; None means a square.
    """
    side = math.isqrt(positions_1ND.shape[1])
    rows, columns = grid or (side, side)
    if (rows, columns) == new_grid:
        return positions_1ND
    rule = RULES[interpolation]
    if rule.recomputed:
        recomputed = flat_sincos_positions(positions_1ND.shape[2], new_grid[0] * new_grid[1])
        return send(recomputed.to(positions_1ND.dtype), positions_1ND.device)
    image = positions_1ND.reshape(1, rows, columns, -1).permute(0, 3, 1, 2).float()
    # With a scale factor, torch samples at multiples of it, although the output has a whole number of patches.
    factor = ((new_grid[0] + rule.offset) / rows, (new_grid[1] + rule.offset) / columns)
    resized = F.interpolate(
        image,
        size=None if rule.offset else new_grid,
        scale_factor=factor if rule.offset else None,
        mode="bicubic",
        antialias=rule.antialias,
        align_corners=rule.align_corners,
    )
    return resized.permute(0, 2, 3, 1).flatten(1, 2).to(positions_1ND.dtype)


def fit_positions(positions: Tensor, num_prefix: int, side: int, interpolation: Interpolation) -> Tensor:
    """Interpolate a file's positions, (1, num_prefix + N, D), to side x side patches; unchanged if N is no square."""
    patches = positions.shape[1] - num_prefix if positions.ndim == 3 and len(positions) == 1 else 0
    if patches <= 0 or math.isqrt(patches) ** 2 != patches or not positions.is_floating_point():
        return positions
    # In float32, so that a file in half precision is rounded only once.
    positions = positions.float()
    patches_1ND = resize_positions(positions[:, num_prefix:], (side, side), interpolation=interpolation)
    return torch.cat([positions[:, :num_prefix], patches_1ND], dim=1)


def flat_sincos_positions(width: int, patches: int) -> Tensor:
    """Return MAE-pytorch's fixed positions, (1, patches, width): alternating sines and cosines of the patch number."""
    number_N1 = torch.arange(patches, dtype=torch.float64)[:, None]
    channel_D = torch.arange(width, dtype=torch.float64)
    angle_ND = number_N1 / 10_000.0 ** (2 * (channel_D // 2) / width)
    return torch.where(channel_D % 2 == 0, angle_ND.sin(), angle_ND.cos())[None].float()


def sincos_positions(width: int, side: int, *, num_prefix: int = 1) -> Tensor:
    """Return MAE's fixed 2-D sin-cos position embedding, (1, num_prefix + side**2, width), zero for prefix tokens.

    The first half of the width encodes the column, the second the row; each half is sines, then cosines.
    """
    if width % 4:
        raise ConfigError(f"encoder.width {width} is not divisible by 4, as sin-cos positions need")
    frequency = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = axis[None, :, :].expand(side, -1, -1)
    row = axis[:, None, :].expand(-1, side, -1)
    patches = torch.cat([column, row], dim=2).flatten(0, 1)
    return torch.cat([patches.new_zeros(num_prefix, width), patches])[None].float()


def are_sincos(positions: Tensor, *, num_prefix: int) -> bool:
    """Return whether positions (1, num_prefix + side**2, width) equal MAE's or MoCo v3's in half precision."""
    return _are_maes(positions, num_prefix) or are_mocos(positions, num_prefix=num_prefix)


def are_mocos(positions: Tensor, *, num_prefix: int) -> bool:
    """Return whether positions equal MoCo v3's, whose first half of the width encodes the row; see `are_sincos`."""
    swapped = positions.roll(positions.shape[2] // 2, dims=2)
    return not _are_maes(positions, num_prefix) and _are_maes(swapped, num_prefix)


def _are_maes(positions: Tensor, num_prefix: int) -> bool:
    side, width = math.isqrt(positions.shape[1] - num_prefix), positions.shape[2]
    if width % 4 or side**2 + num_prefix != positions.shape[1]:
        return False
    return torch.allclose(positions.float(), sincos_positions(width, side, num_prefix=num_prefix), rtol=0, atol=2e-3)
