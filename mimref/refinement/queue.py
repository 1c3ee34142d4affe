"""First-in-first-out queue of projections, and the nearest-neighbour lookup in it (Eq. 2).

Shapes: H heads, Q queue rows, M queries, O output width, K neighbours.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Similarities held at once during a lookup: 2**26 float32 are 256 MiB.
_LOOKUP_ELEMENTS = 1 << 26


class Neighbours(NamedTuple):
    """One queue row per head and query."""

    rows_HMO: Tensor
    similarity_HM: Tensor
    sample_HM: Tensor
    """Sample index of the row; -1 for a random row from the queue's start."""
    age_HM: Tensor
    """Updates since the row was enqueued."""


class Queue:
    """One (H, Q, O) buffer whose heads share one position, one list of sample indices and one list of ages.

    Rows start as random unit vectors with sample index -1.
    """

    def __init__(self, heads: int, size: int, width: int, *, generator: torch.Generator, device: torch.device) -> None:
        rows = torch.randn(heads, size, width, generator=generator)
        self.rows_HQO = F.normalize(rows, dim=2).to(device)
        self.sample_Q = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.update_Q = torch.zeros(size, dtype=torch.int64, device=device)
        self.position = 0
        self.updates = 0

    def __len__(self) -> int:
        return len(self.sample_Q)

    @torch.no_grad()
    def enqueue(self, rows_HMO: Tensor, sample_M: Tensor) -> None:
        """Overwrite the oldest M rows of every head. More rows than the queue holds leave only the last ones."""
        count = min(rows_HMO.shape[1], len(self))
        rows_HMO, sample_M = rows_HMO[:, -count:], sample_M[-count:]
        where = (torch.arange(count, device=self.sample_Q.device) + self.position) % len(self)
        self.rows_HQO[:, where] = rows_HMO.to(self.rows_HQO.dtype)
        self.sample_Q[where] = sample_M
        self.update_Q[where] = self.updates
        self.position = (self.position + count) % len(self)
        self.updates += 1

    @torch.no_grad()
    def swap_neighbours(self, query_HMO: Tensor, sample_M: Tensor, choice_HM: Tensor, *, top_k: int) -> Neighbours:
        """One of the `top_k` most similar rows for every query, chosen by `choice_HM` in [0, 1) (Eq. 2).

        query_HMO: unit length. sample_M: index of each query's own image, whose rows are left out: the sample's own
        earlier entry would be a perfect but useless neighbour. Results carry no gradient.
        """
        chunk = max(1, _LOOKUP_ELEMENTS // (query_HMO.shape[0] * len(self)))
        parts = [
            self._search(query, sample, choice, top_k)
            for query, sample, choice in zip(
                query_HMO.split(chunk, dim=1), sample_M.split(chunk), choice_HM.split(chunk, dim=1), strict=True
            )
        ]
        similarity_HM = torch.cat([similarity for similarity, _ in parts], dim=1)
        index_HM = torch.cat([index for _, index in parts], dim=1)
        rows_HMO = self.rows_HQO.gather(1, index_HM[:, :, None].expand(-1, -1, self.rows_HQO.shape[2]))
        return Neighbours(rows_HMO, similarity_HM, self.sample_Q[index_HM], self.updates - self.update_Q[index_HM])

    def _search(self, query_HMO: Tensor, sample_M: Tensor, choice_HM: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        similarity_HMQ = torch.bmm(query_HMO.to(self.rows_HQO.dtype), self.rows_HQO.transpose(1, 2))
        similarity_HMQ.masked_fill_(sample_M[:, None] == self.sample_Q, -torch.inf)
        if top_k == 1:
            similarity_HM, index_HM = similarity_HMQ.max(dim=2)
            return similarity_HM, index_HM
        top_HMK, index_HMK = similarity_HMQ.topk(top_k, dim=2)
        chosen = (choice_HM * top_k).long().clamp_max(top_k - 1)[:, :, None]
        return top_HMK.gather(2, chosen).squeeze(2), index_HMK.gather(2, chosen).squeeze(2)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        tensors = {"rows": self.rows_HQO, "sample": self.sample_Q, "update": self.update_Q}
        return {**tensors, "position": self.position, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved queue of the same shape."""
        self.rows_HQO.copy_(state["rows"])
        self.sample_Q.copy_(state["sample"])
        self.update_Q.copy_(state["update"])
        self.position, self.updates = state["position"], state["updates"]
