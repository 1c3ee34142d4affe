"""Settings of `mimref lowshot`."""

from typing import Self

from pydantic import Field, model_validator

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

    @model_validator(mode="after")
    def _check_split_files(self) -> Self:
        for name in ("shots", "splits") if self.split_files else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: the split files choose the training images; omit one of the two")
        return self
