"""`heads.blocks = "auto"`: heads where the base encoder's features ask for them; `mimref analyze-blocks` shows why."""

from mimref.data.sources import ImageSource
from mimref.data.transforms import EvalTransform
from mimref.devices import resolve_device, resolve_precision
from mimref.encoders.checkpoints import Checkpoint, encoder_from
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import ConfigError
from mimref.evaluation.blocks.statistics import blocks_text, recommend_heads
from mimref.evaluation.monitor import KnnMonitor
from mimref.features.encode import columns_of
from mimref.progress import LabelledProgress
from mimref.refinement.config import RefineConfig


def recommended_blocks(
    config: RefineConfig,
    checkpoint: Checkpoint,
    architecture: Architecture,
    transform: EvalTransform,
    source: ImageSource,
    progress: LabelledProgress | None = None,
) -> str:
    """Blocks as `heads.blocks` takes them, from the k-NN accuracy of every block of the base encoder.

    Measured on the monitor's subset of the images (`monitor.knn_samples`), on what the heads would read. source: the
    training images. Raises ConfigError when there are no labels to measure it with.
    """
    device = resolve_device(config.device)
    precision, problems = resolve_precision(config.precision, device), list[str]()
    monitor = KnnMonitor(config, source, transform, device, precision, note=problems.append)
    if monitor.test is None:
        raise ConfigError(
            "heads.blocks 'auto' measures k-NN and needs labelled training and validation images; name blocks, such as "
            f"last8{''.join(f' ({problem})' for problem in problems)}"
        )
    encoder = encoder_from(checkpoint, architecture)
    assert isinstance(encoder, Encoder)
    depth = encoder.depth
    groups = [columns_of([block], config.heads.pool, True, depth) for block in range(1, depth + 1)]
    train, test = monitor.features(encoder.to(device), [column for columns in groups for column in columns])
    assert test is not None
    accuracies = []
    for done, columns in enumerate(groups, 1):
        accuracies.append(monitor.knn_top1(train.matrix(columns), train.y, test.matrix(columns), test.y))
        if progress is not None:
            progress("k-NN of every block", done, depth)
    return blocks_text(recommend_heads(accuracies))
