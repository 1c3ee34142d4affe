"""Settings of `mimref search`."""

from typing import Literal

from pydantic import Field

from mimref.features.config import EvaluationConfig


class SearchConfig(EvaluationConfig):
    """All settings of `mimref search`."""

    command = "search"
    queries: list[str] = []
    """Image files, or images of the data set by the names that results give them."""
    k: int = Field(default=12, gt=0)
    """Nearest images of every query."""
    split: Literal["train", "val", "all"] = "all"
    """Which images are searched; `all`: those of every split there is."""
    standardize: bool = True
    """Scale every feature by the mean and standard deviation over the searched images first, as `mimref knn` does."""
