"""Settings of `mimref assess`."""

from typing import Annotated, Literal

from pydantic import Field

from mimref.config.run import ViewsConfig
from mimref.evaluation.assess.measures import DEFAULT, Measure
from mimref.features.config import EncoderPassConfig


class AssessConfig(EncoderPassConfig):
    """All settings of `mimref assess`."""

    command = "assess"
    checkpoints: Annotated[list[str], Field(min_length=1)] = ["quickstart"]
    """Weights files, run folders or names, which are ranked together."""
    blocks: str = "last"
    """`last`, `last4` (concatenated), `all` (one by one), or blocks such as `1,5,12` (one by one)."""
    split: Literal["train", "val"] = "train"
    """Images to use. An unlabelled folder has one split."""
    images: int = Field(default=5000, ge=3)
    """Maximum number of images to measure. The choice is fixed: classes in turn or, without labels, every n-th
    image."""
    k: int = Field(default=10, gt=0)
    """Neighbours per image; at most a quarter of the other images."""
    measure: Measure = DEFAULT
    """Measure that checkpoints and blocks are ranked by."""
    views: ViewsConfig = ViewsConfig()
    """The two augmented views: the global views of refinement. Unless set, colour augmentation is off for gray images,
    and blur for views of fewer than 64 pixels."""
