"""What a report shows of the images: the file `exhibits.json` of a finished folder.

Images are numbered by their place in `Exhibits.images`; every number in the other parts is such a place.
"""

import base64
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError

from mimref.errors import OutputError
from mimref.files import write_bytes

FILE = "exhibits.json"
MAP_DECIMALS = 3
"""Of coordinates in the file; a map is some ten units wide and less than a thousand pixels."""


@dataclass(frozen=True)
class Thumbnail:
    """One image, as the evaluation sees it."""

    path: str
    """As the data set names it; may hold any characters."""
    label: str | None
    """Class name; None without labels."""
    jpeg: bytes
    """Longest side at most 48 pixels."""


@dataclass(frozen=True)
class Query:
    """An image and what each model finds most similar to it."""

    image: NonNegativeInt
    neighbours: dict[str, list[NonNegativeInt]]
    """By model: the most similar images by cosine, the nearest first, without the image itself."""


@dataclass(frozen=True)
class Confusion:
    """Validation images of one class that k-NN takes for another."""

    label: str
    predicted: str
    count: NonNegativeInt
    share: FiniteFloat
    """Of the class's validation images, 0 to 1."""
    images: list[NonNegativeInt]
    """Examples."""


@dataclass(frozen=True)
class Cluster:
    """One cluster of k-means."""

    number: NonNegativeInt
    size: NonNegativeInt
    label: str | None
    """Most frequent class; None without labels."""
    purity: FiniteFloat | None
    """Share of that class in the cluster, 0 to 1; None without labels."""
    central: list[NonNegativeInt]
    """Nearest to the centre, the nearest first."""
    outlying: list[NonNegativeInt]
    """Farthest from the centre, the farthest first."""


@dataclass(frozen=True)
class Exhibits:
    """Images, their maps, and galleries, for every model that was evaluated."""

    images: list[Thumbnail]
    map_images: list[int]
    """The M images on the maps."""
    maps: dict[str, NDArray[np.float32]]
    """By model: (M, 2) positions of `map_images`."""
    queries: list[Query]
    confusions: dict[str, list[Confusion]]
    """By model: the largest share first; empty without labels."""
    clusters: dict[str, list[Cluster]]
    """By model: the largest first."""
    notes: list[str]
    """How it was made, and what was left out and why: sentences."""

    def write(self, folder: Path) -> None:
        """Write `exhibits.json` into `folder` in one step. Raises OutputError if it cannot be written."""
        write_bytes(folder / FILE, self.to_json())

    def to_json(self) -> bytes:
        """The content of the file."""
        images = [
            {"path": each.path, "label": each.label, "jpeg": base64.b64encode(each.jpeg).decode("ascii")}
            for each in self.images
        ]
        document = {
            "images": images,
            "map_images": self.map_images,
            "maps": {
                name: [[round(float(at), MAP_DECIMALS) for at in point] for point in points]
                for name, points in self.maps.items()
            },
            "queries": [asdict(query) for query in self.queries],
            "confusions": {name: [asdict(each) for each in found] for name, found in self.confusions.items()},
            "clusters": {name: [asdict(each) for each in found] for name, found in self.clusters.items()},
            "notes": self.notes,
        }
        # Only ASCII: paths may hold halves of surrogate pairs, which no encoding writes.
        return (json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")

    @classmethod
    def read(cls, folder: Path) -> "Exhibits | None":
        """The exhibits in `folder`; None if it holds none. Raises OutputError for a damaged file."""
        file = folder / FILE
        try:
            return cls.from_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            reason = first_problem(error)
            raise OutputError(f"{file}: damaged ({reason}); remove it to do without its images") from error

    @classmethod
    def from_json(cls, content: bytes) -> "Exhibits":
        """From the content of the file. Raises ValueError for a damaged one."""
        # pydantic's own parser refuses halves of surrogate pairs.
        document = _DOCUMENT.validate_python(json.loads(content))
        images = [
            Thumbnail(each.path, each.label, base64.b64decode(each.jpeg, validate=True)) for each in document.images
        ]
        maps = {name: np.array(points, dtype=np.float32).reshape(-1, 2) for name, points in document.maps.items()}
        found = cls(
            images, document.map_images, maps, document.queries, document.confusions, document.clusters, document.notes
        )
        if any(not image.jpeg.startswith(b"\xff\xd8") for image in images):
            raise ValueError("an image that is not a JPEG")
        if any(number >= len(images) for number in found._numbers()):
            raise ValueError(f"an image beyond the {len(images)} that it holds")
        if any(len(points) != len(found.map_images) for points in maps.values()):
            raise ValueError("a map without a position for every image")
        return found

    def _numbers(self) -> Iterator[int]:
        """Every reference to an image, with repetitions."""
        yield from self.map_images
        for query in self.queries:
            yield query.image
            for neighbours in query.neighbours.values():
                yield from neighbours
        for confusions in self.confusions.values():
            for confusion in confusions:
                yield from confusion.images
        for clusters in self.clusters.values():
            for cluster in clusters:
                yield from (*cluster.central, *cluster.outlying)


def save(exhibits: Exhibits | None, folder: Path) -> None:
    """Write `exhibits.json`; without exhibits, remove that of earlier results. Raises OutputError as `write` does."""
    if exhibits is not None:
        exhibits.write(folder)
    elif (folder / FILE).is_file():
        (folder / FILE).unlink()


@dataclass(frozen=True)
class _Image:
    path: str
    label: str | None
    jpeg: str


@dataclass(frozen=True)
class _Document:
    images: list[_Image]
    map_images: list[NonNegativeInt]
    maps: dict[str, list[tuple[FiniteFloat, FiniteFloat]]]
    queries: list[Query]
    confusions: dict[str, list[Confusion]]
    clusters: dict[str, list[Cluster]]
    notes: list[str]


_DOCUMENT = TypeAdapter(_Document)


def first_problem(error: OSError | ValueError | RecursionError) -> str:
    """What is wrong with a file of a run, on one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return str(error.strerror if isinstance(error, OSError) else error)
