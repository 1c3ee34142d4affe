"""Missing or wrong specs; valid ones are tested with the module that opens them."""

import pytest

from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.errors import ConfigError, DataError
from tests.sources import opened


def test_no_spec() -> None:
    with pytest.raises(ConfigError, match="--data"):
        open_source(DataConfig(), "train")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digts", "did you mean 'digits'"),
        ("fashion_mnist", "did you mean 'fashion-mnist'"),
        ("/no/such/folder", r"/no/such/folder: no such folder or data set \(accepted: a folder, digits, fashion-mnist"),
        ("wds:shards.tar", "no such shard: shards.tar"),
        ("hf:folder", "folder .*hub"),
        ("list:a.csv", "cannot be read"),
        ("", "no such folder"),
        ("torchvision:cifar11", "cifar11: unknown data set; did you mean 'cifar10'.*known: CIFAR10, CIFAR100"),
        ("torchvision:MNIST", r"needs the folder of its files: --set data\.root=FOLDER"),
    ],
)
def test_wrong_spec(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        opened(spec)
    assert "\n" not in str(caught.value)
