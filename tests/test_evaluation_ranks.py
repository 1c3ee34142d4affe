"""Every evaluation gives the same numbers with two processes as with one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mimref.config.base import DataConfig
from mimref.data.sources import Split
from mimref.encoders.vit import Encoder
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.assess.measures import MEASURES
from mimref.evaluation.assess.protocol import assess
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.blocks.protocol import evaluate_blocks
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.cluster.protocol import evaluate_cluster
from mimref.evaluation.compare import compare_encoders
from mimref.evaluation.config import CompareConfig
from mimref.evaluation.knn import retrieval
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.lowshot.protocol import evaluate_lowshot
from mimref.evaluation.probe.config import ProbeConfig, ProbeTrainingConfig
from mimref.evaluation.probe.protocol import evaluate_probe
from mimref.evaluation.search.config import SearchConfig
from mimref.evaluation.search.protocol import search
from mimref.features.config import CacheConfig
from mimref.features.encode import Column
from mimref.features.inputs import EncoderInputs
from mimref.progress import Silent
from tests.ranks import run_ranks
from tests.test_evaluation_knn import rank_results
from tests.test_evaluation_monitor import check_on_rank
from tests.test_evaluation_retrieval import clouds
from tests.tiny import write_labelled, write_weights

SPLITS: tuple[Split, ...] = ("train", "val")


def evaluate_all(folder: Path, cache: str) -> list[list[Any]]:
    """Rows of every protocol, each with its own features; the ranks rejoin a group between protocols."""
    base, other = (str(folder / f"{name}.safetensors") for name in ("base", "other"))
    common: dict[str, Any] = {"data": DataConfig(spec=str(folder / "data")), "device": "cpu", "workers": 0}
    common |= {"batch_size": 7}
    probe = ProbeTrainingConfig(epochs=2, batch_size=16)
    # 43 training images in batches of 12: three epochs of three batches, which the ranks take in turns.
    augmented = ProbeTrainingConfig(epochs=3, batch_size=12, select="val-split")

    def attentive(limit: float) -> ProbeTrainingConfig:
        settings = {"kind": "attentive", "lr": [5.0, 50.0], "queries": [2, 4], "select": "val-split"}
        return ProbeTrainingConfig.model_validate(settings | {"epochs": 3, "batch_size": 12, "tokens_gb": limit})

    tasks = [
        lambda c: evaluate_knn(KnnConfig(checkpoint=base, k=[1, 5], blocks="all", retrieval=True, **c)),
        lambda c: evaluate_lowshot(LowshotConfig(checkpoint=base, splits=2, shots=[1], **c)),
        lambda c: evaluate_cluster(ClusterConfig(checkpoint=base, runs=2, metrics=["acc", "sil"], **c), exhibits=True)[
            0
        ],
        lambda c: evaluate_probe(ProbeConfig(checkpoint=base, cached=True, probe=probe, **c)),
        lambda c: evaluate_probe(ProbeConfig(checkpoint=base, probe=augmented, **c)),
        *(
            lambda c, cached=cached, limit=limit: evaluate_probe(
                ProbeConfig(checkpoint=base, cached=cached, probe=attentive(limit), **c)
            )
            for cached, limit in ((True, 1.0), (True, 2e-5), (False, 1e-6))
        ),
        lambda c: evaluate_blocks(BlocksConfig(checkpoints=[base, other], k=5, **c), exhibits=True),
        lambda c: compare_encoders(
            CompareConfig(base=base, refined=[other], splits=1, shots=[1], runs=2, **c), exhibits=True
        ),
        lambda c: assess(AssessConfig(checkpoints=[base, other], blocks="all", images=20, **c)),
        lambda c: search(SearchConfig(checkpoint=base, queries=[str(folder / "data/val/a/000.png")], **c)),
    ]
    found = []
    for number, task in enumerate(tasks):
        if "TEST_RANK" in os.environ and not dist.is_initialized():
            rank = int(os.environ["TEST_RANK"])
            dist.init_process_group("gloo", init_method=f"file://{folder}/store{number}", rank=rank, world_size=2)
        os.environ["MIMREF_CACHE"] = f"{folder}/{cache}{number}"
        found.append(task(common).rows)
    return found


def fetch_together(folder: Path, data: Path, weights: Path | None = None) -> dict[str, Any]:
    """The features that a rank reads when all ranks share a pass, and how many images it encodes."""
    seen = 0
    blocks = Encoder.blocks

    def counting(encoder: Encoder, images: Any, *args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += len(images)
        return blocks(encoder, images, *args, **options)

    Encoder.blocks = counting  # type: ignore[method-assign]
    os.environ["MIMREF_CACHE"] = str(folder / "cache")
    config = KnnConfig(
        checkpoint=str(weights or folder / "base.safetensors"),
        data=DataConfig(spec=str(data)),
        batch_size=5,
        workers=0,
        device="cpu",
    )
    inputs = EncoderInputs(config, config.checkpoint, Silent())
    inputs.prepare([Column(4, "cls"), Column(2, "mean")])
    again = EncoderInputs(config, config.checkpoint, Silent())
    again.prepare([Column(3, "cls")])
    Encoder.blocks = blocks  # type: ignore[method-assign]
    return {
        "seen": seen,
        "x": {split: inputs.features(split).matrix([Column(4, "cls"), Column(2, "mean")])[:] for split in SPLITS},
        "more": again.features("train").matrix([Column(3, "cls")])[:],
        "indices": inputs.features("train").indices,
        "bad": inputs.bad,
    }


def images_encoded(folder: Path) -> int:
    """Images that this rank encodes in a clustering of 16 images whose features cannot be cached."""
    (folder / "a file").touch()
    blocks, seen = Encoder.blocks, 0

    def counting(self: Encoder, images: Tensor, *args: Any, **options: Any) -> list[Tensor]:
        nonlocal seen
        seen += len(images)
        return blocks(self, images, *args, **options)

    Encoder.blocks = counting  # type: ignore[method-assign]
    config = ClusterConfig(
        checkpoint=str(folder / "base.safetensors"),
        data=DataConfig(spec=str(folder / "data")),
        device="cpu",
        workers=0,
        batch_size=7,
        runs=1,
        metrics=["acc"],
        cache=CacheConfig(folder=str(folder / "a file")),
    )
    evaluate_cluster(config)
    return seen


def work(folder: Path) -> dict[str, Any]:
    """Results for all tests below, from a single start of the processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "blocks", Encoder.blocks)
        found: dict[str, Any] = {"check": check_on_rank(folder / "differing")}
        found["neighbours"] = [tuple(each) for each in rank_results(2)]
        patch.setattr(retrieval, "SORTED_AT_ONCE", 90 * 8)
        found["retrieval"] = retrieval.retrieval(*clouds())
        found["fetched"] = fetch_together(folder, folder / "data")
        found["encoded"] = images_encoded(folder)
        found["rows"] = evaluate_all(folder, "ranks")
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for seed, name in enumerate(("base", "other")):
        write_weights(folder / f"{name}.safetensors", seed=seed)
    (write_labelled(folder / "data") / "train" / "a" / "003.png").write_bytes(b"no image")
    for rank in ("0", "1"):
        write_labelled(folder / "differing" / rank)
    (folder / "differing" / "1" / "val" / "a" / "000.png").unlink()
    return folder


