"""Number of attention heads, which the weights of most encoders do not show."""

from collections.abc import Mapping
from typing import Any

from mimref.encoders.parts import Unrecognised

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16, 2560: 32, 4096: 32}
"""From width to attention heads in the published sizes (S, B, L, H, g, G, 2B, ...)."""
MOCO_HEADS = HEADS | {384: 12}
"""The same for MoCo v3."""
MAE_LITE_HEADS = {192: 12, 384: 12}
"""The same for MAE-Lite, whose files have the layout of MAE's."""

_HOW_TO_SET = "--set encoder.num_heads=N gives it (inspect, export, push: --num-heads N)"


def find_num_heads(
    width: int,
    asked: int | None,
    config: Mapping[str, Any],
    notices: list[str],
    *,
    published: Mapping[int, int] = HEADS,
    others: Mapping[int, int] | None = None,
    channels: int = 64,
) -> int:
    """Return the number of heads asked for, else that in `config.json`, of a published size, or width / `channels`.

    published: from width to heads. others: the same in a project whose files look alike. notices: receives what was
    assumed. Raises Unrecognised if no number fits the width.
    """
    if asked and width % asked:
        raise Unrecognised(f"its width of {width} is not divisible by encoder.num_heads {asked}")
    saved = config.get("num_attention_heads")
    if not asked and type(saved) is int and saved > 0 and width % saved == 0:
        notices.append(f"{saved} attention heads are taken from config.json")
        return saved
    if known := asked or published.get(width):
        if not asked and (other := (others or {}).get(width)):
            notices.append(f"{known} attention heads are assumed; encoders of MAE-Lite have {other}: {_HOW_TO_SET}")
        return known
    if width % channels:
        raise Unrecognised(f"its number of attention heads is unknown for a width of {width}; {_HOW_TO_SET}")
    heads = width // channels
    notices.append(f"{heads} attention heads are assumed, {channels} channels each; if that is wrong, {_HOW_TO_SET}")
    return heads
