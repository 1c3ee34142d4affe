"""Settings of `mimref cluster`."""

from typing import Annotated, Literal

from pydantic import Field

from mimref.features.config import EvaluationConfig


class ClusterConfig(EvaluationConfig):
    """All settings of `mimref cluster`."""

    command = "cluster"
    metrics: Annotated[list[str], Field(min_length=1)] = ["acc", "nmi", "ami", "ari", "sil", "dbs"]
    """Of clusters: acc, nmi, ami, ari; of classes: sil (silhouette), dbs (Davies-Bouldin). With `clusters`, sil and dbs
    are also of the clusters. Images without labels have these alone."""
    clusters: int | None = Field(default=None, ge=2)
    """How many; None: as many as classes, which needs labels."""
    runs: int = Field(default=100, gt=0)
    """Mini-batch k-means runs."""
    split: Literal["train", "val"] = "val"
    """Which images."""
    classes: str | None = None
    """Only these classes: names, or a file with one name per line; None: all."""
