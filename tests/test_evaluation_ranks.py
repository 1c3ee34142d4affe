"""Every evaluation by two processes gives the numbers of one."""

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mimref.config.base import DataConfig
from mimref.encoders.vit import Encoder
from mimref.evaluation.blocks.config import BlocksConfig
from mimref.evaluation.blocks.protocol import evaluate_blocks
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.cluster.protocol import evaluate_cluster
from mimref.evaluation.compare import compare_encoders
from mimref.evaluation.config import CompareConfig
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.evaluation.lowshot.config import LowshotConfig
from mimref.evaluation.lowshot.protocol import evaluate_lowshot
from mimref.evaluation.probe.config import ProbeConfig, ProbeTrainingConfig
from mimref.evaluation.probe.protocol import evaluate_probe
from mimref.features.config import CacheConfig
from tests.ranks import run_ranks
from tests.tiny import write_labelled, write_weights


def evaluate_all(folder: Path, cache: str) -> list[list[Any]]:
    """Rows of every protocol, each with features of its own; between them the ranks join a group anew."""
    base, other = (str(folder / f"{name}.safetensors") for name in ("base", "other"))
    common: dict[str, Any] = {"data": DataConfig(spec=str(folder / "data")), "device": "cpu", "workers": 0}
    common |= {"batch_size": 7}
    probe = ProbeTrainingConfig(epochs=2, batch_size=16)
    # 43 images that train, in batches of 12: three epochs of three batches, by turns.
    augmented = ProbeTrainingConfig(epochs=3, batch_size=12, select="val-split")
    tasks = [
        lambda c: evaluate_knn(KnnConfig(checkpoint=base, k=[1, 5], blocks="all", **c)),
        lambda c: evaluate_lowshot(LowshotConfig(checkpoint=base, splits=2, shots=[1], **c)),
        lambda c: evaluate_cluster(ClusterConfig(checkpoint=base, runs=2, metrics=["acc", "sil"], **c))[0],
        lambda c: evaluate_probe(ProbeConfig(checkpoint=base, cached=True, probe=probe, **c)),
        lambda c: evaluate_probe(ProbeConfig(checkpoint=base, probe=augmented, **c)),
        lambda c: evaluate_blocks(BlocksConfig(checkpoints=[base, other], k=5, **c)),
        lambda c: compare_encoders(CompareConfig(base=base, refined=[other], splits=1, shots=[1], runs=2, **c)),
    ]
    found = []
    for number, task in enumerate(tasks):
        if "TEST_RANK" in os.environ and not dist.is_initialized():
            rank = int(os.environ["TEST_RANK"])
            dist.init_process_group("gloo", init_method=f"file://{folder}/store{number}", rank=rank, world_size=2)
        os.environ["MIMREF_CACHE"] = f"{folder}/{cache}{number}"
        found.append(task(common).rows)
    return found


def images_encoded(folder: Path) -> int:
    """Images that this rank sees of a clustering of 16, where no features can be kept."""
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


def test_a_rank_encodes_its_share_alone(tmp_path: Path) -> None:
    write_weights(tmp_path / "base.safetensors")
    write_labelled(tmp_path / "data")
    assert run_ranks(images_encoded, 2, tmp_path / "group", tmp_path) == [7 + 2, 7]


def test_two_ranks_give_the_numbers_of_one_process(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "other")):
        write_weights(tmp_path / f"{name}.safetensors", seed=seed)
    (write_labelled(tmp_path / "data") / "train" / "a" / "003.png").write_bytes(b"no image")
    alone = evaluate_all(tmp_path, "alone")
    first, second = run_ranks(evaluate_all, 2, tmp_path / "group", tmp_path, "ranks")
    assert first == alone
    assert len(first[4]) == 1 + 52
    # k-NN is everyone's; the rest is rank 0's.
    assert second[0] == alone[0] and second[1:] == [[]] * 6
