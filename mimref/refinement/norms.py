"""Normalisation inside the heads: every feature of every head at once, on activations (H, width, N).

`batch` is the paper's: statistics of the whole batch over all ranks, which cost a collective per layer and pass.
`running` uses the statistics of earlier updates, which ranks exchange once per update, after the backward pass.
`layer` uses the statistics of each row and head, so ranks exchange nothing.

Shapes: H heads, W width, N rows (views times images), C = H * W channels, R ranks, S values sent.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimref.distributed.collectives import gather_stack
from mimref.distributed.group import world_size

Norm = Literal["batch", "layer", "running"]
NORMS: tuple[Norm, ...] = ("batch", "layer", "running")

EPS = 1e-5
"""Added to variances, as in BatchNorm."""
MOMENTUM = 0.02
"""Weight of an update's batch in running statistics, once they are settled.

No gradient flows through the statistics. If they change quickly, they undo the gradient's last update, and weights grow
without bound (Ioffe 2017, Batch Renormalization): with a weight of 1, within tens of updates. Ioffe's remedy needs
gradients through the statistics of a process's own rows, so results would depend on the number of processes.
"""
DEPTH = 5
"""Layers of a head, in projector and predictor. The first `DEPTH` updates replace the statistics, since a layer's
inputs are right only once the layers before it have settled."""


def make_norm(norm: Norm, heads: int, width: int) -> nn.Module:
    """Return a layer that normalises (H, W, N)."""
    if norm == "layer":
        return EnsembleLayerNorm(heads, width)
    return EnsembleRunningNorm(heads, width) if norm == "running" else EnsembleBatchNorm(heads, width)


class EnsembleBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows, for every feature of every head at once: (H, width, N) -> (H, width, N).

    In a process group the statistics span the rows of all ranks, which may differ in number: means, sums of squared
    deviations and counts are gathered in one collective for all heads, and combined by Chan's formula (sums of squares
    lose precision). torch's SyncBatchNorm does the same, but only for CUDA tensors.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__(heads * width)

    def forward(self, x_HWN: Tensor) -> Tensor:
        if self.training and world_size() > 1:
            return self._synchronised(x_HWN.reshape(self.num_features, x_HWN.shape[2])).view_as(x_HWN)
        if self.training and x_HWN.device.type == "cpu" and x_HWN.shape[2] > 1:
            return self._as_groups(x_HWN)
        return super().forward(x_HWN.reshape(1, self.num_features, -1)).view_as(x_HWN)

    def _as_groups(self, x_HWN: Tensor) -> Tensor:
        """Normalise as a group norm of single channels: equivalent, and five times as fast on CPUs in this layout."""
        channels, rows = self.num_features, x_HWN.shape[2]
        normed, mean, rstd = torch.native_group_norm(
            x_HWN.reshape(1, channels, rows), self.weight, self.bias, 1, channels, rows, channels, self.eps
        )
        variance_C = rstd[0].detach().pow(-2) - self.eps
        self._track(mean[0].detach(), variance_C * (rows / (rows - 1)))
        return normed.view_as(x_HWN)

    def _synchronised(self, x_CN: Tensor) -> Tensor:
        exact_CN = _exact(x_CN)
        mean_C, deviation_C, total = _combined(gather_stack(_summary(exact_CN)))
        self._track(mean_C.detach(), (deviation_C / (total - 1)).detach())
        scale_C = self.weight * torch.rsqrt(deviation_C / total + self.eps)
        normed_CN: Tensor = (exact_CN - mean_C[:, None]) * scale_C[:, None] + self.bias[:, None]
        return normed_CN.to(x_CN.dtype)

    @torch.no_grad()
    def _track(self, mean_C: Tensor, variance_C: Tensor) -> None:
        """Update the running statistics as BatchNorm does, with the unbiased variance."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(1)


