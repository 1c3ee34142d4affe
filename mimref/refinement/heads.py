"""The ensemble of contrastive heads as one batched module (Appendix B.2).

All heads' weights are stacked, one batched matrix product serves every head, and one BatchNorm over H * width features
normalises them all. Activations are (H, width, N): this is BatchNorm's own (1, channels, N) layout, so that no copy
lies between matrix product and normalisation.

Shapes: H heads, N rows (views times images), D encoder width, O output width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimref.errors import ConfigError
from mimref.refinement.config import HeadsConfig
from mimref.refinement.norms import Norm, make_norm


class EnsembleLinear(nn.Module):
    """H linear maps without bias, Xavier-uniform: (H, in, N) -> (H, out, N). `weight[h]` is an nn.Linear's weight."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = math.sqrt(6 / (inputs + outputs))
        self.weight = nn.Parameter(torch.empty(heads, outputs, inputs).uniform_(-bound, bound))

    def forward(self, x_HIN: Tensor) -> Tensor:
        return torch.bmm(self.weight, x_HIN)


class _Layer(nn.Module):
    """Linear, norm and, except at the end of a projector or predictor, GELU."""

    def __init__(self, heads: int, inputs: int, outputs: int, norm: Norm, *, last: bool = False) -> None:
        super().__init__()
        self.linear = EnsembleLinear(heads, inputs, outputs)
        self.norm = make_norm(norm, heads, outputs)
        self.last = last

    def forward(self, x_HIN: Tensor) -> Tensor:
        normed_HON: Tensor = self.norm(self.linear(x_HIN))
        return normed_HON if self.last else F.gelu(normed_HON)


class Heads(nn.Module):
    """Projectors (three layers) and predictors (two layers) of all heads."""

    def __init__(self, config: HeadsConfig, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        hidden, output, norm = config.projector_hidden, config.output, config.norm
        self.projector = nn.Sequential(
            _Layer(num_heads, embed_dim, hidden, norm),
            _Layer(num_heads, hidden, hidden, norm),
            _Layer(num_heads, hidden, output, norm, last=True),
        )
        self.predictor = nn.Sequential(
            _Layer(num_heads, output, config.predictor_hidden, norm),
            _Layer(num_heads, config.predictor_hidden, output, norm, last=True),
        )

    def forward(self, features_HND: Tensor) -> tuple[Tensor, Tensor]:
        """Projections and predictions of pooled tokens, both (H, N, O) and of unit length in float32.

        features_HND: head h reads features_HND[h]. In training mode the statistics span all N rows jointly. Projections
        carry no gradient, as queries, queue rows and negatives (SG in Eq. 1).
        """
        projected_HON = self.projector(features_HND.transpose(1, 2))
        predicted_HON = self.predictor(projected_HON)
        return _unit_rows(projected_HON.detach()), _unit_rows(predicted_HON)

    def hidden(self, features_HND: Tensor) -> Tensor:
        """Output of every projector's first layer, (H, N, projector_hidden): what heads of a sweep are compared by."""
        hidden_HWN: Tensor = self.projector[0](features_HND.transpose(1, 2))
        return hidden_HWN.transpose(1, 2)


def _unit_rows(x_HON: Tensor) -> Tensor:
    x_HON = x_HON.float() if x_HON.dtype is torch.bfloat16 else x_HON
    # As F.normalize, which divides where this multiplies.
    return (x_HON * x_HON.square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt()).transpose(1, 2)


def head_blocks(blocks: str, depth: int) -> list[int]:
    """Block of every head from `17-24`, `20,22,24` or `last8` (also mixed: `17-20,24`); blocks may repeat.

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
