"""`mimref.Embedder`: the features of `mimref extract`, in pipelines of scikit-learn."""

import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

import mimref
from mimref.cli import run
from mimref.data.readers.named import open_digits
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.vit import Encoder, build_encoder
from mimref.errors import CheckpointError, ConfigError, DataError
from tests.tiny import ARCHITECTURE, write_images, write_weights

DIGITS = open_digits("val")


@pytest.fixture
def weights(tmp_path: Path) -> str:
    return str(write_weights(tmp_path / "e.safetensors"))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in every pass of an encoder."""
    found: list[int] = []
    blocks = Encoder.blocks

    def counted(self: Encoder, images: Any, *args: Any, **options: Any) -> Any:
        found.append(len(images))
        return blocks(self, images, *args, **options)

    monkeypatch.setattr(Encoder, "blocks", counted)
    return found


def test_the_features_are_those_of_extract(weights: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=3)
    for number, image in enumerate(sorted(folder.rglob("*.png"))):
        Image.open(image).resize((20 + number, 30)).save(image)
    out = tmp_path / "f.npz"
    command = ["extract", weights, "--data", str(folder), "--split", "train", "--blocks", "2,4", "--pool", "cls+mean"]
    assert run([*command, "--final-norm", "--out", str(out), "--quiet", "--device", "cpu"]) == 0
    saved = np.load(out)
    embedder = mimref.Embedder(weights, blocks=[2, 4], pool="cls+mean", final_norm=True, device="cpu")
    paths = list(saved["paths"])
    pictures: list[Any] = [Image.open(path) for path in paths]
    for images in (paths, pictures, [np.array(picture) for picture in pictures]):
        found = embedder.fit_transform(images)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, saved["x"].reshape(len(paths), -1))
    np.testing.assert_array_equal(
        mimref.Embedder(weights, blocks=4, workers=2, device="cpu").transform(paths).shape, (6, 32)
    )


def test_the_packaged_encoder_on_digits() -> None:
    expected = mimref.extract(mimref.load("quickstart"), DIGITS.images[:50], device="cpu").x
    embedder = mimref.Embedder(device="cpu")
    np.testing.assert_array_equal(embedder.transform(DIGITS.images[:50]), expected)
    smaller = mimref.Embedder(device="cpu", batch_size=7).transform(DIGITS.images[:50])
    np.testing.assert_allclose(smaller, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("blocks", "width"), [("last", 1), ("last4", 4), ("all", 4), ("1,3", 2), (2, 1), ([1, 2, 3], 3), (np.int64(2), 1)]
)
def test_blocks(blocks: Any, width: int, weights: str) -> None:
    embedder = mimref.Embedder(weights, blocks=blocks, device="cpu").fit(DIGITS.images[:2])
    assert embedder.transform(DIGITS.images[:2]).shape == (2, 32 * width)
    assert len(embedder.get_feature_names_out()) == 32 * width


def test_names_and_tables(weights: str) -> None:
    embedder = mimref.Embedder(weights, blocks=[1, 4], pool="cls+mean", final_norm=True, device="cpu")
    names = embedder.get_feature_names_out()
    assert list(names[[0, 32, 64, -1]]) == [
        "block1_cls_0",
        "block1_mean_0",
        "block4_cls_normed_0",
        "block4_mean_normed_31",
    ]
    assert len(set(names)) == len(names) == 128
    table = embedder.set_output(transform="pandas").transform(DIGITS.images[:3])
    assert list(table.columns) == list(names) and table.shape == (3, 128)


def test_a_pipeline_and_a_search(weights: str, tmp_path: Path, passes: list[int]) -> None:
    """The images of a fold are encoded once: the cache serves the other settings of the classifier."""
    train, labels = DIGITS.images[:60], DIGITS.labels[:60]  # type: ignore[index]
    embedder = mimref.Embedder(weights, cache=tmp_path / "cache", device="cpu")
    pipeline = make_pipeline(embedder, LogisticRegression(tol=0.1))
    grid = {"logisticregression__C": [0.1, 1.0], "embedder__pool": ["cls", "mean"]}
    search = GridSearchCV(pipeline, grid, cv=2, n_jobs=1).fit(train, labels)
    assert search.best_estimator_.predict(train[:5]).shape == (5,)
    # 30 images of each of two folds with each of two poolings; all 60 with the best pooling; 5 to predict.
    assert sorted(passes) == [5, 30, 30, 30, 30, 60]


def test_the_cache(weights: str, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    images = DIGITS.images[:4]
    first = mimref.Embedder(weights, device="cpu", cache=str(tmp_path / "c")).transform(images)
    assert len(passes) == 1
    again = mimref.Embedder(weights, device="cpu", cache=tmp_path / "c").transform(list(images))
    np.testing.assert_array_equal(again, first)
    assert len(passes) == 1
    mimref.Embedder(weights, device="cpu", cache=tmp_path / "c").transform(images[::-1])
    mimref.Embedder(weights, device="cpu", cache=tmp_path / "c", resolution=24).transform(images)
    mimref.Embedder(weights, device="cpu").transform(images)
    mimref.Embedder(weights, device="cpu", cache=False).transform(images)
    assert len(passes) == 5
    monkeypatch.setenv("MIMREF_CACHE", str(tmp_path / "own"))
    mimref.Embedder(weights, device="cpu", cache=True).transform(images)
    assert (tmp_path / "own" / "features").is_dir()


def test_the_weights_are_read_once(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mimref.features import inputs

    read: list[str] = []
    original = inputs.read_checkpoint
    monkeypatch.setattr(
        inputs, "read_checkpoint", lambda *args, **options: read.append("") or original(*args, **options)
    )
    embedder = mimref.Embedder(weights, device="cpu").fit(DIGITS.images[:2])
    for _ in range(3):
        embedder.transform(DIGITS.images[:2])
    assert len(read) == 1
    embedder.set_params(pool="mean").transform(DIGITS.images[:2])
    assert len(read) == 2


def test_clones_and_pickles(weights: str) -> None:
    embedder = mimref.Embedder(weights, blocks=[2], device="cpu").fit(DIGITS.images[:2])
    features = embedder.transform(DIGITS.images[:2])
    assert clone(embedder).get_params() == embedder.get_params() and not hasattr(clone(embedder), "weights_")
    stored = pickle.dumps(embedder)
    assert len(stored) < 5_000  # without the weights
    np.testing.assert_array_equal(pickle.loads(stored).transform(DIGITS.images[:2]), features)
    # Other weights under the same name would silently give other features.
    save_encoder(Path(weights), build_encoder(ARCHITECTURE), {"source": "mae"})
    torch.manual_seed(5)
    write_weights(Path(weights), seed=5)
    with pytest.raises(CheckpointError, match="fit again"):
        pickle.loads(stored).transform(DIGITS.images[:2])
    pickle.loads(stored).fit(DIGITS.images[:2]).transform(DIGITS.images[:2])


def test_nothing_has_to_be_fitted(weights: str) -> None:
    embedder = mimref.Embedder(weights, device="cpu")
    check_is_fitted(embedder)
    before = vars(embedder).copy()
    embedder.transform(DIGITS.images[:2])
    assert {key: value for key, value in vars(embedder).items() if key != "_loaded"} == before


# The checks of scikit-learn's `check_estimator` that need no X: the others call `fit` with tables of numbers.
CHECKS = (
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_do_not_raise_errors_in_init_or_set_param",
    "check_valid_tag_types",
    "check_estimator_tags_renamed",
)


@pytest.mark.parametrize("name", CHECKS)
def test_checks_of_scikit_learn(name: str) -> None:
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip(f"this scikit-learn has no {name}")
    embedder = mimref.Embedder(device="cpu")
    first = next(iter(inspect.signature(check).parameters))
    check("Embedder", embedder) if first == "name" else check(embedder)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"checkpoint": "gone.pth"}, CheckpointError, "gone.pth"),
        ({"blocks": 9}, ConfigError, "block 9"),
        ({"blocks": "x"}, ConfigError, "'x'"),
        ({"blocks": [None]}, ConfigError, "None"),
        ({"pool": "max"}, ConfigError, "max"),
        ({"resolution": 20}, ConfigError, "20"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"device": "tpu"}, ConfigError, "tpu"),
        ({"workers": -1}, ConfigError, "workers"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], error: type[Exception], words: str, weights: str) -> None:
    embedder = mimref.Embedder(**({"checkpoint": weights, "device": "cpu"} | settings))
    for call in (embedder.fit, embedder.transform):
        with pytest.raises(error, match=words):
            call(DIGITS.images[:2])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [None, True])
def test_unreadable_files_are_named(workers: int, cache: bool | None, weights: str, tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(write_images(tmp_path / "i", per_class=2).rglob("*.png"))]
    Path(paths[2]).write_bytes(b"no image")
    with pytest.raises(DataError, match=paths[2]):
        mimref.Embedder(weights, device="cpu", workers=workers, cache=cache).transform(paths)


def test_tables_of_numbers_are_refused(weights: str) -> None:
    with pytest.raises(DataError, match=r"\(3, 64\)"):
        mimref.Embedder(weights, device="cpu").fit(np.zeros((3, 64)))


def test_the_example_in_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Embedder" in block)
    exec(compile(example, "docs/python.md", "exec"), {})
    scores = [float(score) for score in capsys.readouterr().out.strip(" []\n").split()]
    assert len(scores) == 3 and min(scores) > 0.8
