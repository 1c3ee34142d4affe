"""mimref refines vision transformers that were pre-trained by masked image modelling.

Names of the public Python API are imported on first use, so that `import mimref` itself is fast.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names and their modules.
_PUBLIC = {
    "Embedder": "mimref.embedder",
    "FinetuneConfig": "mimref.transfer.finetune.config",
    "KnnConfig": "mimref.evaluation.knn.config",
    "PretrainConfig": "mimref.pretraining.config",
    "RefineConfig": "mimref.refinement.config",
    "RobustnessConfig": "mimref.transfer.robustness.config",
    "SearchConfig": "mimref.evaluation.search.config",
    "SuiteConfig": "mimref.transfer.suite.config",
    "analyze_blocks": "mimref.evaluation.blocks.statistics",
    "cluster": "mimref.evaluation.cluster.protocol",
    "evaluate_robustness": "mimref.transfer.robustness.protocol",
    "extract": "mimref.api",
    "finetune": "mimref.transfer.finetune.run",
    "knn": "mimref.evaluation.knn.protocol",
    "load": "mimref.api",
    "load_config": "mimref.config.load",
    "lowshot": "mimref.evaluation.lowshot.protocol",
    "pretrain": "mimref.pretraining.run",
    "probe_cached": "mimref.evaluation.probe.cached",
    "refine": "mimref.refinement.run",
    "run_suite": "mimref.transfer.suite.run",
    "search": "mimref.evaluation.search.protocol",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mimref' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
