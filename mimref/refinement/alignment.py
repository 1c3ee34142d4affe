"""Nearest Neighbor Alignment: the queue and its lookup (Eq. 2), and the loss (Eq. 1), for all heads at once.

Shapes: H heads, Q queue rows, M queries, K neighbours, V views, G = 2 global views, B images, O output width,
P = V - 1 views paired with a global view.
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
    """Sample index of the row; -1 for one of the queue's initial random rows."""
    age_HM: Tensor
    """Updates since the row was enqueued."""


class Queue:
    """One (H, Q, O) buffer; all heads share the position, the sample indices and the ages of rows.

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
        """Overwrite the oldest M rows of every head. If M exceeds the queue's size, only the last rows are kept."""
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
        """Return, for every query, one of the `top_k` most similar rows, chosen by `choice_HM` in [0, 1) (Eq. 2).

        query_HMO: unit length. sample_M: sample index of each query. A sample's own rows are excluded: they would be
        perfect but useless neighbours. Results carry no gradient.
        """
        chunk = max(1, _LOOKUP_ELEMENTS // (query_HMO.shape[0] * len(self)))
        parts = zip(query_HMO.split(chunk, dim=1), sample_M.split(chunk), choice_HM.split(chunk, dim=1), strict=True)
        found = zip(*(self._search(*part, top_k) for part in parts), strict=True)
        similarity_HM, index_HM = (torch.cat(each, dim=1) for each in found)
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
        """Return the queue's contents and position, for saved states."""
        tensors = {"rows": self.rows_HQO, "sample": self.sample_Q, "update": self.update_Q}
        return {**tensors, "position": self.position, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved queue of the same shape."""
        self.rows_HQO.copy_(state["rows"])
        self.sample_Q.copy_(state["sample"])
        self.update_Q.copy_(state["update"])
        self.position, self.updates = state["position"], state["updates"]


class Alignment(NamedTuple):
    """Loss and alignment probability of every head."""

    loss_H: Tensor
    """Mean of Eq. (1) over samples and view pairs."""
    global_H: Tensor
    """Mean probability of the positive over pairs of global views, without gradient."""
    local_H: Tensor
    """The same over pairs with a local view; NaN without local views."""


def nna_loss(
    prediction_HVBO: Tensor,
    negative_HGBO: Tensor,
    neighbour_HGBO: Tensor,
    temperature_H: Tensor,
    *,
    direction: str = "projection",
    first: int = 0,
    all_prediction_HVBO: Tensor | None = None,
) -> Alignment:
    """Align every prediction with the neighbour of its image's global view, and repel it from the other images.

    All inputs have unit length. For each global view g and each other view v, anchor i is prediction (v, i), its
    positive is neighbour (g, i), and its negatives are rows (g, j) of the other images: their projections or, with
    NNCLR's swapped negatives (Table 1e), the neighbours of their projections. Negatives get no gradient.
    direction: `projection` is Eq. (1), a softmax over negatives for each prediction; `prediction` is a softmax over
    predictions for each negative. If other ranks hold the rest of the batch, `first` is the number of images before
    this rank's, and the softmax runs over the images of the whole batch, held by negative_HGBO or, for `prediction`, by
    all_prediction_HVBO. The result is then the mean over this rank's images.
    """
    by_prediction = direction == "projection"
    anchor_HVBO = prediction_HVBO if all_prediction_HVBO is None else all_prediction_HVBO
    losses, global_pairs, local_pairs = [], [], []
    for g in range(2):
        own_HPBO = other_HPBO = _other_views(prediction_HVBO, g) / temperature_H[:, None, None, None]
        if anchor_HVBO is not prediction_HVBO:
            other_HPBO = _other_views(anchor_HVBO, g) / temperature_H[:, None, None, None]
        logit_HPBB = torch.bmm(other_HPBO.flatten(1, 2), negative_HGBO[:, g].detach().transpose(1, 2))
        logit_HPBB = logit_HPBB.unflatten(1, other_HPBO.shape[1:3])
        positive_HPB = (own_HPBO * neighbour_HGBO[:, g, None].detach()).sum(dim=-1)
        # The diagonal would repel an image from itself; in Eq. (1) the positive takes its place.
        offset = first if by_prediction else -first
        logit_HPBB.diagonal(offset, dim1=-2, dim2=-1).copy_(positive_HPB)
        loss_HPB = logit_HPBB.logsumexp(dim=-1 if by_prediction else -2) - positive_HPB
        losses.append(loss_HPB)
        probability_HPB = loss_HPB.detach().neg().exp()
        global_pairs.append(probability_HPB[:, 0])
        local_pairs.append(probability_HPB[:, 1:])
    return Alignment(
        torch.stack(losses).mean(dim=(0, 2, 3)),
        torch.stack(global_pairs).mean(dim=(0, 2)),
        torch.stack(local_pairs).mean(dim=(0, 2, 3)),
    )


def _other_views(x_HVBO: Tensor, g: int) -> Tensor:
    """Return all views except global view g: the other global view first, then the local views."""
    return torch.cat([x_HVBO[:, 1 - g : 2 - g], x_HVBO[:, 2:]], dim=1)
