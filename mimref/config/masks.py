"""Settings of images with a class for every pixel."""

from pydantic import Field

from mimref.config.base import Fraction, Section

MOST_CLASSES = 32767
"""Labels are passed on as 16-bit integers."""


class MasksConfig(Section):
    """How the values of a mask map to classes."""

    classes: int | None = Field(default=None, ge=2, le=MOST_CLASSES)
    """Number of classes. None: the number of lines of `classes.txt` in the folder or of names that come with the data
    set, else one more than the largest label in the training masks."""
    first: int | None = Field(default=None, ge=0)
    """Value of the first class; pixels with lower values have no label. None: 1 in ADE20K's layout, else 0."""
    ignore: int = Field(default=255, ge=0)
    """Value of pixels without a label."""


class MosaicsConfig(Section):
    """Mosaics of `digits` and `fashion-mnist`: objects on a textured background, the same for every seed."""

    train: int = Field(default=1000, gt=0)
    """Number of mosaics of training images."""
    val: int = Field(default=300, gt=0)
    """Number of mosaics of validation images."""
    filled: Fraction = 0.8
    """Share of the four cells that hold an object."""
