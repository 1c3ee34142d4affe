"""The choice of blocks and norms, and token pooling to one vector per image.

Shapes: B images, L tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimref.errors import ConfigError


def norm_flags(indices: Sequence[int], final_norm: bool | Sequence[bool], depth: int) -> list[bool]:
    """Return for each index whether the final norm applies to its block's tokens; see `Encoder.blocks`."""
    return [final_norm and index == depth for index in indices] if isinstance(final_norm, bool) else list(final_norm)


def check_blocks(indices: Sequence[int], depth: int) -> None:
    """Raise ConfigError if `indices` is empty or holds a block outside 1..depth."""
    outside = [index for index in indices if not 1 <= index <= depth]
    if outside or not indices:
        asked = f"block {outside[0]} does not exist" if outside else "no block is named"
        raise ConfigError(f"{asked}: the encoder has blocks 1 to {depth}")


def pool_tokens(tokens_BLD: Tensor, how: str, num_prefix_tokens: int, has_cls_token: bool) -> Tensor:
    """Pool tokens to one vector per image; see `Encoder.pool`."""
    if how == "cls" and has_cls_token:
        return tokens_BLD[:, 0]
    mean_BD = tokens_BLD[:, num_prefix_tokens:].mean(dim=1)
    if how != "cls+mean":
        return mean_BD
    return torch.cat([tokens_BLD[:, 0] if has_cls_token else mean_BD, mean_BD], dim=1)
