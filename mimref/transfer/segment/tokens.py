"""Patch tokens of a frozen encoder, as the inputs of heads, and which blocks a protocol reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimref.devices import autocast
from mimref.encoders.vit import Encoder
from mimref.errors import ConfigError
from mimref.features.encode import PassSettings, block_groups
from mimref.transfer.segment.config import SegmentConfig
from mimref.transfer.segment.heads import HeadInput


class PatchTokens:
    """The inputs of heads, from one pass of an encoder (on its device, in evaluation mode)."""

    def __init__(
        self, encoder: Encoder, inputs: Sequence[HeadInput], reading: PassSettings, *, final_norm: bool
    ) -> None:
        self.encoder, self.inputs, self.reading, self.final_norm = encoder, list(inputs), reading, final_norm
        self.blocks = sorted({block for each in inputs for block in each.blocks})

    @property
    def widths(self) -> list[int]:
        """Of the inputs."""
        of_pool = {"patch": 1, "patch+cls": 2}
        return [self.encoder.embed_dim * len(each.blocks) * of_pool[each.pool] for each in self.inputs]

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor) -> list[Tensor]:
        """(B, N, D) float32 of every input; images: normalised, on the device."""
        with autocast(self.reading.device, self.reading.precision):
            found = self.encoder.blocks(images_B3SS, self.blocks, final_norm=self.final_norm)
        of_block = {block: tokens.float() for block, tokens in zip(self.blocks, found, strict=True)}
        return [each.tokens(of_block, self.encoder.num_prefix_tokens) for each in self.inputs]


def head_inputs(config: SegmentConfig, depth: int, has_cls_token: bool) -> list[HeadInput]:
    """What the heads read, or whose neighbours are searched. Raises ConfigError for blocks that do not exist.

    Named blocks are read one by one, patch tokens alone.
    """
    if config.blocks in ("last", "last4"):
        raise ConfigError(f"--blocks {config.blocks}: expected all, or blocks such as 1,5,12")
    if config.blocks is not None:
        groups = block_groups(config.blocks, depth)
        return [HeadInput(tuple(blocks)) for blocks in groups.values()]
    if config.protocol != "paper":
        return [HeadInput((depth,))]
    blocks = paper_blocks(depth)
    return [HeadInput(blocks), HeadInput(blocks, "patch+cls")] if has_cls_token else [HeadInput(blocks)]


def paper_blocks(depth: int) -> tuple[int, ...]:
    """The last, 5th, 9th and 13th last block (Appendix C.7); of a shallower encoder four that are evenly spaced."""
    if depth > 12:
        return tuple(range(depth - 12, depth + 1, 4))
    return tuple(sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)}))
