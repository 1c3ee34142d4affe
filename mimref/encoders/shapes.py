"""Shapes of an encoder's tokens, from its architecture alone."""

from collections.abc import Sequence

import torch

from mimref.encoders.backbones import EncoderArchitecture, TimmBackbone
from mimref.encoders.vit import Architecture


def patch_shapes(architecture: EncoderArchitecture, blocks: Sequence[int], size: int) -> dict[int, tuple[int, int]]:
    """Return the number and width of patch tokens by block (1-based), for images of an accepted `size` in pixels."""
    if isinstance(architecture, Architecture):
        return dict.fromkeys(blocks, ((size // architecture.patch_size) ** 2, architecture.width))
    with torch.device("meta"):
        backbone = TimmBackbone(architecture).eval()
        image = torch.empty(1, architecture.channels, size, size)
    tokens = backbone.blocks(image, list(blocks))
    prefix = backbone.num_prefix_tokens
    return {block: (each.shape[1] - prefix, each.shape[2]) for block, each in zip(blocks, tokens, strict=True)}
