"""Model cards: the header that the hub reads, and text that is shown verbatim."""

import json
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from mimref.data.transforms import EvalTransform
from mimref.encoders.checkpoints import Checkpoint, save_encoder
from mimref.encoders.classifier import Classifier
from mimref.encoders.vit import Architecture, build_encoder
from mimref.reports.model_card import card_header, escape_markdown, model_card
from mimref.sharing.export import folder_layout, read_subject
from mimref.sharing.layout import Library, Subject
from mimref.sharing.record import Record, is_public, last_part, read_record, shareable_data
from tests.families import FAMILIES, backbone

TINY = Architecture("custom", 16, width=32, depth=2, num_heads=2, patch_size=4)
ENCODER = Subject(build_encoder(TINY), EvalTransform(16))
ROWS: list[Any] = [
    {"model": "raw pixels", "metric": "knn_top1", "value": 50.0, "k": 10, "tau": 0.07},
    {"model": "base", "metric": "knn_top1", "value": 81.25, "k": 10, "tau": 0.07, "blocks": "last"},
    {"model": "refined", "metric": "knn_top1", "value": 84.14, "k": 10, "tau": 0.07, "blocks": "last"},
    {"model": "refined", "metric": "lowshot_top1", "value": 58.7, "std": 4.3, "shots": 1},
    {"model": "refined", "metric": "silhouette", "value": float("nan")},
]
RECORD = Record(
    "mae refined", "CC-BY-NC-4.0", "refine", "refine/x", "fashion-mnist", True, "facebook/vit-mae-base", ROWS
)
HOSTILE = [
    "<script>alert(1)</script>",
    "a | b",
    "*bold* _it_ `code`",
    "[link](http://x.y)",
    "1. one",
    "- two",
    "# three",
    "---",
    "a\nb: c\n---",
    "&lt;",
    "\udcff",
    "ä 日本 🙂",
    "{{ 7 * 7 }}{% raw %}",
    "\"quoted\" 'single' \\ back",
    "https://example.org www.example.org",
]


def card(
    subject: Subject = ENCODER, record: Record = RECORD, title: str = "my-model", library: Library = "timm"
) -> str:
    return model_card(title, subject, folder_layout(subject, library), record)


def with_classes(classes: list[str]) -> Subject:
    return Subject(ENCODER.encoder, ENCODER.transform, {}, Classifier(ENCODER.encoder, len(classes)), classes)


