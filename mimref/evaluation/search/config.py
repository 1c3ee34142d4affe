"""Settings of `mimref search`."""

from typing import Literal

from pydantic import Field

from mimref.features.config import EvaluationConfig


class SearchConfig(EvaluationConfig):
    """All settings of `mimref search`."""

    command = "search"
    unread = {"features": "search needs the images; name a checkpoint"}
    queries: list[str] = []
    """Image files, or names of images in the data set, as results show them."""
    k: int = Field(default=12, gt=0)
    """Nearest images per query."""
    split: Literal["train", "val", "all"] = "all"
    """Images to search; `all`: those of every split."""
    standardize: bool = True
    """First scale every feature by its mean and standard deviation over the searched images, as `mimref knn` does."""