@pytest.fixture(scope="module")
def ranks(data: Path) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.ranks.TIMEOUT_S", 300)  # this does the work of many tests
        return run_ranks(work, 2, data / "group", data)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as in every rank: several threads split sums by batch size, which changes the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_rank_encodes_its_share_alone(ranks: list[dict[str, Any]]) -> None:
    assert [rank["encoded"] for rank in ranks] == [7 + 2, 7]


def test_ranks_that_see_other_validation_images_search_none(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        values, notes = rank["check"]
        assert values.keys() == {"feature_variance", *MEASURES}
        assert len(notes) == 1 and "[15, 16]" in notes[0]


def test_ranks_share_the_search_for_neighbours(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for alone, (similarity, train_index) in zip(rank_results(1), rank["neighbours"], strict=True):
            assert torch.equal(alone.similarity, similarity) and torch.equal(alone.train_index, train_index)


def test_ranks_share_the_queries_of_retrieval(ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "SORTED_AT_ONCE", 90 * 8)
    assert [rank["retrieval"] for rank in ranks] == [retrieval.retrieval(*clouds())] * 2


def test_ranks_share_a_pass(ranks: list[dict[str, Any]], data: Path) -> None:
    alone = fetch_together(data / "alone", data / "data", data / "base.safetensors")
    assert alone["seen"] == 47 + 16
    # 10 and 4 batches of 5, in turns; nothing is encoded twice.
    assert [rank["fetched"]["seen"] for rank in ranks] == [25 - 1 + 10, 23 + 6]
    for rank in ranks:
        fetched = rank["fetched"]
        for split in SPLITS:
            assert np.array_equal(fetched["x"][split], alone["x"][split])
        assert np.array_equal(fetched["more"], alone["more"])
        assert np.array_equal(fetched["indices"], alone["indices"])
        assert fetched["bad"] == alone["bad"] and len(alone["bad"]) == 1


def test_two_ranks_give_the_numbers_of_one_process(ranks: list[dict[str, Any]], data: Path) -> None:
    alone = evaluate_all(data, "alone")
    first, second = (rank["rows"] for rank in ranks)
    assert first == alone
    assert len(first[4]) == 1 + 52
    # All ranks return the rows of k-NN; only rank 0 returns the others.
    assert second[0] == alone[0] and second[1:] == [[]] * 11
    assert len(first[11]) == 12
