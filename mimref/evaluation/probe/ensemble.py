"""Many linear classifiers trained at once on the same features, with a learning rate each (Appendix C.3).

Shapes: B images, D width of an input, C classes, R learning rates, K classifiers: R on each input, input by input.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mimref.errors import DataError
from mimref.training.optim import learning_rate

MOMENTUM = 0.9
INIT_STD = 0.01
# With norm="batch": share of warm-up updates, and the absolute learning rate at the end of the cosine.
WARMUP_SHARE = 0.1
END_LR = 1e-6
# torch's own defaults of BatchNorm1d.
BATCH_NORM_MOMENTUM = 0.1
BATCH_NORM_EPS = 1e-5

Norm = Literal["none", "batch"]
Batch = tuple[Sequence[Tensor], Tensor]
"""One (B, D) tensor per input, and (B,) labels 0..C-1."""


class ProbeEnsemble:
    """R linear classifiers on each of several inputs, trained together by SGD with momentum 0.9, no weight decay.

    widths: D of every input. lrs: R learning rates, already scaled to the batch. Weights start as N(0, 0.01), a
    function of `seed`; biases as 0. norm "batch": every input passes a BatchNorm1d without affine parameters, with the
    batch's statistics in training and the running ones in `logits`. Classifiers are independent: one that diverges does
    not affect the others. Inputs are converted to `dtype` and moved to `device`.
    """

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
        # Drawn on the CPU, so that every device starts from the same weights.
        generator = torch.Generator().manual_seed(seed)
        self.norm, self.classes = norm, classes
        self.rate_R = torch.tensor(lrs, dtype=dtype).to(device)
        # All classifiers of an input, (R * C, D): one matrix product serves them.
        self.weights = [
            torch.empty(len(lrs) * classes, width, dtype=dtype).normal_(0, INIT_STD, generator=generator).to(device)
            for width in widths
        ]
        self.bias_KC = torch.zeros(len(widths) * len(lrs), classes, dtype=dtype, device=device)
        self._momenta = [torch.zeros_like(weight) for weight in self.weights]
        self._bias_momentum = torch.zeros_like(self.bias_KC)
        self._means = [torch.zeros(width, dtype=dtype, device=device) for width in widths]
        self._variances = [torch.ones(width, dtype=dtype, device=device) for width in widths]

    def __len__(self) -> int:
        return len(self.bias_KC)

    @property
    def smallest_batch(self) -> int:
        """Fewest images that can be trained on: statistics of a batch need two."""
        return 2 if self.norm == "batch" else 1

    @torch.no_grad()
    def step(self, inputs: Sequence[Tensor], labels: Tensor, scale: float, offset: float = 0.0) -> None:
        """Update all classifiers on one batch, at the learning rates `scale` * lr + `offset`. No device sync.

        inputs: one (B, D) per input. labels: (B,) int64, 0..C-1.
        """
        features = self._prepared(inputs, training=True)
        # The gradient of every classifier's mean cross-entropy; its division by B is left to the sums below.
        gradient_KCB = self._logits(features).softmax(dim=1)
        label_K1B = labels.to(self.bias_KC.device, non_blocking=True).expand(len(self), 1, -1)
        gradient_KCB.scatter_add_(1, label_K1B, gradient_KCB.new_full((1, 1, 1), -1.0).expand_as(label_K1B))
        share = 1 / len(labels)
        self._bias_momentum.mul_(MOMENTUM).add_(gradient_KCB.sum(dim=2), alpha=share)
        rate_R1 = (self.rate_R * scale + offset)[:, None]
        self.bias_KC.addcmul_(self._bias_momentum, rate_R1.repeat(len(self.weights), 1), value=-1)
        rates = len(self.rate_R)
        for weight, momentum, gradient_RCB, x_BD in zip(
            self.weights, self._momenta, gradient_KCB.split(rates), features, strict=True
        ):
            momentum.addmm_(gradient_RCB.flatten(0, 1), x_BD, beta=MOMENTUM, alpha=share)
            weight.view(rates, -1).addcmul_(momentum.view(rates, -1), rate_R1, value=-1)

    @torch.no_grad()
    def logits(self, inputs: Sequence[Tensor]) -> Tensor:
        """(K, C, B) for one (B, D) per input."""
        return self._logits(self._prepared(inputs, training=False))

    def hits(self, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """(K,) int64: images whose largest logit is their label's. Logits that are not finite never count."""
        logits_KCB = self.logits(inputs)
        hit_KB = (logits_KCB.argmax(dim=1) == labels.to(logits_KCB.device)) & logits_KCB.isfinite().all(dim=1)
        return hit_KB.sum(dim=1)

    def finite(self) -> Tensor:
        """(K,) bool: classifiers that have not diverged."""
        weights = [weight.view(len(self.rate_R), -1).isfinite().all(dim=1) for weight in self.weights]
        return torch.cat(weights) & self.bias_KC.isfinite().all(dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies: weights, momenta and statistics."""
        lists = {"weight": self.weights, "momentum": self._momenta, "mean": self._means, "variance": self._variances}
        tensors = {f"{name}.{i}": value for name, values in lists.items() for i, value in enumerate(values)}
        return tensors | {"bias": self.bias_KC, "bias_momentum": self._bias_momentum}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave. Raises ValueError for the state of another ensemble."""
        own = self.state_dict()
        if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in own.items()}:
            raise ValueError("the state has other inputs, classes or learning rates")
        for key, value in own.items():
            value.copy_(state[key])

    def _logits(self, features: Sequence[Tensor]) -> Tensor:
        """(K, C, B). With images last, softmax over the classes runs over whole vectors of images."""
        logits_KCB = self.bias_KC.new_empty(len(self), self.classes, len(features[0]))
        rates = len(self.rate_R)
        for out, bias, weight, x_BD in zip(
            logits_KCB.split(rates), self.bias_KC.split(rates), self.weights, features, strict=True
        ):
            torch.addmm(bias.reshape(-1, 1), weight, x_BD.T, out=out.flatten(0, 1))
        return logits_KCB

    def _prepared(self, inputs: Sequence[Tensor], *, training: bool) -> list[Tensor]:
        like = self.bias_KC
        features = [x_BD.to(like.device, like.dtype, non_blocking=True) for x_BD in inputs]
        if self.norm == "none":
            return features
        statistics = zip(features, self._means, self._variances, strict=True)
        return [
            F.batch_norm(x, mean, var, training=training, momentum=BATCH_NORM_MOMENTUM, eps=BATCH_NORM_EPS)
            for x, mean, var in statistics
        ]


