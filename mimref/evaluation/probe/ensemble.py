"""Many linear classifiers trained at once on the same features, with a learning rate each (Appendix C.3).

Shapes: B images, D width of an input, C classes, R learning rates, K classifiers: R on each input, input by input.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mimref.errors import ConfigError, DataError, OutputError
from mimref.files import atomic_write, is_whole, remove_halves
from mimref.progress import Progress
from mimref.training.optim import learning_rate

MOMENTUM = 0.9
INIT_STD = 0.01
# With norm="batch": share of the updates that warm up, and the absolute learning rate that the cosine ends at.
WARMUP_SHARE = 0.1
END_LR = 1e-6
# torch's own defaults of BatchNorm1d.
BATCH_NORM_MOMENTUM = 0.1
BATCH_NORM_EPS = 1e-5
# A state can be gigabytes: it is saved this seldom, and takes at most about 5% of the time.
SAVE_EVERY_S = 10.0
SAVE_COST = 20.0

Norm = Literal["none", "batch"]
Batch = tuple[Sequence[Tensor], Tensor]
"""One (B, D) tensor per input, and (B,) labels 0..C-1."""
Setting = str | int | float | list[float] | list[str]


class ProbeEnsemble:
    """R linear classifiers on each of several inputs, trained together by SGD with momentum 0.9, no weight decay.

    widths: D of every input. lrs: R learning rates, already scaled to the batch. Weights start as N(0, 0.01), a
    function of `seed`; biases as 0. norm "batch": every input passes a BatchNorm1d without affine parameters, with the
    batch's statistics in training and the running ones in `logits`. No classifier touches another: one that diverges
    leaves the others as they are. Inputs are converted to `dtype` and moved to `device`.
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
        """(K,) int64: images whose largest logit is that of their label. Logits that are not finite hit nothing."""
        logits_KCB = self.logits(inputs)
        hit_KB = (logits_KCB.argmax(dim=1) == labels.to(logits_KCB.device)) & logits_KCB.isfinite().all(dim=1)
        return hit_KB.sum(dim=1)

    def finite(self) -> Tensor:
        """(K,) bool: the classifiers that have not diverged."""
        weights = [weight.view(len(self.rate_R), -1).isfinite().all(dim=1) for weight in self.weights]
        return torch.cat(weights) & self.bias_KC.isfinite().all(dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies: weights, momenta and statistics."""
        lists = {"weight": self.weights, "momentum": self._momenta, "mean": self._means, "variance": self._variances}
        tensors = {f"{name}.{i}": value for name, values in lists.items() for i, value in enumerate(values)}
        return tensors | {"bias": self.bias_KC, "bias_momentum": self._bias_momentum}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError when that was of another ensemble."""
        own = self.state_dict()
        if {key: value.shape for key, value in state.items()} != {key: value.shape for key, value in own.items()}:
            raise ValueError("the state is one of other inputs, classes or learning rates")
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
    warm-up over the first 10% of the updates, then a cosine to 1e-6, the same for every learning rate.
    """

    total: int
    """Updates."""
    norm: Norm

    def __call__(self, update: int) -> tuple[float, float]:
        """Scale and offset of an update (0-based)."""
        batch = self.norm == "batch"
        warmup = round(WARMUP_SHARE * self.total) if batch else 0
        # The schedule is linear in its peak and its end, so that all classifiers share these two numbers.
        scale = learning_rate(update, peak=1.0, warmup_updates=warmup, total_updates=self.total, end=0.0)
        if not batch:
            return scale, 0.0
        return scale, learning_rate(update, peak=0.0, warmup_updates=warmup, total_updates=self.total, end=END_LR)


class ProbeState:
    """The file from which an interrupted training continues; whoever uses the results removes it."""

    def __init__(self, path: Path, settings: Mapping[str, Setting]) -> None:
        """settings: all that the result depends on; a file of other ones is refused."""
        self.path, self.settings = path, dict(settings)
        self._due = time.monotonic() + SAVE_EVERY_S

    def load(self, ensemble: ProbeEnsemble) -> int:
        """Fill the ensemble; returns the number of updates done, 0 where there is no file.

        Raises ConfigError for a file of other settings or images, OutputError for a damaged one.
        """
        remove_halves(self.path.parent, self.path.name)
        if not self.path.exists():
            return 0
        try:
            with open(self.path, "rb") as file:
                if not is_whole(file):
                    raise ValueError("the file is not as it was written")
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, step, tensors = dict(saved["settings"]), int(saved["step"]), dict(saved["ensemble"])
        except Exception as error:  # whatever a damaged file makes torch raise
            raise self._damaged() from error
        for key, value in self.settings.items():
            if settings.get(key) != value:
                raise ConfigError(
                    f"cannot continue the probe of {self.path} with another {key}: it was {settings.get(key)!r} and is "
                    f"now {value!r}; leave it as it was, or remove the file to start anew"
                )
        try:
            ensemble.load_state_dict(tensors)
        except (ValueError, AttributeError) as error:
            raise self._damaged() from error
        return step

    def save(self, ensemble: ProbeEnsemble, step: int) -> None:
        """Write the file atomically. Raises OutputError when it cannot be written."""
        started = time.monotonic()
        with atomic_write(self.path) as file:
            torch.save({"settings": self.settings, "step": step, "ensemble": ensemble.state_dict()}, file)
        now = time.monotonic()
        self._due = now + max(SAVE_EVERY_S, SAVE_COST * (now - started))

    def save_when_due(self, ensemble: ProbeEnsemble, step: int) -> None:
        """`save`, when the last time is long enough ago."""
        if time.monotonic() >= self._due:
            self.save(ensemble, step)

    def _damaged(self) -> OutputError:
        return OutputError(f"{self.path}: damaged state of a probe; remove the file to start anew")


def train_probe(
    ensemble: ProbeEnsemble,
    batches: Callable[[int], Iterator[Batch]],
    schedule: Schedule,
    *,
    state: ProbeState | None = None,
    progress: Progress | None = None,
) -> None:
    """Train on all batches; with `state`, from where an earlier run had come to, with the same result bit for bit.

    batches: gives the batches from an update on (0-based), `schedule.total` in all. Those with fewer images than
    statistics need (unreadable ones are left out) count as updates and change nothing. progress: updates done, total.
    """
    step = state.load(ensemble) if state else 0
    if step >= schedule.total:
        return
    for inputs, labels in batches(step):
        if len(labels) >= ensemble.smallest_batch:
            ensemble.step(inputs, labels, *schedule(step))
        step += 1
        if state:
            state.save_when_due(ensemble, step)
        if progress is not None:
            progress(step, schedule.total)
    if state:
        state.save(ensemble, step)


def score(ensemble: ProbeEnsemble, batches: Iterable[Batch], name: str) -> NDArray[np.float64]:
    """Top-1 accuracy of every classifier in percent, (K,); that of a diverged one is 0.

    `name` says in the message which images these are. Raises DataError when there are none.
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


def check_lrs(lrs: Sequence[float]) -> None:
    """Raise ConfigError unless there are learning rates, all of them finite and above 0."""
    if not len(lrs):
        raise ConfigError("lrs: the list is empty; give one or more learning rates")
    for lr in lrs:
        if not (math.isfinite(lr) and lr > 0):
            raise ConfigError(f"lrs: {lr:g} is no learning rate; each must be a finite number above 0")
