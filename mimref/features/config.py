"""Settings of every command that reads features of encoders."""

from typing import Annotated, Literal

from pydantic import Field

from mimref.config.base import CommandConfig, Interpolation, PatchGrid, Section


class EvaluatedEncoderConfig(Section):
    """What cannot be inferred from an encoder's weights."""

    num_heads: int | None = Field(default=None, gt=0)
    """Attention heads; None: those of the published model of the same width, else one per 64 channels."""
    part: str | None = None
    """Which encoder of a file that holds several, such as `teacher`: its prefix in the file, or a part of it that no
    other has. None: the one that the authors of such files evaluate."""
    grid: PatchGrid | None = None
    """Rows and columns of patches that a file's positions are for. None: a square, else the shape nearest to one."""
    interpolation: Interpolation | None = None
    """Whose rule interpolates positions to other resolutions than the weights'. None: that of the weights' format."""


class CacheConfig(Section):
    """Where features are cached between commands."""

    folder: str | None = None
    """None: `features` in `$MIMREF_CACHE`, else in the user's cache folder. `off` caches nothing."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Number format on disk; fp16 halves it."""
    keep_gb: float = Field(default=1.0, ge=0)
    """A pass of the encoder caches every block and both poolings if they fit in this, so that later commands need no
    pass; else only what the command needs."""


class EncoderPassConfig(CommandConfig):
    """Settings of every command that reads features of encoders."""

    encoder: EvaluatedEncoderConfig = EvaluatedEncoderConfig()
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
    """Weights file, a refine output folder, published weights by name, or `quickstart` for the packaged encoder."""
    features: Annotated[tuple[str, str], Field(strict=False)] | None = None
    """Two .npz files of training and validation features (`x`, `y`) to evaluate instead of an encoder's."""
    blocks: str = "last"
    """`last`, `last4` (concatenated), `all` (one by one), or blocks such as `1,5,12` (one by one)."""


class ExtractConfig(EvaluationConfig):
    """All settings of `mimref extract`."""

    command = "extract"
    split: Literal["train", "val"] = "val"
    """Which images."""
