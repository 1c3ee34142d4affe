"""One pass of an encoder by all ranks: each of R ranks encodes every R-th batch, and rank 0 receives all, in order.

The batches are those of a single process, and so are the features. Rank 0 looks into the cache and decides whether
there is a pass and which columns it has; the other ranks wait for its decision.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mimref.distributed.group import own_rank, world_size
from mimref.distributed.turns import end_requests, request, requests, take_turns
from mimref.features.encode import Batch, Column


@dataclass(frozen=True)
class SharedPass:
    """A pass over one data set; in a single process it is an ordinary one."""

    encode: Callable[[list[Column], int, int], Iterator[Batch]]
    """Encodes columns of every `every`-th batch, from a position in the data set on: (columns, start, every)."""
    images: int
    batch_size: int

    def lead(self, columns: list[Column], start: int) -> Iterator[Batch]:
        """On rank 0: all batches from position `start` on. The other ranks must be in `follow`."""
        if world_size() > 1:
            request((columns, start))
        yield from self._by_turns(columns, start)

    def end(self) -> None:
        """On rank 0: release the other ranks from `follow`."""
        if world_size() > 1:
            end_requests()

    def follow(self) -> None:
        """On the other ranks: encode what rank 0 asks for, until it ends."""
        for columns, start in requests():
            for _ in self._by_turns(columns, start):
                pass

    def _by_turns(self, columns: list[Column], start: int) -> Iterator[Batch]:
        own = self.encode(columns, start + own_rank() * self.batch_size, world_size())
        return take_turns(own, -(-(self.images - start) // self.batch_size))
