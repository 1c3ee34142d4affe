"""Many linear heads on patch tokens, trained together on the same images, each with its own learning rate.

A head is a BatchNorm over all tokens and a 1 x 1 convolution, whose scores are upsampled to pixels. The heads of one
input share BatchNorm statistics and one matrix product; the loss is computed for a few heads at a time, so that memory
does not grow with the number of heads. Heads are independent: each trains as it would alone.

Shapes: B images, M tokens (all of a batch), D width of an input, C classes, R heads of an input, h x w patches,
S pixels per side, K heads: R on each input, input by input.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimref.data.masks.sources import UNLABELLED
from mimref.evaluation.probe.ensemble import MOMENTUM
from mimref.transfer.segment.config import Upsampling

INIT_STD = 0.01
# Number of pixel scores that a loss holds at once: 128 MB in float32, several times over.
PIXEL_ELEMENTS = 1 << 25


class HeadInput(NamedTuple):
    """The tokens that a group of heads reads."""

    blocks: tuple[int, ...]
    """Block numbers, 1-based (0: raw pixels); their tokens are concatenated."""
    pool: Literal["patch", "patch+cls"] = "patch"
    """Patch tokens alone, or each concatenated with the CLS token of the same block."""

    def __str__(self) -> str:
        return f"blocks {','.join(map(str, self.blocks))} {self.pool}"

    def tokens(self, of_block: dict[int, Tensor], num_prefix: int) -> Tensor:
        """Return (B, N, D) from the output (B, L, D') of every block. num_prefix: number of prefix tokens."""
        parts: list[Tensor] = []
        for block in self.blocks:
            patches_BND = of_block[block][:, num_prefix:]
            parts.append(patches_BND)
            if self.pool == "patch+cls":
                parts.append(of_block[block][:, :1].expand_as(patches_BND))
        return torch.cat(parts, dim=2)


class SegmentationHeads(nn.Module):
    """R linear heads on each of several inputs.

    widths: D of every input. Weights start as normal draws with a standard deviation of 0.01, biases as 0. The draws
    depend on `seed`, the width and the number of classes, and are the same for all heads of an input. affine: the
    BatchNorm of every head has its own scale and shift.
    """

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        heads: int,
        *,
        affine: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.classes, self.heads, self.affine = classes, heads, affine

        def stacked(values: Tensor) -> nn.Parameter:
            return nn.Parameter(values.expand(heads, *values.shape).clone().to(device))

        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.scales, self.shifts = nn.ParameterList(), nn.ParameterList()
        for width in widths:
            # Draw on the CPU, so that training starts from the same weights on every device.
            generator = torch.Generator().manual_seed(seed)
            weight_CD = torch.empty(classes, width, dtype=torch.float64)
            nn.init.trunc_normal_(weight_CD, std=INIT_STD, generator=generator)
            self.weights.append(stacked(weight_CD.to(dtype)))
            self.biases.append(stacked(torch.zeros(classes, dtype=dtype)))
            if affine:
                self.scales.append(stacked(torch.ones(width, dtype=dtype)))
                self.shifts.append(stacked(torch.zeros(width, dtype=dtype)))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width, affine=False, device=device, dtype=dtype) for width in widths)

    def __len__(self) -> int:
        return len(self.weights) * self.heads

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return scores (R, C, B, N) for every input (B, N, D); in training mode, BatchNorm uses batch statistics."""
        found: list[Tensor] = []
        for number, x_BND in enumerate(inputs):
            weight_RCD = self.weights[number]
            x_MD = self.norms[number](x_BND.flatten(0, 1).to(weight_RCD.dtype))
            bias_RC = self.biases[number]
            if self.affine:
                # Fold scale and shift into weights and biases, so that one product serves all heads.
                bias_RC = bias_RC + torch.einsum("rcd,rd->rc", weight_RCD, self.shifts[number])
                weight_RCD = weight_RCD * self.scales[number][:, None]
            scores = torch.addmm(bias_RC.reshape(-1, 1), weight_RCD.flatten(0, 1), x_MD.T)
            found.append(scores.view(self.heads, self.classes, *x_BND.shape[:2]))
        return found

    def parameters_of(self, head: int) -> list[nn.Parameter]:
        """Return the parameters of one head, 0 to K-1: views of the stacked parameters."""
        number, row = divmod(head, self.heads)
        return [nn.Parameter(stack.detach()[row]) for stack in self._stacks(number)]

    def gradients_of(self, head: int) -> list[Tensor]:
        """Return the gradients of one head's parameters, after a backward pass."""
        number, row = divmod(head, self.heads)
        return [stack.grad[row] for stack in self._stacks(number) if stack.grad is not None]

    def finite(self) -> Tensor:
        """Return which heads have not diverged, (K,) bool."""
        of_input = [
            torch.stack([stack.isfinite().flatten(1).all(dim=1) for stack in self._stacks(number)]).all(dim=0)
            for number in range(len(self.weights))
        ]
        return torch.cat(of_input)

    def _stacks(self, number: int) -> list[nn.Parameter]:
        """Return the stacked parameters of an input's heads."""
        lists = (self.weights, self.biases, *((self.scales, self.shifts) if self.affine else ()))
        return [stacks[number] for stacks in lists]


