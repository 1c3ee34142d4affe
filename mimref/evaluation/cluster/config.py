"""Settings of `mimref cluster`."""

from typing import Annotated, Literal

from pydantic import Field

from mimref.features.config import EvaluationConfig


class ClusterConfig(EvaluationConfig):
    """All settings of `mimref cluster`."""

    command = "cluster"
    metrics: Annotated[list[str], Field(min_length=1)] = ["acc", "nmi", "ami", "ari", "sil", "dbs"]
    """For clusters: acc, nmi, ami, ari; for classes: sil (silhouette), dbs (Davies-Bouldin). With `clusters`, sil and
    dbs also score the clusters; images without labels have only these scores."""
    clusters: int | None = Field(default=None, ge=2)
    """Number of clusters. None: the number of classes, which needs labels."""
    runs: int = Field(default=100, gt=0)
    """Mini-batch k-means runs."""
    split: Literal["train", "val"] = "val"
    """Images to cluster."""
    classes: str | None = None
    """Only these classes: names, or a file with one name per line; None: all."""