class EnsembleLayerNorm(nn.Module):
    """LayerNorm over the features of every row and head, with a scale and shift per feature of every head."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads * width))
        self.bias = nn.Parameter(torch.zeros(heads * width))

    def forward(self, x_HWN: Tensor) -> Tensor:
        """(H, W, N) -> (H, W, N): H heads, W features, N rows."""
        weight_HW, bias_HW = (vector_C.view(x_HWN.shape[:2]) for vector_C in (self.weight, self.bias))
        if torch.compiler.is_compiling():  # the compiler fuses the plain formula, and fails on the function below
            exact_HWN = _exact(x_HWN)
            centred_HWN = exact_HWN - exact_HWN.mean(dim=1, keepdim=True)
            scale_H1N = torch.rsqrt(centred_HWN.square().mean(dim=1, keepdim=True) + EPS)
            return (centred_HWN * scale_H1N * weight_HW[:, :, None] + bias_HW[:, :, None]).to(x_HWN.dtype)
        normed_HWN: Tensor = _LayerNorm.apply(x_HWN, weight_HW, bias_HW)
        return normed_HWN


class _LayerNorm(torch.autograd.Function):
    """LayerNorm over dimension 1: torch's needs features last, and the copies take five times as long on CPUs."""

    @staticmethod
    def forward(ctx: Any, x_HWN: Tensor, weight_HW: Tensor, bias_HW: Tensor) -> Tensor:
        """Normalise rows over their W features, then scale and shift them: (H, W, N), in the dtype of `x_HWN`."""
        exact_HWN = _exact(x_HWN)
        normed_HWN = exact_HWN - exact_HWN.mean(dim=1, keepdim=True)
        scale_H1N = normed_HWN.square().mean(dim=1, keepdim=True).add_(EPS).rsqrt_()
        normed_HWN.mul_(scale_H1N)
        ctx.save_for_backward(normed_HWN.to(x_HWN.dtype), scale_H1N, weight_HW)
        return torch.addcmul(bias_HW[:, :, None], normed_HWN, weight_HW[:, :, None]).to(x_HWN.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of the input (H, W, N) and of scale and shift (H, W), from the output's gradient."""
        normed_HWN, scale_H1N, weight_HW = ctx.saved_tensors
        given_HWN = _exact(gradients[0])
        bias_HW = given_HWN.sum(dim=2)
        along_HWN = given_HWN * normed_HWN
        own_HW = along_HWN.sum(dim=2)
        weight_H1W, width = weight_HW[:, None], weight_HW.shape[1]
        # The input's gradient has no component along ones, and none along the normalised row itself.
        constant_H1N, along_H1N = (torch.bmm(weight_H1W, part_HWN) / width for part_HWN in (given_HWN, along_HWN))
        x_HWN = torch.addcmul(-constant_H1N, given_HWN, weight_HW[:, :, None])
        x_HWN.addcmul_(_exact(normed_HWN), along_H1N, value=-1).mul_(scale_H1N)
        return x_HWN.to(gradients[0].dtype), own_HW, bias_HW


class EnsembleRunningNorm(nn.Module):
    """Normalisation of every feature of every head by the statistics of earlier updates: (H, W, N) -> (H, W, N).

    A row's output depends on no other row, and no gradient flows through the statistics; both passes are those of a
    BatchNorm in evaluation mode. In training mode a pass stores the statistics of its rows in `seen_S`, for
    `update_statistics`.
    """

    running_mean: Tensor
    running_var: Tensor
    updates: Tensor
    """Number of updates of the statistics, ()."""
    seen_S: Tensor
    """Summary of the last pass in training mode: means, sums of squared deviations, and number of rows."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        channels = heads * width
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen_S", torch.zeros(2 * channels + 1), persistent=False)

    def forward(self, x_HWN: Tensor) -> Tensor:
        x_CN = x_HWN.reshape(len(self.weight), x_HWN.shape[2])
        if self.training:
            self.seen_S.copy_(_summary(_exact(x_CN.detach())))
        normed_1CN = F.batch_norm(
            x_CN[None], self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=EPS
        )
        return normed_1CN.view_as(x_HWN)

    @torch.no_grad()
    def follow(self, seen_RS: Tensor) -> None:
        """Move the running statistics towards those of the rows that all ranks have seen."""
        mean_C, deviation_C, total = _combined(seen_RS)
        # Statistics computed from the outputs of layers that had not settled are forgotten.
        since = (self.updates - (DEPTH - 2)).clamp_min(1).to(mean_C.dtype)
        momentum = since.reciprocal().clamp_min(MOMENTUM)
        self.running_mean.lerp_(mean_C, momentum)
        self.running_var.lerp_(deviation_C / total, momentum)
        self.updates.add_(1)


def settled(module: nn.Module) -> bool:
    """Return whether all running statistics have initial values. Sync point."""
    return all(int(norm.updates) for norm in module.modules() if isinstance(norm, EnsembleRunningNorm))


def update_statistics(module: nn.Module) -> None:
    """Update all running statistics of a module from the rows in all ranks' last passes, in one collective.

    Call this on all ranks after the backward pass, which needs the statistics of the forward pass.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, EnsembleRunningNorm)]
    if norms:
        sizes = [len(norm.seen_S) for norm in norms]
        every_RS = gather_stack(torch.cat([norm.seen_S for norm in norms]))
        for norm, seen_RS in zip(norms, every_RS.split(sizes, dim=1), strict=True):
            norm.follow(seen_RS)


def _exact(x: Tensor) -> Tensor:
    """Convert half precision to single precision; leave other types."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _summary(x_CN: Tensor) -> Tensor:
    """Return each channel's mean and sum of squared deviations, and the row count: (2 * C + 1,); zeros without rows."""
    rows = x_CN.shape[1]
    mean_C = x_CN.sum(dim=1) / max(rows, 1)
    deviation_C = (x_CN - mean_C[:, None]).square().sum(dim=1)
    return torch.cat([mean_C, deviation_C, x_CN.new_full((1,), rows)])


def _combined(sent_RS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the ranks' summaries into mean, sum of squared deviations and count of all rows, by Chan's formula."""
    count_R1 = sent_RS[:, -1:].detach()
    total = count_R1.sum()
    mean_RC, deviation_RC = sent_RS[:, :-1].chunk(2, dim=1)
    mean_C = (mean_RC * count_R1).sum(dim=0) / total
    return mean_C, (deviation_RC + count_R1 * (mean_RC - mean_C).square()).sum(dim=0), total
