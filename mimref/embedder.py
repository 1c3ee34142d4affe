"""An encoder with the interface of scikit-learn: a transformer from images to features."""

import warnings
from collections.abc import Sequence
from operator import index
from os import PathLike
from typing import Any, Self, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin

from mimref.config.load import validated
from mimref.data.given import GivenSource
from mimref.data.pixels import Decoding
from mimref.errors import CheckpointError, ConfigError
from mimref.features.config import EncoderPassConfig
from mimref.features.encode import Column, block_groups, pooled_tokens
from mimref.features.inputs import EncoderInputs
from mimref.progress import Listener


class Embedder(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Features of images for scikit-learn's pipelines: `make_pipeline(Embedder("runs/mae_l16"), LogisticRegression())`.

    X is a list of paths, PIL images, arrays or tensors, of any sizes, or one array: (N, H, W), (N, H, W, 3) or
    (N, 3, H, W), uint8 or floats from 0 to 1. Nothing is learned: `fit` only reads the encoder, and `transform` works
    without `fit`. Features are those of `mimref extract`, float32 (N, D), with several blocks or poolings concatenated.

    checkpoint: a weights file, a run's folder, or a published or packaged name. blocks: `last`, `last4`, `all`, or
    numbers such as `"1,5,12"`, 12 or [1, 5, 12]; 1-based. pool: `cls`, `mean` or `cls+mean`. final_norm: whether to
    apply the final norm to the last block. resolution: image size in pixels; None: the encoder's own. batch_size:
    images per pass. device, precision: as `--device` and `--precision`; None: the best available. workers: number of
    processes that read files. cache: folder in which features are cached by weights, settings and images; True: the one
    that `mimref cache list` shows; None: no cache. channels: number of channels of images that are not colour images,
    as `--channels`; None: the encoder's. mean, std: per channel, for encoders whose file does not record them.
    Raises CheckpointError or ConfigError if the encoder and the settings do not fit, DataError, with the path, for a
    file that is no image or cannot be read. Pickles hold the settings and a hash of the weights, not the weights.
    """

    def __init__(
        self,
        checkpoint: str | PathLike[str] = "quickstart",
        *,
        blocks: str | int | Sequence[int] = "last",
        pool: str = "cls",
        final_norm: bool = False,
        resolution: int | None = None,
        batch_size: int = 256,
        device: str | None = None,
        precision: str | None = None,
        workers: int | None = 0,
        cache: str | PathLike[str] | bool | None = None,
        channels: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.blocks = blocks
        self.pool = pool
        self.final_norm = final_norm
        self.resolution = resolution
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.workers = workers
        self.cache = cache
        self.channels = channels
        self.mean = mean
        self.std = std

    def fit(self, X: Any, y: Any = None) -> Self:
        """Read the encoder. Only the types and shapes of X are checked; y is ignored."""
        self.__dict__.pop("_loaded", None)
        inputs, _ = self._encoder(known=None)
        GivenSource(X, Decoding.of(inputs.data))
        self.weights_: str = inputs.checkpoint.fingerprint
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Return the features (N, D) of the images, in their order."""
        inputs, columns = self._encoder(known=getattr(self, "weights_", None))
        source = GivenSource(X, Decoding.of(inputs.data))
        own = inputs.with_images(source)
        own.prepare(columns, ["val"])
        return own.features("val").stacked([columns])

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Return feature names such as `block8_cls_0`. input_features: ignored."""
        inputs, columns = self._encoder(known=getattr(self, "weights_", None))
        size = inputs.image_size
        with torch.inference_mode():
            images = torch.zeros(1, inputs.data.channels or 3, size, size, device=inputs.device)
            widths = [pooled.shape[1] for pooled in pooled_tokens(inputs.encoder, images, columns)]
        names = [
            f"block{column.block}_{column.pool}{'_normed' if column.final_norm else ''}_{number}"
            for column, width in zip(columns, widths, strict=True)
            for number in range(width)
        ]
        return np.asarray(names, dtype=object)

    def _encoder(self, known: str | None) -> tuple[EncoderInputs, list[Column]]:
        """Return the encoder that the settings ask for, read once, and the columns of features to compute.

        known: hash of the weights with which it was fitted.
        """
        settings = repr(self.get_params(deep=False))
        loaded = self.__dict__.get("_loaded")
        if loaded is None or loaded[0] != settings:
            config = self._config()
            inputs = EncoderInputs(config, str(self.checkpoint), _Warnings(), need_labels=False)
            _ = inputs.settings  # nothing is measured on X
            if known is not None and inputs.checkpoint.fingerprint != known:
                raise CheckpointError(f"{self.checkpoint}: these weights differ from the fitted ones; fit again")
            groups = block_groups(_blocks(self.blocks), inputs.depth)
            columns = list(dict.fromkeys(column for group in groups.values() for column in inputs.columns(group)))
            loaded = self.__dict__["_loaded"] = (settings, inputs, columns)
        return loaded[1], loaded[2]

    def _config(self) -> EncoderPassConfig:
        is_flag = self.cache is None or isinstance(self.cache, bool)
        folder = (None if self.cache else "off") if is_flag else str(self.cache)
        return validated(
            EncoderPassConfig,
            {
                # The images in X; features must not lack any of them.
                "data": {"spec": "X", "max_bad": 0, "channels": self.channels, "mean": self.mean, "std": self.std},
                "cache": {"folder": folder, "keep_gb": 0.0},
                "pool": self.pool,
                "final_norm": self.final_norm,
                "resolution": self.resolution,
                "batch_size": self.batch_size,
                "device": self.device or "auto",
                "precision": self.precision or "auto",
                "workers": self.workers,
            },
        )

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_loaded", None)
        return state

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        return tags

    def _more_tags(self) -> dict[str, Any]:
        """Return the tags for scikit-learn before 1.6."""
        return {"requires_fit": False, "stateless": True, "no_validation": True, "X_types": ["3darray", "string"]}


class _Warnings(Listener):
    """Listener that issues notes and warnings as Python warnings."""

    def note(self, message: str) -> None:
        """See `Listener`."""
        warnings.warn(message, stacklevel=2)

    def warn(self, message: str) -> None:
        """See `Listener`."""
        warnings.warn(message, stacklevel=2)


def _blocks(blocks: str | int | Sequence[int]) -> str:
    """Return blocks in the form of `--blocks`. Raises ConfigError for a value that is neither text nor integers."""
    if isinstance(blocks, str):
        return blocks
    numbers = [blocks] if isinstance(blocks, SupportsIndex) else blocks
    try:
        return ",".join(str(index(number)) for number in numbers)
    except TypeError:
        raise ConfigError(f"blocks {blocks!r}: expected last, last4, all or blocks such as [1, 5, 12]") from None
