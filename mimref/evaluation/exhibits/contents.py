"""The images that a report shows: the file `exhibits.json` of a finished folder.

Images are numbered by their position in `Exhibits.images`; the other parts refer to them by this number.
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
"""Decimals of coordinates in the file; a map is about ten units and less than a thousand pixels wide."""


@dataclass(frozen=True)
class Thumbnail:
    """One image, as a report or a gallery shows it."""

    path: str
    """Path as the data set names it; may hold any characters."""
    label: str | None
    """Class name; None without labels."""
    jpeg: bytes
    """JPEG file, with a longest side of at most 48 pixels in a report and 112 in a gallery."""


@dataclass(frozen=True)
class Query:
    """An image, and the images that each model finds most similar to it."""

    image: NonNegativeInt
    neighbours: dict[str, list[NonNegativeInt]]
    """By model: the most similar images by cosine, nearest first, without the image itself."""


@dataclass(frozen=True)
class Confusion:
    """Validation images of one class that k-NN assigns to another."""

    label: str
    predicted: str
    count: NonNegativeInt
    share: FiniteFloat
    """Share of the class's validation images, 0 to 1."""
    images: list[NonNegativeInt]
    """Example images."""


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
    """Images nearest to the centre, nearest first."""
    outlying: list[NonNegativeInt]
    """Images farthest from the centre, farthest first."""


@dataclass(frozen=True)
class Exhibits:
    """Images, their maps, and galleries, for every model that was evaluated."""

    images: list[Thumbnail]
    map_images: list[int]
    """The M images on the maps."""
    maps: dict[str, NDArray[np.float32]]
    """Positions (M, 2) of `map_images`, by model."""
    queries: list[Query]
    confusions: dict[str, list[Confusion]]
    """Confusions by model, largest share first; empty without labels."""
    clusters: dict[str, list[Cluster]]
    """Clusters by model, largest first."""
    notes: list[str]
    """Sentences on how the exhibits were made, and on what was left out and why."""

    def write(self, folder: Path) -> None:
        """Write `exhibits.json` into `folder` in one step. Raises OutputError if it cannot be written."""
        write_bytes(folder / FILE, self.to_json())

    def to_json(self) -> bytes:
        """Return the content of the file."""
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
        # Only ASCII: paths may hold lone surrogates, which no encoding can write.
        return (json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")

    @classmethod
    def read(cls, folder: Path) -> "Exhibits | None":
        """Return the exhibits in `folder`; None if it holds none. Raises OutputError for a damaged file."""
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
        """Return the exhibits from the content of the file. Raises ValueError if it is damaged."""
        # pydantic's own parser rejects lone surrogates.
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
        """Yield every reference to an image, with repetitions."""
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
    """Write `exhibits.json`; without exhibits, remove that of earlier ones. Raises OutputError as `write` does."""
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
    """Return what is wrong with a run's file, on one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return str(error.strerror if isinstance(error, OSError) else error)
