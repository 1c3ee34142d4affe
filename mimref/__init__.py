"""mimref refines vision transformers that were pre-trained by masked image modelling.

The public Python API is imported when it is first used, so that `import mimref` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "KnnConfig": "mimref.config",
    "PretrainConfig": "mimref.config",
    "RefineConfig": "mimref.config",
    "knn": "mimref.evaluation.knn",
    "load_config": "mimref.recipes",
    "pretrain": "mimref.pretraining.run",
    "refine": "mimref.refinement.run",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mimref' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
