"""The linear probe as published (Appendix C.3): every batch is augmented, and encoded once for all classifiers."""

from typing import Literal

from mimref.errors import ConfigError
from mimref.evaluation.probe.ensemble import Norm
from mimref.evaluation.probe.grid import ProbeInput
from mimref.features.encode import Column


def probe_inputs(
    depth: int,
    has_cls_token: bool,
    *,
    norm: Norm = "none",
    blocks: Literal["both", "last", "last4"] = "both",
    final_norm: bool = True,
    norm_any_block: bool = True,
) -> dict[ProbeInput, list[Column]]:
    """Return the inputs of an encoder's classifiers, each with the columns that are concatenated for it, in this order.

    An encoder with fewer than four blocks has no `last4`; one without a CLS token has only `mean`. norm "none" is
    DINOv2's protocol (dinov2/eval/linear.py; models/vision_transformer.py, `get_intermediate_layers`): the encoder's
    final norm on all four blocks, whose CLS tokens are joined by the mean of the last block only. "batch" is the
    paper's released code: the final norm in `last` alone, and CLS and mean of each of the four raw blocks.
    final_norm False: no block is normed. norm_any_block False: only the last one can be.
    Raises ConfigError for `last4` with fewer than four blocks.
    """

    def columns(numbers: list[int], pool: str) -> list[Column]:
        first, *more = pool.split("+")
        if norm == "batch":
            normed = final_norm and numbers == [depth]
            return [Column(block, part, normed) for block in numbers for part in (first, *more)]
        cls = [Column(block, first, final_norm and (norm_any_block or block == depth)) for block in numbers]
        return cls + [Column(depth, part, final_norm) for part in more]

    pools = ["cls", "cls+mean"] if has_cls_token else ["mean"]
    return {
        ProbeInput(name, pool): columns(numbers, pool)
        for name, numbers in chosen_blocks(depth, blocks).items()
        for pool in pools
    }


def chosen_blocks(depth: int, blocks: str) -> dict[str, list[int]]:
    """Return the numbers of `last` and `last4`, or of the one that is named. Raises ConfigError below four blocks."""
    if depth < 4 and blocks == "last4":
        raise ConfigError(f"probe.blocks 'last4': there are only {depth} blocks; use probe.blocks='last'")
    groups = {"last": [depth]} | ({"last4": list(range(depth - 3, depth + 1))} if depth >= 4 else {})
    return {name: numbers for name, numbers in groups.items() if blocks in ("both", name)}
