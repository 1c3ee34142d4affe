"""Encoders with a linear classifier: forward pass, stochastic depth during training, and storage.

Shapes: B images, D width, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from
from mimref.encoders.vit import Architecture, Encoder
from mimref.encoders.writing import write_safetensors
from mimref.errors import CheckpointError

Pool = Literal["cls", "mean"]
HEAD_STD = 2e-5
"""Standard deviation of the head's initial weights (MAE, BEiT), which makes the first predictions almost uniform."""


class StochasticDepth(nn.Module):
    """Drops a residual branch of some samples in training, and scales those of the others to keep the mean.

    The trainer sets the random numbers that decide, `uniform_B`, so that they depend on the samples and not on their
    places in a batch.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.uniform_B: Tensor | None = None

    def forward(self, branch_BLD: Tensor) -> Tensor:
        if not self.training or self.uniform_B is None:
            return branch_BLD
        keep_B = (self.uniform_B >= self.rate).to(branch_BLD.dtype) / (1 - self.rate)
        return branch_BLD * keep_B[:, None, None]


def set_stochastic_depth(encoder: Encoder, rate: float) -> list[StochasticDepth]:
    """Set `rate * (b - 1) / (L - 1)` for the branches of block b of L; returns those with a rate above 0, in order."""
    found = []
    for number, block in enumerate(encoder.vit.blocks):
        own = rate * number / max(1, encoder.depth - 1)
        for name in [name for name, _ in block.named_modules()]:
            parent, _, child = name.rpartition(".")
            # timm's blocks have one for each branch: drop_path1, drop_path2, or drop_path in parallel blocks.
            if own and child.startswith("drop_path"):
                depth = StochasticDepth(own)
                setattr(block.get_submodule(parent), child, depth)
                found.append(depth)
    return found


class Classifier(nn.Module):
    """Logits from the pooled tokens of the last block, after a LayerNorm.

    With CLS pooling, that norm is the encoder's final one, if it has one; otherwise it is new, as in MAE's fine-tuning
    of mean-pooled patches.
    """

    def __init__(self, encoder: Encoder, num_classes: int, pool: Pool = "cls") -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.final_norm = pool == "cls" and not isinstance(encoder.vit.norm, nn.Identity)
        width, eps = encoder.embed_dim, encoder.architecture.norm_eps
        self.fc_norm: nn.Module = nn.Identity() if self.final_norm else nn.LayerNorm(width, eps=eps)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.head.out_features

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, C) of normalised images (B, 3, S, S)."""
        tokens_BLD = self.encoder.blocks(images, [self.encoder.depth], final_norm=self.final_norm)[0]
        return self.logits(self.encoder.pool(tokens_BLD, self.pool))

    def logits(self, pooled_BD: Tensor) -> Tensor:
        """Return the logits (B, C) of pooled tokens of the last block, after the final norm if `final_norm`."""
        logits_BC: Tensor = self.head(self.fc_norm(pooled_BD))
        return logits_BC

    def head_state(self) -> dict[str, Tensor]:
        """Return the tensors that are not the encoder's, under timm's names."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("encoder.")}


@dataclass(frozen=True)
class ClassifierRecord:
    """A header's record of a classifier."""

    pool: Pool
    classes: list[str]
    """Names in the order of the logits."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ClassifierRecord | None":
        """Return the record in a file's header; None without a classifier. Raises CheckpointError if it is invalid."""
        recorded = checkpoint.header.get("classifier")
        if recorded is None:
            return None
        try:
            pool, classes = recorded["pool"], recorded["classes"]
            if pool not in get_args(Pool) or not isinstance(classes, list) or len(classes) < 2:
                raise ValueError(f"pool {pool!r}, classes {classes!r}"[:100])
            classes = list(map(str, classes))
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path}: its record of a classifier is not valid ({error!r})") from error
        return cls(pool, classes)


def save_classifier(path: Path, classifier: Classifier, classes: Sequence[str], header: Mapping[str, Any]) -> None:
    """Write an encoder and its classifier atomically as safetensors, under timm's names.

    Commands that need an encoder read the file too. classes: names in the order of the logits.
    """
    encoder = classifier.encoder
    tensors = {**encoder.vit.state_dict(), **classifier.head_state()}
    described = {
        "architecture": encoder.architecture.to_dict(),
        "classifier": {"pool": classifier.pool, "classes": list(classes)},
        **header,
    }
    found = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    write_safetensors(path, found, described)


def classifier_of(checkpoint: Checkpoint, encoder: Encoder) -> tuple[Classifier, list[str]] | None:
    """Return a file's classifier on top of its encoder, and the names of its classes; None if the file has none."""
    record = ClassifierRecord.of(checkpoint)
    if record is None:
        return None
    classifier = _with_head(encoder, len(record.classes), record.pool, checkpoint.tensors)
    if classifier is None:
        raise CheckpointError(f"{checkpoint.path}: lacks the classifier that its header describes")
    return classifier, record.classes


def _with_head(encoder: Encoder, num_classes: int, pool: Pool, tensors: Mapping[str, Tensor]) -> Classifier | None:
    """Build a classifier with a file's tensors; None if one is missing or does not fit."""
    with torch.device("meta"):
        classifier = Classifier(encoder, num_classes, pool)
    wanted = classifier.head_state()
    if any(name not in tensors or tensors[name].shape != tensor.shape for name, tensor in wanted.items()):
        return None
    # The encoder's own tensors are there already.
    given = {name: tensors[name].to(tensor.dtype) for name, tensor in wanted.items()}
    classifier.load_state_dict(given, strict=False, assign=True)
    return classifier.eval()


def _public_classifier(checkpoint: Checkpoint, encoder: Encoder) -> tuple[Classifier, list[str]] | None:
    """Return a foreign file's classifier under the names of timm, MAE or torchvision; its classes are called 0, 1, ...

    If the file has a norm of pooled tokens, the mean of the patches is classified (MAE); otherwise the CLS token.
    """
    if (found := checkpoint.recognised) is None:
        return None
    named = {name.removeprefix(found.prefix): tensor for name, tensor in checkpoint.named.items()}
    tensors = {name.removeprefix("heads."): tensor for name, tensor in named.items()}
    weight = tensors.get("head.weight")
    if weight is None or weight.ndim != 2:
        return None
    pool: Pool = "mean" if "fc_norm.weight" in tensors else "cls"
    classifier = _with_head(encoder, len(weight), pool, tensors)
    return None if classifier is None else (classifier, [str(number) for number in range(len(weight))])


def read_classifier(checkpoint: Checkpoint, resolution: int | None = None) -> tuple[Classifier, list[str]]:
    """Return a checkpoint's classifier on the CPU, for images of `resolution` pixels, and the names of its classes.

    The classes of public fine-tuned models are called by number. Raises CheckpointError for a file without a
    classifier, ConfigError for a resolution that is not divisible by the patch size.
    """
    if checkpoint.architecture is None:
        raise CheckpointError(f"{checkpoint.path}: {checkpoint.problem}")
    architecture = choose_architecture(checkpoint, resolution=resolution)
    if isinstance(architecture, Architecture):
        encoder = encoder_from(checkpoint, replace(architecture, image_size=resolution or architecture.image_size))
        assert isinstance(encoder, Encoder)
        if found := classifier_of(checkpoint, encoder) or _public_classifier(checkpoint, encoder):
            return found
    raise CheckpointError(
        f"{checkpoint.path}: holds an encoder without a classifier; fine-tune it first (mimref finetune)"
    )
