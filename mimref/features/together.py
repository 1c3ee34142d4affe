"""One pass of an encoder by all processes of a group: each encodes every R-th batch, and rank 0 has them all, in order.

The batches are those of a single process, so the features are too. Rank 0 decides whether there is a pass at all (it
looks into the cache) and which columns it has; the others wait for its word. Shapes: R ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypedDict, TypeVar

import torch.distributed as dist

from mimref.features.extract import Batch, Column
from mimref.training.distributed import own_rank, world_size

_T = TypeVar("_T")
Part = Callable[[list[Column], int, int], Iterator[Batch]]
"""Encodes some columns of every `every`-th batch, from a position in the data set on: (columns, start, every)."""


class Sizes(TypedDict):
    """Of the whole pass."""

    batch_size: int
    images: int


_DONE, _WAIT = "done", "wait"


def lead(part: Part, columns: list[Column], start: int, *, batch_size: int, images: int) -> Iterator[Batch]:
    """On rank 0: all batches from position `start` on, of which the other ranks, in `follow`, encode their share."""
    ask((columns, start))
    yield from _pass(part, columns, start, batch_size, images)


def follow(part: Part, *, batch_size: int, images: int) -> None:
    """On the other ranks: encode what rank 0 asks for, until it says that the features are there."""
    for columns, start in requests():
        for _ in _pass(part, columns, start, batch_size, images):
            pass


def ask(what: Any) -> None:
    """On rank 0: tell the others what to do next."""
    _tell(what)


def finish() -> None:
    """On rank 0: let the others go on."""
    _tell(_DONE)


def wait_on() -> None:
    """On rank 0: say that there is still nothing to do."""
    _tell(_WAIT)


def requests() -> Iterator[Any]:
    """On the other ranks: what rank 0 asks for, one after the other, until it says that all is done."""
    while (asked := _tell(None)) != _DONE:
        if asked != _WAIT:
            yield asked


def take_turns(own: Iterator[_T], count: int) -> Iterator[_T]:
    """On rank 0: `count` things that the ranks make by turns, in order. The others get nothing, but must iterate too.

    own: what this rank makes, numbers r, r + R, ... of them; of tensors, on the CPU.
    """
    rank, world = own_rank(), world_size()
    if world == 1:
        yield from own
        return
    for first in range(0, count, world):
        made = [next(own)] if first + rank < count else []
        gathered: list[list[_T]] | None = [[]] * world if rank == 0 else None
        dist.gather_object(made, gathered)
        for one in gathered or ():
            yield from one


def _pass(part: Part, columns: list[Column], start: int, batch_size: int, images: int) -> Iterator[Batch]:
    own = part(columns, start + own_rank() * batch_size, world_size())
    return take_turns(own, -(-(images - start) // batch_size))


def _tell(message: Any) -> Any:
    """What rank 0 says, on every rank."""
    said = [message]
    dist.broadcast_object_list(said)
    return said[0]
