"""Settings of `mimref lowshot`."""

from pydantic import Field

from mimref.config.base import Numbers
from mimref.features.config import EvaluationConfig


class LowshotConfig(EvaluationConfig):
    """All settings of `mimref lowshot`."""

    command = "lowshot"
    shots: Numbers = [1, 2, 5]
    """Training images per class."""
    splits: int | None = Field(default=None, gt=0)
    """Random draws of the training images. None: 3, or 20 with fewer than 10,000 training images."""
    split_files: list[str] = []
    """Files with one image file name per line (the format of MSN's splits), instead of draws."""
