"""Parts that the folders of both libraries have in common."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mimref.data.transforms import EvalTransform
from mimref.encoders.backbones import TokenEncoder, new_encoder
from mimref.encoders.classifier import Classifier
from mimref.encoders.vit import Encoder
from mimref.encoders.writing import safetensors_parts

Library = Literal["transformers", "timm"]
WEIGHTS, CONFIG, PROCESSOR, CARD = "model.safetensors", "config.json", "preprocessor_config.json", "README.md"
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue, as in `mimref.encoders.vit.gray`."""


@dataclass(frozen=True)
class Subject:
    """Model to export, in fp32 on the CPU."""

    encoder: TokenEncoder
    transform: EvalTransform
    """Transform of its images."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Entries of its header that hold in any format."""
    classifier: Classifier | None = None
    """Classifier on top of the encoder, which is then a plain vision transformer."""
    classes: Sequence[str] = ()
    """Names of classes in the order of the logits."""

    @property
    def header(self) -> dict[str, Any]:
        """Header of the weights file, whatever its layout."""
        classes = {"classes": list(self.classes)} if self.classifier else {}
        return {**self.facts, "transform": self.transform.to_dict(), **classes}

    def for_rgb(self) -> "Subject":
        """Return the same model for RGB images: a gray encoder's projection of pixels then also computes the luma."""
        architecture = self.encoder.architecture
        if architecture.channels != 1:
            return self
        encoder = new_encoder(replace(architecture, channels=3))
        luma, shapes = torch.tensor(LUMA).view(1, 3, 1, 1), {n: x.shape for n, x in encoder.model.state_dict().items()}
        # Only the convolution on the pixels has a different shape.
        state = {n: x if x.shape == shapes[n] else x * luma for n, x in self.encoder.model.state_dict().items()}
        encoder.model.load_state_dict(state)
        classifier = copy.deepcopy(self.classifier)
        if classifier is not None:
            assert isinstance(encoder, Encoder)
            classifier.encoder = encoder
        mean, std = (values * 3 if len(values) == 1 else values for values in (self.transform.mean, self.transform.std))
        transform = replace(self.transform, mean=mean, std=std)
        return replace(self, encoder=encoder.eval(), transform=transform, classifier=classifier)


@dataclass(frozen=True)
class Layout:
    """Files of a folder, without its card."""

    library: Library
    model: str
    """Class of transformers, or name of a timm model."""
    tensors: Mapping[str, Tensor]
    """Tensors under the library's names."""
    config: Mapping[str, Any]
    header: Mapping[str, Any]
    """Header for mimref, in the metadata of the weights file."""
    processor: Mapping[str, Any] | None = None
    """None if the config describes how images are prepared."""

    def files(self) -> dict[str, bytes]:
        """Return the content of every file by name."""
        # BatchNorm counts its batches in integers.
        floats = {name: x.float() if x.is_floating_point() else x for name, x in self.tensors.items()}
        tensors = {name: x.contiguous().clone() for name, x in floats.items()}
        found = {WEIGHTS: b"".join(safetensors_parts(tensors, self.header)), CONFIG: _json(self.config)}
        return found if self.processor is None else found | {PROCESSOR: _json(self.processor)}


def with_layer_scale(state: Mapping[str, Tensor], depth: int, width: int) -> dict[str, Tensor]:
    """Return a state whose blocks have LayerScale, with factors of 1 where they had none."""
    ones = {f"blocks.{block}.ls{part}.gamma": torch.ones(width) for block in range(depth) for part in (1, 2)}
    return ones | dict(state)


def _json(values: Mapping[str, Any]) -> bytes:
    # Names of classes may contain bytes that are not UTF-8; escaping preserves them.
    return (json.dumps(dict(values), indent=2) + "\n").encode()
