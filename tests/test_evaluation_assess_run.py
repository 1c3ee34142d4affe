"""`mimref assess` from a checkpoint to rows and sentences, and the features of two views that it uses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimref.config.base import DataConfig
from mimref.config.run import ViewsConfig
from mimref.data.open import open_source
from mimref.data.sources import ArraySource, Subset
from mimref.data.transforms import EvalTransform
from mimref.data.views import CropGroup, Photometric, cut_group
from mimref.encoders.checkpoints import encoder_from, read_checkpoint
from mimref.encoders.vit import Encoder
from mimref.errors import UserError
from mimref.evaluation.assess.config import AssessConfig
from mimref.evaluation.assess.measures import MEASURES, crop_measures, view_measures
from mimref.evaluation.assess.protocol import AssessResult, assess
from mimref.evaluation.assess.verdicts import Assessed, verdicts
from mimref.evaluation.assess.views import fitting_views
from mimref.features.config import CacheConfig
from mimref.features.encode import Column, PassSettings, encode_views, extract, gather
from mimref.progress import Silent
from tests.cli.evaluations import Passes
from tests.tiny import ARCHITECTURE, write_images, write_labelled, write_unlabelled, write_weights

CPU = torch.device("cpu")
TRANSFORM = EvalTransform(16)
VIEWS = ViewsConfig(global_scale=(0.5, 1.0), blur=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders, and the same images with and without labels."""
    folder = tmp_path_factory.mktemp("assess")
    for seed, name in enumerate(("one", "two")):
        write_weights(folder / f"{name}.safetensors", seed=seed)
    write_labelled(folder / "labelled")
    write_unlabelled(folder / "plain")
    return folder


def assessed(made: Path, *names: str, data: str = "labelled", **changes: Any) -> AssessResult:
    checkpoints = [str(made / f"{name}.safetensors") for name in names or ("one",)]
    fixed: dict[str, Any] = {"device": "cpu", "workers": 0, "data": DataConfig(spec=str(made / data))}
    return assess(AssessConfig(checkpoints=checkpoints, views=VIEWS, **{**fixed, **changes}))


def values(result: AssessResult, **where: Any) -> dict[str, float]:
    rows = [row for row in result.rows if all(row.get(key) == value for key, value in where.items())]
    return {str(row["metric"]): float(row["value"]) for row in rows}


def network(made: Path, name: str = "one") -> Encoder:
    encoder = encoder_from(read_checkpoint(made / f"{name}.safetensors"), ARCHITECTURE).eval()
    assert isinstance(encoder, Encoder)
    return encoder


def test_views_are_those_of_refinement(made: Path) -> None:
    source, encoder = open_source(DataConfig(spec=str(made / "plain")), "train"), network(made)
    settings = PassSettings(TRANSFORM, CPU, batch_size=20)
    columns = [Column(block, pool, view == 1, view) for view in (0, 1) for block in (2, 4) for pool in ("cls", "mean")]
    found = gather(encode_views(encoder, source, settings, columns, VIEWS, 3), columns, len(source), "images")
    assert found.indices.tolist() == list(range(48))
    sample = torch.arange(48)
    decoded = [source.read_reduced(index, None) for index in range(48)]
    crops = cut_group(decoded, CropGroup(2, 16, (0.5, 1.0)), 3, 0, sample)
    images = Photometric(VIEWS, 3, CPU)(crops, 0, sample, [0, 1])
    with torch.inference_mode():
        for column in columns:
            assert column.view is not None
            (tokens,) = encoder.blocks(images[column.view], [column.block], final_norm=[column.final_norm])
            expected = encoder.pool(tokens, column.pool).numpy()
            np.testing.assert_allclose(found.columns[column], expected, rtol=1e-4, atol=1e-5)
    assert columns[0].name == "block-02-cls-view-0" and columns[-1].name == "block-04-mean-normed-view-1"


def test_rows_are_the_measures_of_features(made: Path) -> None:
    result = assessed(made, blocks="2,4", pool="mean", seed=5, k=4)
    source, encoder, settings = (
        open_source(result.data or DataConfig(), "train"),
        network(made),
        PassSettings(TRANSFORM, CPU),
    )
    for block in (2, 4):
        column = Column(block, "mean")
        crops = extract(encoder, source, settings, [column])
        pair = [column._replace(view=view) for view in (0, 1)]
        views = gather(encode_views(encoder, source, settings, pair, VIEWS, 5), pair, 48, "images")
        expected = crop_measures(crops.columns[column], k=4, y=crops.y)
        expected |= view_measures(*(views.columns[each] for each in pair), k=4)
        found = values(result, blocks=str(block))
        assert found.pop("assessed_rank") in (1, 2)
        assert found == pytest.approx(expected, rel=1e-6)
    row = next(row for row in result.rows if row["metric"] == "hubness")
    assert (row["model"], row["pool"], row["dimensions"], row["images"], row["k"]) == (
        "one.safetensors",
        "mean",
        32,
        48,
        4,
    )


def test_labels_are_not_needed(made: Path) -> None:
    plain = values(assessed(made, data="plain"))
    assert plain.keys() == {*MEASURES, "assessed_rank"}
    assert values(assessed(made)).keys() == {*plain, "knn_leave_one_out"}


def test_several_encoders_are_ranked_together(made: Path) -> None:
    result = assessed(made, "one", "two", blocks="all", measure="rankme")
    ranked = result.verdicts
    assert [each.rank for each in ranked] == list(range(1, 9))
    scores = [values(result, model=each.model, blocks=each.blocks)["rankme"] for each in ranked]
    assert scores == sorted(scores, reverse=True)
    for each in ranked:
        assert values(result, model=each.model, blocks=each.blocks, by="rankme") == {"assessed_rank": each.rank}
    assert ranked[0].text.startswith(f"{ranked[0].model}, block {ranked[0].blocks} is the best of 8: RankMe ")


