"""Patch tokens of a frozen encoder as inputs of heads, and the blocks that each protocol reads."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mimref.devices import autocast
from mimref.encoders.vit import Encoder
from mimref.errors import ConfigError
from mimref.features.encode import PassSettings, block_groups
from mimref.transfer.segment.config import SegmentConfig
from mimref.transfer.segment.heads import HeadInput

PIXELS_BLOCK = 0
"""Number that stands for raw pixels, a baseline: those of a patch and of the eight around it."""


class PatchTokens:
    """Computes the inputs of heads in one pass of an encoder, which is on its device and in evaluation mode."""

    def __init__(
        self, encoder: Encoder, inputs: Sequence[HeadInput], reading: PassSettings, *, final_norm: bool
    ) -> None:
        self.encoder, self.inputs, self.reading, self.final_norm = encoder, list(inputs), reading, final_norm
        self.blocks = sorted({block for each in inputs for block in each.blocks})

    @property
    def widths(self) -> list[int]:
        """Width D of every input."""
        of_pool, pixels = {"patch": 1, "patch+cls": 2}, 3 * (3 * self.encoder.patch_size) ** 2
        return [
            of_pool[each.pool] * sum(self.encoder.embed_dim if block else pixels for block in each.blocks)
            for each in self.inputs
        ]

    @torch.no_grad()
    def __call__(self, images_B3SS: Tensor) -> list[Tensor]:
        """Return (B, N, D) float32 for every input. images_B3SS: normalised, on the device."""
        of_block: dict[int, Tensor] = {}
        if encoded := [block for block in self.blocks if block != PIXELS_BLOCK]:
            with autocast(self.reading.device, self.reading.precision):
                found = self.encoder.blocks(images_B3SS, encoded, final_norm=self.final_norm)
            of_block = {block: tokens.float() for block, tokens in zip(encoded, found, strict=True)}
        if PIXELS_BLOCK in self.blocks:
            pixels_BND = neighbourhoods(images_B3SS, self.encoder.patch_size)
            # Zeros in place of the prefix tokens, which are dropped below.
            of_block[PIXELS_BLOCK] = F.pad(pixels_BND, (0, 0, self.encoder.num_prefix_tokens, 0))
        return [each.tokens(of_block, self.encoder.num_prefix_tokens) for each in self.inputs]


def neighbourhoods(images_B3SS: Tensor, patch_size: int) -> Tensor:
    """Return the pixels (B, N, D) of every patch and of the eight around it; zero beyond the edges."""
    side = 3 * patch_size
    return F.unfold(F.pad(images_B3SS, [patch_size] * 4), side, stride=patch_size).transpose(1, 2)


def head_inputs(config: SegmentConfig, depth: int, has_cls_token: bool) -> list[HeadInput]:
    """Return the inputs of the heads, or of the neighbour search. Raises ConfigError for blocks that do not exist.

    Blocks in `config.blocks` are read one by one, without the CLS token; block 0 is raw pixels.
    """
    if config.blocks in ("last", "last4"):
        raise ConfigError(f"--blocks {config.blocks}: expected all, or blocks such as 1,5,12")
    if config.blocks is not None:
        first, _, others = config.blocks.partition(",")
        raw = [HeadInput((PIXELS_BLOCK,))] if first.strip() == str(PIXELS_BLOCK) else []
        if raw and not others:
            return raw
        groups = block_groups(others if raw else config.blocks, depth)
        return [*raw, *(HeadInput(tuple(blocks)) for blocks in groups.values())]
    if config.protocol != "paper":
        return [HeadInput((depth,))]
    blocks = paper_blocks(depth)
    return [HeadInput(blocks), HeadInput(blocks, "patch+cls")] if has_cls_token else [HeadInput(blocks)]


def paper_blocks(depth: int) -> tuple[int, ...]:
    """Return the last, 5th-, 9th- and 13th-last blocks (Appendix C.7), or four evenly spaced ones up to depth 12."""
    if depth > 12:
        return tuple(range(depth - 12, depth + 1, 4))
    return tuple(sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)}))
