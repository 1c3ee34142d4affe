"""Nearest Neighbor Alignment, Eq. (1), for all heads and view pairs.

Shapes: H heads, V views, G = 2 global views, B images, O output width, P = V - 1 views paired with a global view.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """Loss and alignment probability of every head."""

    loss_H: Tensor
    """Mean of Eq. (1) over samples and view pairs."""
    global_H: Tensor
    """Mean probability of the positive among the pairs of global views, without gradient."""
    local_H: Tensor
    """The same for pairs with a local view; NaN without local views."""


def nna_loss(
    prediction_HVBO: Tensor,
    projection_HGBO: Tensor,
    neighbour_HGBO: Tensor,
    temperature_H: Tensor,
    *,
    direction: str = "projection",
    swap_negatives: bool = False,
    first: int = 0,
    all_prediction_HVBO: Tensor | None = None,
    all_negative_HGBO: Tensor | None = None,
) -> Alignment:
    """Align every prediction with the neighbour of its image's global view, repel it from the other images.

    All inputs have unit length. For each global view g and each other view v, anchor i is prediction (v, i), its
    positive neighbour (g, i), its negatives projections (g, j) of the other images, which get no gradient.
    direction: `projection` is Eq. (1), a softmax over projections for each prediction; `prediction` is a softmax over
    predictions for each projection. swap_negatives: negatives are replaced by their neighbours too (NNCLR, Table 1e).
    Where the images are a part of a batch that other ranks hold the rest of: first is the number of images before them,
    all_negative_HGBO the negatives and, for `prediction`, all_prediction_HVBO the predictions of the whole batch. The
    result is then the mean over this part.
    """
    views = prediction_HVBO.shape[1]
    by_prediction = direction == "projection"
    anchors_HVBO = prediction_HVBO if by_prediction or all_prediction_HVBO is None else all_prediction_HVBO
    if all_negative_HGBO is None or not by_prediction:
        all_negative_HGBO = neighbour_HGBO if swap_negatives else projection_HGBO
    losses, global_pairs, local_pairs = [], [], []
    for g in range(2):
        neighbour_HBO = neighbour_HGBO[:, g].detach()
        negative_HBO = all_negative_HGBO[:, g].detach()
        temperature = temperature_H[:, None, None, None]
        # View 1 - g comes first, local views after it.
        own_HPBO = torch.cat([prediction_HVBO[:, 1 - g : 2 - g], prediction_HVBO[:, 2:]], dim=1) / temperature
        other_HPBO = own_HPBO
        if anchors_HVBO is not prediction_HVBO:
            other_HPBO = torch.cat([anchors_HVBO[:, 1 - g : 2 - g], anchors_HVBO[:, 2:]], dim=1) / temperature
        logit_HPBB = torch.bmm(other_HPBO.flatten(1, 2), negative_HBO.transpose(1, 2))
        logit_HPBB = logit_HPBB.unflatten(1, (views - 1, other_HPBO.shape[2]))
        positive_HPB = (own_HPBO * neighbour_HBO[:, None]).sum(dim=-1)
        # The diagonal would repel an image from itself; Eq. (1) has the positive in its place.
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