def test_encoders_of_different_sizes_are_not_compared_silently(made: Path, tmp_path: Path) -> None:
    other = str(write_weights(tmp_path / "other.safetensors", architecture=replace(ARCHITECTURE, depth=3)))
    first, second = (str(made / f"{name}.safetensors") for name in ("one", "two"))

    class Warnings(Silent):
        def __init__(self) -> None:
            self.found: list[str] = []

        def warn(self, message: str) -> None:
            self.found.append(message)

    for checkpoints, told in ([first, second], 0), ([first, other], 1):
        listener = Warnings()
        data = DataConfig(spec=str(made / "plain"))
        assess(AssessConfig(checkpoints=checkpoints, device="cpu", workers=0, data=data), listener=listener)
        assert len([line for line in listener.found if "differ in depth" in line]) == told


def test_features_of_views_are_cached(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(monkeypatch)
    first = assessed(made, seed=11, data="plain")
    assert passes.images == 3 * 48
    again = assessed(made, seed=11, data="plain")
    assert (passes.images, passes.built) == (3 * 48, 1) and again.rows == first.rows
    other = assessed(made, seed=12, data="plain")
    assert passes.images == 5 * 48  # new views, but the same crops
    assert values(other)["rankme"] == values(first)["rankme"] and values(other)["lidar"] != values(first)["lidar"]
    unkept = assessed(made, seed=11, data="plain", cache=CacheConfig(folder="off"))
    assert values(unkept) == pytest.approx(values(first), rel=1e-9)


def test_a_limit_chooses_images(made: Path) -> None:
    result = assessed(made, images=20, data="plain")
    source, column = open_source(DataConfig(spec=str(made / "plain")), "train"), Column(4, "cls")
    some = Subset(source, np.arange(0, 48, 3))
    x = extract(network(made), some, PassSettings(TRANSFORM, CPU), [column]).columns[column]
    assert values(result).items() >= {key: pytest.approx(value) for key, value in crop_measures(x).items()}.items()
    assert {row["images"] for row in result.rows if "images" in row} == {16}


def test_very_few_images(made: Path, tmp_path: Path) -> None:
    few = write_images(tmp_path / "17", per_class=17, classes=("",))
    result = assessed(made, data=str(few), blocks="all")
    assert all(np.isfinite(float(row["value"])) for row in result.rows)
    assert next(row["k"] for row in result.rows if "k" in row) == 4
    two = write_images(tmp_path / "2", per_class=2, classes=("",))
    with pytest.raises(UserError, match=r"2 images; measures compare at least 3"):
        assessed(made, data=str(two))


def test_mistakes_are_found_together(made: Path) -> None:
    with pytest.raises(UserError) as raised:
        assessed(made, "one", "gone", data="nowhere", blocks="9")
    assert all(part in str(raised.value) for part in ("gone.safetensors", "nowhere", "block 9"))


def test_views_fit_the_images(made: Path) -> None:
    gray = ArraySource("gray", np.zeros((5, 8, 8), np.uint8), None, None, "train", np.arange(5))
    colour = open_source(DataConfig(spec=str(made / "plain")), "train")

    def fitting(views: ViewsConfig, source: Any, size: int) -> tuple[bool, bool, int]:
        fitted, notes = fitting_views(views, source, size)
        return fitted.color, fitted.blur, len(notes)

    assert [fitting(ViewsConfig(), source, 224) for source in (gray, colour)] == [(False, True, 1), (True, True, 0)]
    assert fitting(ViewsConfig(), gray, 32) == (False, False, 2)
    assert [fitting(ViewsConfig(), colour, size)[1] for size in (63, 64)] == [False, True]
    assert fitting(ViewsConfig(color=True, blur=True), gray, 32) == (True, True, 0)
    assert fitting(ViewsConfig(global_size=32), colour, 224) == (True, False, 1)


def test_sentences() -> None:
    def one(model: str, blocks: str, consistency: float, rank: float = 12.3, hubs: float = 0.5) -> Assessed:
        found = dict.fromkeys(MEASURES, 1.0)
        return Assessed(
            model, blocks, 96, found | {"neighbour_consistency": consistency, "effective_rank": rank, "hubness": hubs}
        )

    spread = "features are spread over 12 of 96 dimensions"
    (alone,) = verdicts([one("a", "last", 20)], "neighbour_consistency")
    assert (alone.rank, alone.text) == (1, f"a: neighbour consistency 20.0%; {spread}")
    blocks = verdicts([one("a", "1", 20), one("a", "2", 30.04), one("a", "3", 20)], "neighbour_consistency")
    assert [(each.blocks, each.rank) for each in blocks] == [("2", 1), ("1", 2), ("3", 2)]
    assert blocks[0].text == f"block 2 is the best of 3: neighbour consistency 30.0%; {spread}"
    assert blocks[1].text == f"block 1 is 2nd of 3: neighbour consistency 20.0%, against 30.0%; {spread}"
    bad = verdicts([one("a", "last", 20), one("b", "last", float("nan"), rank=1.0, hubs=9)], "neighbour_consistency")
    assert bad[1].text == (
        "b: no neighbour consistency, since the features do not vary; features are spread over 1 of 96 dimensions, "
        "which is few; few images are the neighbours of most (hubness 9.0)"
    )
