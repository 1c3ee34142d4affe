"""Settings of `mimref knn`."""

from mimref.config.base import Numbers, Temperatures
from mimref.features.config import EvaluationConfig


class KnnConfig(EvaluationConfig):
    """All settings of `mimref knn`."""

    command = "knn"
    k: Numbers = [10]
    """Neighbours that vote; several give one result each."""
    tau: Temperatures = [0.07]
    """Temperatures of the votes; several give one result each."""
    standardize: bool = True
    """Scale every feature by the training images' mean and standard deviation first."""
    per_class: bool = False
    """One result per class as well."""
    retrieval: bool = False
    """Mean average precision and recall as well, of the validation images as queries among the training images."""
    recall_at: Numbers = [1, 5, 10]
    """Nearest images among which recall looks for one of the query's class."""
