"""Many linear classifiers trained at once on the same features, each with its own learning rate (Appendix C.3).

Shapes: B images, D width of an input, C classes, R learning rates, K classifiers: R on each input, input by input.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mimref.training.optim import learning_rate

MOMENTUM = 0.9

Norm = Literal["none", "batch"]
Batch = tuple[Sequence[Tensor], Tensor]
"""One (B, D) tensor per input, and (B,) labels 0..C-1."""


class ProbeEnsemble(nn.Module):
    """R linear classifiers on each of several inputs, trained together by SGD with momentum 0.9 and no weight decay.

    widths: D of every input. lrs: R learning rates, already scaled to the batch. Weights start from N(0, 0.01), as a
    function of `seed`; biases start at 0. norm "batch": every input passes through a BatchNorm1d without affine
    parameters, with the batch's statistics in training and the running ones in `logits`. Classifiers are independent:
    one that diverges does not affect the others. Inputs are converted to `dtype` and moved to `device`.
    """

    bias_KC: Tensor
    bias_momentum_KC: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        lrs: Sequence[float],
        *,
        norm: Norm = "none",
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.smallest_batch = 2 if norm == "batch" else 1
        """Fewest images that an update can train on: batch statistics need two."""
        # Drawn on the CPU, so that every device starts from the same weights.
        generator = torch.Generator().manual_seed(seed)
        # All classifiers of an input, (R * C, D), so that one matrix product serves them.
        weights = [
            torch.empty(len(lrs) * classes, width, dtype=dtype).normal_(0, 0.01, generator=generator).to(device)
            for width in widths
        ]
        bias_KC = torch.zeros(len(widths) * len(lrs), classes, dtype=dtype, device=device)
        self.rate_R = torch.tensor(lrs, dtype=dtype).to(device)
        self.weights = constants(weights)
        self.momenta = constants(map(torch.zeros_like, weights))
        self.bias_KC, self.bias_momentum_KC = constants([bias_KC, torch.zeros_like(bias_KC)])
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width, affine=False, device=device, dtype=dtype) if norm == "batch" else nn.Identity()
            for width in widths
        )

    def __len__(self) -> int:
        return len(self.bias_KC)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.bias_KC.device

    @property
    def elements(self) -> int:
        """Values per image held while scoring: its features or all logits, whichever are more."""
        return max(len(self) * self.classes, sum(int(weight.shape[1]) for weight in self.weights))

    @torch.no_grad()
    def step(self, inputs: Sequence[Tensor], labels: Tensor, scale: float, offset: float = 0.0) -> None:
        """Update all classifiers on one batch, at the learning rates `scale` * lr + `offset`. No device sync.

        inputs: one (B, D) per input. labels: (B,) int64, 0..C-1.
        """
        features = self._normalised(inputs, training=True)
        # The gradient of every classifier's mean cross-entropy; its division by B is left to the sums below.
        gradient_KCB = self._logits(features).softmax(dim=1)
        label_K1B = labels.to(self.bias_KC.device, non_blocking=True).expand(len(self), 1, -1)
        gradient_KCB.scatter_add_(1, label_K1B, gradient_KCB.new_full((1, 1, 1), -1.0).expand_as(label_K1B))
        share = 1 / len(labels)
        self.bias_momentum_KC.mul_(MOMENTUM).add_(gradient_KCB.sum(dim=2), alpha=share)
        rate_R1 = (self.rate_R * scale + offset)[:, None]
        self.bias_KC.addcmul_(self.bias_momentum_KC, rate_R1.repeat(len(self.weights), 1), value=-1)
        rates = len(self.rate_R)
        for weight, momentum, gradient_RCB, x_BD in zip(
            self.weights, self.momenta, gradient_KCB.split(rates), features, strict=True
        ):
            momentum.addmm_(gradient_RCB.flatten(0, 1), x_BD, beta=MOMENTUM, alpha=share)
            weight.view(rates, -1).addcmul_(momentum.view(rates, -1), rate_R1, value=-1)

    @torch.no_grad()
    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return logits (K, C, B) for one (B, D) tensor per input."""
        return self._logits(self._normalised(inputs, training=False))

    def finite(self) -> Tensor:
        """Return (K,) bool: classifiers that have not diverged."""
        weights = [weight.view(len(self.rate_R), -1).isfinite().all(dim=1) for weight in self.weights]
        return torch.cat(weights) & self.bias_KC.isfinite().all(dim=1)

    def _logits(self, features: Sequence[Tensor]) -> Tensor:
        """Return logits (K, C, B). With images last, softmax over the classes runs on whole vectors of images."""
        logits_KCB = self.bias_KC.new_empty(len(self), self.classes, len(features[0]))
        rates = len(self.rate_R)
        for out, bias, weight, x_BD in zip(
            logits_KCB.split(rates), self.bias_KC.split(rates), self.weights, features, strict=True
        ):
            torch.addmm(bias.reshape(-1, 1), weight, x_BD.T, out=out.flatten(0, 1))
        return logits_KCB

    def _normalised(self, inputs: Sequence[Tensor], *, training: bool) -> list[Tensor]:
        self.norms.train(training)
        features = [x_BD.to(self.bias_KC.device, self.bias_KC.dtype, non_blocking=True) for x_BD in inputs]
        return [norm(x_BD) for norm, x_BD in zip(self.norms, features, strict=True)]


def count_hits(logits_KCB: Tensor, labels: Tensor) -> Tensor:
    """Return (K,) int64: images whose largest logit is that of their label (B,). Non-finite logits never count."""
    hit_KB = (logits_KCB.argmax(dim=1) == labels.to(logits_KCB.device)) & logits_KCB.isfinite().all(dim=1)
    return hit_KB.sum(dim=1)


def constants(tensors: Iterable[Tensor]) -> nn.ParameterList:
    """Return the tensors as parameters that `state_dict` holds, but that are updated without autograd."""
    return nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)


def schedule(update: int, total: int, norm: Norm) -> tuple[float, float]:
    """Return the learning rates of an update (0-based) of `total`, as `scale` and `offset` of `ProbeEnsemble.step`.

    norm "none" is DINOv2's schedule, a cosine from lr to 0. norm "batch" is that of the paper's released code: a linear
    warm-up over the first 10% of the updates, then a cosine to 1e-6 for every learning rate.
    """
    if norm == "none":
        return learning_rate(update, peak=1.0, warmup_updates=0, total_updates=total, end=0.0), 0.0
    warmup = total // 10  # truncated, not rounded, as in the release
    # The schedule is linear in its peak and its end, so all classifiers share these two numbers.
    scale = learning_rate(update, peak=1.0, warmup_updates=warmup, total_updates=total, end=0.0)
    return scale, learning_rate(update, peak=0.0, warmup_updates=warmup, total_updates=total, end=1e-6)
