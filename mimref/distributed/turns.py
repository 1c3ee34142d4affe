"""Work that all ranks do at the request of rank 0: requests, and results that ranks produce in turn."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from mimref.distributed.group import own_rank, world_size

_Item = TypeVar("_Item")
_DONE, _WAIT = "done", "wait"


def request(what: Any) -> None:
    """On rank 0: send the other ranks a request."""
    _broadcast(what)


def end_requests() -> None:
    """On rank 0: release the other ranks from `requests`."""
    _broadcast(_DONE)


def keep_waiting() -> None:
    """On rank 0: let the other ranks know, before they time out, that there is nothing to do yet."""
    _broadcast(_WAIT)


def requests() -> Iterator[Any]:
    """On the other ranks: yield the requests of rank 0 until it ends them."""
    while (received := _broadcast(None)) != _DONE:
        if received != _WAIT:
            yield received


def take_turns(own: Iterator[_Item], count: int) -> Iterator[_Item]:
    """On rank 0: yield `count` items that the ranks produce in turn. Other ranks get nothing, but must iterate too.

    own: the items of this rank r of R, numbers r, r + R, ...; tensors must be on the CPU.
    """
    rank, world = own_rank(), world_size()
    if world == 1:
        yield from own
        return
    for first in range(0, count, world):
        made = [next(own)] if first + rank < count else []
        gathered: list[list[_Item]] | None = [[]] * world if rank == 0 else None
        dist.gather_object(made, gathered)
        for items in gathered or ():
            yield from items


def _broadcast(message: Any) -> Any:
    """Return rank 0's message on every rank."""
    messages = [message]
    dist.broadcast_object_list(messages)
    return messages[0]
