"""The ensemble of contrastive heads as one batched module (Appendix B.2).

The weights of all heads are stacked: one batched matrix product computes every head, and one norm over H * width
features normalises them all (`norms.py`). Activations are (H, width, N). This matches BatchNorm's (1, channels, N)
layout, so no copy is needed between matrix product and normalisation.

Shapes: H heads, N rows (views times images), D width of a block, O output width.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimref.errors import ConfigError
from mimref.refinement.config import HeadsConfig
from mimref.refinement.norms import Norm, make_norm


class EnsembleLinear(nn.Module):
    """H linear maps without bias, Xavier-uniform: (H, in, N) -> (H, out, N). `weight[h]` is as in nn.Linear."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (inputs + outputs))
        self.weight = nn.Parameter(torch.empty(heads, outputs, inputs).uniform_(-bound, bound))

    def forward(self, x_HIN: Tensor) -> Tensor:
        return torch.bmm(self.weight, x_HIN)


class EnsembleLinears(nn.Module):
    """The first layer of heads that read blocks of several widths: one `EnsembleLinear` per width, ascending."""

    place_H: Tensor | None
    """Position of each head when sorted by width; None if they are already in that order."""

    def __init__(self, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        distinct = sorted(set(widths))
        self.linears = nn.ModuleList(EnsembleLinear(widths.count(width), width, outputs) for width in distinct)
        grouped = [head for width in distinct for head, own in enumerate(widths) if own == width]
        place = None if grouped == sorted(grouped) else torch.tensor(grouped).argsort()
        # A buffer, because an index on another device would be copied in every pass.
        self.register_buffer("place_H", place, persistent=False)

    def forward(self, *x_HIN: Tensor) -> Tensor:
        """Map one (H, in, N) per width, for the heads that read it -> (H, out, N) for all heads in their order."""
        y_HON = torch.cat([linear(own_HIN) for linear, own_HIN in zip(self.linears, x_HIN, strict=True)])
        return y_HON if self.place_H is None else y_HON.index_select(0, self.place_H)


class _Layer(nn.Module):
    """Linear, norm and, except at the end of a projector or predictor, GELU."""

    def __init__(self, widths: Sequence[int], outputs: int, norm: Norm, *, last: bool = False) -> None:
        """widths: input width of each head."""
        super().__init__()
        same = len(set(widths)) == 1
        self.linear = EnsembleLinear(len(widths), widths[0], outputs) if same else EnsembleLinears(widths, outputs)
        self.norm = make_norm(norm, len(widths), outputs)
        self.last = last

    def forward(self, *x_HIN: Tensor) -> Tensor:
        normed_HON: Tensor = self.norm(self.linear(*x_HIN))
        return normed_HON if self.last else F.gelu(normed_HON)


class Heads(nn.Module):
    """Projectors (three layers) and predictors (two layers) of all heads."""

    def __init__(self, config: HeadsConfig, widths: Sequence[int]) -> None:
        """widths: width of the block that each head reads."""
        super().__init__()
        self.widths, self.num_heads = list(widths), len(widths)
        heads, hidden, output, norm = self.num_heads, config.projector_hidden, config.output, config.norm
        self.projector = nn.Sequential(
            _Layer(self.widths, hidden, norm),
            _Layer([hidden] * heads, hidden, norm),
            _Layer([hidden] * heads, output, norm, last=True),
        )
        self.predictor = nn.Sequential(
            _Layer([output] * heads, config.predictor_hidden, norm),
            _Layer([config.predictor_hidden] * heads, output, norm, last=True),
        )

    def stacked(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Stack each head's features, (..., D) each, as `forward` expects: one (H, ..., D) per width D, ascending."""
        return [
            torch.stack([x for x, own in zip(features, self.widths, strict=True) if own == width])
            for width in sorted(set(self.widths))
        ]

    def forward(self, *features_HND: Tensor) -> tuple[Tensor, Tensor]:
        """Return projections and predictions of pooled tokens, both (H, N, O) and of unit length in float32.

        features_HND: as `stacked` returns them; with a single width, head h reads features_HND[h]. In training mode the
        statistics span all N rows jointly. Projections carry no gradient, because they serve as queries, queue rows and
        negatives (SG in Eq. 1).
        """
        projected_HON = self._first(features_HND)
        for layer in list(self.projector)[1:]:
            projected_HON = layer(projected_HON)
        predicted_HON = self.predictor(projected_HON)
        return _unit_rows(projected_HON.detach()), _unit_rows(predicted_HON)

    def hidden(self, *features_HND: Tensor) -> Tensor:
        """Return each projector's first-layer output, (H, N, projector_hidden), by which a sweep compares heads."""
        return self._first(features_HND).transpose(1, 2)

    def _first(self, features_HND: Sequence[Tensor]) -> Tensor:
        """Return the output of the projectors' first layer, (H, hidden, N)."""
        hidden_HWN: Tensor = self.projector[0](*(x_HND.transpose(1, 2) for x_HND in features_HND))
        return hidden_HWN


def _unit_rows(x_HON: Tensor) -> Tensor:
    x_HON = x_HON.float() if x_HON.dtype is torch.bfloat16 else x_HON
    # Like F.normalize, which divides where this multiplies.
    return (x_HON * x_HON.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()).transpose(1, 2)


def head_blocks(blocks: str, depth: int) -> list[int]:
    """Parse the block of each head from `17-24`, `20,22,24` or `last8` (also mixed: `17-20,24`); blocks may repeat.

    Raises ConfigError for a block outside 1..depth and for a range whose start exceeds its end.
    """
    if blocks.startswith("last"):
        ranges = [(depth + 1 - int(blocks.removeprefix("last")), depth)]
    else:
        words = (part.partition("-") for part in blocks.split(","))
        ranges = [(int(first), int(last or first)) for first, _, last in words]
    for first, last in ranges:
        # Checked before the range is expanded: it may have any length.
        if min(first, last) < 1 or max(first, last) > depth:
            raise ConfigError(f"heads.blocks {blocks!r} does not fit: the encoder has blocks 1 to {depth}")
        if first > last:
            raise ConfigError(f"heads.blocks {blocks!r}: range start exceeds end; use {last}-{first}")
    return [block for first, last in ranges for block in range(first, last + 1)]