@dataclass(frozen=True)
class Schedule:
    """Learning rates of every update: `scale` * lr + `offset`.

    norm "none" is DINOv2's schedule, a cosine from lr to 0. norm "batch" is that of the paper's released code: a linear
    warm-up over the first 10% of the updates, then a cosine to 1e-6 for every learning rate.
    """

    total: int
    """Updates."""
    norm: Norm

    def __call__(self, update: int) -> tuple[float, float]:
        """Scale and offset of an update (0-based)."""
        batch = self.norm == "batch"
        warmup = round(WARMUP_SHARE * self.total) if batch else 0
        # The schedule is linear in its peak and its end, so all classifiers share these two numbers.
        scale = learning_rate(update, peak=1.0, warmup_updates=warmup, total_updates=self.total, end=0.0)
        if not batch:
            return scale, 0.0
        return scale, learning_rate(update, peak=0.0, warmup_updates=warmup, total_updates=self.total, end=END_LR)


def score(ensemble: ProbeEnsemble, batches: Iterable[Batch], name: str) -> NDArray[np.float64]:
    """Top-1 accuracy of every classifier in percent, (K,); that of a diverged one is 0.

    name: of the images, for the message. Raises DataError when there are none.
    """
    hits = torch.zeros(len(ensemble), dtype=torch.int64, device=ensemble.bias_KC.device)
    count = 0
    for inputs, labels in batches:
        hits += ensemble.hits(inputs, labels)
        count += len(labels)
    if not count:
        raise DataError(f"{name}: no readable image")
    accuracy: NDArray[np.float64] = np.where(ensemble.finite().cpu().numpy(), 100.0 * hits.cpu().numpy() / count, 0.0)
    return accuracy
