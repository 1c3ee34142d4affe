"""Test sets of a classifier, clean, shifted and corrupted: opened, with labels that number the classifier's classes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mimref.config.base import DataConfig
from mimref.data.decode import first_of, printable
from mimref.data.labels import Indices, class_name, nearest_class
from mimref.data.open import COLUMNED, open_source
from mimref.data.sample import check_readable
from mimref.data.sources import FileSource, ImageSource
from mimref.errors import Checks, DataError
from mimref.progress import Listener
from mimref.results import Row
from mimref.transfer.robustness.corruptions import CORRUPTIONS, IMAGENET_C, SEVERITIES

SUBSET_CLASSES = 200
"""Number of classes of ImageNet-A; ImageNet-R has as many, but different ones."""


@dataclass(frozen=True)
class LabelledSet:
    """Images with labels among the classifier's classes."""

    where: Row
    """Columns that identify the set in the results: `metric`, `set`, for corrupted images `corruption` and `severity`,
    and the number of `classes` that compete."""
    source: ImageSource
    labels: Indices
    """(N,) class numbers, or positions in `among` if that is given."""
    among: Indices | None = None
    """The classes that compete; None: all."""


@dataclass(frozen=True)
class Place:
    """Location of a test set, with the setting and the option that name it."""

    setting: str
    flag: str
    spec: str
    where: Row
    subset: bool = False
    """Whether only the classes of the set compete."""


def open_labelled(place: Place, data: DataConfig, classes: Sequence[str] | None, listener: Listener) -> LabelledSet:
    """Open the validation images of a set, or all images of a folder of classes.

    data: settings for reading images. classes: the classifier's; None if unknown, then nothing is compared. Raises
    DataError for images that cannot be opened, and for classes that the classifier does not have.
    """
    data = data.model_copy(update={"spec": place.spec, "train_limit": None})
    if place.setting != "data.spec" and not place.spec.startswith(COLUMNED):
        data = data.model_copy(update={"image": None, "label": None})  # for other sets
    try:
        source = _open(data, listener)
        check_readable(source, data.max_bad)
        if source.labels is None or source.class_names is None:
            raise DataError("its images have no labels; it needs a folder for each class, two or more")
        numbers = np.arange(len(source.class_names))
        if classes is not None:
            # A list of classes may name classes without images.
            present = np.unique(source.labels)
            numbers[present] = match_classes([source.class_names[n] for n in present.tolist()], classes)
    except DataError as error:
        cause = error.__cause__ if isinstance(error.__cause__, DataError) else error
        raise DataError(f"{place.flag} {printable(place.spec)}: {cause}") from error
    labels, among = numbers[source.labels], None
    if place.subset:
        among, positions = np.unique(labels, return_inverse=True)
        labels = positions.astype(np.int64)
    competing = len(numbers if classes is None else classes) if among is None else len(among)
    return LabelledSet({**place.where, "classes": competing}, source, labels, among)


def _open(data: DataConfig, listener: Listener) -> ImageSource:
    source = open_source(data, "val", progress=listener.progress)
    if isinstance(source, FileSource) and source.folder == os.path.expanduser(data.spec or ""):
        # A folder without splits: its class folders are found as training images only.
        return open_source(data, "train", progress=listener.progress)
    return source


def match_classes(names: Sequence[str], classes: Sequence[str]) -> Indices:
    """Return the position of every name in `classes`.

    The classifier may name ImageNet's classes differently: by numbers from `0` to `999`, or in words. Raises DataError
    for names that `classes` does not have, and for two names of one class.
    """
    number = {class_name(name): index for index, name in enumerate(classes)}
    unknown = [name for name in names if name not in number]
    if unknown:
        number = _wnid_numbers(classes) | number
        unknown = [name for name in names if name not in number]
    if len(unknown) == len(names):
        raise DataError(
            f"none of its {len(names)} classes ({first_of(names)}) is one of the classifier's {len(classes)} "
            f"({first_of(classes)})"
        )
    if unknown:
        count = "1 of its classes is" if len(unknown) == 1 else f"{len(unknown)} of its classes are"
        near = nearest_class(unknown[0], classes)
        raise DataError(f"{count} not among the classifier's {len(classes)}: {first_of(unknown)}{near}")
    first: dict[int, str] = {}
    for name in names:
        if (other := first.setdefault(number[name], name)) != name:
            raise DataError(f"its classes {other!r} and {name!r} are one of the classifier's; merge or rename them")
    return np.array([number[name] for name in names], dtype=np.int64)


