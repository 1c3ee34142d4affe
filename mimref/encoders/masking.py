"""Masked image modelling around the encoder (He et al. 2022; Xie et al. 2022): masks, decoders and loss.

Shapes: B images, N patches, K visible patches, D encoder width, C pixel values of a patch (channels * patch_size**2).
"""

from functools import partial
from typing import NamedTuple, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimref.config.run import DecoderConfig
from mimref.encoders.positions import sincos_positions
from mimref.encoders.vit import Encoder
from mimref.errors import ConfigError

# MAE's epsilon is not torch's default. timm annotates a class here, but calls whatever it gets.
_layer_norm = cast(type[nn.LayerNorm], partial(nn.LayerNorm, eps=1e-6))


class Mask(NamedTuple):
    """Which patches of each image stay visible."""

    visible_BK: Tensor
    """Indices of the visible patches."""
    restore_BN: Tensor
    """Every patch's place in the order that has the visible ones first."""
    hidden_BN: Tensor
    """1.0 where a patch is hidden, else 0.0."""


class MAEDecoder(nn.Module):
    """Reconstructs all patches from the visible ones' tokens. Raises ConfigError unless 4 divides the width."""

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
        """grid: patches per side. patch_pixels: values of a patch. num_prefix: tokens before those of the patches.

        norm_input: a LayerNorm of the decoder's own in front of its embedding, for tokens that no norm has passed.
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
        """visible_BLD: prefix tokens first, then visible patches in shuffled order. Returns pixels (B, N, C)."""
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
    """SimMIM's decoder, one linear layer, and the mask token, which the encoder sees in place of hidden patches."""

    no_decay_names = frozenset({"mask_token"})

    def __init__(self, encoder_width: int, patch_pixels: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(encoder_width))
        self.predict = nn.Linear(encoder_width, patch_pixels)

    def forward(self, patches_BND: Tensor) -> Tensor:
        """Tokens of all patches in reading order to their pixels (B, N, C)."""
        pixels: Tensor = self.predict(patches_BND)
        return pixels


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Patches that stay visible: at least one, and at least one is hidden (of two or more)."""
    # The tolerance keeps 20 of 100 patches at a ratio of 0.8, whose complement is a little below 0.2 in floats.
    return min(max(1, int(num_patches * (1 - mask_ratio) + 1e-6)), num_patches - 1)


def count_patches(encoder: Encoder) -> int:
    """Patches of an image. Raises ConfigError where it is a single one."""
    size = encoder.patch_size
    if encoder.architecture.image_size == size:
        raise ConfigError(f"encoder.image_size {size} is one patch; masking needs at least two patches a side")
    return (encoder.architecture.image_size // size) ** 2


def draw_mask(noise_BN: Tensor, num_visible: int) -> Mask:
    """The patches with the smallest noise stay visible."""
    order_BN = noise_BN.argsort(dim=1)
    restore_BN = order_BN.argsort(dim=1)
    return Mask(order_BN[:, :num_visible], restore_BN, (restore_BN >= num_visible).float())


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, channels, S, S) into (B, N, C) patches in reading order.

    A patch's values are ordered row, column, channel.
    """
    batch, channels, side, _ = images.shape
    grid = side // patch_size
    cut = images.reshape(batch, channels, grid, patch_size, grid, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalize_patches(patches_BNC: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) variance for every patch."""
    mean = patches_BNC.mean(dim=2, keepdim=True)
    variance = patches_BNC.var(dim=2, keepdim=True)
    return (patches_BNC - mean) / (variance + 1e-6).sqrt()


def hidden_error(pixels_BNC: Tensor, target_BNC: Tensor, hidden_BN: Tensor) -> Tensor:
    """Mean squared error over hidden patches, a scalar; zero if there are none."""
    error_BN = (pixels_BNC.float() - target_BNC).square().mean(dim=2)
    loss: Tensor = (error_BN * hidden_BN).sum() / hidden_BN.sum().clamp_min(1)
    return loss


def init_masked_model(model: nn.Module, encoder: Encoder, mask_token: nn.Parameter) -> None:
    """MAE's initialisation of an encoder and what is around it in `model`."""
    model.apply(init_linear)
    projection = encoder.vit.patch_embed.proj.weight
    nn.init.xavier_uniform_(projection.data.view(len(projection), -1))
    assert encoder.vit.cls_token is not None
    nn.init.normal_(encoder.vit.cls_token, std=0.02)
    nn.init.normal_(mask_token, std=0.02)


def init_linear(module: nn.Module) -> None:
    """MAE's initialisation of linear layers, for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