def header_of(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return loaded


def test_the_header() -> None:
    header = header_of(card())
    assert header == card_header("my-model", ENCODER, folder_layout(ENCODER, "timm"), RECORD)
    assert header["license"] == "cc-by-nc-4.0" and header["base_model"] == "facebook/vit-mae-base"
    assert header["library_name"] == "timm" and header["pipeline_tag"] == "image-feature-extraction"
    assert header["tags"] == ["mimref", "vision", "mae", "timm", "transformers"]
    assert header["datasets"] == ["zalando-datasets/fashion_mnist"]
    (index,) = header["model-index"]
    (result,) = index["results"]
    assert index["name"] == "my-model" and result["dataset"]["name"] == "fashion-mnist"
    metrics = {metric["name"]: (metric["type"], metric["value"]) for metric in result["metrics"]}
    assert metrics == {"k-NN top-1": ("knn_top1", 84.14), "1-shot top-1": ("lowshot_top1", 58.7)}


def test_the_hub_parses_the_card(tmp_path: Path) -> None:
    """The hub's own client reads the card, including its model-index."""
    (tmp_path / "README.md").write_text(card(with_classes(HOSTILE)), encoding="utf-8")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license == "cc-by-nc-4.0" and data.pipeline_tag == "image-classification"
    assert data.eval_results is not None and data.eval_results[0].metric_value == 84.14


@pytest.mark.parametrize("family", ["swin", "gray"])
def test_other_families(family: str) -> None:
    subject = Subject(backbone(FAMILIES[family]), EvalTransform(32))
    text = card(subject)
    assert "timm calls swin_tiny_patch4_window7_224" in text and "attention heads" not in text
    assert ("computes their luma itself" in text) == (family == "gray") and "red, green and blue" in text


def test_other_channels() -> None:
    encoder = build_encoder(replace(TINY, channels=5))
    subject = Subject(encoder, EvalTransform(16, mean=(0.5,) * 5, std=(0.2,) * 5))
    text = card(subject)
    assert "the 5 channels" in text and "(B, 5, 16, 16)" in text and "PIL" not in text


def test_what_is_not_known_is_left_out() -> None:
    header = header_of(card(record=Record()))
    assert header.keys() == {"library_name", "pipeline_tag", "tags"}
    text = card(record=Record())
    assert "None are recorded" in text and "Not recorded" in text and "| None" not in text


@pytest.mark.parametrize(
    ("licence", "found"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("CC-BY-NC 4.0", {"license": "cc-by-nc-4.0"}),
        ("My own: terms", {"license": "other", "license_name": "my-own-terms"}),
    ],
)
def test_licences(licence: str, found: dict[str, str]) -> None:
    header = header_of(card(record=replace(RECORD, licence=licence)))
    assert {key: header[key] for key in header if key.startswith("license")} == found


def test_base_and_refined_stand_side_by_side() -> None:
    (line,) = (line for line in card().splitlines() if line.startswith("| k-NN top-1"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["k-NN top-1", "50.0", "81.2", "84.1"]
    assert "58.7 ± 4.3" in card()


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_code_names_the_library(library: Library) -> None:
    text = card(library=library)
    assert ("local-dir:my-model" in text) == (library == "timm")
    assert ("AutoModel.from_pretrained" in text) == (library == "transformers")
    assert "transformers rounds" in text if library == "transformers" else "transformers rounds" not in text


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is(text: str) -> None:
    """A Markdown renderer shows the same characters and adds only a paragraph, list item or cell."""
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    shown = text.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")
    assert render(escaped) == f"<p>{shown}</p>"
    assert render(f"| a |\n|---|\n| {escaped} |").count("<td>") == 1
    assert f"<li>{shown}</li>" in render(f"0. {escaped}")


def render(text: str) -> str:
    return unescape(MarkdownIt("commonmark").enable("table").render(text)).strip()


def test_hostile_names_in_a_card() -> None:
    subject = with_classes(HOSTILE)
    record = replace(RECORD, data="<b>|", preset="*p*", settings='name = "````"\n')
    text = card(subject, record, title="x/`y`")
    assert header_of(text)["model-index"][0]["name"] == "x/`y`"
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body and "<b>" not in body and "49" not in body.split("## Classes")[1].split("##")[0]
    assert '`````toml\nname = "````"\n`````' in text


def test_many_classes_are_cut() -> None:
    assert "and 50 more" in card(with_classes([f"c{number}" for number in range(150)]))


# --- what is known about a run


def run_folder(folder: Path, **config: Any) -> Path:
    header = {"source": "mae refined", "data": {"spec": str(folder / "private")}, "preset": str(folder / "p.toml")}
    folder.mkdir(exist_ok=True)
    save_encoder(folder / "encoder.safetensors", ENCODER.encoder, header)
    (folder / "results.json").write_text(json.dumps({"command": "refine", "metrics": ROWS}).replace("NaN", "null"))
    (folder / "config.toml").write_text(
        f'out = "{folder}"\nheads_from = "~/x"\n[encoder]\nweights = "mae_b16"\n[data]\nspec = "list:{folder}/a.csv"\n'
    )
    return folder


def test_a_run_is_described_without_places(tmp_path: Path) -> None:
    subject, checkpoint = read_subject(run_folder(tmp_path / "run"))
    record = read_record(checkpoint)
    assert (record.command, record.preset, record.data, record.data_is_public) == ("refine", "p.toml", "private", False)
    assert record.base_model == "facebook/vit-mae-base" and len(record.rows) == len(ROWS)
    text = card(subject, record)
    assert str(tmp_path) not in text and "~" not in text
    assert 'spec = "list:a.csv"' in text and 'out = "run"' in text
    assert header_of(text)["model-index"][0]["results"][0]["dataset"] == {"name": "private", "type": "private"}


def test_damaged_files_beside_the_weights_are_ignored(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for damage in ("{", "[]", '{"command": 3}', '{"command": "refine", "metrics": [3, {}]}'):
        (folder / "results.json").write_text(damage)
        (folder / "config.toml").write_text("= broken")
        record = read_record(read_subject(folder)[1])
        assert record.rows == [] and record.settings == ""


def test_a_file_alone(tmp_path: Path) -> None:
    header = {"source": "mae", "metrics": [{"metric": "knn_top1", "value": 81.8}]}
    record = read_record(Checkpoint(tmp_path / "a.safetensors", {}, header, source="mae"))
    assert record.command is None and record.rows == header["metrics"]
    assert "| k-NN top-1 | 81.8 |" in card(record=record)


def test_addresses_are_reduced_to_their_last_part() -> None:
    for text, shown in (
        ("wds:https://user:token@host/dir/{split}-{000..127}.tar", "wds:{split}-{000..127}.tar"),
        ("wds:s3://private-bucket/a/b.tar", "wds:b.tar"),
        ("https://host/weights.pth", "weights.pth"),
        ("https://host/", "images"),
        ("list:/data/a.csv", "list:a.csv"),
        ("digits", "digits"),
    ):
        assert last_part(text) == shown


def test_public_data() -> None:
    public = ("digits", "fashion-mnist", "torchvision:CIFAR10", "vtab:caltech101", "hf:cifar10", "hf:owner/name")
    private = ("/data/x", "images", "list:/a.csv", "hf:/a/b", "wds:/x/{0..3}.tar", "hf:a/b/c/d")
    assert [is_public(spec) for spec in (*public, *private)] == [True] * len(public) + [False] * len(private)
    assert shareable_data(None) == {} and shareable_data({"spec": 3}) == {}


def test_measures_without_labels_are_not_shown_as_accuracies() -> None:
    rows: list[Any] = [{"model": "refined", "metric": "rankme", "value": 7.2, "images": 60}]
    text = card(record=replace(RECORD, rows=rows))
    assert "model-index" not in header_of(text)
    assert "RankMe" in text and "Measures without labels" in text and "In percent" not in text
    assert "In percent" in card() and "Measures without labels" not in card()
