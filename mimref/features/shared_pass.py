"""One pass of an encoder by all processes of a group: each encodes every R-th batch, and rank 0 has them all, in order.

The batches are those of a single process, so the features are too. Rank 0 decides whether there is a pass at all (it
looks into the cache) and which columns it has; the others wait for its word. Shapes: R ranks.
"""

from collections.abc import Callable, Iterator
from typing import TypedDict

from mimref.distributed.group import own_rank, world_size
from mimref.distributed.turns import request, requests, take_turns
from mimref.features.encode import Batch, Column

Part = Callable[[list[Column], int, int], Iterator[Batch]]
"""Encodes some columns of every `every`-th batch, from a position in the data set on: (columns, start, every)."""


class Sizes(TypedDict):
    """Of the whole pass."""

    batch_size: int
    images: int


def lead(part: Part, columns: list[Column], start: int, *, batch_size: int, images: int) -> Iterator[Batch]:
    """On rank 0: all batches from position `start` on, of which the other ranks, in `follow`, encode their share."""
    request((columns, start))
    yield from _pass(part, columns, start, batch_size, images)


def follow(part: Part, *, batch_size: int, images: int) -> None:
    """On the other ranks: encode what rank 0 asks for, until it says that the features are there."""
    for columns, start in requests():
        for _ in _pass(part, columns, start, batch_size, images):
            pass


def _pass(part: Part, columns: list[Column], start: int, batch_size: int, images: int) -> Iterator[Batch]:
    own = part(columns, start + own_rank() * batch_size, world_size())
    return take_turns(own, -(-(images - start) // batch_size))
