"""What an evaluation reads: features of one encoder on one data set, cached or from one pass; or arrays from files."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mimref.config.base import DataConfig
from mimref.data.decode import BadImages
from mimref.data.loader import loader_workers
from mimref.data.open import open_source
from mimref.data.sources import ImageSource, Split
from mimref.devices import resolve_device, resolve_precision
from mimref.distributed.group import own_rank, without_group, world_size
from mimref.distributed.turns import end_requests, keep_waiting
from mimref.encoders.backbones import TimmBackbone
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.vit import Architecture, Encoder
from mimref.errors import ConfigError
from mimref.features.cache.contents import feature_folder
from mimref.features.cache.store import FeatureCache, Stored, pass_spec
from mimref.features.config import EncoderPassConfig
from mimref.features.encode import Batch, Column, columns_of, encode_columns
from mimref.features.header import eval_transform, recorded_data
from mimref.features.matrix import Labels, Matrix, side_by_side
from mimref.features.shared_pass import Part, Sizes, follow, lead
from mimref.progress import Listener

SPLIT_NAMES: dict[Split, str] = {"train": "training", "val": "validation"}


class Inputs(Protocol):
    """Features and labels of training and validation images, whoever made them."""

    name: str
    """Of the model, in results."""

    @property
    def data(self) -> DataConfig | None:
        """The images; None for features made elsewhere."""

    @property
    def depth(self) -> int:
        """Blocks that there are features of."""

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Path and reason of every image that was left out so far."""

    def prepare(self, wanted: Sequence[Column], splits: Sequence[Split] = ("train", "val")) -> None:
        """Get these columns in one go; asking for them one by one would run the encoder as often."""

    def matrix(self, split: Split, columns: Sequence[Column]) -> Matrix:
        """Features (N, D), columns next to each other."""

    def labels(self, split: Split) -> Labels | None:
        """(N,) in the order of the features, or None for unlabelled images."""


