"""Many attentive probes trained at once on the same patch tokens: efficient probing.

Psomas et al., "Attention, Please! Revisiting Attentive Probing Through the Lens of Efficiency", ICLR 2026
(billpsomas/efficient-probing, poolings/ep.py and probe_heads.py). Learned queries attend to the tokens themselves,
without projections to keys and queries; each query pools its own share of the channels of one value projection.

Shapes: B images, L tokens, D width of an input, Q queries of a probe, E = D / Q, C classes, R learning rates, M queries
of all probes of an input, K probes: R for every number of queries, input by input.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimref.evaluation.probe.ensemble import MOMENTUM, Norm, constants
from mimref.training.optim import learning_rate

QUERY_STD = 0.02
TRUST = 0.001
"""LARS: norm of an update, before the learning rate, relative to the norm of the weights."""
WARMUP = 10 / 90
"""Share of the updates that warm up the learning rates: 10 of the paper's 90 epochs."""
_NORM_EPS = 1e-6


class TokenShape(NamedTuple):
    """Shape of the tokens of one input, which form one row per image: block by block, token by token."""

    tokens: int
    """Number of tokens of every block."""
    widths: tuple[int, ...]
    """Widths of the blocks, whose tokens are concatenated."""

    @property
    def width(self) -> int:
        """Width D of a concatenated token."""
        return sum(self.widths)

    @property
    def size(self) -> int:
        """Values per image, L * D."""
        return self.tokens * self.width

    def unflatten(self, rows_BX: Tensor) -> Tensor:
        """Return rows (B, L * D) as tokens (B, L, D)."""
        blocks = rows_BX.split([self.tokens * width for width in self.widths], dim=1)
        parts = [block.unflatten(1, (self.tokens, width)) for block, width in zip(blocks, self.widths, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class AttentivePools(nn.Module):
    """R probes of Q queries each on one input: attention, value projection, BatchNorm, linear classifier.

    Initialised as in the authors' code: queries N(0, 0.02), the other weights and the bias uniform in +-1 / sqrt(D).
    """

    def __init__(
        self, width: int, queries: int, classes: int, rates: int, norm: Norm, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.queries = queries
        bound = width**-0.5

        def drawn(*shape: int, std: float | None = None) -> nn.Parameter:
            values = torch.empty(shape)
            values = (
                values.uniform_(-bound, bound, generator=generator)
                if std is None
                else values.normal_(0, std, generator=generator)
            )
            return nn.Parameter(values)

        self.query_RQD = drawn(rates, queries, width, std=QUERY_STD)
        self.value_RQED = drawn(rates, queries, width // queries, width)
        self.weight_RCD = drawn(rates, classes, width)
        self.bias_RC = drawn(rates, classes)
        self.momenta = constants(map(torch.zeros_like, self.trained))
        # One norm computes the statistics of all R * D pooled features.
        self.norm = nn.BatchNorm1d(rates * width, eps=_NORM_EPS, affine=False) if norm == "batch" else nn.Identity()

    @property
    def trained(self) -> list[nn.Parameter]:
        """Trained weights, in the order of `momenta`."""
        return [self.query_RQD, self.value_RQED, self.weight_RCD, self.bias_RC]

    def forward(self, pooled_BMD: Tensor) -> Tensor:
        """Return logits (R, B, C) of tokens pooled by every query, M = R * Q.

        Projecting the pooled tokens equals pooling the projected tokens, but needs no (L, D) product per probe.
        """
        rates, queries, share, width = self.value_RQED.shape
        value_MBE = pooled_BMD.transpose(0, 1) @ self.value_RQED.view(rates * queries, share, width).mT
        value_BX = value_MBE.transpose(0, 1).flatten(1)
        normed_BX: Tensor = self.norm(value_BX)
        normed_RBD = normed_BX.view(-1, rates, width).transpose(0, 1)
        return torch.baddbmm(self.bias_RC[:, None], normed_RBD, self.weight_RCD.mT)

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], rate_R: Tensor) -> None:
        """Take one step of LARS without weight decay; as in MAE's code (util/lars.py), biases use plain momentum."""
        for weight, momentum, gradient in zip(self.trained, self.momenta, gradients, strict=True):
            ones = (1,) * (weight.ndim - 1)
            if weight.ndim > 2:
                weights_R, gradients_R = (x.flatten(1).norm(dim=1) for x in (weight, gradient))
                usable_R = (weights_R > 0) & (gradients_R > 0)
                trust_R = torch.where(usable_R, TRUST * weights_R / gradients_R, torch.ones_like(rate_R))
                gradient = gradient * trust_R.view(-1, *ones)
            momentum.mul_(MOMENTUM).add_(gradient)
            weight.sub_(momentum * rate_R.view(-1, *ones))


class AttentiveEnsemble(nn.Module):
    """Attentive probes on several inputs: R learning rates for every number of queries, trained together by LARS.

    shapes: token shapes of the inputs; every number of queries must divide their widths. lrs: R learning rates,
    already scaled to the batch. norm "batch": pooled features pass through a BatchNorm1d without affine parameters,
    with the batch's statistics in training and the running ones in `logits`. Initial weights are a function of `seed`.
    Probes are independent: one that diverges does not affect the others. The interface is that of `ProbeEnsemble`.
    """

    def __init__(
        self,
        shapes: Sequence[TokenShape],
        queries: Sequence[int],
        classes: int,
        lrs: Sequence[float],
        *,
        norm: Norm = "batch",
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.shapes, self.classes, self.dtype = list(shapes), classes, dtype
        self.smallest_batch = 2 if norm == "batch" else 1
        # Drawn on the CPU, so that every device starts from the same weights.
        generator = torch.Generator().manual_seed(seed)
        self.of_input = [
            [AttentivePools(shape.width, count, classes, len(lrs), norm, generator) for count in queries]
            for shape in shapes
        ]
        self.pools = [pools for own in self.of_input for pools in own]
        self.registered = nn.ModuleList(self.pools)
        self.to(device, dtype)
        self.rate_R = torch.tensor(lrs, dtype=dtype).to(device)

    def __len__(self) -> int:
        return len(self.pools) * len(self.rate_R)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.rate_R.device

    @property
    def elements(self) -> int:
        """Most values per image held at once while scoring: all tokens, the pooling of one input, or all logits."""
        held = [
            shape.size + sum(pools.queries for pools in own) * len(self.rate_R) * (shape.tokens + 2 * shape.width)
            for shape, own in zip(self.shapes, self.of_input, strict=True)
        ]
        return max(*held, sum(shape.size for shape in self.shapes), len(self) * self.classes)

    def step(self, inputs: Sequence[Tensor], labels: Tensor, scale: float, offset: float = 0.0) -> None:
        """Update all probes on one batch, at the learning rates `scale` * lr + `offset`. No device sync.

        inputs: one (B, L * D) per input, see `TokenShape`. labels: (B,) int64, 0..C-1.
        """
        with torch.enable_grad():
            logits_KBC = self._logits(inputs, training=True)
            label_X = labels.to(self.device, non_blocking=True).repeat(len(self))
            # The sum of all probes' mean cross-entropies: each probe's gradient is that of its own loss.
            loss = F.cross_entropy(logits_KBC.flatten(0, 1), label_X, reduction="sum") / len(labels)
            gradients = iter(torch.autograd.grad(loss, [weight for pools in self.pools for weight in pools.trained]))
        rate_R = self.rate_R * scale + offset
        for pools in self.pools:
            pools.update([next(gradients) for _ in pools.trained], rate_R)

    @torch.no_grad()
    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return logits (K, C, B) for one (B, L * D) tensor per input."""
        return self._logits(inputs, training=False).mT

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Return (K,) bool: probes that have not diverged."""
        of_pools = [
            torch.stack([weight.flatten(1).isfinite().all(dim=1) for weight in pools.trained]).all(dim=0)
            for pools in self.pools
        ]
        return torch.cat(of_pools)

    def _logits(self, inputs: Sequence[Tensor], *, training: bool) -> Tensor:
        """Return logits (K, B, C)."""
        self.train(training)
        found: list[Tensor] = []
        for rows_BX, shape, own in zip(inputs, self.shapes, self.of_input, strict=True):
            x_BLD = shape.unflatten(rows_BX.to(self.device, self.dtype, non_blocking=True))
            if x_BLD.is_inference():  # autograd cannot save inference tensors
                x_BLD = x_BLD.clone()
            pooled_BMD = attend(torch.cat([pools.query_RQD.flatten(0, 1) for pools in own]), x_BLD)
            parts = pooled_BMD.split([pools.query_RQD.shape[0] * pools.queries for pools in own], dim=1)
            found += [pools(part) for pools, part in zip(own, parts, strict=True)]
        return torch.cat(found)


def attend(query_MD: Tensor, x_BLD: Tensor) -> Tensor:
    """Return tokens pooled by every query, (B, M, D): softmax over the tokens of query . token / sqrt(D)."""
    attention_BLM = (x_BLD @ (query_MD * query_MD.shape[1] ** -0.5).T).softmax(dim=1)
    pooled_BMD: Tensor = attention_BLM.mT @ x_BLD
    return pooled_BMD


def attentive_schedule(update: int, total: int) -> tuple[float, float]:
    """Return the learning rates of an update (0-based) of `total`, as `scale` and `offset` of the ensemble's `step`.

    A linear warm-up over a ninth of the updates, then a cosine to 0.
    """
    warmup = round(total * WARMUP)
    return learning_rate(update, peak=1.0, warmup_updates=warmup, total_updates=total, end=0.0), 0.0
