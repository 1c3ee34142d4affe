"""Settings of `mimref robustness`."""

from typing import Annotated

from pydantic import Field, field_validator

from mimref.config.base import CommandConfig
from mimref.transfer.robustness.corruptions import corruption_names


class RobustnessConfig(CommandConfig):
    """All settings of `mimref robustness`; `data` is the clean images."""

    command = "robustness"
    checkpoint: str = ""
    """A file that `mimref finetune` wrote, or its folder."""
    imagenet_c: str | None = None
    """Folder of ImageNet-C: one folder per corruption, each with one per severity, each with one per class."""
    imagenet_a: str | None = None
    """Folder of ImageNet-A: only its 200 classes compete."""
    imagenet_r: str | None = None
    """Folder of ImageNet-R: only its 200 classes compete."""
    sketch: str | None = None
    """Folder of ImageNet-Sketch: all classes compete."""
    shifted: list[str] = []
    """Other test sets with the classifier's classes, each as `data.spec`: their validation images, or all images of a
    folder."""
    subset: bool = True
    """For `shifted`: only the classes of a set compete. False: all classes of the classifier compete."""
    corrupt: str | None = None
    """Corrupt the clean images by the `15` corruptions of ImageNet-C, all `19`, or some, such as `fog,snow`."""
    severities: Annotated[list[Annotated[int, Field(ge=1, le=5)]], Field(min_length=1)] = [1, 2, 3, 4, 5]
    """Severities of the corruptions."""
    resolution: int | None = Field(default=None, gt=0)
    """Pixels per side of the images. None: as in fine-tuning."""

    @field_validator("corrupt")
    @classmethod
    def _check_corruptions(cls, text: str | None) -> str | None:
        # Not of an annotated type: `15` would be read as a number.
        if text is not None:
            corruption_names(text)
        return text
