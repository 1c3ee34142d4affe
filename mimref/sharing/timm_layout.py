"""Encoders as timm models: `config.json` names a model and overrides its sizes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mimref.data.transforms import EvalTransform
from mimref.encoders.backbones import TimmBackbone
from mimref.encoders.classifier import Classifier
from mimref.encoders.export import plain_state, timm_name
from mimref.encoders.export_backbone import timm_model
from mimref.encoders.export_classifier import classifier_options, classifier_state, pools_patches
from mimref.encoders.timm_models import native_size, timm_record
from mimref.encoders.vit import Encoder, norm_option, timm_options
from mimref.errors import ConfigError
from mimref.sharing.layout import Layout, Subject, with_layer_scale

_PLAIN, _SWIGLU = "vit_base_patch16_224", "vit_giant_patch14_dinov2"
"""timm models whose sizes are overridden if timm has no model of the encoder's sizes."""


def timm_layout(subject: Subject) -> Layout:
    """Lay out the folder's files. Raises ConfigError, naming an alternative, for what no timm model computes."""
    if isinstance(subject.encoder, TimmBackbone):
        name, args = timm_model(subject.encoder.architecture)
        header = {**subject.header, "architecture": subject.encoder.architecture.to_dict()}
        return Layout("timm", name, subject.encoder.model.state_dict(), _config(subject, name, args), header)
    return _plain_layout(subject, subject.encoder)


def _plain_layout(subject: Subject, encoder: Encoder) -> Layout:
    architecture = encoder.architecture
    if architecture.post_norm:
        raise ConfigError(
            f"--to hf: neither transformers nor timm has post-norm blocks (data2vec 2.0), which {architecture.name} "
            "needs; use --to release or --to onnx"
        )
    if norm_option(architecture):
        raise ConfigError(
            f"--layout timm: config.json cannot store the LayerNorm's epsilon of {architecture.norm_eps:g}, which "
            f"{architecture.name} needs; use --layout transformers or --to timm"
        )
    name = timm_name(encoder) if architecture.final_norm else None
    args: dict[str, Any] = {}
    state: Mapping[str, Tensor] = plain_state(encoder)
    if name is not None:
        if native_size(name) != architecture.image_size:
            args["img_size"] = architecture.image_size
        if architecture.channels != 3:
            args["in_chans"] = architecture.channels
    else:
        name = _SWIGLU if architecture.swiglu else _PLAIN
        described = replace(architecture, layer_scale=architecture.layer_scale or architecture.swiglu)
        args = {key: value for key, value in timm_options(described).items() if key != "num_classes"}
        if not architecture.final_norm:
            args["final_norm"] = False
        if architecture.swiglu:
            args.setdefault("mlp_ratio", 4.0)  # the named model has another
            state = with_layer_scale(state, architecture.depth, architecture.width)
    header = {**subject.header, "architecture": architecture.to_dict()}
    if state.keys() != encoder.vit.state_dict().keys():
        header["architecture"]["layer_scale"] = True
    if (classifier := subject.classifier) is not None:
        args.pop("final_norm", None)  # the classifier has its own, for pooled tokens
        args |= {key: value for key, value in classifier_options(classifier).items() if key != "num_classes"}
        added = {key: tensor for key, tensor in state.items() if key not in encoder.vit.state_dict()}
        state = classifier_state(classifier) | added
        header = _classifier_header(header, classifier, subject)
    return Layout("timm", name, state, _config(subject, name, args), header)


def _config(subject: Subject, name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": len(subject.classes),
        "num_features": subject.encoder.architecture.width,
    }
    pool = args.get("global_pool", getattr(subject.encoder.model, "global_pool", None))
    if isinstance(pool, str):  # as timm does
        config["global_pool"] = pool
    config["pretrained_cfg"] = _pretrained_cfg(subject, name)
    if subject.classes:
        config["label_names"] = list(subject.classes)
    return config | ({"model_args": dict(args)} if args else {})


def _classifier_header(header: dict[str, Any], classifier: Classifier, subject: Subject) -> dict[str, Any]:
    """Add what mimref needs to read the classifier again, if its own form has the same tensors."""
    if not classifier.final_norm and classifier.encoder.architecture.from_timm:
        return {key: value for key, value in header.items() if key != "architecture"}
    # The classifier's own norm replaces the encoder's: `fc_norm` after a mean, `norm` before taking the CLS token.
    header["architecture"]["final_norm"] = classifier.final_norm or not pools_patches(classifier)
    return header | {"classifier": {"pool": classifier.pool, "classes": list(subject.classes)}}


def _pretrained_cfg(subject: Subject, name: str) -> dict[str, Any]:
    transform, channels, record = subject.transform, subject.encoder.architecture.channels, timm_record(name)
    size = transform.image_size
    licence = subject.facts.get("licence")
    return {
        "tag": "",
        "custom_load": False,
        "input_size": [channels, size, size],
        "fixed_input_size": record.fixed_input_size,
        "interpolation": "bicubic",
        "crop_pct": 1.0 if transform.resize == "direct" else crop_pct(transform),
        "crop_mode": "squash" if transform.resize == "direct" else "center",
        "mean": list(transform.mean),
        "std": list(transform.std),
        "num_classes": len(subject.classes),
        "pool_size": None,
        # Older versions of timm assume that this layer's weights are for 3 channels, and convert or drop them.
        "first_conv": record.first_conv if channels == 3 else None,
        "classifier": record.classifier,
        **({"license": licence} if isinstance(licence, str) else {}),
    }


def crop_pct(transform: EvalTransform) -> float:
    """Return the share with which timm, which rounds the resized side down, gets mimref's side, which is rounded."""
    size = transform.image_size
    side = round(size / transform.crop_fraction)
    return transform.crop_fraction if int(size / transform.crop_fraction) == side else size / (side + 0.5)
