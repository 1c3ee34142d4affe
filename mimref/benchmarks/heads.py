"""Time saved by batching the heads, per norm: `Heads` against one plain module per head, forward and backward.

Shapes: H heads, N rows (views times images), D encoder width, O output width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimref.benchmarks.measure import Facts, Ticks, device_setting, median_seconds
from mimref.devices import autocast, keep_freed_memory, resolve_device, resolve_precision
from mimref.progress import Progress
from mimref.refinement.config import HeadsConfig
from mimref.refinement.heads import Heads
from mimref.refinement.norms import NORMS, Norm, update_statistics
from mimref.results import Row


@dataclass(frozen=True)
class HeadSizes:
    """Sizes to measure; the defaults are the paper's heads (see `for_device`)."""

    heads: int = 12
    views: int = 12
    embed_dim: int = 1024
    """Width of the encoder; the default is a ViT-L's."""
    config: HeadsConfig = field(default_factory=HeadsConfig)
    images: tuple[int, ...] = (16, 32, 64, 1024)
    repeats: int = 10
    """Measurements of each implementation, taken in turns after two warm-ups."""

    @classmethod
    def for_device(cls, device: torch.device) -> "HeadSizes":
        """Return the paper's sizes on GPUs; on CPUs, the quickstart preset's at twice its width, which take seconds."""
        if device.type == "cuda":
            return cls()
        small = HeadsConfig(projector_hidden=256, predictor_hidden=512, output=128)
        return cls(embed_dim=192, config=small, images=(4, 16, 64))


def benchmark_heads(
    sizes: HeadSizes | None = None, *, device: str = "auto", precision: str = "auto", progress: Progress | None = None
) -> list[Row]:
    """Time a forward and backward pass of separate modules relative to the ensemble's, per image count and norm.

    Both start from the pooled tokens of each head's block and also compute the gradients of these tokens; the ensemble
    has to stack them first. All norms take turns. Updating running statistics is included.
    """
    target = resolve_device(device)
    if target.type == "cpu":
        keep_freed_memory()  # as training does
    sizes = sizes or HeadSizes.for_device(target)
    dtype = resolve_precision(precision, target)
    both = {norm: _both(sizes, norm, target) for norm in NORMS}
    tick = Ticks(progress, len(sizes.images))
    rows = []
    for images in sizes.images:
        for norm, (together_s, separate_s) in _times(both, sizes, images * sizes.views, dtype).items():
            row: Row = {"metric": "benchmark_heads_speedup", "value": separate_s / together_s, "norm": norm}
            row |= {"together_s": together_s, "separate_s": separate_s}
            row |= {"heads": sizes.heads, "images": images, "rows": images * sizes.views, "width": sizes.embed_dim}
            row |= {"projector_hidden": sizes.config.projector_hidden}
            row |= {"predictor_hidden": sizes.config.predictor_hidden, "output": sizes.config.output}
            rows.append(row | device_setting(target, dtype))
        tick()
    return rows


def _both(sizes: HeadSizes, norm: Norm, device: torch.device) -> tuple[Heads, nn.ModuleList]:
    """Build the ensemble and the separate modules with the same weights."""
    torch.manual_seed(0)
    config = sizes.config.model_copy(update={"norm": norm})
    heads = Heads(config, [sizes.embed_dim] * sizes.heads).to(device)
    return heads, separate_heads(heads, config, sizes.embed_dim)


class _Head(nn.Module):
    """One head of plain modules."""

    def __init__(self, config: HeadsConfig, embed_dim: int) -> None:
        super().__init__()
        hidden, output, wide = config.projector_hidden, config.output, config.predictor_hidden
        first, second = _layer(config.norm, embed_dim, hidden), _layer(config.norm, hidden, hidden)
        projected = _layer(config.norm, hidden, output)
        self.projector = nn.Sequential(*first, nn.GELU(), *second, nn.GELU(), *projected)
        self.predictor = nn.Sequential(
            *_layer(config.norm, output, wide), nn.GELU(), *_layer(config.norm, wide, output)
        )

    def forward(self, features_ND: Tensor) -> tuple[Tensor, Tensor]:
        projected_NO = self.projector(features_ND)
        return _unit_rows(projected_NO.detach()), _unit_rows(self.predictor(projected_NO))


