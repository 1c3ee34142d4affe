"""Tiny encoders of every kind that folders hold, with random weights."""

from dataclasses import replace
from typing import Any

import torch

from mimref.data.transforms import EvalTransform
from mimref.encoders.classifier import Classifier
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.sharing.layout import Subject

TINY = Architecture("custom", 16, width=48, depth=3, num_heads=3, patch_size=4)
NO_CLS = replace(TINY, class_token=False)
SCALED = replace(TINY, layer_scale=True, fixed_positions=False)
SWIGLU = replace(SCALED, swiglu=True, mlp_width=256)
FOURFOLD_SWIGLU = replace(SWIGLU, mlp_width=0)
REGISTERS = replace(SCALED, registers=4)
DINOV2 = replace(SWIGLU, registers=2)
PLAIN_SWIGLU = replace(SWIGLU, layer_scale=False)
GRAY = replace(TINY, channels=1)
WIDE = replace(TINY, mlp_width=100)
EPS = replace(TINY, norm_eps=1e-12)
NO_NORM = replace(TINY, final_norm=False)
NO_CLS_REGISTERS = replace(NO_CLS, registers=2)
POST_NORM = replace(TINY, post_norm=True)
CLASSES = ["a", "b", "<b>"]
TRANSFORM = EvalTransform(16, 0.8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def make(architecture: Architecture) -> Encoder:
    """Return an encoder with random weights, also where a new one has zeros and ones."""
    torch.manual_seed(0)
    encoder = build_encoder(architecture).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return encoder


def with_classifier(architecture: Architecture, pool: Any = "cls") -> Classifier:
    classifier = Classifier(make(architecture), len(CLASSES), pool)
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return classifier.eval()


def subject_of(model: Encoder | Classifier, transform: EvalTransform = TRANSFORM) -> Subject:
    facts = {"source": "mae refined"}
    if isinstance(model, Classifier):
        return Subject(model.encoder, transform, facts, model, CLASSES)
    return Subject(model, transform, facts)
