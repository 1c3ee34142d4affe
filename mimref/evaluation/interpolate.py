"""Averages of a base and a refined encoder's weights, which trade off their strengths (the idea of WiSE-FT)."""

import shutil
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mimref.config.base import CommandConfig, ReadingConfig
from mimref.data.sources import ImageSource, Split
from mimref.encoders.backbones import TimmBackbone, TokenEncoder
from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from, read_checkpoint, save_encoder
from mimref.encoders.published import must_download
from mimref.errors import CheckpointError, Checks, OutputError
from mimref.evaluation.choice import best, by_knn, by_measure, check_held_out
from mimref.evaluation.config import InterpolateConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.evaluation.metrics import check_labels
from mimref.features.config import CacheConfig
from mimref.features.header import resolve_data, with_channels
from mimref.features.opening import Opened, check_device, open_images, warn_of_notices
from mimref.locks import folder_lock
from mimref.progress import Listener, Silent
from mimref.results import EvaluationResult, Row, check_folder, remove_earlier, write_results

_TEMPORARY = ".averages-"
CHOSEN = "encoder.safetensors"
"""File name of the chosen average, which makes its folder usable as a checkpoint."""


@dataclass(frozen=True)
class _Ends:
    """The two encoders to average, and the images."""

    config: InterpolateConfig
    """Settings, with the images that the refined weights' header records."""
    base: Checkpoint
    refined: Checkpoint
    base_encoder: TokenEncoder
    refined_encoder: TokenEncoder
    sources: dict[Split, ImageSource]

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every evaluation. Features are not cached: those of an average are not needed again."""
        own = {name: getattr(self.config, name) for name in CommandConfig.model_fields}
        asked = self.config.encoder
        channels = ReadingConfig(channel_init=asked.channel_init, color_channels=asked.color_channels)
        return own | {"cache": CacheConfig(folder="off"), "encoder": channels}

    def write(self, file: Path, alpha: float, *, chosen_by: str | None = None) -> None:
        """Write an average, with its origin and the facts that the refined weights' header records."""
        left_out = ("architecture", "classifier", "metrics")
        facts = {key: value for key, value in self.refined.header.items() if key not in left_out}
        origin: dict[str, Any] = {"base": str(self.base.path), "refined": str(self.refined.path), "alpha": alpha}
        origin |= {"chosen_by": chosen_by} if chosen_by else {}
        save_encoder(file, average(self.base_encoder, self.refined_encoder, alpha), {**facts, "interpolated": origin})


def interpolate(
    config: InterpolateConfig,
    out: Path,
    *,
    force: bool = False,
    listener: Listener | None = None,
    checks: Checks | None = None,
) -> EvaluationResult:
    """Write `(1 - alpha) * base + alpha * refined` for every alpha into `out`, as `alpha-0.25.safetensors`.

    With images in `config.data`, the rows hold the k-NN accuracy for every `alpha`; `out` receives them as well.
    With `config.choose`, only the best average is written, as `encoder.safetensors`. The rows then hold, for every
    alpha, the score that decides, followed by the chosen average's k-NN accuracy on the validation images, if there are
    any; `images` names the images of each row. The choice does not read the validation images.
    Raises CheckpointError for encoders of different shapes, OutputError for a folder that holds results or such files
    (unless `force`).
    """
    started, listener, checks = time.monotonic(), listener or Silent(), checks or Checks()
    checks.run("out", lambda: check_folder(out, force))
    for name in _names(config) if checks.passed else ():
        checks.run("out", partial(_check_file, out / name, config, force))
    check_device(config, checks)
    ends = _open(config, listener, checks)
    config = ends.config
    write = _write_all if config.choose is None else _write_chosen
    with folder_lock(out):
        for left in out.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)  # of a killed process
        rows, bad = write(ends, out, listener)
    elapsed_s = time.monotonic() - started
    remove_earlier(out)
    write_results(out, config.command, config.model_dump(mode="json"), elapsed_s, rows, bad_images=bad)
    return EvaluationResult(rows, elapsed_s, bad)


