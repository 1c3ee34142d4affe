"""Settings of every command that reads features of encoders."""

from typing import Annotated, Literal

from pydantic import Field

from mimref.config.base import CommandConfig, ReadingConfig, Section


class CacheConfig(Section):
    """Where features are cached between commands."""

    folder: str | None = None
    """Folder of cached features. None: `features` in `$MIMREF_CACHE`, else in the user's cache folder. `off` caches
    nothing."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Number format on disk; fp16 halves the size."""
    keep_gb: float = Field(default=1.0, ge=0)
    """A pass of the encoder caches every block and both poolings if they fit in this many GB, so that later commands
    need no pass; otherwise it caches only what the command needs."""


class EncoderPassConfig(CommandConfig):
    """Settings of every command that reads features of encoders."""

    device_decoding = True
    encoder: ReadingConfig = ReadingConfig()
    cache: CacheConfig = CacheConfig()
    arch: str | None = None
    """As `encoder.arch`; None: read from the checkpoint."""
    source: str | None = None
    """As `encoder.source`; None: read from the checkpoint."""
    batch_size: int = Field(default=256, gt=0)
    """Images per forward pass."""
    final_norm: bool = False
    """Apply the encoder's final norm to the last block's output."""
    resolution: int | None = Field(default=None, gt=0)
    """Pixels of the centre crop; None: the encoder's image size."""
    pool: Literal["cls", "mean", "cls+mean"] = "cls"
    """The class token, the mean of the patch tokens, or both concatenated."""


class EvaluationConfig(EncoderPassConfig):
    """Settings of every evaluation of one encoder."""

    checkpoint: str = "quickstart"
    """Weights file, output folder of `mimref refine`, name of published weights, or packaged weights (`quickstart` or
    `peak`)."""
    features: Annotated[tuple[str, str], Field(strict=False)] | None = None
    """Two .npz files of training and validation features (`x`, `y`) to evaluate instead of those of an encoder."""
    blocks: str = "last"
    """`last`, `last4` (concatenated), `all` (one by one), or blocks such as `1,5,12` (one by one)."""


class ExtractConfig(EvaluationConfig):
    """All settings of `mimref extract`."""

    command = "extract"
    unread = {"features": "name a checkpoint"}
    split: Literal["train", "val", "all"] = "val"
    """Images to use; `all`: those of every split."""
