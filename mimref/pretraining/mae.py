"""A masked autoencoder (He et al. 2022): the encoder sees a quarter of the patches, a light decoder paints the rest.

Shapes: B images, N patches, K visible patches, D encoder width, P pixels of a patch (3 * patch_size**2).
"""

from functools import partial
from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mimref.config import DecoderConfig
from mimref.encoders.vit import Encoder, sincos_positions
from mimref.errors import ConfigError

# MAE's epsilon is not torch's default. timm annotates a class here, and calls whatever it gets.
_layer_norm = cast(type[nn.LayerNorm], partial(nn.LayerNorm, eps=1e-6))


class MAEDecoder(nn.Module):
    """Reconstructs all patches from tokens of the visible ones. Raises ConfigError for a width that is no fit."""

    no_decay_names = frozenset({"mask_token"})

    def __init__(self, config: DecoderConfig, encoder_width: int, grid: int, patch_pixels: int) -> None:
        super().__init__()
        if config.width % 4:
            raise ConfigError(f"mae.decoder.width {config.width} is not divisible by 4, as sin-cos positions need")
        self.embed = nn.Linear(encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.positions: Tensor
        self.register_buffer("positions", sincos_positions(config.width, grid), persistent=False)
        self.blocks = nn.Sequential(
            *(Block(config.width, config.num_heads, qkv_bias=True, norm_layer=_layer_norm) for _ in range(config.depth))
        )
        self.norm = _layer_norm(config.width)
        self.predict = nn.Linear(config.width, patch_pixels)

    def forward(self, visible_BKD: Tensor, restore_BN: Tensor) -> Tensor:
        """visible_BKD: CLS token first, then visible patches in shuffled order. Returns pixels (B, N, P)."""
        tokens = self.embed(visible_BKD)
        batch, patches = restore_BN.shape
        masks = self.mask_token.expand(batch, patches - (tokens.shape[1] - 1), -1)
        shuffled = torch.cat([tokens[:, 1:], masks.to(tokens.dtype)], dim=1)
        ordered = shuffled.gather(1, restore_BN[:, :, None].expand(-1, -1, shuffled.shape[2]))
        tokens = torch.cat([tokens[:, :1], ordered], dim=1) + self.positions
        pixels: Tensor = self.predict(self.norm(self.blocks(tokens)))
        patch_pixels: Tensor = pixels[:, 1:]
        return patch_pixels


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder with MAE's initialisation and its loss on normalised pixels of hidden patches.

    At least one patch stays visible and one hidden; raises ConfigError for images of a single patch.
    """

    def __init__(self, encoder: Encoder, decoder: DecoderConfig, mask_ratio: float) -> None:
        super().__init__()
        grid = encoder.architecture.image_size // encoder.patch_size
        self.encoder = encoder
        self.decoder = MAEDecoder(decoder, encoder.embed_dim, grid, 3 * encoder.patch_size**2)
        self.num_patches = grid**2
        if self.num_patches == 1:
            size = encoder.patch_size
            raise ConfigError(f"encoder.image_size {size} is a single patch of {size} pixels, too few to hide any")
        # The tolerance keeps 20 of 100 patches at a ratio of 0.8, whose complement is a little below 0.2 in floats.
        self.num_visible = min(max(1, int(self.num_patches * (1 - mask_ratio) + 1e-6)), self.num_patches - 1)
        self.apply(_init_linear)
        projection = encoder.vit.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.data.view(len(projection), -1))
        assert encoder.vit.cls_token is not None
        nn.init.normal_(encoder.vit.cls_token, std=0.02)
        nn.init.normal_(self.decoder.mask_token, std=0.02)

    def forward(self, images: Tensor, noise_BN: Tensor) -> Tensor:
        """Mean squared error over hidden patches, each normalised by its own mean and variance.

        images: (B, 3, S, S) normalised. noise_BN: one random number per patch; the smallest stay visible.
        """
        order_BN = noise_BN.argsort(dim=1)
        restore_BN = order_BN.argsort(dim=1)
        visible = self.encode_visible(images, order_BN[:, : self.num_visible])
        pixels: Tensor = self.decoder(visible, restore_BN)
        target = normalize_patches(patchify(images, self.encoder.patch_size))
        error_BN = (pixels.float() - target).square().mean(dim=2)
        hidden_BN = (restore_BN >= self.num_visible).float()
        loss: Tensor = (error_BN * hidden_BN).sum() / hidden_BN.sum()
        return loss

    def encode_visible(self, images: Tensor, visible_BK: Tensor) -> Tensor:
        """Normed tokens of the visible patches alone, CLS first: (B, 1 + K, D)."""
        patches, prefix_positions = self.encoder.embed_patches(images)
        patches = patches.gather(1, visible_BK[:, :, None].expand(-1, -1, patches.shape[2]))
        vit = self.encoder.vit
        normed: Tensor = vit.norm(vit.blocks(vit.norm_pre(self.encoder.add_prefix(patches, prefix_positions))))
        return normed


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut (B, 3, S, S) into (B, N, P) patches in reading order; a patch's pixels run row, column, channel."""
    batch, channels, side, _ = images.shape
    grid = side // patch_size
    cut = images.reshape(batch, channels, grid, patch_size, grid, patch_size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid * grid, -1)


def normalize_patches(patches_BNP: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) variance for every patch."""
    mean = patches_BNP.mean(dim=2, keepdim=True)
    variance = patches_BNP.var(dim=2, keepdim=True)
    return (patches_BNP - mean) / (variance + 1e-6).sqrt()


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
