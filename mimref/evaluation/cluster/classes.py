"""Choice of the classes to cluster."""

import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from mimref.data.decode import printable
from mimref.data.open import how_to_label
from mimref.data.sources import ImageSource
from mimref.errors import Checks, ConfigError, DataError, did_you_mean
from mimref.evaluation.cluster.config import ClusterConfig
from mimref.evaluation.cluster.embedding import check_count
from mimref.evaluation.metrics import number_classes
from mimref.features.matrix import Labels
from mimref.features.opening import Opened


def check_classes(config: ClusterConfig, opened: Opened, checks: Checks, embed: bool) -> Labels | None:
    """Return the labels of the classes to cluster, None without labels, and check that there are enough images.

    embed: check that there are enough for UMAP, too.
    """
    y, names = opened.labels(config.split), opened.class_names(config.split)
    source = opened.sources.get(config.split)
    found, images = None, 0 if source is None else len(source)
    if y is not None:
        found = checks.run("data.spec", lambda: number_classes(y, config.split, names)[0])
        if (asked := config.classes) is not None:
            found = checks.run("classes", lambda: choose_classes(asked, names, y))
        if found is None:
            return None
        images = int(np.isin(y, found).sum())
    elif source is None:
        return None  # the images could not be opened
    elif config.clusters is None:
        checks.run("clusters", lambda: _ask_for_clusters(config, opened, source))
    elif config.classes is not None:
        wrong = f"--classes {config.classes}: the {config.split} images have no labels; leave it out"
        checks.add("classes", ConfigError(wrong))
    count = config.clusters or (0 if found is None else len(found))
    setting = "data.spec" if config.clusters is None else "clusters"
    checks.run(setting, lambda: check_clusters(count, images, given=config.clusters is not None))
    if embed:
        checks.run("umap", lambda: check_count(images))
    return found


def _ask_for_clusters(config: ClusterConfig, opened: Opened, source: ImageSource) -> NoReturn:
    spec = (config.data if opened.inputs is None or opened.inputs.data is None else opened.inputs.data).spec or ""
    how = how_to_label(source, spec)
    wrong = f"the {config.split} images have no labels, so the number of clusters is unknown"
    raise DataError(f"--data {printable(spec)}: {wrong}; pass --clusters N, or {how}")


def check_clusters(clusters: int, images: int, *, given: bool) -> None:
    """Raise an error unless there are more images than clusters. given: whether the user chose the number."""
    if clusters < images:
        return
    if given:
        raise ConfigError(f"clusters {clusters} need more than the {images} images; choose fewer")
    raise DataError(
        f"{clusters} clusters (one per class) need more than {images} images; give several images per class"
    )


def choose_classes(asked: str, class_names: Sequence[str] | None, labels: Labels) -> Labels:
    """Return the labels of the requested classes, ascending.

    asked: names or numbers separated by commas, or a text file with one per line, where `#` begins a comment. Names are
    those of class folders; case is ignored unless a class has exactly this name. A number that is not a class name is a
    label. class_names: names of classes 0, 1, ..., or None if only labels are known. labels (N,): those of the images.
    Raises ConfigError for an unknown class or one without images, for fewer than two classes, and for a file that
    cannot be read.
    """
    names = list(class_names or [])
    available = np.unique(labels)
    chosen: set[int] = set()
    for name in _asked(asked, names):
        label = _label(name, names, available)
        if label not in available:
            raise ConfigError(f"--classes: class {name!r} has no images here; leave it out")
        chosen.add(label)
    if len(chosen) < 2:
        raise ConfigError(f"--classes {asked!r} is {len(chosen)} class; give at least two, separated by commas")
    return np.array(sorted(chosen), dtype=np.int64)


def _asked(asked: str, names: Sequence[str]) -> list[str]:
    """Return the single names of a list or of a file; a class name is never taken for a file."""
    if asked in names or not os.path.isfile(asked):
        parts = asked.split(",")
    else:
        try:
            lines = Path(asked).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            problem = error.strerror or error
            raise ConfigError(f"--classes {asked}: {problem}; give class names or a readable file") from None
        except UnicodeDecodeError:
            raise ConfigError(f"--classes {asked}: not a text file; give one class per line") from None
        parts = [line.partition("#")[0] for line in lines]
    return [part.strip() for part in parts if part.strip()]


def _label(name: str, names: Sequence[str], available: Labels) -> int:
    if name in names:
        return names.index(name)
    alike = [label for label, known in enumerate(names) if known.lower() == name.lower()]
    if len(alike) > 1:
        raise ConfigError(f"--classes: {name!r} may be any of {', '.join(names[label] for label in alike)}; use one")
    if alike:
        return alike[0]
    if name.removeprefix("-").isdecimal():
        if int(name) in available or 0 <= int(name) < len(names):
            return int(name)
        raise ConfigError(f"--classes: there is no class {name}; labels are {available[0]} to {available[-1]}")
    if not names:
        raise ConfigError(f"--classes: these features have no class names, so {name!r} is unknown; give numbers")
    advice = did_you_mean(name, names) or f"; classes have names like {names[0]!r}"
    missing_file = " and no file" if "/" in name or "." in name else ""
    raise ConfigError(f"--classes: {name!r} is not a class{missing_file} here{advice}")
