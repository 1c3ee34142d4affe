"""Accuracy on corrupted and shifted images, against direct forward passes and plain formulas."""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from mimref.data.transforms import EvalTransform
from mimref.encoders.checkpoints import read_checkpoint
from mimref.encoders.classifier import Classifier, read_classifier, save_classifier
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import UserError, UserErrors
from mimref.results import Row, main_rows
from mimref.transfer.finetune.classify import Scores
from mimref.transfer.finetune.config import PredictConfig
from mimref.transfer.finetune.predict import predict
from mimref.transfer.robustness.config import RobustnessConfig
from mimref.transfer.robustness.corruptions import ALEXNET_ERRORS, CORRUPTIONS, corruption_names
from mimref.transfer.robustness.protocol import evaluate_robustness
from mimref.transfer.robustness.scores import score_rows
from mimref.transfer.robustness.sets import match_classes
from tests.ranks import run_ranks
from tests.tiny import ARCHITECTURE, Watcher, turn, write_images

CLASSES = ("a", "b", "c", "d", "e", "f")
# Error rates of AlexNet at severities 1 to 5: facebookresearch/dinov3, dinov3/eval/metrics/imagenet_c.py.
ALEXNET = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.9487, 0.9872, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.5843, 0.70048, 0.82108, 0.8975, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.9187, 0.94952),
    "frost": (0.6139, 0.79734, 0.8879, 0.89942, 0.9343),
    "fog": (0.67474, 0.7605, 0.84378, 0.8726, 0.945),
    "brightness": (0.4514, 0.48502, 0.54048, 0.62166, 0.7244),
    "contrast": (0.64548, 0.7615, 0.88874, 0.9776, 0.9927),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.5462, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
    "speckle_noise": (0.66192, 0.7444, 0.90246, 0.94548, 0.97268),
    "gaussian_blur": (0.54732, 0.70444, 0.82574, 0.89864, 0.9594),
    "spatter": (0.47196, 0.62194, 0.75052, 0.84132, 0.90182),
    "saturate": (0.59342, 0.65514, 0.51174, 0.70834, 0.8226),
}


def write_classifier(
    folder: Path, *, classes: tuple[str, ...] = CLASSES, architecture: Architecture = ARCHITECTURE, seed: int = 0
) -> Path:
    """A random classifier whose predictions vary and whose header records `folder`/clean as its images."""
    torch.manual_seed(seed)
    classifier = Classifier(build_encoder(architecture), len(classes))
    for parameter in classifier.parameters():
        parameter.data.normal_(std=0.3)
    with torch.inference_mode():
        # Otherwise one class would be predicted for all images.
        classifier.head.bias -= classifier(
            2 * torch.randn(64, 3, 1, 1).expand(-1, -1, *[architecture.image_size] * 2)
        ).mean(0)
    save_classifier(folder / "c.safetensors", classifier, classes, {"data": {"spec": str(folder / "clean")}})
    return folder / "c.safetensors"


def write_noise(folder: Path, seed: int, *, per_class: int = 2, classes: tuple[str, ...] = CLASSES) -> None:
    """PNGs of random colours in `folder`/class, so that a classifier's predictions differ."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = np.clip(rng.uniform(0, 256, 3) + rng.normal(0, 20, (20, 16, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")


def write_imagenet_c(root: Path, names: tuple[str, ...] = CORRUPTIONS) -> Path:
    for name in names:
        for severity in range(1, 6):
            write_noise(root / name / str(severity), 10 * CORRUPTIONS.index(name) + severity)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of six classes, its clean images, an ImageNet-C made of noise, and a set of three of the classes."""
    made = tmp_path_factory.mktemp("robustness")
    write_classifier(made)
    write_noise(made / "clean", 1000, per_class=3)
    write_imagenet_c(made / "c")
    write_noise(made / "some", 2000, per_class=8, classes=("b", "d", "e"))
    return made


def config(folder: Path, **settings: Any) -> RobustnessConfig:
    return RobustnessConfig(**{"checkpoint": str(folder / "c.safetensors"), "device": "cpu", "workers": 0} | settings)


