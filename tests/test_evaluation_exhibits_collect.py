"""From the features of an evaluation to exhibits.json: its contents, what is left out, and its size."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mimref.config.base import DataConfig
from mimref.data.open import open_source
from mimref.data.sources import ArraySource, Subset
from mimref.data.transforms import EvalTransform
from mimref.encoders.vit import build_encoder
from mimref.evaluation.cluster.kmeans import BestRun
from mimref.evaluation.exhibits import collect, maps
from mimref.evaluation.exhibits.collect import Exhibition, Voting, encoder_model
from mimref.evaluation.exhibits.contents import Exhibits
from mimref.evaluation.exhibits.maps import principal_components
from mimref.evaluation.metrics import unit_rows
from mimref.features.encode import Column, Features, PassSettings, extract
from tests.tiny import ARCHITECTURE, Watcher

COLUMN = Column(1, "cls")
SETTINGS = PassSettings(EvalTransform(16, 1.0), torch.device("cpu"))


@pytest.fixture(autouse=True)
def _no_umap(monkeypatch):
    monkeypatch.setattr(maps, "umap_embedding", lambda x, seed: principal_components(x))


def noise(images, y, *, names=None, side=16):
    pixels = np.random.default_rng(images).integers(0, 256, (images, 3, side, side), np.uint8)
    return ArraySource("noise", pixels, y, names, "val", np.arange(images))


def features(source, seed=0, width=8):
    x = np.random.default_rng(seed).normal(size=(len(source), width)).astype(np.float32)
    if source.labels is not None:
        x[np.arange(len(source)), source.labels % width] += 3
    return Features({COLUMN: x}, np.arange(len(source)), source.labels, source.class_names)


def exhibition(source, told=None, **changes):
    return Exhibition(source, SETTINGS, 0, told or Watcher(), **changes)


def test_several_models_are_shown_by_the_same_images(tmp_path):
    y = np.arange(60) % 3
    source = noise(60, y, names=["a", "b", "c"])
    shown = exhibition(source)
    for seed, name in enumerate(("base", "refined")):
        found = features(source, seed)
        x = found.matrix([COLUMN])
        shown.add(name, found, [COLUMN], voting=Voting(x, y, 5, 0.07), best=BestRun(unit_rows(x), 3, 1, 0, 4))
    shown.save(tmp_path)
    made = Exhibits.read(tmp_path)
    assert made is not None
    assert len(made.images) == 60 and len({image.path for image in made.images}) == 60
    assert made.map_images == list(range(60))
    assert {name: points.shape for name, points in made.maps.items()} == {"base": (60, 2), "refined": (60, 2)}
    assert len(made.queries) == 12 and made.queries[0].neighbours.keys() == {"base", "refined"}
    assert [sum(each.size for each in made.clusters[name]) for name in ("base", "refined")] == [60, 60]
    assert made.confusions.keys() == {"base", "refined"}
    for image in made.images:
        row = int(image.path.rpartition("/")[2])
        assert image.label == "abc"[row % 3]
        assert np.asarray(Image.open(io.BytesIO(image.jpeg))).shape == (48, 48, 3)
    again = exhibition(source)
    found = features(source)
    again.add("base", found, [COLUMN], best=BestRun(unit_rows(found.matrix([COLUMN])), 3, 1, 0, 4))
    repeated = again.made()
    assert repeated is not None
    assert repeated.clusters["base"] == made.clusters["base"]
    np.testing.assert_array_equal(repeated.maps["base"], made.maps["base"])


def test_random_state_is_left_alone():
    source = noise(60, np.arange(60) % 3)
    np.random.seed(3)
    torch.manual_seed(3)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    shown = exhibition(source)
    shown.add("base", features(source), [COLUMN])
    assert shown.made() is not None
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_images_without_labels_have_maps_queries_and_clusters():
    source = noise(50, None)
    shown = exhibition(source)
    shown.add("base", features(source), [COLUMN])
    made = shown.made()
    assert made is not None and made.confusions == {}
    assert len(made.map_images) == 50 and len(made.queries) == 12
    assert len(made.clusters["base"]) == 5 and {each.purity for each in made.clusters["base"]} == {None}
    assert {image.label for image in made.images} == {None}


@pytest.mark.parametrize("y", [np.zeros(2, dtype=np.int64), None, np.array([0, 1])])
def test_two_images_have_no_map(y):
    source = noise(2, y)
    shown = exhibition(source)
    shown.add("base", features(source), [COLUMN])
    made = shown.made()
    assert made is not None
    assert (made.map_images, made.maps, made.clusters["base"]) == ([], {}, [])
    assert [query.neighbours["base"] for query in made.queries] == [[1], [0]]
    assert len(made.images) == 2 and any("few images" in note for note in made.notes)


def test_one_class_and_one_image():
    for images in (1, 30):
        source = noise(images, np.zeros(images, dtype=np.int64), names=["only"])
        shown = exhibition(source)
        found = features(source)
        shown.add("base", found, [COLUMN], voting=Voting(found.matrix([COLUMN]), source.labels, 5, 0.07))
        made = shown.made()
        assert made is not None and made.confusions["base"] == []
        assert len(made.images) == images


def test_collapsed_features_are_shown_without_confusions():
    source = noise(120, np.arange(120) % 2)
    found = Features({COLUMN: np.ones((120, 4), np.float32)}, np.arange(120), source.labels)
    shown = exhibition(source)
    shown.add("base", found, [COLUMN], voting=Voting(found.matrix([COLUMN]), source.labels, 5, 0.07))
    made = shown.made()
    assert made is not None and made.confusions["base"] == []


def test_predictions_may_be_of_classes_without_validation_images():
    train_x = np.array([[1, 0.0], [0, 1], [1, 0.1]], dtype=np.float32)
    source = noise(3, np.array([0, 0, 2]), names=["a", "b", "c"])
    found = Features({COLUMN: train_x}, np.arange(3), source.labels, source.class_names)
    shown = exhibition(source)
    shown.add("base", found, [COLUMN], voting=Voting(train_x, np.array([1, 1, 1]), 1, 0.07))
    made = shown.made()
    assert made is not None
    assert {(each.label, each.predicted, each.count) for each in made.confusions["base"]} == {
        ("a", "b", 2),
        ("c", "b", 1),
    }


def test_chosen_rows_alone_are_shown():
    y = np.arange(60) % 3
    source = noise(60, y)
    chosen = np.flatnonzero(y != 1)
    shown = exhibition(source)
    shown.add("base", features(source), [COLUMN], chosen=chosen)
    made = shown.made()
    assert made is not None
    assert {int(image.path.rpartition("/")[2]) % 3 for image in made.images} == {0, 2}
    assert {image.label for image in made.images} == {"0", "2"}


def test_further_models_are_named_in_a_note():
    source = noise(20, np.arange(20) % 2)
    shown = exhibition(source)
    for name in "abcdef":
        shown.add(name, features(source), [COLUMN])
    made = shown.made()
    assert made is not None and list(made.maps) == list("abcd")
    assert any("e, f" in note for note in made.notes)


def test_different_images_of_two_models_are_a_warning():
    told = Watcher()
    source = noise(20, None)
    shown = exhibition(source, told)
    shown.add("base", features(source), [COLUMN])
    fewer = features(source)
    fewer.indices = fewer.indices + 1
    shown.add("refined", fewer, [COLUMN])
    assert shown.made() is None and len(told.warnings) == 1


@pytest.mark.parametrize("where", ["nearest", "number_images"])
def test_a_failure_is_one_warning(monkeypatch, tmp_path, where):
    def fail(*args, **options):
        raise MemoryError("too little")

    told = Watcher()
    monkeypatch.setattr(collect, where, fail)
    source = noise(20, np.arange(20) % 2)
    shown = exhibition(source, told)
    shown.add("base", features(source), [COLUMN])
    shown.add("refined", features(source), [COLUMN])
    shown.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(told.warnings) == 1 and "MemoryError: too little" in told.warnings[0]


def test_features_that_are_not_finite_are_a_warning():
    told = Watcher()
    source = noise(20, None)
    found = features(source)
    found.columns[COLUMN][3] = np.nan
    shown = exhibition(source, told)
    shown.add("base", found, [COLUMN])
    assert shown.made() is None and len(told.warnings) == 1


def test_hostile_names_and_unreadable_images(tmp_path):
    names = [
        "<script>alert(1)</script>",
        '"quo\'ted"',
        "y" * 250,
        b"half\x80".decode("utf-8", "surrogateescape"),
        "ü\n",
    ]
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for name in names:
        place = data / f"{name.replace('/', ':')[:240]}.png"
        Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).save(str(place), "PNG")
    (data / "broken.png").write_bytes(b"no image")
    source = open_source(DataConfig(spec=str(data)), "train")
    encoder = build_encoder(ARCHITECTURE)
    shown = exhibition(source)
    shown.add_passes([encoder_model("<b>", encoder, SETTINGS)])
    shown.save(tmp_path)
    made = Exhibits.read(tmp_path)
    assert made is not None and len(made.images) == 5
    assert any("<script>" in image.path for image in made.images)
    assert all(image.path.isprintable() for image in made.images)
    next(data.glob("y*")).unlink()  # after the features were computed
    again = exhibition(source)
    found = extract(encoder, open_source(DataConfig(spec=str(data)), "train"), SETTINGS, [Column(4, "cls")])
    found.indices = np.arange(6)[~np.array(["broken" in source.path(row) for row in range(6)])]
    found.columns = {COLUMN: np.eye(5, dtype=np.float32)}
    again.add("base", found, [COLUMN])
    repeated = again.made()
    assert repeated is not None and any("1 images" in note for note in repeated.notes)


def test_a_fixed_choice_of_a_large_source(monkeypatch):
    monkeypatch.setattr(collect, "MOST_IMAGES", 10)
    source = noise(95, None)
    shown = Exhibition.of_some(source, SETTINGS, 0, Watcher(), "training images")
    assert isinstance(shown.source, Subset)
    shown.add_passes([("x", COLUMN, features)])
    made = shown.made()
    assert made is not None
    assert [image.path for image in made.images] == [source.path(row) for row in range(0, 95, 10)]
    assert any("10 of the 95 training images" in note for note in made.notes)


def test_labelled_training_images_vote():
    source, train = noise(30, np.arange(30) % 3), noise(40, np.arange(40) % 3)
    shown = exhibition(source)
    shown.add_passes([("x", COLUMN, features)], train, k=3)
    made = shown.made()
    assert made is not None and any("k = 3" in note for note in made.notes)


def test_seven_thousand_images_fit(tmp_path):
    y = np.arange(7000) % 50
    source = noise(7000, y, side=48)
    settings = PassSettings(EvalTransform(48, 1.0), torch.device("cpu"))
    shown = Exhibition(source, settings, 0, Watcher())
    for seed in range(3):
        found = features(source, seed)
        voting = Voting(found.matrix([COLUMN])[:500], y[:500], 10, 0.07)
        best = BestRun(unit_rows(found.matrix([COLUMN])), 50, 0, 0, 1)
        shown.add(f"model {seed}", found, [COLUMN], voting=voting, best=best)
    shown.save(tmp_path)
    assert 1_500_000 < (tmp_path / "exhibits.json").stat().st_size <= 3_000_000
    made = Exhibits.read(tmp_path)
    assert made is not None and len(made.map_images) == 2000
    assert {len(each) for each in made.clusters.values()} == {20}
    assert {len(each) for each in made.confusions.values()} == {20}
    assert any("2000 of the 7000" in note for note in made.notes)


def test_long_paths_leave_room_for_images(monkeypatch):
    source = noise(2000, None)
    monkeypatch.setattr(source, "path", lambda index: f"/{'夏' * 1000}/{index}.png")
    shown = exhibition(source)
    shown.add("base", features(source), [COLUMN])
    made = shown.made()
    assert made is not None and len(made.to_json()) <= 3_000_000
    assert made.images[7].path.startswith("...") and made.images[7].path.endswith("/7.png")
    assert any("paths" in note for note in made.notes)
