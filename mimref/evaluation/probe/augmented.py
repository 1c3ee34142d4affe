"""The linear probe as published (Appendix C.3): every batch is augmented, and encoded once for all classifiers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mimref.data.sources import ImageSource
from mimref.encoders.backbones import TokenEncoder
from mimref.errors import ConfigError
from mimref.evaluation.probe.config import ProbeTrainingConfig
from mimref.evaluation.probe.ensemble import Norm
from mimref.evaluation.probe.grid import ProbeInput
from mimref.evaluation.probe.streamed import EncodedImages, probe_encoded
from mimref.features.encode import Column, Features, PassSettings
from mimref.progress import Progress
from mimref.results import Row


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

    groups = {"last": [depth]} | ({"last4": list(range(depth - 3, depth + 1))} if depth >= 4 else {})
    wanted = {name: numbers for name, numbers in groups.items() if blocks in ("both", name)}
    if not wanted:
        raise ConfigError(f"probe.blocks 'last4': there are only {depth} blocks; use probe.blocks='last'")
    pools = ["cls", "cls+mean"] if has_cls_token else ["mean"]
    return {ProbeInput(name, pool): columns(numbers, pool) for name, numbers in wanted.items() for pool in pools}


def probe_augmented(
    encoder: TokenEncoder,
    train: ImageSource,
    test: Features,
    groups: Mapping[ProbeInput, list[Column]],
    settings: ProbeTrainingConfig,
    seed: int,
    reading: PassSettings,
    state: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Run `probe_cached` on freshly augmented images: bicubic random crops of 8% to 100% of the area, and flips.

    The encoder (move it to the device first) is put into evaluation mode and runs without gradient; one pass per batch
    computes all inputs. Augmentations are a function of (seed, epoch, image). test: features of centre crops, with the
    columns of `groups` (see `probe_inputs`); centre crops of held-out training images are encoded at the end. Returns
    the rows, and the path and reason of every training image left out. In a process group all ranks call this: they
    encode the batches in turns, and rank 0 trains on them; the others return empty lists. Raises what `probe_cached`
    does, and DataError for images without labels or too many unreadable ones.
    """
    images = EncodedImages(encoder, groups, reading)
    return probe_encoded(images, train, test, settings, seed, augment=True, state=state, progress=progress)
