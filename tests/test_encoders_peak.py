"""The packaged encoder `peak`: small enough to ship, documented, and best in its middle blocks."""

import os

import pytest

from mimref.config.base import DataConfig
from mimref.config.load import load_config
from mimref.config.run import TrainingConfig
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.vit import Architecture
from mimref.evaluation.knn.config import KnnConfig
from mimref.evaluation.knn.protocol import evaluate_knn
from mimref.features.config import CacheConfig
from mimref.pretraining.config import PretrainConfig
from mimref.refinement.config import RefineConfig


def test_the_file_is_small_and_says_what_it_holds() -> None:
    checkpoint = read_checkpoint("peak")
    architecture = checkpoint.architecture
    assert isinstance(architecture, Architecture)
    assert os.path.getsize(checkpoint.path) < 3e6
    assert (architecture.width, architecture.depth, architecture.image_size) == (64, 16, 28)
    made: TrainingConfig = load_config(PretrainConfig, "pretrain/peak")
    assert checkpoint.header["data"]["spec"] == made.data.spec == "fashion-mnist"
    assert checkpoint.licence
    assert load_config(RefineConfig, "refine/peak").encoder.weights == "peak"


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isdir("/usr/share/datasets/fashion-mnist"), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_middle_blocks_are_better_than_the_last() -> None:
    config = KnnConfig(
        checkpoint="peak",
        data=DataConfig(spec="fashion-mnist", train_limit=5000),
        blocks="1,7,16",
        precision="fp32",
        cache=CacheConfig(folder="off"),
    )
    first, middle, last = (float(row["value"]) for row in evaluate_knn(config).rows if row["metric"] == "knn_top1")
    print(f"block 1: {first:.1f}, block 7: {middle:.1f}, block 16: {last:.1f}")
    assert middle > first + 5 and middle > last + 3
