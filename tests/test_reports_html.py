"""Reports as HTML pages: numbers, curves and images match the run's files, and user-supplied names stay text."""

import base64
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from mimref.config.recipe import Derived
from mimref.errors import OutputError
from mimref.evaluation.config import CompareConfig
from mimref.reports.html import page as pages
from mimref.reports.html.page import MOST_BYTES, make_page
from mimref.reports.html.runs import newest_run, read_run, settings
from mimref.results import Row
from tests.exhibits import make_exhibits
from tests.pages import ROWS, Parsed, charts, parsed, write_log, write_run

HOSTILE = [
    "<script>window.hostile=1</script>.png",
    "</script><img src=x onerror=window.hostile=1>",
    "\"' onload='window.hostile=1' x=\"",
    "`${window.hostile=1}`{{ 7*7 }}<!--",
    "\u202egnp.exe\u2066\x00\x1b[31m\n\u2028\udcff",
    "n" * 125 + "ñ" * 62 + "\t",
    "javascript:window.hostile=1",
]
"""Names of files, classes and models. One has 250 bytes."""


# --- numbers


def test_the_table_has_the_results_with_spread_and_differences(tmp_path: Path) -> None:
    lines = parsed(write_run(tmp_path)).lines
    assert lines[:5] == [
        ["Metric", "base", "refined"],
        ["k-NN top-1", "81.2", "84.0 (+2.8)"],
        ["1-shot top-1± standard deviation of 20 draws", "57.6 ± 4.7", "58.7 ± 4.3 (+1.1)"],
        ["k-means ACC± standard deviation of 100 runs", "61.9 (mean 60.9 ± 2.4)", "66.6 (mean 60.2 ± 4.1) (+4.7)"],
        ["Davies-Bouldin", "2.500", "1.750 (-0.750)"],
    ]


def test_a_lower_davies_bouldin_is_a_gain(tmp_path: Path) -> None:
    rows = [row for row in ROWS if row["metric"] == "davies_bouldin"]
    assert '<small class="gain">(-0.750)' in make_page([read_run(write_run(tmp_path, rows))])


def test_a_single_model_is_not_the_best(tmp_path: Path) -> None:
    assert 'number best"' not in make_page([read_run(write_run(tmp_path, ROWS[:1]))])


def test_an_entry_of_a_suite_is_a_line(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"model": "m", "metric": "suite_average", "value": 80.0, "entries": 2},
        {"model": "m", "metric": "knn_top1", "value": 70.0, "entry": "flowers"},
        {"model": "m", "metric": "probe_top1", "value": 90.0, "entry": "pets", "std": 1.25, "mean": 90.0},
    ]
    lines = parsed(write_run(tmp_path, rows, command="transfer", config={"seed": 0})).lines
    assert lines[1:4] == [["flowers", "70.0"], ["pets± standard deviation", "90.0 ± 1.2"], ["average", "80.0"]]