def _layer(norm: Norm, width: int, output: int) -> tuple[nn.Module, nn.Module]:
    normalise = nn.LayerNorm(output) if norm == "layer" else nn.BatchNorm1d(output)
    # A BatchNorm in evaluation mode computes what a running norm does, without statistics of its own.
    return nn.Linear(width, output, bias=False), normalise.train(norm != "running")


def _unit_rows(x_NO: Tensor) -> Tensor:
    return F.normalize(x_NO.float() if x_NO.dtype is torch.bfloat16 else x_NO, dim=1)


def separate_heads(heads: Heads, config: HeadsConfig, embed_dim: int) -> nn.ModuleList:
    """Build a plain module per head with the ensemble's weights; each takes (N, D) and returns what `heads` does."""
    separate = nn.ModuleList(_Head(config, embed_dim) for _ in range(heads.num_heads)).to(next(heads.parameters()))
    stacked = [tensor for tensor in heads.state_dict().values() if tensor.ndim]  # all but update counters
    for number, head in enumerate(separate):
        plain = [tensor for tensor in head.state_dict().values() if tensor.ndim]
        for own, ours in zip(plain, stacked, strict=True):
            own.copy_(ours.unflatten(0, (heads.num_heads, -1))[number].view_as(own))
    return separate


def _times(
    both: Mapping[Norm, tuple[Heads, nn.ModuleList]], sizes: HeadSizes, rows: int, precision: torch.dtype
) -> dict[Norm, tuple[float, float]]:
    """Return the median seconds of the ensemble and of the separate modules, for every norm."""
    device = next(both["batch"][0].parameters()).device
    features = [torch.randn(rows, sizes.embed_dim, device=device, requires_grad=True) for _ in range(sizes.heads)]
    weight_HNO = torch.randn(sizes.heads, rows, sizes.config.output, device=device)

    def drop_gradients(module: nn.Module) -> None:
        for tensor in (*features, *module.parameters()):
            tensor.grad = None

    def run_ensemble(heads: Heads) -> None:
        with autocast(device, precision):
            _, prediction_HNO = heads(torch.stack(features))
        (prediction_HNO * weight_HNO).sum().backward()
        update_statistics(heads)
        drop_gradients(heads)

    def run_separate(separate: nn.ModuleList) -> None:
        with autocast(device, precision):
            predictions = [head(own)[1] for head, own in zip(separate, features, strict=True)]
        torch.stack([(p * weight).sum() for p, weight in zip(predictions, weight_HNO, strict=True)]).sum().backward()
        drop_gradients(separate)

    ways = [
        way for heads, plain in both.values() for way in (partial(run_ensemble, heads), partial(run_separate, plain))
    ]
    calls = 5 if device.type == "cuda" else 1
    seconds = median_seconds(ways, device, turns=sizes.repeats, warm_up=2, calls=calls)
    return dict(zip(both, zip(seconds[::2], seconds[1::2], strict=True), strict=True))


def heads_facts(rows: list[Row]) -> Facts:
    """Describe what `benchmark_heads` measured."""
    facts: Facts = []
    for row in rows:
        heads = f"{row['heads']} heads of {row['projector_hidden']}/{row['predictor_hidden']}/{row['output']}"
        much = f"{1e3 * float(row['together_s']):,.1f} ms together, {1e3 * float(row['separate_s']):,.1f} ms as "
        much += f"separate modules: {float(row['value']):.2f} x as fast"
        facts.append((f"{heads}, {row['norm']} norm, {row['images']} images", much))
    return facts
