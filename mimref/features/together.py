"""One pass of an encoder by all processes of a group: each encodes every R-th batch, and rank 0 has them all, in order.

The batches are those of a single process, so the features are too. Rank 0 decides whether there is a pass at all (it
looks into the cache) and which columns it has; the others wait for its word.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import torch.distributed as dist

from mimref.features.extract import Batch, Column
from mimref.training.distributed import own_rank, world_size

Part = Callable[[list[Column], int, int], Iterator[Batch]]
"""Encodes some columns of every `every`-th batch, from a position in the data set on: (columns, start, every)."""


class Sizes(TypedDict):
    """Of the whole pass."""

    batch_size: int
    images: int


_DONE, _WAIT = "done", "wait"


def lead(part: Part, columns: list[Column], start: int, *, batch_size: int, images: int) -> Iterator[Batch]:
    """On rank 0: all batches from position `start` on, of which the other ranks, in `follow`, encode their share."""
    _tell((columns, start))
    yield from _rounds(part, columns, start, batch_size, images)


def follow(part: Part, *, batch_size: int, images: int) -> None:
    """On the other ranks: encode what rank 0 asks for, until it says that the features are there."""
    while (asked := _tell(None)) != _DONE:
        if asked == _WAIT:
            continue
        columns, start = asked
        for _ in _rounds(part, columns, start, batch_size, images):
            pass


def finish() -> None:
    """On rank 0: let the others go on."""
    _tell(_DONE)


def wait_on() -> None:
    """On rank 0: say that there is still nothing to do."""
    _tell(_WAIT)


def _rounds(part: Part, columns: list[Column], start: int, batch_size: int, images: int) -> Iterator[Batch]:
    rank, world = own_rank(), world_size()
    own = part(columns, start + rank * batch_size, world)
    for first in range(start, images, world * batch_size):
        batch = next(own) if first + rank * batch_size < images else None
        gathered: list[Batch | None] | None = [None] * world if rank == 0 else None
        dist.gather_object(batch, gathered)
        for found in gathered or ():
            if found is not None:
                yield found


def _tell(message: Any) -> Any:
    """What rank 0 says, on every rank."""
    said = [message]
    dist.broadcast_object_list(said)
    return said[0]