def test_runs_stand_side_by_side_under_their_names(tmp_path: Path) -> None:
    other: list[Row] = [{"model": "base", "metric": "knn_top1", "value": 70.0, "k": 20}]
    lines = parsed(write_run(tmp_path / "one"), write_run(tmp_path / "two", other)).lines
    assert lines[0] == ["", "one", "two"] and lines[1] == ["Metric", "base", "refined", "base"]
    assert lines[2] == ["k-NN top-1 (k = 10)", "81.2", "84.0 (+2.8)", "-"]
    assert ["k-NN top-1 (k = 20)", "-", "-", "70.0"] in lines


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    page = parsed(write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run"))
    assert len({name for name in page.lines[0] if name}) == 2


def test_curves_are_the_log_with_the_stages_one_after_another(tmp_path: Path) -> None:
    lines = write_log(tmp_path)
    page = charts(parsed(write_run(tmp_path, command="refine", config={"seed": 0})))
    losses = [line for line in lines if "loss" in line]
    expected = [(line["epoch"] + 2 * (line["stage"] == "encoder"), line["loss"]) for line in losses]
    assert [(point["x"], point["y"]) for point in page["loss"]] == [
        (x, pytest.approx(y, rel=1e-5)) for x, y in expected
    ]
    heads = [(point["curve"], point["x"], point["y"]) for point in page["head loss"]]
    for head in (0, 1):
        own = [(x, y) for curve, x, y in heads if curve == f"head {head + 1}"]
        assert own == [
            (x, pytest.approx(line["head_loss"][head], rel=1e-5)) for (x, _), line in zip(expected, losses, strict=True)
        ]
    assert [(point["x"], point["y"]) for point in page["k-NN top-1 (%)"]] == [(2, 52.0), (5, 53.0)]
    assert "rankme" not in page  # its values are never finite


def test_runs_are_overlaid_by_the_mean_of_their_heads(tmp_path: Path) -> None:
    for name in ("one", "two"):
        lines = write_log(tmp_path / name)
        write_run(tmp_path / name, command="refine", config={"seed": 0})
    found = charts(parsed(tmp_path / "one", tmp_path / "two"))["head loss"]
    for name in ("one", "two"):
        means = [sum(line["head_loss"]) / 2 for line in lines if "head_loss" in line]
        assert [point["y"] for point in found if point["curve"] == name] == pytest.approx(means, rel=1e-5)


def test_long_logs_are_thinned_but_keep_their_ends(tmp_path: Path) -> None:
    lines = [{"epoch": number / 100, "stage": "pretrain", "loss": 1 / (1 + number)} for number in range(20_000)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = charts(parsed(write_run(tmp_path, [], command="pretrain", config={"seed": 0})))["loss"]
    assert len(points) == 400
    assert (points[0]["x"], points[0]["y"]) == (0, 1) and points[-1]["x"] == 199.99


def test_splits_of_a_fine_tuning_have_a_curve_each(tmp_path: Path) -> None:
    lines = [{"epoch": 1, "stage": "finetune", "split": split, "loss": float(split)} for split in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = charts(parsed(write_run(tmp_path, [], command="finetune", config={"seed": 0})))["loss"]
    assert {(point["curve"], point["y"]) for point in points} == {("split 1", 1.0), ("split 2", 2.0)}


def test_blocks_have_curves_and_a_table(tmp_path: Path) -> None:
    accuracies = [60.0, 70.0, 72.0, 75.5, 74.0, 73.0, 72.0, 71.0]
    rows: list[Row] = [
        {"model": "m", "metric": "block_knn_top1", "value": value, "block": block}
        for block, value in enumerate(accuracies, start=1)
    ]
    rows += [{"model": "m", "metric": "block_effective_rank", "value": 3.5, "block": 1}]
    page = parsed(write_run(tmp_path, rows, command="analyze-blocks", config={"seed": 0}))
    points = charts(page)["k-NN top-1 (%)"]
    assert [(point["x"], point["y"]) for point in points] == list(enumerate(accuracies, start=1))
    assert [point["x"] for point in points if point["head"]] == [5, 6, 7, 8]
    assert ["1", "60.0", "3.5"] in page.lines and ["4", "75.5", "-"] in page.lines


def test_settings_that_differ_are_marked(tmp_path: Path) -> None:
    config = CompareConfig(base="b", refined=["r"], k=20, shots=[1, 2, 5], seed=3)
    found = settings(read_run(write_run(tmp_path, config=config.model_dump(mode="json"))))
    assert {each.key: each.value for each in found if each.changed} == {
        "base": "b",
        "refined": '["r"]',
        "k": "20",
        "seed": "3",
    }
    assert {each.key: each.default for each in found}["k"] == "10"


def test_derived_settings_are_listed_with_their_rules(tmp_path: Path) -> None:
    derived = [
        Derived("batch_size", 16, "half of 32 images"),
        Derived("heads.queue_size", 8, "there are <b>17</b> images", before=65536),
    ]
    page = make_page([read_run(write_run(tmp_path, derived=[asdict(each) for each in derived]))])
    assert "derived from encoder and images (2)" in page and "half of 32 images" in page
    assert "65536 -&gt; 8" in page and "&lt;b&gt;17&lt;/b&gt;" in page


def test_what_was_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("seed = 0\n")
    text = "\n".join(parsed(write_run(tmp_path, command="refine", config={"seed": 7, "preset": "mine"})).text)
    for part in ("mimref refine", "mine", "7", "0:01:15", f"--preset {tmp_path / 'config.toml'}"):
        assert part in text


# --- images


def test_the_map_and_the_galleries_show_the_exhibits(tmp_path: Path) -> None:
    exhibits = make_exhibits(30)
    exhibits.write(write_run(tmp_path))
    page = parsed(tmp_path)
    data = json.loads(page.data)
    assert data["prefix"] == "data:image/jpeg;base64,"
    assert [base64.b64decode(image) for image in data["images"]] == [image.jpeg for image in exhibits.images]
    for place, point in enumerate(charts(page)["map"]):
        assert point["number"] == exhibits.map_images[place]
        assert point["label"] == exhibits.images[point["number"]].label
        for model, at in zip(exhibits.maps, point["at"], strict=True):
            assert at == pytest.approx(exhibits.maps[model][place], abs=1e-3)
    numbers = [int(value or "") for name, value in page.attributes if name == "data-image"]
    queries = [
        number
        for query in exhibits.queries
        for number in (query.image, *(each for shown in query.neighbours.values() for each in shown))
    ]
    assert numbers[: len(queries)] == queries
    alternatives = [value for name, value in page.attributes if name == "alt"]
    assert len(alternatives) == len(numbers) and alternatives[0] == "a, val/0.png"


def test_neighbours_of_the_same_class_are_framed_and_counted(tmp_path: Path) -> None:
    exhibits = make_exhibits(30)
    exhibits.write(write_run(tmp_path))
    text = make_page([read_run(tmp_path)]).split('<section id="neighbours">')[1].split("</section>")[0]
    galleries = re.findall(r'<small>(\d+) of 12 right</small></h3>\s*<ul class="gallery">(.*?)</ul>', text, re.DOTALL)
    shown = [(query, model) for query in exhibits.queries for model in query.neighbours]
    for gallery, (query, model) in zip(galleries, shown, strict=True):
        right = [
            number
            for number in query.neighbours[model]
            if exhibits.images[number].label == exhibits.images[query.image].label
        ]
        framed = re.findall(r'class="right">\s*<img data-image="(\d+)"', gallery[1])
        assert int(gallery[0]) == len(right) and list(map(int, framed)) == right


def test_images_without_labels_have_no_frames(tmp_path: Path) -> None:
    make_exhibits(30, labels=None).write(write_run(tmp_path))
    text = make_page([read_run(tmp_path)])
    assert 'class="right"' not in text and " right</small>" not in text and 'id="confusions"' not in text
    assert 'id="clusters"' in text and 'alt="val/0.png"' in text


def test_a_report_without_images_says_so(tmp_path: Path) -> None:
    text = make_page([read_run(write_run(tmp_path))])
    assert "exhibits.json" in text and "k-NN top-1" in text and "data-image=" not in text.split("<script")[0]


def test_skipped_images_are_listed_with_reasons(tmp_path: Path) -> None:
    bad = [(f"{number}.png", "not an image") for number in range(250)]
    page = parsed(write_run(tmp_path, bad_images=bad))
    assert ["0.png", "not an image"] in page.lines and ["199.png", "not an image"] in page.lines
    assert ["200.png", "not an image"] not in page.lines and "250 images" in "".join(page.text)


@pytest.mark.slow
def test_a_page_of_the_largest_exhibits_is_small(tmp_path: Path) -> None:
    names = [f"{number:05}" + "<" * 245 for number in range(3500)]
    labels = [f"{number:03}" + "&" * 247 for number in range(100)]
    exhibits = make_exhibits(3500, labels=labels, paths=names, side=48, quality=92)
    assert sum(len(image.jpeg) for image in exhibits.images) > MOST_BYTES
    exhibits.write(
        write_run(tmp_path, bad_images=[(name, name) for name in names], command="refine", config={"seed": 0})
    )
    lines = [
        {"epoch": number, "stage": "encoder"} | {f"sign{sign}": [float(number)] * 24 for sign in range(10)}
        for number in range(800)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = make_page([read_run(tmp_path)])
    assert len(text.encode()) < MOST_BYTES
    data = json.loads(Parsed(text).data)
    assert data["prefix"] == "data:image/webp;base64," and all(data["images"]) and "compressed further" in text


# --- user-supplied names


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run with hostile names everywhere."""
    rows: list[Row] = []
    # results.csv is in UTF-8, which cannot encode half of a surrogate pair.
    for number, name in enumerate(name.replace("\udcff", "") for name in HOSTILE):
        rows += [
            {"model": name, "metric": "knn_top1", "value": 50.0 + number, "data": name},
            {"model": name, "metric": name, "value": 1.0},
            {"model": name, "metric": "block_knn_top1", "value": 2.0, "block": 1},
        ]
    config = CompareConfig(base=HOSTILE[0], refined=HOSTILE[1:]).model_dump(mode="json")
    folder = write_run(tmp_path / "<b>run", rows, config=config, bad_images=[(name, name) for name in HOSTILE])
    exhibits = make_exhibits(40, labels=HOSTILE, models=HOSTILE[:3], paths=HOSTILE)
    exhibits.notes.extend(HOSTILE)
    exhibits.write(folder)
    line = {"epoch": 1, "stage": "encoder", "split": HOSTILE[0], **{name: 1.0 for name in HOSTILE}}
    other = line | {"split": HOSTILE[1]}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(other) + "\n")
    return folder


def test_hostile_names_stay_text(hostile: Path) -> None:
    text = make_page([read_run(hostile)])
    page = Parsed(text)
    assert page.tags.count("script") == 3  # the data, the library, our own
    template = (Path(pages.__file__).parent / "templates" / "page.html").read_text(encoding="utf-8")
    assert set(page.tags) <= set(re.findall(r"<([a-z]+\d?)", template))
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    outside = text.replace(str(pages.library()), "")
    assert not [character for character in outside if not character.isprintable() and character != "\n"]
    assert "49" not in {part.strip() for part in page.text}  # {{ 7*7 }}


def test_hostile_names_are_shown(hostile: Path) -> None:
    page = parsed(hostile)
    first = [line[0] for line in page.lines]
    assert HOSTILE[0] in first and HOSTILE[2] in first
    assert r"\u202egnp.exe\u2066\x00\x1b[31m\n\u2028\udcff" in first


def test_only_the_two_scripts_of_the_page_may_run(tmp_path: Path) -> None:
    policy = parsed(write_run(tmp_path)).policy.split("; ")
    assert policy[0] == "default-src 'none'" and policy[1] == "img-src data:"
    scripts = policy[3].split()
    assert scripts[0] == "script-src" and len(scripts) == 4 and scripts[3] == "'unsafe-eval'"
    assert all(each.startswith("'sha256-") for each in scripts[1:3])


def test_the_page_names_no_other_address(hostile: Path) -> None:
    text = make_page([read_run(hostile)])
    addresses = set(re.findall(r"https?://[\w./-]+", text))
    # Identifiers of XML and of JSON schemas, which nothing fetches, and addresses in messages.
    assert {address.split("/")[2] for address in addresses} <= {"www.w3.org", "vega.github.io", "github.com"}


# --- files


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("results.json", "", "results.json"),
        ("results.json", '{"command": "compare", "config": {}', "results.json"),
        ("results.json", '{"command": "compare", "config": {}, "elapsed_s": 1, "metrics": 7}', "metrics"),
        ("results.json", '{"command": "compare", "config": {}, "elapsed_s": 1, "metrics": [{"value": 1}]}', "metric"),
        ("results.json", '{"command": "compare", "config": {}, "elapsed_s": 1, "metrics": [{"metric": "a"}]}', "value"),
        ("results.json", '{"command": "brew", "config": {}, "elapsed_s": 1, "metrics": []}', "brew"),
        ("metrics.jsonl", '{"epoch": 1}\n{"epoch": 2', "metrics.jsonl"),
        ("metrics.jsonl", '{"epoch": 1}\n{]\n', "metrics.jsonl"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl"),
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl"),
        ("metrics.jsonl", '{"epoch": NaN}\n', "metrics.jsonl"),
        ("exhibits.json", "{}", "exhibits.json"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(file: str, content: str, named: str, tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(OutputError) as caught:
        read_run(tmp_path)
    assert str(tmp_path / file) in str(caught.value) and named in str(caught.value)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(OutputError, match=re.escape(str(folder))):
            read_run(folder)


def test_an_unfinished_run_shows_its_log_and_says_so(tmp_path: Path) -> None:
    write_log(tmp_path)
    (tmp_path / "config.toml").write_text('preset = "refine/mine"\nseed = 5\n')
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"epoch": 4, "lo')
    run = read_run(tmp_path)
    assert run.command == "refine" and not run.finished and run.config["seed"] == 5
    page = parsed(tmp_path)
    text = "".join(page.text)
    assert "not finished" in text and "incomplete" in text and len(charts(page)["loss"]) == 5


def test_an_empty_log_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(OutputError, match=re.escape(str(tmp_path / "metrics.jsonl"))):
        read_run(tmp_path)


def test_the_newest_finished_run(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=re.escape(str(tmp_path))):
        newest_run(tmp_path)
    for name, seconds in (("a", 5), ("b", 9), ("c", 7)):
        write_run(tmp_path / name)
        os.utime(tmp_path / name / "results.json", (seconds, seconds))
    write_log(tmp_path / "d")
    (tmp_path / "knn").mkdir()
    (tmp_path / "knn" / "results.json").write_text('{"command": "knn"}')  # newer, but of a command without a report
    assert newest_run(tmp_path) == tmp_path / "b"
    (tmp_path / "knn" / "results.json").write_text("{")
    assert newest_run(tmp_path) == tmp_path / "knn"  # damaged: must be reported, not ignored