def _names(config: InterpolateConfig) -> list[str]:
    """Return the names of the files to write."""
    return [CHOSEN] if config.choose else [_name(alpha) for alpha in config.alpha]


def _name(alpha: float) -> str:
    return f"alpha-{alpha:g}.safetensors"


def _check_file(file: Path, config: InterpolateConfig, force: bool) -> None:
    """Raise OutputError for a file that exists (unless `force`), or that is to be averaged."""
    for path in map(Path, (config.base, config.refined)):
        if file.exists() and any(each.exists() and each.samefile(file) for each in (path, path / CHOSEN)):
            raise OutputError(f"{file}: is one of the encoders to average; choose another --out")
    if file.is_dir():
        raise OutputError(f"{file}: is a folder; choose another --out")
    if file.exists() and not force:
        raise OutputError(f"{file}: exists; choose another --out, or --force to replace it")


def _open(config: InterpolateConfig, listener: Listener, checks: Checks) -> _Ends:
    """Read both checkpoints and open the images; raise everything that is wrong with any of them."""
    need_labels = config.choose != "assess"
    open_splits = partial(
        open_images, progress=listener.progress, checks=checks, need_labels=need_labels, existing=not need_labels
    )
    sources: dict[Split, ImageSource] = {}
    has_images, remote = config.data.spec is not None, must_download(config.base) or must_download(config.refined)
    if has_images and remote:
        sources = open_splits(config.data)
    read: list[Checkpoint | None] = []
    for setting, path in (("base", config.base), ("refined", config.refined)):
        fetch = checks.passed or not must_download(path)
        reading = partial(read_checkpoint, path, config.encoder, progress=listener.progress)
        read.append(checks.run(setting, reading) if fetch else None)
    base, refined = read
    left = checks.run("base", partial(_end, base, refined, config, listener)) if base else None
    right = checks.run("refined", partial(_end, refined, base, config, listener)) if refined else None
    if refined is not None and (has_images or config.choose):
        # The header records how images are decoded.
        data = checks.run("refined", partial(resolve_data, config.data, refined.header)) or config.data
        data = with_channels(data, right[1].architecture) if right is not None else data
        config = config.model_copy(update={"data": data})
    if config.data.spec is not None and not (has_images and remote):
        sources = open_splits(config.data)
    check_labels(Opened(None, sources), checks)
    if config.choose == "knn" and "train" in sources:
        checks.run("choose", lambda: check_held_out(sources["train"]))
    if left is not None and right is not None:
        checks.run("refined", partial(_check_alike, config, left[1], right[1]))
    (base, base_encoder), (refined, refined_encoder) = checks.finished(left), checks.finished(right)
    warn_of_notices(sources, listener)
    return _Ends(config, base, refined, base_encoder, refined_encoder, sources)


def _write_all(ends: _Ends, out: Path, listener: Listener) -> tuple[list[Row], list[tuple[str, str]]]:
    """Write every average and, with images, measure it. `out` receives the files once all are complete."""
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    alphas = ends.config.alpha
    with TemporaryDirectory(prefix=_TEMPORARY, dir=out) as folder:
        for done, alpha in enumerate(alphas, 1):
            file = Path(folder, _name(alpha))
            ends.write(file, alpha)
            if ends.sources:
                found, bad = _validate(ends, file, alpha, listener)  # bad images are the same for every average
                rows += found
            listener.progress("averages", done, len(alphas))
        for name in map(_name, alphas):
            Path(folder, name).replace(out / name)
    return rows, bad


