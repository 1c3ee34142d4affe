"""Inputs of an evaluation: features of one encoder on one data set, cached or from one pass, or features from files.

In a process group all ranks share the passes of the encoder: rank 0 looks into the cache and decides whether a pass is
needed, and for which columns. The other ranks wait for its decision, and read what it has cached when they need it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mimref.config.run import ViewsConfig
from mimref.data.decode import BadImages, first_bad
from mimref.data.device_crops import decoding_device
from mimref.data.open import open_source
from mimref.data.sources import ImageSource, NoSplitError, Split
from mimref.devices import resolve_device, resolve_precision
from mimref.distributed.group import own_rank, without_group, world_size
from mimref.distributed.turns import end_requests, request, requests, take_turns
from mimref.encoders.backbones import BackboneArchitecture, TokenEncoder
from mimref.encoders.channels import for_images
from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.vit import Architecture
from mimref.errors import Checks, ConfigError
from mimref.features.cache.contents import feature_folder
from mimref.features.cache.store import FORMAT, FeatureCache
from mimref.features.config import EncoderPassConfig, EvaluationConfig
from mimref.features.encode import (
    Batch,
    Column,
    Features,
    PassSettings,
    block_groups,
    columns_of,
    encode_columns,
    encode_views,
    gather,
    labelled,
)
from mimref.features.files import FeatureFiles
from mimref.features.header import eval_transform, resolve_data, with_channels, with_statistics
from mimref.progress import Listener
from mimref.results import Row

Encode = Callable[[list[Column], int, int], Iterator[Batch]]
"""Runs the encoder for some columns, from a position in the data set, on the first of every so many batches."""
SPLIT_NAMES: dict[Split, str] = {"train": "training", "val": "validation"}


class EncoderInputs:
    """A checkpoint's encoder on a data set: features from the cache or from one pass per split.

    The network is built on first use. A checkpoint or images that do not fit raise subclasses of UserError before any
    work starts.
    """

    def __init__(
        self,
        config: EncoderPassConfig,
        checkpoint: str,
        listener: Listener,
        *,
        need_labels: bool = True,
        read: Checkpoint | None = None,
    ) -> None:
        """read: the checkpoint, if it has been read already."""
        self.config, self.listener, self.need_labels = config, listener, need_labels
        self.name = model_name(checkpoint)
        self.checkpoint = read or read_checkpoint(checkpoint, config.encoder, progress=listener.progress)
        architecture = choose_architecture(self.checkpoint, config.arch, config.source, config.resolution)
        self.data = with_channels(resolve_data(config.data, self.checkpoint.header), architecture)
        self.architecture = for_images(architecture, self.data.channels)
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        self.decode_on = decoding_device(self.data, self.device)
        self.image_size = config.resolution or self.architecture.image_size
        for notice in self.checkpoint.notices(self.architecture, [self.image_size]):
            listener.note(notice)
        self._folder = None if config.cache.folder == "off" else feature_folder(config.cache.folder)
        self.sources: dict[Split, ImageSource] = {}
        self._features: dict[Split, Features] = {}
        self._cached: dict[Split, list[Column]] = {}
        """On ranks other than 0: columns that rank 0 has cached and this rank has not read yet."""
        if self.data.channels is None:
            _ = self.settings  # finds a damaged record now; other channels may have to be measured first
        self.views: Features | None = None
        """Result of `prepare_views`, on rank 0."""
        self.pool = config.pool if self.has_cls_token else "mean"
        """Pooling of the features, as rows record it."""
        if self.pool != config.pool:
            listener.note(f"{self.architecture.name} has no CLS token; the mean of its patch tokens replaces it")

    @cached_property
    def settings(self) -> PassSettings:
        """How images are read. Raises subclasses of UserError for a transform that does not fit.

        If nothing records the channels' mean and standard deviation, they are measured, on the training images if
        there are any.
        """
        header, channels = self.checkpoint.header, self.checkpoint.channels_as(self.architecture.name)
        data = with_statistics(self.data, header, channels, self._measured())
        if data != self.data:
            mean, std = (", ".join(f"{value:g}" for value in values or ()) for values in (data.mean, data.std))
            self.listener.note(f"measured for every channel: data.mean {mean}; data.std {std}")
        return PassSettings(
            eval_transform(self.architecture, data, header, resolution=self.config.resolution),
            self.device,
            self.precision,
            self.config.batch_size,
            self.config.workers,
            self.config.data.max_bad,
            self.decode_on,
        )

    def _measured(self) -> Iterator[ImageSource]:
        """Yield the images to measure channels on: the training images, even if only others are encoded."""
        if "train" not in self.sources and self.data.spec is not None:
            try:
                train = [open_source(self.data, "train", progress=self.listener.progress)]
            except NoSplitError:
                train = []
            yield from train
        yield from (self.sources[split] for split in ("train", "val") if split in self.sources)

    @cached_property
    def encoder(self) -> TokenEncoder:
        """The network, on its device."""
        return encoder_from(self.checkpoint, self.architecture).to(self.device).eval()

    @cached_property
    def depth(self) -> int:
        """Number of blocks."""
        return self.architecture.depth

    @property
    def has_cls_token(self) -> bool:
        """Whether `cls` and `mean` differ."""
        return self.architecture.class_token

    def columns(self, blocks: Iterable[int]) -> list[Column]:
        """Return the columns of blocks, pooled and normed as the settings ask."""
        return columns_of(list(blocks), self.pool, self.config.final_norm, self.depth)

    def with_images(self, source: ImageSource) -> "EncoderInputs":
        """Return a copy with the same encoder, already read, and other images as validation images."""
        _ = self.encoder
        other = copy.copy(self)
        other.sources, other._features, other._cached = {"val": source}, {}, {}
        return other

    def source(self, split: Split) -> ImageSource:
        """Open the images of a split. Raises DataError if labels are needed but missing."""
        if split not in self.sources:
            self.sources[split] = open_source(
                self.data, split, need_labels=self.need_labels, progress=self.listener.progress
            )
        return self.sources[split]

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Path and reason for every image left out so far."""
        return [pair for features in self._features.values() for pair in features.bad]

    def prepare(self, wanted: Sequence[Column], splits: Sequence[Split] = ("train", "val")) -> None:
        """Get these columns, from the cache or from one pass per split. In a process group all ranks must call this."""
        for split in splits:
            known = [*self._cached.get(split, []), *(self._features[split].columns if split in self._features else [])]
            missing = [column for column in dict.fromkeys(wanted) if column not in known]
            if missing and own_rank() > 0 and self._folder is not None:
                self._follow(self._encode(split), len(self.source(split)))
                self._cached[split] = [*self._cached.get(split, []), *missing]
            elif missing:
                self._add(split, missing, tell=own_rank() == 0)

    def prepare_views(self, wanted: Sequence[Column], split: Split, views: ViewsConfig) -> None:
        """Get these columns of the two global views, as `prepare` does; `views` then holds them on rank 0."""
        source = self.source(split)

        def encode(columns: list[Column], start: int, every: int) -> Iterator[Batch]:
            return encode_views(self.encoder, source, self.settings, columns, views, self.config.seed, start, every)

        if own_rank() > 0 and self._folder is not None:
            self._follow(encode, len(source))
            return
        # No local views are cut.
        drawn = views.model_dump(mode="json", exclude={"local_views", "local_size", "local_scale"})
        spec = {**self.spec(source), "views": drawn, "seed": self.config.seed}
        self.views = self._run(split, encode, f"views of {SPLIT_NAMES[split]} images", spec, list(wanted), [])

    def features(self, split: Split) -> Features:
        """Return the prepared columns."""
        if split in self._cached:
            with without_group():
                self._add(split, self._cached.pop(split), tell=False)  # rank 0 has
        return self._features[split]

    def tell(self, split: Split, lines: Sequence[str] | None = None) -> None:
        """Warn about peculiarities of the images; lines: those cached with their features."""
        for line in self.source(split).peculiarities(f"{SPLIT_NAMES[split]} images") if lines is None else lines:
            self.listener.warn(line)

    def _add(self, split: Split, wanted: list[Column], *, tell: bool) -> None:
        found = self._load(split, wanted)
        have = self._features.get(split)
        if have is not None and np.array_equal(have.indices, found.indices):
            found.columns = {**found.columns, **have.columns}
        self._features[split] = found
        if found.bad:
            bad = BadImages(self.config.data.max_bad)
            bad.add_all(found.bad)
        if found.bad and tell:
            what = f"{len(found.bad)} of {len(self.source(split))} {SPLIT_NAMES[split]} images"
            self.listener.warn(f"{what} cannot be read and are left out: {first_bad(found.bad)}")
        if tell:
            self.tell(split, found.notices)

    def _load(self, split: Split, wanted: list[Column]) -> Features:
        """Return columns from the cache, or from a pass of the encoder."""
        source = self.source(split)
        label, also = f"features of {SPLIT_NAMES[split]} images", self._everything(len(source))
        return self._run(split, self._encode(split), label, self.spec(source), wanted, also)

    def _run(
        self, split: Split, encode: Encode, label: str, spec: dict[str, Any], wanted: list[Column], also: list[Column]
    ) -> Features:
        """Return columns from the cache, or from a pass of the encoder that all ranks share.

        label: shown with the progress. spec: what the numbers depend on. also: columns to cache with the wanted ones.
        """
        source, progress = self.source(split), partial(self.listener.progress, label)
        notices = partial(source.peculiarities, f"{SPLIT_NAMES[split]} images")
        if self._folder is None:
            batches = encode(wanted, 0, 1)
            features = gather(batches, wanted, len(source), source.name, progress)
            return replace(labelled(features, source), notices=notices())
        cache = FeatureCache(self._folder, self.listener, self.config.cache.dtype)
        resolution = self.image_size
        about = {"model": self.name, "data": source.name, "split": split, "resolution": resolution}
        run_pass = partial(self._lead, encode, source)
        found = cache.columns(
            *(spec, wanted, run_pass), also=also, about=about, source=source, notices=notices, progress=progress
        )
        if world_size() > 1:
            end_requests()
        return labelled(found, source)

    def _encode(self, split: Split) -> Encode:
        """Return the function that runs the pass over the evaluation crops."""
        source = self.source(split)
        # The encoder is built when the pass runs.
        return lambda columns, start, every: encode_columns(self.encoder, source, self.settings, columns, start, every)

    def _lead(self, encode: Encode, source: ImageSource, columns: list[Column], start: int) -> Iterator[Batch]:
        """Yield all batches from position `start`, on rank 0. The other ranks must be in `_follow`."""
        if world_size() > 1:
            request((columns, start))
        for batch in self._by_turns(encode, len(source), columns, start):
            source.record(batch.indices, batch.traits)  # also those that other ranks have read
            yield batch

    def _follow(self, encode: Encode, images: int) -> None:
        """Encode what rank 0 requests until it finishes, on the other ranks."""
        for columns, start in requests():
            for _ in self._by_turns(encode, images, columns, start):
                pass

    def _by_turns(self, encode: Encode, images: int, columns: list[Column], start: int) -> Iterator[Batch]:
        """Encode every R-th batch on each of R ranks. The batches, and so the features, equal those of one process."""
        size, ranks = self.settings.batch_size, world_size()
        own = encode(columns, start + own_rank() * size, ranks)
        return take_turns(own, -(-(images - start) // size))

    def _everything(self, images: int) -> list[Column]:
        """Return all columns that later commands may need, if they are small enough to be cached in advance."""
        architecture, cache = self.architecture, self.config.cache
        if not isinstance(architecture, Architecture):
            return []
        depth = architecture.depth
        columns = columns_of(range(1, depth + 1), "cls+mean", final_norm=False, depth=depth)
        columns += columns_of([depth], "cls+mean", final_norm=True, depth=depth)
        # DINOv2's probe norms the last four blocks.
        first_token = "cls" if self.has_cls_token else "mean"
        columns += [Column(block, first_token, True) for block in range(max(1, depth - 3), depth)]
        needed = images * len(columns) * architecture.width * (4 if cache.dtype == "fp32" else 2)
        return columns if needed <= cache.keep_gb * 1e9 else []

    def spec(self, source: ImageSource) -> dict[str, Any]:
        """Return everything that the numbers of a pass over the images depend on."""
        return {
            "format": FORMAT,
            "weights": self.checkpoint.fingerprint,
            "architecture": self._architecture_record(),
            "data": source.fingerprint,
            "images": len(source),
            "transform": self.settings.transform.to_dict(),
            "precision": str(self.settings.precision).removeprefix("torch."),
            # Recorded only if it is not the default, so that features cached by earlier versions are found.
            **({"decoding": changes} if (changes := source.decoding.changes()) and not source.in_memory else {}),
            **({"decode": "device"} if self.decode_on is not None and not source.in_memory else {}),
        }

    def _architecture_record(self) -> dict[str, Any]:
        architecture, size = self.architecture, self.image_size
        adapted = {}
        if architecture.channels != self.checkpoint.channels_as(architecture.name):
            adapted["channel_rule"] = self.checkpoint.channel_rule.key()
        if isinstance(architecture, BackboneArchitecture):
            return architecture.key() | adapted
        record = architecture.to_dict() | adapted
        if not self.checkpoint.interpolates(architecture, size):
            record.pop("interpolation", None)
        return record


Inputs = EncoderInputs | FeatureFiles
"""Features and labels of both splits, through `name`, `data`, `depth`, `bad`, `prepare` and `features`."""
Groups = list[tuple[Row, list[Column]]]
"""Blocks that are evaluated together: their names in the rows, and their columns."""


def column_groups(config: EvaluationConfig, inputs: Inputs | None, checks: Checks) -> Groups:
    """Return the groups of blocks to evaluate."""
    if inputs is None:
        return []
    groups: Groups = []
    for name, blocks in (checks.run("blocks", lambda: block_groups(config.blocks, inputs.depth)) or {}).items():
        if isinstance(inputs, FeatureFiles):
            # A file does not record the block or pooling of its single column.
            groups.append(({"blocks": name} if inputs.depth > 1 else {}, [Column(block, "cls") for block in blocks]))
        else:
            groups.append(({"blocks": name, "pool": inputs.pool}, inputs.columns(blocks)))
    return groups


def prepare_groups(groups: Groups, inputs: Inputs, splits: Sequence[Split] = ("train", "val")) -> None:
    """Prepare the columns of all groups."""
    inputs.prepare([column for _, columns in groups for column in columns], splits)


def give_distinct_names(opened: Sequence[EncoderInputs], checkpoints: Sequence[str]) -> None:
    """Set the names of models to those of `distinct_names`."""
    for inputs, name in zip(opened, distinct_names(checkpoints), strict=True):
        inputs.name = name


def distinct_names(checkpoints: Sequence[str]) -> list[str]:
    """Return names of models, with full paths if several share a name. Raises ConfigError for duplicates."""
    duplicates = [checkpoint for checkpoint in checkpoints if checkpoints.count(checkpoint) > 1]
    if duplicates:
        raise ConfigError(f"{duplicates[0]} is named twice; name each encoder once")
    names = list(map(model_name, checkpoints))
    return [checkpoint if names.count(name) > 1 else name for name, checkpoint in zip(names, checkpoints, strict=True)]


def model_name(checkpoint: str) -> str:
    """Return a checkpoint's name in results: that of the file or run folder, without parent folders."""
    path = Path(checkpoint)
    # `..` and `.` are not names themselves.
    return path.resolve().name if path.is_dir() else path.name