class EncoderInputs:
    """Features of one encoder on one data set; the encoder is built when a pass is needed, not before.

    Raises UserError subclasses for a checkpoint or images that do not fit, before any work.
    """

    def __init__(
        self, config: EncoderPassConfig, checkpoint: str, listener: Listener, *, need_labels: bool = True
    ) -> None:
        self.config, self.listener, self.need_labels = config, listener, need_labels
        self.name = model_name(checkpoint)
        self.checkpoint = read_checkpoint(checkpoint, num_heads=config.encoder.num_heads, progress=listener.progress)
        self.architecture = choose_architecture(self.checkpoint, config.arch, config.source, config.resolution)
        for notice in self.checkpoint.notices(self.architecture):
            listener.note(notice)
        header = self.checkpoint.header
        self.transform = eval_transform(self.architecture, config.data, header, resolution=config.resolution)
        self.data = recorded_data(config.data, header)
        self.device = resolve_device(config.device)
        self.precision = resolve_precision(config.precision, self.device)
        self._sources: dict[Split, ImageSource] = {}
        self._stored: dict[Split, Stored] = {}
        self._unread: dict[Split, list[Column]] = {}
        if config.pool != "mean" and not self.has_cls_token:
            listener.note(f"{self.architecture.name} has no CLS token; the mean of its patch tokens stands in for it")

    @cached_property
    def encoder(self) -> Encoder | TimmBackbone:
        """The network, on its device."""
        return encoder_from(self.checkpoint, self.architecture).to(self.device).eval()

    @cached_property
    def depth(self) -> int:
        """Number of blocks."""
        return self.architecture.depth if isinstance(self.architecture, Architecture) else self.encoder.depth

    @property
    def has_cls_token(self) -> bool:
        """Whether `cls` and `mean` are different things."""
        architecture = self.architecture
        return architecture.class_token if isinstance(architecture, Architecture) else self.encoder.has_cls_token

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Path and reason of every image that was left out so far."""
        return [pair for stored in self._stored.values() for pair in stored.bad]

    def source(self, split: Split) -> ImageSource:
        """The images. Raises DataError when labels are needed and absent."""
        if split not in self._sources:
            self._sources[split] = open_source(
                self.data, split, need_labels=self.need_labels, progress=self.listener.progress
            )
        return self._sources[split]

    def prepare(self, wanted: Sequence[Column], splits: Sequence[Split] = ("train", "val")) -> None:
        """Get these columns of both splits, each from the cache or from one pass of the encoder.

        In a process group all ranks must call this together.
        """
        for split in splits:
            have = self._stored.get(split)
            there = [*self._unread.get(split, []), *(have.columns if have else [])]
            missing = [column for column in dict.fromkeys(wanted) if column not in there]
            if not missing:
                continue
            if own_rank() > 0 and self._cache_folder() is not None:
                # Rank 0 has them now. Most protocols do not need them here.
                follow(partial(self._run, self.source(split)), **self._sizes(split))
                self._unread[split] = [*self._unread.get(split, []), *missing]
            else:
                self._keep(split, self._fetch(split, missing))

    def matrix(self, split: Split, columns: Sequence[Column]) -> Matrix:
        """Features (N, D), columns next to each other."""
        self.prepare(columns, [split])
        stored = self._read(split)
        return side_by_side([stored.columns[column] for column in columns])

    def labels(self, split: Split) -> Labels | None:
        """Of the readable images, once their features are there; until then of all images."""
        labels = self.source(split).labels
        prepared = split in self._stored or split in self._unread
        return labels[self._read(split).indices] if labels is not None and prepared else labels

    def indices(self, split: Split) -> Labels:
        """Positions of the readable images in the data set."""
        return self._read(split).indices

    def _read(self, split: Split) -> Stored:
        """What was prepared; on other ranks than 0 it is read now, when it is needed."""
        if split in self._unread:
            columns = self._unread.pop(split)
            with without_group():
                self._keep(split, self._fetch(split, columns))
        return self._stored[split]

    def _keep(self, split: Split, found: Stored) -> None:
        have = self._stored.get(split)
        if have is not None and np.array_equal(have.indices, found.indices):
            found.columns |= have.columns
        self._stored[split] = found

    def _fetch(self, split: Split, wanted: list[Column]) -> Stored:
        """Columns from the cache, or from a pass; rank 0's passes are shared by all, through the cache."""
        source, folder = self.source(split), self._cache_folder()
        part: Part = partial(self._run, source)
        shared = world_size() > 1 and folder is not None
        cache = FeatureCache(
            folder,
            dtype=self.config.cache.dtype,
            note=self.listener.note,
            waiting=keep_waiting if shared else None,
        )
        label = f"features of {SPLIT_NAMES[split]} images"
        stored = cache.columns(
            # A cache that is off needs no name for the pass.
            self._spec(source) if folder else {"images": len(source)},
            wanted,
            partial(lead, part, **self._sizes(split)) if shared else partial(self._run, source),
            also=self._everything(len(source)),
            about={
                "model": self.name,
                "data": source.name,
                "split": split,
                "resolution": self.transform.image_size,
            },
            progress=lambda done, total: self.listener.progress(label, done, total),
        )
        if shared:
            end_requests()
        self._report_bad(stored.bad, split)
        return stored

    def _cache_folder(self) -> Path | None:
        chosen = self.config.cache.folder
        return None if chosen == "off" else feature_folder(chosen)

    def _sizes(self, split: Split) -> Sizes:
        return {"batch_size": self.config.batch_size, "images": len(self.source(split))}

    def _report_bad(self, found: Sequence[tuple[str, str]], split: Split) -> None:
        if not found:
            return
        bad = BadImages(self.config.data.max_bad)
        for path, reason in found:
            bad.add(path, reason)
        path, reason = found[0]
        self.listener.warn(f"{len(found)} {SPLIT_NAMES[split]} images are left out; the first: {path} ({reason})")

    def _run(self, source: ImageSource, columns: list[Column], start: int, every: int = 1) -> Iterator[Batch]:
        bad = BadImages(self.config.data.max_bad)
        for batch in encode_columns(
            self.encoder,
            source,
            self.transform,
            columns,
            device=self.device,
            precision=self.precision,
            batch_size=self.config.batch_size,
            workers=loader_workers(self.config.workers, source),
            start=start,
            every=every,
        ):
            for path, reason in batch.bad:
                bad.add(path, reason)
            yield batch

    def _everything(self, images: int) -> list[Column]:
        """All that later commands may ask for, where it is little enough to be kept without being asked for."""
        architecture, cache = self.architecture, self.config.cache
        if not isinstance(architecture, Architecture):
            return []
        depth = architecture.depth
        columns = columns_of(range(1, depth + 1), "cls+mean", final_norm=False, depth=depth)
        columns += columns_of([depth], "cls+mean", final_norm=True, depth=depth)
        needed = images * len(columns) * architecture.width * (4 if cache.dtype == "fp32" else 2)
        return columns if needed <= cache.keep_gb * 1e9 else []

    def _spec(self, source: ImageSource) -> dict[str, Any]:
        return pass_spec(
            weights=self.checkpoint.fingerprint,
            architecture=asdict(self.architecture),
            data=source.fingerprint,
            images=len(source),
            transform=self.transform.to_dict(),
            precision=str(self.precision).removeprefix("torch."),
        )


def give_distinct_names(opened: Sequence[EncoderInputs], checkpoints: Sequence[str]) -> None:
    """Name models by their whole paths where the last part alone is another's too. Raises ConfigError for twins."""
    names = [inputs.name for inputs in opened]
    for inputs, checkpoint in zip(opened, checkpoints, strict=True):
        if names.count(inputs.name) > 1:
            inputs.name = checkpoint
    twins = [checkpoint for checkpoint in checkpoints if checkpoints.count(checkpoint) > 1]
    if twins:
        raise ConfigError(f"{twins[0]} is named twice; name each encoder once")


def model_name(checkpoint: str) -> str:
    """How results name a checkpoint: a run folder's or a file's own name, without the folders above."""
    path = Path(checkpoint)
    # `..` and `.` have no name of their own.
    return path.resolve().name if path.is_dir() else path.name