@cache
def classifier_of(folder: Path) -> tuple[Classifier, list[str]]:
    classifier, classes = read_classifier(read_checkpoint(str(folder / "c.safetensors")))
    return classifier.double(), classes


def top1(folder: Path, images: Path, among: tuple[str, ...] = CLASSES) -> float:
    """Accuracy by one forward pass per file, in float64."""
    classifier, classes = classifier_of(folder)
    transform, hits, count = EvalTransform(16), 0, 0
    columns = [classes.index(name) for name in among]
    for path in sorted(images.rglob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        batch = transform.normalize(transform.crop(pixels)[None], torch.float64)
        with torch.inference_mode():
            logits = classifier(batch)[0, columns]
        hits += among[int(logits.argmax())] == path.parent.name
        count += 1
    return 100 * hits / count


def values(rows: list[Row], metric: str, **where: str | int) -> list[float]:
    """Values of the rows with exactly these settings, whatever the model and the numbers of images and classes."""
    found = []
    for row in rows:
        ignored = {"model", "metric", "value", "images", "classes"} - where.keys()
        if row["metric"] == metric and {key: row[key] for key in row if key not in ignored} == where:
            found.append(float(row["value"]))
    return found


def test_imagenet_c_is_as_forward_passes_and_plain_loops(folder: Path) -> None:
    result = evaluate_robustness(config(folder, imagenet_c=str(folder / "c")))
    assert values(result.rows, "clean_top1", set=str(folder / "clean")) == [top1(folder, folder / "clean")]
    expected = {name: [top1(folder, folder / "c" / name / str(level)) for level in range(1, 6)] for name in CORRUPTIONS}
    assert len({value for found in expected.values() for value in found}) > 3  # the expected values differ
    for name, found in expected.items():
        for level, value in enumerate(found, 1):
            where: Row = {"set": "imagenet-c", "corruption": name, "severity": level}
            assert values(result.rows, "robust_top1", **where) == [pytest.approx(value)]
        assert values(result.rows, "robust_top1", set="imagenet-c", corruption=name) == [pytest.approx(sum(found) / 5)]
    for count in (15, 19):
        mean, mce = 0.0, 0.0
        for name in CORRUPTIONS[:count]:
            mean += sum(expected[name]) / 5 / count
            errors = [1 - value / 100 for value in expected[name]]
            mce += 100 * sum(errors) / sum(ALEXNET[name]) / count
        assert values(result.rows, "robust_mean_top1", set="imagenet-c", corruptions=count) == [pytest.approx(mean)]
        assert values(result.rows, "robust_mce", set="imagenet-c", corruptions=count) == [pytest.approx(mce)]
    assert [row["metric"] for row in result.rows[:5]] == ["clean_top1", *["robust_mean_top1", "robust_mce"] * 2]
    assert len(result.rows) == 1 + 4 + 19 + 95 and len(main_rows(result.rows)) == 1 + 4 + 19
    assert {row["model"] for row in result.rows} == {"c.safetensors"}


def test_alexnets_errors_are_the_means_of_the_published_ones() -> None:
    assert ALEXNET.keys() == ALEXNET_ERRORS.keys()
    for name, by_severity in ALEXNET.items():
        assert ALEXNET_ERRORS[name] == pytest.approx(100 * sum(by_severity) / 5, abs=1e-4)


def of_severities(name: str, accuracies: list[float], severities: list[int] | None = None) -> list[tuple[Row, Scores]]:
    return [
        ({"metric": "robust_top1", "set": name, "corruption": each, "severity": level}, Scores(accuracy, None, 10))
        for each, accuracy in zip(CORRUPTIONS, accuracies, strict=False)
        for level in severities or range(1, 6)
    ]


def test_alexnet_has_an_mce_of_100() -> None:
    rows = score_rows(of_severities("imagenet-c", [100 - error for error in ALEXNET_ERRORS.values()]))
    assert [row["value"] for row in rows if row["metric"] == "robust_mce"] == pytest.approx([100, 100])


def test_only_complete_means_are_imagenet_cs() -> None:
    counts = {}
    for given in (3, 15, 17, 19):
        rows = score_rows(of_severities("imagenet-c", [50.0] * given))
        counts[given] = [(row["set"], row["corruptions"]) for row in rows if row["metric"] == "robust_mean_top1"]
        assert sum(row["metric"] == "robust_mce" for row in rows) == {3: 0, 15: 1, 17: 1, 19: 2}[given]
    official = ("imagenet-c", 15)
    assert counts == {
        3: [("imagenet-c, incomplete", 3)],
        15: [official],
        17: [official],
        19: [official, ("imagenet-c", 19)],
    }


def test_own_corrupted_images_have_a_drop_and_no_mce() -> None:
    clean: tuple[Row, Scores] = ({"metric": "clean_top1", "set": "x"}, Scores(80.0, None, 10))
    rows = score_rows([clean, *of_severities("x, corrupted", [60.0, 20.0], [2, 4])])
    common = {"set": "x, corrupted", "corruptions": 2, "severities": "2,4"}
    assert rows[1:3] == [
        {"metric": "robust_mean_top1", "value": 40.0, **common},
        {"metric": "robust_drop", "value": 50.0, **common},
    ]
    seventeen = score_rows([clean, *of_severities("x, corrupted", [40.0] * 15 + [80.0] * 2)])
    means = [(row["corruptions"], row["value"]) for row in seventeen if row["metric"] == "robust_mean_top1"]
    assert means == [(15, pytest.approx(40)), (17, pytest.approx((15 * 40 + 2 * 80) / 17))]


def test_only_the_classes_of_a_subset_compete(folder: Path) -> None:
    some, names = folder / "some", ("b", "d", "e")
    restricted, whole = top1(folder, some, names), top1(folder, some)
    assert restricted != whole
    own: dict[str, Any] = {"shifted": [str(some)]}
    rows = evaluate_robustness(config(folder, imagenet_a=str(some), imagenet_r=str(some), sketch=str(some), **own)).rows
    for name in ("imagenet-a", "imagenet-r", str(some)):
        assert values(rows, "robust_top1", set=name, classes=3) == [pytest.approx(restricted)]
    assert values(rows, "robust_top1", set="imagenet-sketch") == [pytest.approx(whole)]
    rows = evaluate_robustness(config(folder, subset=False, **own)).rows
    assert values(rows, "robust_top1", set=str(some)) == [pytest.approx(whole)]


def test_groups_of_corruptions_may_have_folders(folder: Path, tmp_path: Path) -> None:
    for group, name in (("noise", "gaussian_noise"), ("blur", "zoom_blur")):
        shutil.copytree(folder / "c" / name, tmp_path / group / name)
    heard = Watcher()
    rows = evaluate_robustness(config(folder, imagenet_c=str(tmp_path)), listener=heard).rows
    assert {row["corruption"] for row in rows if "corruption" in row} == {"gaussian_noise", "zoom_blur"}
    assert values(rows, "robust_mean_top1", set="imagenet-c, incomplete", corruptions=2)
    (warning,) = heard.warnings
    assert "shot_noise, impulse_noise" in warning and "zoom" not in warning


def evaluate_on_rank(folder: str) -> list[Row]:
    where = Path(folder)
    shifted = [str(where / "some"), str(where / "c" / "fog" / "1")]
    return evaluate_robustness(config(where, imagenet_a=str(where / "some"), shifted=shifted)).rows


def test_two_ranks_give_the_rows_of_one(folder: Path, tmp_path: Path) -> None:
    assert run_ranks(evaluate_on_rank, 2, tmp_path, str(folder)) == [evaluate_on_rank(str(folder))] * 2


def test_imagenets_classes_are_found_by_wnid_number_and_words() -> None:
    wnids = ["n01440764", "n02480495", "n15075141"]
    numbers = [0, 365, 999]
    assert match_classes(wnids, [str(number) for number in range(1000)]).tolist() == numbers
    words = [f"class {number}" for number in range(1000)]
    words[7], words[3] = "tench, Tinca tinca", "orangutan, orang, orangutang, Pongo pygmaeus"
    assert match_classes(wnids[:2], words).tolist() == [7, 3]
    assert match_classes(["b", "a"], ["a", "b"]).tolist() == [1, 0]
    with pytest.raises(UserError, match="n01440764"):
        match_classes(wnids, [str(number) for number in range(10)])


def test_the_two_cranes_of_imagenet_are_told_apart_by_position() -> None:
    info: Any = ImageNetInfo()
    words, cranes = info.label_descriptions(), ["n02012849", "n03126707"]
    assert match_classes([*cranes, "n01440764"], words).tolist() == [134, 517, 0]
    words[517] = "construction crane"
    assert match_classes(cranes[:1], words).tolist() == [134]
    with pytest.raises(UserError, match="n03126707"):
        match_classes(cranes, words)
    with pytest.raises(UserError, match="'tench, Tinca tinca' and 'n01440764'"):
        match_classes([words[0], "n01440764"], words)


def test_shifted_sets_have_the_users_root_and_columns(folder: Path, tmp_path: Path) -> None:
    lines = [f"{path},{path.parent.name},val" for path in (folder / "some").rglob("*.png")]
    (tmp_path / "own.csv").write_text("\n".join(["mine,kind,split", *lines]))
    place = tmp_path / "root" / "svhn"
    write_noise(place, 3, classes=("x",))
    for name in ("train800val200", "test"):
        (place / f"{name}.txt").write_text("x/0.png 0\nx/1.png 1\n")
    write_classifier(tmp_path, classes=("0", "1", "b", "d", "e"))
    specs = [f"list:{tmp_path / 'own.csv'}", "vtab1k:svhn", str(folder / "some")]
    data = {"root": str(tmp_path / "root"), "image": "mine", "label": "kind"}
    rows = evaluate_robustness(config(tmp_path, shifted=specs, data=data)).rows
    listed, named, plain = (row for row in rows if row["metric"] == "robust_top1")
    assert [row["images"] for row in (listed, named, plain)] == [24, 2, 24] and listed["value"] == plain["value"]
    (line,) = errors_of(config(tmp_path, shifted=specs, data=data | {"spec": str(folder / "some")}))
    assert "data.image" in line


def test_names_of_corruptions() -> None:
    assert corruption_names("15") == list(CORRUPTIONS[:15]) and corruption_names("19") == list(CORRUPTIONS)
    assert corruption_names("fog, snow") == ["snow", "fog"]
    with pytest.raises(ValueError, match="'fog'"):
        corruption_names("fogg")


# --- bad input


def errors_of(checked: RobustnessConfig, listener: Watcher | None = None) -> list[str]:
    with pytest.raises(UserError) as caught:
        evaluate_robustness(checked, listener=listener)
    error = caught.value
    return [str(each) for each in error.errors] if isinstance(error, UserErrors) else [str(error)]


def test_wrong_sets_are_named_together(folder: Path, tmp_path: Path) -> None:
    write_noise(tmp_path / "other", 1, classes=("x", "y"))
    write_noise(tmp_path / "mixed", 1, classes=("a", "bb"))
    write_images(tmp_path / "flat", per_class=3, classes=("",))
    shutil.copytree(folder / "c" / "fog", tmp_path / "c" / "fog")
    shutil.rmtree(tmp_path / "c" / "fog" / "3")
    wrong = config(
        folder,
        imagenet_c=str(tmp_path / "c"),
        imagenet_a=str(tmp_path / "other"),
        imagenet_r=str(tmp_path / "nowhere"),
        sketch=str(tmp_path / "flat"),
        shifted=[str(tmp_path / "mixed")],
    )
    found = errors_of(wrong)
    for flag, *parts in (
        ("--imagenet-c", "fog", "3"),
        ("--imagenet-a", "none of its 2 classes", "x, y", "6"),
        ("--imagenet-r", "nowhere"),
        ("--sketch", "flat", "folder for each class"),
        ("--shifted", "bb"),
    ):
        (line,) = [line for line in found if flag in line]
        assert all(part in line for part in parts) and "--data" not in line
    assert len(found) == 5


def test_a_folder_without_corruptions_and_no_set_at_all(folder: Path) -> None:
    (line,) = errors_of(config(folder, imagenet_c=str(folder / "some")))
    assert "--imagenet-c" in line and "gaussian_noise" in line
    (line,) = errors_of(config(folder, imagenet_c=str(folder / "nowhere")))
    assert "nowhere" in line
    (line,) = errors_of(config(folder))
    assert "--imagenet-c" in line and "--corrupt" in line


def test_weights_without_a_classifier(folder: Path) -> None:
    (line,) = errors_of(config(folder, checkpoint="quickstart", shifted=[str(folder / "some")]))
    assert "finetune" in line


def test_clean_images_that_are_gone_are_a_warning_unless_they_are_asked_for(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "c.safetensors", tmp_path)
    write_classifier(tmp_path)
    heard = Watcher()
    rows = evaluate_robustness(config(tmp_path, shifted=[str(folder / "some")]), listener=heard).rows
    assert [row["metric"] for row in rows] == ["robust_top1"] and "clean" in heard.warnings[0]
    (line,) = errors_of(config(tmp_path, shifted=[str(folder / "some")], data={"spec": str(tmp_path / "clean")}))
    assert "--data" in line and str(tmp_path / "clean") in line


def test_incomplete_sets_are_a_warning_each(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "c" / "fog", tmp_path / "fog")
    shutil.rmtree(tmp_path / "fog" / "2" / "a")
    given = {"imagenet_c": str(tmp_path), "sketch": str(folder / "some"), "imagenet_a": str(folder / "clean")}
    heard = Watcher()
    evaluate_robustness(config(folder, **given, shifted=[str(folder / "some")]), listener=heard)
    missing, classes, sizes, *others = heard.warnings
    assert "lacks" in missing and f"{tmp_path / 'fog' / '2'}: images of 5 of 6 classes" in classes
    assert "10 images" in sizes and "12" in sizes
    assert {"images of 3 of 6 classes", "images of 6 of 200 classes"} == {
        line.partition(": ")[2].partition(";")[0] for line in others
    }


def test_the_limit_on_unreadable_images_is_that_of_all_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [("1.png", "empty file"), ("2.png", "empty file")]
    monkeypatch.setattr("mimref.transfer.finetune.classify.gather_lists", lambda own: [*own, *bad])
    shifted = [str(folder / "some")]
    assert evaluate_robustness(config(folder, shifted=shifted, data={"max_bad": 2})).bad_images == bad
    (line,) = errors_of(config(folder, shifted=shifted, data={"max_bad": 1}))
    assert "2 images" in line and "data.max_bad=1" in line


def test_peculiar_images_of_every_set_are_reported(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "some", tmp_path / "some")
    turn(tmp_path / "some" / "b" / "3.png")
    write_imagenet_c(tmp_path / "c", ("fog", "snow"))
    for severity in range(1, 6):
        turn(tmp_path / "c" / "fog" / str(severity) / "a" / "0.png")
    heard = Watcher()
    evaluate_robustness(
        config(folder, shifted=[str(tmp_path / "some")], imagenet_c=str(tmp_path / "c")), listener=heard
    )
    lines = [line for line in heard.warnings if "EXIF orientation" in line]
    assert len(lines) == 2 and {line[:20] for line in lines} == {"1 of 24 images of /t", "1 of 12 images of im"}
    predicting = PredictConfig.model_validate(
        {"checkpoint": str(folder / "c.safetensors"), "data": {"spec": str(tmp_path / "some")}, "workers": 0}
    )
    predict(predicting, out=tmp_path / "labels.csv", listener=heard)
    assert heard.warnings[-1].startswith("1 of 24 images have an EXIF orientation")


def test_an_unreadable_image_is_reported_and_not_counted(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "some", tmp_path / "some")
    broken = tmp_path / "some" / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    heard = Watcher()
    result = evaluate_robustness(config(folder, shifted=[str(tmp_path / "some")]), listener=heard)
    assert [path for path, _ in result.bad_images] == [str(broken)] and str(broken) in heard.warnings[-1]
    assert [row["images"] for row in result.rows if row["metric"] == "robust_top1"] == [23]
