"""`mimref predict`: the most probable class of every image, as a table."""

import csv
from functools import partial
from io import StringIO
from pathlib import Path

from mimref.data.decode import first_bad, none_readable, printable
from mimref.devices import resolve_device, resolve_precision
from mimref.distributed.group import end_group
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.classifier import read_classifier
from mimref.errors import Checks
from mimref.features.encode import PassSettings
from mimref.features.header import eval_transform, resolve_data
from mimref.features.opening import check_device, open_images, warn_of_notices
from mimref.files import write_bytes
from mimref.progress import Listener, Silent
from mimref.transfer.finetune.classify import classify
from mimref.transfer.finetune.config import PredictConfig


def predict(
    config: PredictConfig, *, out: Path, listener: Listener | None = None, checks: Checks | None = None
) -> int | None:
    """Write one row per readable image to `out`: its path, its most probable class and the probability of that class.

    Returns the number of rows; in a process group rank 0 does the work, and the other ranks return None. Raises
    UserError subclasses for a file without a classifier or images that cannot be opened, one error for all mistakes.
    """
    listener, checks = listener or Silent(), checks or Checks()
    check_device(config, checks)
    read = partial(read_checkpoint, config.checkpoint, progress=listener.progress)
    checkpoint = checks.run("checkpoint", read)
    found = None
    if checkpoint is not None:
        found = checks.run("checkpoint", partial(read_classifier, checkpoint, config.resolution))
    data = checks.run("data.spec", partial(resolve_data, config.data, checkpoint.header if checkpoint else {}))
    sources = {}
    if data is not None:
        splits = [config.split]
        sources = open_images(data, listener.progress, checks, need_labels=False, splits=splits)
    classifier, classes = checks.finished(found)
    assert checkpoint is not None and data is not None
    if not end_group():
        return None
    architecture = classifier.encoder.architecture
    for notice in checkpoint.notices(architecture, [architecture.image_size]):
        listener.note(notice)
    warn_of_notices(sources, listener)
    source, device = sources[config.split], resolve_device(config.device)
    settings = PassSettings(
        eval_transform(architecture, data, checkpoint.header, resolution=config.resolution),
        device,
        resolve_precision(config.precision, device),
        workers=config.workers,
        max_bad=config.data.max_bad,
    )
    table, bad, count = StringIO(), list[tuple[str, str]](), 0
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["path", "label", "probability"])
    for batch, logits_BC in classify(classifier.to(device), source, settings):
        probabilities, numbers = logits_BC.softmax(dim=1).max(dim=1)
        for index, number, probability in zip(batch.indices, numbers.tolist(), probabilities.tolist(), strict=True):
            writer.writerow([printable(source.path(index)), classes[number], f"{probability:.6g}"])
        count, bad = count + len(batch.indices), bad + batch.bad
        listener.progress("predictions", batch.end, len(source))
    if not count:
        raise none_readable(source.name, bad)
    for line in source.peculiarities():
        listener.warn(line)
    if bad:
        listener.warn(f"unreadable images left out of the table ({len(bad)}): {first_bad(bad)}")
    write_bytes(out, table.getvalue().encode())
    return count
