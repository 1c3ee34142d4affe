"""timm's BEiT and Hiera, which take images of one size, extended to other sizes.

Shapes: B images, L tokens, D width, H heads.
"""

import math
from typing import Any

import torch
from timm.models.beit import Attention, Beit
from timm.models.hiera import Hiera, Reroll, Unroll
from torch import Tensor
from torch.nn import functional as F


def take_other_sizes(model: Any) -> None:
    """Let a BEiT or Hiera take images of other sizes, with the same results at its own size.

    BEiT takes smaller images: the relative positions of a smaller grid are among its own. Hiera interpolates its
    positions bicubically, as timm does where they have a part per window. Models of other classes are left unchanged.
    """
    if type(model) is Beit and model.pos_embed is None:
        model.patch_embed.strict_img_size = False
        for block in model.blocks:
            attention: Any = block.attn
            attention.__class__ = SubgridAttention
            attention.columns = model.patch_embed.grid_size[1]
    elif type(model) is Hiera and model.pos_embed is not None:
        model.__class__ = ResizedHiera


class SubgridAttention(Attention):
    """BEiT's attention on the tokens of an image that may be smaller than the model's."""

    columns: int
    """Columns of the model's whole grid of patches."""
    tokens: int
    """Tokens per image in the current pass."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        self.tokens = x.shape[1]
        shared = shared_rel_pos_bias if shared_rel_pos_bias is None else self._below(shared_rel_pos_bias)
        attended: Tensor = super().forward(x, shared)
        return attended

    def _get_rel_pos_bias(self) -> Tensor:
        return self._below(super()._get_rel_pos_bias())

    def _below(self, bias_HLL: Tensor) -> Tensor:
        """Return the rows and columns of the CLS token and of a square of patches in the corner of the whole grid."""
        if self.tokens == bias_HLL.shape[-1]:
            return bias_HLL
        at = torch.arange(math.isqrt(self.tokens - 1), device=bias_HLL.device)
        patches = (at[:, None] * self.columns + at + 1).flatten()
        kept = torch.cat([patches.new_zeros(1), patches])
        return bias_HLL[..., kept[:, None], kept]


class ResizedHiera(Hiera):
    """Hiera for images whose size is any multiple of a mask unit."""

    def forward_intermediates(self, x: Tensor, *options: Any, **named: Any) -> Any:
        """Call timm's method for images (B, C, S, S), where S is a multiple of a mask unit in pixels."""
        size = (int(x.shape[-2]), int(x.shape[-1]))
        grid = [pixels // stride for pixels, stride in zip(size, self.patch_stride, strict=True)]
        own = (self.tokens_spatial_shape, self.mask_spatial_shape, self.unroll, self.reroll)
        if grid == self.tokens_spatial_shape:
            return super().forward_intermediates(x, *options, **named)
        schedule = self.unroll.schedule
        try:
            self.tokens_spatial_shape = grid
            self.mask_spatial_shape = [side // unit for side, unit in zip(grid, self.mask_unit_size, strict=True)]
            self.unroll = Unroll(size, self.patch_stride, schedule)
            self.reroll = Reroll(size, self.patch_stride, schedule, self.stage_ends, self.q_pool)
            return super().forward_intermediates(x, *options, **named)
        finally:
            self.tokens_spatial_shape, self.mask_spatial_shape, self.unroll, self.reroll = own

    def _pos_embed(self, x: Tensor) -> Tensor:
        if self.pos_embed is None or self.pos_embed_win is not None or x.shape[1] == self.pos_embed.shape[1]:
            added: Tensor = super()._pos_embed(x)
            return added
        side = math.isqrt(self.pos_embed.shape[1])
        map_1DRR = self.pos_embed.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        resized = F.interpolate(map_1DRR, size=tuple(self.tokens_spatial_shape), mode="bicubic", antialias=True)
        return x + resized.flatten(2).transpose(1, 2)
