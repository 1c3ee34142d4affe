"""Masked image modelling around the encoder (He et al. 2022; Xie et al. 2022): masks, decoders and loss.

Shapes: B images, N patches, K visible patches, D encoder width, C pixel values of a patch (channels * patch_size**2).
"""

import math
from functools import partial
from typing import NamedTuple, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimref.config.run import DecoderConfig
from mimref.encoders.positions import sincos_positions
from mimref.encoders.vit import Encoder
from mimref.errors import ConfigError

# MAE's epsilon is not torch's default. timm annotates this argument as a class, but accepts any callable.
_layer_norm = cast(type[nn.LayerNorm], partial(nn.LayerNorm, eps=1e-6))


class Mask(NamedTuple):
    """Which patches of each image stay visible."""

    visible_BK: Tensor
    """Indices of the visible patches."""
    restore_BN: Tensor
    """Every patch's index in the order that puts the visible patches first."""
    hidden_BN: Tensor
    """1.0 where a patch is hidden, else 0.0."""


class MAEDecoder(nn.Module):
    """MAE's decoder: all patches from the tokens of visible ones. Raises ConfigError unless 4 divides its width."""

    no_decay_names = frozenset({"mask_token"})

    def __init__(
        self,
        config: DecoderConfig,
        encoder_width: int,
        grid: int,
        patch_pixels: int,
        *,
        num_prefix: int = 1,
        norm_input: bool = False,
    ) -> None:
        """Build the layers. grid: patches per side. patch_pixels: values per patch.

        num_prefix: number of tokens before the patch tokens. norm_input: apply a LayerNorm before the decoder's
        embedding, for tokens that have passed no norm.
        """
        super().__init__()
        if config.width % 4:
            raise ConfigError(f"decoder.width {config.width} is not divisible by 4, as sin-cos positions need")
        self.num_prefix = num_prefix
        # torch's epsilon, as in the release.
        self.input_norm = nn.LayerNorm(encoder_width) if norm_input else nn.Identity()
        self.embed = nn.Linear(encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions: Tensor
        positions = sincos_positions(config.width, grid, num_prefix=num_prefix)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(
            *(Block(config.width, config.num_heads, qkv_bias=True, norm_layer=_layer_norm) for _ in range(config.depth))
        )
        self.norm = _layer_norm(config.width)
        self.predict = nn.Linear(config.width, patch_pixels)

    def forward(self, visible_BLD: Tensor, restore_BN: Tensor) -> Tensor:
        """Return the pixels (B, N, C). visible_BLD: prefix tokens, then visible patches in shuffled order."""
        tokens = self.embed(self.input_norm(visible_BLD))
        batch, patches = restore_BN.shape
        prefix, shown = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        masks = self.mask_token.expand(batch, patches - shown.shape[1], -1)
        shuffled = torch.cat([shown, masks.to(tokens.dtype)], dim=1)
        ordered = shuffled.gather(1, restore_BN[:, :, None].expand(-1, -1, shuffled.shape[2]))
        tokens = torch.cat([prefix, ordered], dim=1) + self.positions
        pixels: Tensor = self.predict(self.norm(self.blocks(tokens)))[:, self.num_prefix :]
        return pixels


class LinearDecoder(nn.Module):
    """SimMIM's decoder, one linear layer, and the mask token that replaces hidden patches in the encoder's input."""

    no_decay_names = frozenset({"mask_token"})

    def __init__(self, encoder_width: int, patch_pixels: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(encoder_width))
        self.predict = nn.Linear(encoder_width, patch_pixels)

    def forward(self, patches_BND: Tensor) -> Tensor:
        """Return the pixels (B, N, C) from the tokens of all patches in reading order."""
        pixels: Tensor = self.predict(patches_BND)
        return pixels


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Return the number of patches that stay visible: at least one, and at least one is hidden (of two or more)."""
    # The tolerance keeps 20 of 100 patches at a ratio of 0.8, because 1 - 0.8 is slightly below 0.2 in floating point.
    return min(max(1, int(num_patches * (1 - mask_ratio) + 1e-6)), num_patches - 1)


def count_patches(encoder: Encoder) -> int:
    """Return the number of patches of an image. Raises ConfigError if there is only one."""
    size = encoder.patch_size
    if encoder.architecture.image_size == size:
        raise ConfigError(f"encoder.image_size {size} is one patch; masking needs at least two patches a side")
    return (encoder.architecture.image_size // size) ** 2


def draw_mask(noise_BN: Tensor, num_visible: int) -> Mask:
    """Return the mask that leaves the `num_visible` patches with the smallest noise visible."""
    order_BN = noise_BN.argsort(dim=1)
    restore_BN = order_BN.argsort(dim=1)
    return Mask(order_BN[:, :num_visible], restore_BN, (restore_BN >= num_visible).float())


def in_squares(noise_BN: Tensor, size: int) -> Tensor:
    """Return noise for `draw_mask` that hides squares of `size` x `size` patches one after another, in random order.

    noise_BN: from 0 to 1, for the patches of a square grid. The grid cuts off squares at its right and lower edge. The
    last square may be hidden in part, since the number of hidden patches stays the same.
    """
    grid = math.isqrt(noise_BN.shape[1])
    firsts = noise_BN.unflatten(1, (grid, grid))[:, ::size, ::size]
    place = torch.arange(grid, device=noise_BN.device) // size
    square_N = (place[:, None] * firsts.shape[2] + place).flatten()
    rank_BS = firsts.flatten(1).argsort(dim=1).argsort(dim=1)
    ordered: Tensor = rank_BS[:, square_N] + noise_BN
    return ordered


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, channels, S, S) into (B, N, C) patches in reading order.

    A patch's values are ordered row, column, channel.
    """
    batch, channels, side, _ = images.shape
    grid = side // patch_size
    cut = images.reshape(batch, channels, grid, patch_size, grid, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalize_patches(patches_BNC: Tensor) -> Tensor:
    """Normalise every patch to zero mean and unit (unbiased) variance."""
    mean = patches_BNC.mean(dim=2, keepdim=True)
    variance = patches_BNC.var(dim=2, keepdim=True)
    return (patches_BNC - mean) / (variance + 1e-6).sqrt()


def hidden_error(pixels_BNC: Tensor, target_BNC: Tensor, hidden_BN: Tensor) -> Tensor:
    """Return the mean squared error over hidden patches, a scalar; zero if there are none."""
    error_BN = (pixels_BNC.float() - target_BNC).square().mean(dim=2)
    loss: Tensor = (error_BN * hidden_BN).sum() / hidden_BN.sum().clamp_min(1)
    return loss


def init_masked_model(model: nn.Module, encoder: Encoder, mask_token: nn.Parameter) -> None:
    """Initialise an encoder and the modules around it in `model` as MAE does."""
    model.apply(init_linear)
    projection = encoder.vit.patch_embed.proj.weight
    nn.init.xavier_uniform_(projection.data.view(len(projection), -1))
    assert encoder.vit.cls_token is not None
    nn.init.normal_(encoder.vit.cls_token, std=0.02)
    nn.init.normal_(mask_token, std=0.02)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as MAE does; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
