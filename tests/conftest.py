"""Set before libraries are imported: tiny tensors gain nothing from threads, and tests have no screen or network."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a cache of its own, beside its folder, and never the user's."""
    monkeypatch.setenv("MIMREF_CACHE", f"{tmp_path}-cache")