class HeadsTrainer:
    """Updates every head on the same batch, with PyTorch's SGD or AdamW."""

    def __init__(
        self,
        heads: SegmentationHeads,
        optimizer: Literal["sgd", "adamw"],
        rates: Sequence[float],
        *,
        weight_decay: float = 0.0,
        upsampling: Upsampling = "bilinear",
    ) -> None:
        """rates: R learning rates, already scaled to the batch size; the same for the heads of every input."""
        self.heads, self.upsampling = heads, upsampling
        self.rates = list(rates) * len(heads.weights)
        groups: list[dict[str, Any]] = [{"params": heads.parameters_of(head)} for head in range(len(heads))]
        if optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=0.0, momentum=MOMENTUM, weight_decay=weight_decay, foreach=True
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay, foreach=True)

    def step(self, inputs: Sequence[Tensor], mask_BSS: Tensor, scale: float, offset: float = 0.0) -> None:
        """Update all heads, each at the learning rate `scale` * rate + `offset`. No device sync.

        inputs: one tensor (B, N, D) per input, of square images. mask_BSS: classes, on the heads' device.
        """
        self.heads.train()
        scores = self.heads(inputs)
        gradients = [pixel_gradients(each.detach(), mask_BSS, self.upsampling) for each in scores]
        torch.autograd.backward(scores, gradients)
        for head, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.rates[head] * scale + offset
            for parameter, gradient in zip(group["params"], self.heads.gradients_of(head), strict=True):
                parameter.grad = gradient
        self.optimizer.step()
        self.heads.zero_grad(set_to_none=True)


def pixel_gradients(scores_RCBN: Tensor, mask_BSS: Tensor, upsampling: Upsampling) -> Tensor:
    """Return the gradient of every head's mean cross-entropy over labelled pixels, with respect to its patch scores.

    Without labelled pixels, the gradient is zero.
    """
    target_BSS = mask_BSS.long()
    labelled = (target_BSS != UNLABELLED).sum().clamp_min(1)
    step = max(1, PIXEL_ELEMENTS // (scores_RCBN[0].numel() // scores_RCBN.shape[3] * mask_BSS[0].numel()))
    gradients: list[Tensor] = []
    for part_RCBN in scores_RCBN.split(step):
        part_RCBN = part_RCBN.detach().requires_grad_()
        pixels = to_pixels(grid(part_RCBN.transpose(1, 2).flatten(0, 1)), mask_BSS.shape[1:], upsampling)
        target = target_BSS.expand(len(part_RCBN), *target_BSS.shape).flatten(0, 1)
        loss = F.cross_entropy(pixels, target, ignore_index=UNLABELLED, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, part_RCBN)
        gradients.append(gradient)
    return torch.cat(gradients) / labelled


def grid(scores_BCN: Tensor) -> Tensor:
    """Arrange the scores of the N patches of square images as (B, C, h, w)."""
    side = math.isqrt(scores_BCN.shape[2])
    return scores_BCN.reshape(*scores_BCN.shape[:2], side, side)


def to_pixels(scores_BChw: Tensor, size: Sequence[int], upsampling: Upsampling) -> Tensor:
    """Upsample patch scores to pixels, (B, C, H, W)."""
    if upsampling == "nearest":
        return F.interpolate(scores_BChw, size=tuple(size), mode="nearest")
    return F.interpolate(scores_BChw, size=tuple(size), mode="bilinear", align_corners=False)
