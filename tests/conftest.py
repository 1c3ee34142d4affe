"""Set before libraries are imported: tiny tensors gain nothing from threads, and tests have no screen or network."""

import gc
import os
from itertools import count
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Files whose tests fork their processes from one (see tests/ranks.py): one worker runs them, before anything else.
RANKS = (
    "test_distributed_collectives.py",
    "test_distributed_sharding.py",
    "test_training_sharded.py",
    "test_training_shards.py",
    "test_transfer_finetune_sharded.py",
    "test_refinement_ranks.py",
    "test_pretraining_ranks.py",
    "test_transfer_finetune_ranks.py",
    "test_evaluation_ranks.py",
    "test_training_lost_ranks.py",
    "test_data_ranks.py",
    "test_evaluation_cluster.py",
    "test_benchmarks_suite.py",
    "test_benchmark_all.py",
)


_number = count()


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a cache of its own, and never the user's."""
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{next(_number)}"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in RANKS)


def pytest_collection_finish() -> None:
    gc.freeze()  # what has been imported stays: no collection needs to look through it again


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Of `-n auto`: none for a single file, nor for slow tests, which measure, or those of a GPU, which share it."""
    single = len(config.args) == 1 and ".py" in config.args[0]
    if single or "not slow" not in config.option.markexpr:
        return 0
    from joblib import cpu_count  # which knows of a container's limit

    return min(4, cpu_count())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file share fixtures, and run in one worker; so do all that start ranks."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ranks" if file.endswith(RANKS) else file

    config.option.loadscopereorder = False
    return ByFile(config, log)
