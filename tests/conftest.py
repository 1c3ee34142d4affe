"""Environment, set before imports: tiny tensors gain nothing from threads, and tests have no screen or network."""

import gc
import os
from itertools import count
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Files whose tests fork their processes from one (see tests/ranks.py); one worker runs them, before all others.
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
    """Give every test a cache of its own, never the user's."""
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{next(_number)}"))


@pytest.fixture(autouse=True)
def states_after_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every epoch, as runs with longer epochs do: those of tests take less time than a save."""
    monkeypatch.setattr("mimref.training.job.SAVE_COST", 0.0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in RANKS)


def pytest_collection_finish() -> None:
    gc.freeze()  # imported objects stay alive: no collection has to scan them again


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return 0 for `-n auto` with a single file, slow tests, which measure, or GPU tests, which share the GPU."""
    single = len(config.args) == 1 and ".py" in config.args[0]
    if single or "not slow" not in config.option.markexpr:
        return 0
    from joblib import cpu_count  # respects a container's limit

    return min(4, cpu_count())


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of a file in one worker, since they share fixtures; likewise all files that start ranks."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ranks" if file.endswith(RANKS) else file

    config.option.loadscopereorder = False
    return ByFile(config, log)