def _wnid_numbers(classes: Sequence[str]) -> dict[str, int]:
    """Map ImageNet's wnids, such as n01440764, to class numbers of a classifier of 1,000 classes; else empty.

    Two classes are both called `crane`: they are known by their position in ImageNet's order.
    """
    if len(classes) != 1000:
        return {}
    from timm.data.imagenet_info import ImageNetInfo

    info: Any = ImageNetInfo()
    wnids, words = info.label_names(), info.label_descriptions()
    number = {class_name(name): index for index, name in enumerate(classes)}
    named = words if "0" not in number else list(map(str, range(1000)))
    found = {wnid: number[name] for wnid, name in zip(wnids, named, strict=True) if name in number}
    for index, (wnid, name) in enumerate(zip(wnids, named, strict=True)):
        if named.count(name) > 1 and found.pop(wnid, None) is not None and classes[index] == name:
            found[wnid] = index
    return found


def corrupted_places(root: str, listener: Listener) -> list[Place]:
    """Find the folders of ImageNet-C, `CORRUPTION/SEVERITY` or `GROUP/CORRUPTION/SEVERITY`.

    Warns of missing corruptions. Raises DataError if none is found, or if one lacks a severity.
    """
    shown, root = printable(root), os.path.expanduser(root)
    try:
        below = [os.path.join(root, name) for name in sorted(os.listdir(root))]
    except OSError as error:
        raise DataError(f"--imagenet-c {shown}: cannot be read ({error.strerror})") from error
    candidates = {name: [os.path.join(folder, name) for folder in (root, *below)] for name in CORRUPTIONS}
    found = {name: next(filter(os.path.isdir, paths), "") for name, paths in candidates.items()}
    missing = [name for name, folder in found.items() if not folder]
    if len(missing) == len(CORRUPTIONS):
        raise DataError(f"--imagenet-c {shown}: holds no folder named after a corruption ({first_of(CORRUPTIONS)})")
    places = []
    for name, folder in found.items():
        if not folder:
            continue
        lacking = [str(level) for level in SEVERITIES if not os.path.isdir(os.path.join(folder, str(level)))]
        if lacking:
            raise DataError(f"--imagenet-c {shown}: {name} lacks severity {', '.join(lacking)} of 1 to 5")
        for level in SEVERITIES:
            where: Row = {"metric": "robust_top1", "set": IMAGENET_C, "corruption": name, "severity": level}
            places.append(Place("imagenet_c", "--imagenet-c", os.path.join(folder, str(level)), where))
    if missing:
        listener.warn(f"--imagenet-c {shown}: lacks {', '.join(missing)}; means leave these corruptions out")
    return places


def open_sets(
    places: Sequence[Place], data: DataConfig, classes: Sequence[str] | None, listener: Listener, checks: Checks
) -> list[LabelledSet]:
    """Open several sets; mistakes are added to `checks`. Warns of published sets that look incomplete."""
    opened: dict[str, list[tuple[Place, LabelledSet]]] = {}
    for place in places:
        found = checks.run(place.setting, partial(open_labelled, place, data, classes, listener))
        if found is not None:
            opened.setdefault(place.setting, []).append((place, found))
    for setting, several in opened.items():
        usual = SUBSET_CLASSES if several[0][0].subset else len(classes or ())
        counts = [len(np.unique(each.labels)) for _, each in several]
        place = several[int(np.argmin(counts))][0]
        if setting != "shifted" and min(counts) < usual and classes is not None:
            few = "only these compete" if place.subset else "all classes compete"
            listener.warn(f"{place.flag} {printable(place.spec)}: images of {min(counts)} of {usual} classes; {few}")
        sizes = [len(each.source) for _, each in several]
        if setting == "imagenet_c" and min(sizes) < max(sizes):
            listener.warn(f"--imagenet-c: one folder has {min(sizes)} images, another {max(sizes)}")
    return [each for several in opened.values() for _, each in several]
