"""A spec means the same images from any folder."""

import tarfile
from pathlib import Path

import pytest

from mimref.config.base import DataConfig
from mimref.config.load import load_config
from mimref.data.open import absolute_spec, open_source
from mimref.features.header import data_record
from mimref.refinement.config import RefineConfig
from mimref.training.folder import with_absolute_paths
from tests.tiny import write_images


@pytest.mark.parametrize(
    ("spec", "absolute"),
    [
        ("images", "{here}/images"),
        ("./digits", "{here}/digits"),
        ("digits", "digits"),
        ("fashion-mnist", "fashion-mnist"),
        ("torchvision:MNIST", "torchvision:MNIST"),
        ("list:a/b.csv", "list:{here}/a/b.csv"),
        ("hf:sets/birds", "hf:sets/birds"),  # a name on the hub
        ("hf:./sets/birds", "hf:{here}/sets/birds"),
        ("hf:/sets/birds", "hf:/sets/birds"),
        ("list:~/b.csv", "list:{home}/b.csv"),
        ("wds:a-{{split}}-{{0..3}}.tar", "wds:{here}/a-{{split}}-{{0..3}}.tar"),
        ("wds:../{{a/x,b/y}}/*.tar", "wds:{above}/{{a/x,b/y}}/*.tar"),
        ("wds:/a/{{0..3}}.tar", "wds:/a/{{0..3}}.tar"),
    ],
)
def test_absolute(spec: str, absolute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"here": tmp_path, "above": tmp_path.parent, "home": Path.home()}
    spec, absolute = spec.format_map(places), absolute.format_map(places)
    assert absolute_spec(spec) == absolute
    assert absolute_spec(absolute) == absolute
    # The spec in config.toml and in the result's header.
    config = load_config(RefineConfig, None, {"data.spec": spec})
    assert with_absolute_paths(config).data.spec == absolute
    assert data_record(config.data)["spec"] == absolute


def test_patterns_and_odd_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set [1]"
    write_images(folder / "images", per_class=3)
    (folder / "shards").mkdir()
    for number in range(2):
        with tarfile.open(folder / "shards" / f"a-{number}.tar", "w") as shard:
            shard.add(folder / "images/a", f"{number}")
    monkeypatch.chdir(folder)
    specs = ("wds:shards", "wds:shards/*.tar", "wds:shards/a-{0..1}.tar", "images")
    absolute = [absolute_spec(spec) for spec in specs]
    counts = [len(open_source(DataConfig(spec=spec), "train")) for spec in specs]
    monkeypatch.chdir("/")
    assert counts[:3] == [6] * 3
    assert [len(open_source(DataConfig(spec=spec), "train")) for spec in absolute] == counts