def _write_chosen(ends: _Ends, out: Path, listener: Listener) -> tuple[list[Row], list[tuple[str, str]]]:
    """Measure every average, write the best, and measure it on the validation images."""
    alphas, by, rows = ends.config.alpha, ends.config.choose, list[Row]()
    with TemporaryDirectory(prefix=_TEMPORARY, dir=out) as folder:
        for done, alpha in enumerate(alphas, 1):
            file = Path(folder, _name(alpha))
            ends.write(file, alpha)
            if by == "knn":
                measured = by_knn(file, ends.common, ends.sources["train"], listener)
            else:
                measured = by_measure(file, ends.common, listener)
            file.unlink()  # one at a time: they may be large
            rows += [{"alpha": alpha, **row} for row in measured.rows]
            listener.progress("averages", done, len(alphas))
        chosen = rows[best(rows)]
        alpha, bad = float(chosen["alpha"]), measured.bad_images  # the same for every average
        listener.note(f"alpha {alpha:g} is chosen by {chosen['metric']}, from {len(alphas)} averages")
        file = Path(folder, CHOSEN)
        ends.write(file, alpha, chosen_by=by)
        if any(source.labels is None for source in ends.sources.values()) or len(ends.sources) < 2:
            listener.note("no validation result: there are no labelled training and validation images")
        else:
            found, also = _validate(ends, file, alpha, listener)
            rows += [{**row, "images": "validation"} for row in found]
            bad = list(dict.fromkeys([*bad, *also]))
        file.replace(out / CHOSEN)
    return rows, bad


def _validate(ends: _Ends, file: Path, alpha: float, listener: Listener) -> tuple[list[Row], list[tuple[str, str]]]:
    """Return an average's k-NN accuracy on the validation images, and the images left out."""
    train_y = ends.sources["train"].labels
    assert train_y is not None
    neighbours = [min(k, len(train_y)) for k in KnnConfig().k]
    config = KnnConfig(**ends.common, checkpoint=str(file), k=neighbours)
    found = evaluate_knn(config, listener=listener, sources=ends.sources)
    # alpha replaces the model's name.
    rows: list[Row] = [{"alpha": alpha, **{key: row[key] for key in row if key != "model"}} for row in found.rows]
    return rows, found.bad_images


@torch.no_grad()
def average(base: TokenEncoder, refined: TokenEncoder, alpha: float) -> TokenEncoder:
    """Return an encoder with weights `(1 - alpha) * base + alpha * refined`; 0 and 1 reproduce the two bit for bit."""
    mixed = deepcopy(refined)
    start = base.model.state_dict()
    for name, tensor in mixed.model.state_dict().items():
        # torch's lerp is exact at both ends. BatchNorm's counts remain those of the refined encoder.
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(start[name], tensor, alpha))
    return mixed


def _end(
    checkpoint: Checkpoint, other: Checkpoint | None, config: InterpolateConfig, listener: Listener
) -> tuple[Checkpoint, TokenEncoder]:
    """Build the checkpoint's encoder; weights that do not reveal their architecture have that of the other ones."""
    unknown = checkpoint.architecture is None and config.arch is None
    if unknown and other is not None and other.architecture is not None:
        architecture = other.architecture
    else:
        architecture = choose_architecture(checkpoint, config.arch, config.source)
    for notice in checkpoint.notices(architecture):
        listener.note(notice)
    return checkpoint, encoder_from(checkpoint, architecture)


def _check_alike(config: InterpolateConfig, base: TokenEncoder, refined: TokenEncoder) -> None:
    left, right = asdict(base.architecture), asdict(refined.architecture)
    if left.keys() != right.keys() or (isinstance(base, TimmBackbone) and left != right):
        values = f"{base.architecture.name} and {refined.architecture.name}"
    else:
        # The name and whether positions are trained do not change the function; other image sizes do not matter here.
        alike = ("name", "fixed_positions", "interpolation", "norm_eps")
        differing = [name for name in right if name not in alike and left[name] != right[name]]
        values = ", ".join(f"{name} {left[name]} and {right[name]}" for name in differing)
    if values:
        wrong = f"{config.base} and {config.refined} are encoders of different kinds: {values}"
        raise CheckpointError(f"{wrong}; average a base and its refinement")
