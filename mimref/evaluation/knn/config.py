"""Settings of `mimref knn`."""

from mimref.config.base import Numbers, Temperatures
from mimref.features.config import EvaluationConfig


class KnnConfig(EvaluationConfig):
    """All settings of `mimref knn`."""

    command = "knn"
    k: Numbers = [10]
    """Neighbours that vote; several values give one result each."""
    tau: Temperatures = [0.07]
    """Temperatures of the votes; several values give one result each."""
    standardize: bool = True
    """First scale every feature by the training images' mean and standard deviation."""
    per_class: bool = False
    """Also give one result per class."""
    retrieval: bool = False
    """Also measure mean average precision and recall, with the validation images as queries among the training
    images."""
    recall_at: Numbers = [1, 5, 10]
    """Numbers of nearest images among which recall looks for one of the query's class."""
