"""The model card of an exported folder: README.md with the header that the Hugging Face Hub reads."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from mimref import __version__
from mimref.data.decode import printable
from mimref.data.pixels import DECODING
from mimref.encoders.vit import Architecture
from mimref.evaluation.assess.verdicts import NAMES
from mimref.reports.metrics import format_value, is_undefined, metric_label
from mimref.results import Row
from mimref.sharing.layout import Layout, Subject
from mimref.sharing.record import Record

# Licence identifiers that the hub knows; others become `other` with a `license_name`.
_LICENCES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "unlicense"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
}
# Names of data sets on the hub, by spec; `hf:` specs contain the name.
_DATASETS = {
    "fashion-mnist": "zalando-datasets/fashion_mnist",
    "torchvision:FashionMNIST": "zalando-datasets/fashion_mnist",
    "torchvision:MNIST": "ylecun/mnist",
    "torchvision:CIFAR10": "uoft-cs/cifar10",
    "torchvision:CIFAR100": "uoft-cs/cifar100",
}
_MODELS = ("raw pixels", "base", "refined")
# All but letters, digits, and characters without a meaning in Markdown: underscores in words, points in numbers, ...
_SPECIAL = re.compile(r"(?<![^\W_])_|_(?![^\W_])|\.(?!\w)|(?<!\w)-|:(?=/)|[^\w\s,;:/%=()'\"?.-]")
_SHOWN_CLASSES = 100


class Raw(str):
    """Markdown written by mimref, which is not escaped."""


def model_card(title: str, subject: Subject, layout: Layout, record: Record) -> str:
    """Return Markdown with a YAML header: what the model is, how to load it, how it was made, its results and licence.

    title: name of the folder or of the repository. Names of classes, data and settings may contain any characters, and
    are escaped.
    """
    environment = Environment(
        loader=PackageLoader("mimref.reports", "."),
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Raw) else escape_markdown(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    header = yaml.safe_dump(card_header(title, subject, layout, record), sort_keys=False, allow_unicode=True)
    architecture = subject.encoder.architecture
    rgb = architecture.channels in (1, 3)
    return environment.get_template("model_card.md.jinja").render(
        header=Raw(header),
        title=title,
        version=Raw(__version__),
        architecture=architecture,
        parameters=Raw(f"{sum(tensor.numel() for tensor in layout.tensors.values()) / 1e6:,.1f}"),
        layout=layout,
        transform=subject.transform,
        plain=isinstance(architecture, Architecture),
        rgb=rgb,
        gray=architecture.channels == 1,
        channels=Raw("red, green and blue" if rgb else f"the {architecture.channels} channels"),
        classes=subject.classes[:_SHOWN_CLASSES],
        num_classes=len(subject.classes),
        record=record,
        auto=Raw("AutoModelForImageClassification" if subject.classifier else "AutoModel"),
        name=Raw(re.sub(r"[^\w./-]", "_", title)),
        resized=Raw(round(subject.transform.image_size / subject.transform.crop_fraction)),
        mean=Raw(subject.transform.mean),
        std=Raw(subject.transform.std),
        models=_models(record.rows),
        labelled=any(row["metric"] not in NAMES for row in record.rows),
        table=_table(record.rows),
        rule=Raw("|---|" + "---:|" * len(_models(record.rows))),
        row_of=lambda cells: Raw("| " + " | ".join(map(escape_markdown, cells)) + " |"),
        decoding=[f"data.{key} = {value}" for key, value in _decoding(subject.facts).items()],
        settings=Raw(_fenced(record.settings)),
    )


def card_header(title: str, subject: Subject, layout: Layout, record: Record) -> dict[str, Any]:
    """Return the card's metadata, as the Hugging Face Hub defines them; unknown values are left out."""
    classifies = subject.classifier is not None
    task = "image-classification" if classifies else "image-feature-extraction"
    dataset = _dataset(record)
    header: dict[str, Any] = {
        **_licence(record.licence),
        "library_name": layout.library,
        "pipeline_tag": task,
        "tags": ["mimref", "vision", *([record.source.split()[0]] if record.source else [])],
    }
    if layout.library == "timm":
        header["tags"] += ["timm", "transformers"]
    if dataset is not None:
        header["datasets"] = [dataset]
    if record.base_model is not None:
        header["base_model"] = record.base_model
    if record.data and (metrics := _metrics(record.rows)):
        data = {"name": record.data, "type": dataset or _slug(record.data)}
        result = {"task": {"type": "image-classification"}, "dataset": data, "metrics": metrics}
        header["model-index"] = [{"name": title, "results": [result]}]
    return header


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown and HTML show it unchanged, on one line."""
    line = printable(text.encode("utf-8", "backslashreplace").decode())
    return _SPECIAL.sub(lambda match: _escape(match[0]), line)


def _escape(character: str) -> str:
    if character in "<>&|":
        return f"&#{ord(character)};"
    return f"\\{character}" if character.isascii() else character


def _fenced(text: str) -> str:
    """Return a code block with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}toml\n{text}{fence}"


def _licence(licence: str | None) -> dict[str, str]:
    if licence is None:
        return {}
    name = _slug(licence)
    return {"license": name} if name in _LICENCES else {"license": "other", "license_name": name}


def _dataset(record: Record) -> str | None:
    """Return the data set's name on the hub, if it has one."""
    if record.data is None or not record.data_is_public:
        return None
    if record.data.startswith("hf:"):
        return "/".join(record.data.removeprefix("hf:").split("/")[:2])
    return _DATASETS.get(record.data)


def _metrics(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the metrics of the model itself that have a value and are of a task: the hub compares models by them."""
    own = [row for row in rows if row.get("model", "refined") == "refined" and _has_value(row)]
    own = [row for row in own if row["metric"] not in NAMES]
    return [
        {"type": str(row["metric"]), "name": metric_label(row, own), "value": round(float(row["value"]), 4)}
        for row in own
    ]


def _has_value(row: Row) -> bool:
    return isinstance(row["value"], int | float) and not is_undefined(row)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def _models(rows: Sequence[Row]) -> list[str]:
    found = list(dict.fromkeys(str(row.get("model", "")) for row in rows))
    return sorted(found, key=lambda model: _MODELS.index(model) if model in _MODELS else -1)


def _table(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Return a line for each metric: its name, and its value for every model."""
    models, lines = _models(rows), dict[str, dict[str, str]]()
    for row in rows:
        if isinstance(row["value"], int | float):
            same = [other for other in rows if other.get("model") == row.get("model")]
            lines.setdefault(metric_label(row, same), {})[str(row.get("model", ""))] = format_value(row)
    return [(name, [values.get(model, "") for model in models]) for name, values in lines.items()]


def _decoding(facts: Mapping[str, Any]) -> dict[str, Any]:
    data = facts.get("data", {})
    return {key: data[key] for key in DECODING if key in data}
