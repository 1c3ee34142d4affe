"""Work that ranks do by turns for rank 0, which decides what there is to do."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from mimref.distributed.group import own_rank, world_size

_T = TypeVar("_T")
_DONE, _WAIT = "done", "wait"


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


def _tell(message: Any) -> Any:
    """What rank 0 says, on every rank."""
    said = [message]
    dist.broadcast_object_list(said)
    return said[0]
