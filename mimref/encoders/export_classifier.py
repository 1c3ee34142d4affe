"""Export of a fine-tuned encoder with its classifier to timm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mimref.encoders.classifier import Classifier
from mimref.encoders.export import (
    ENDINGS,
    Export,
    comparison_images,
    plain_state,
    reading_line,
    timm_name,
    write_verified,
)
from mimref.encoders.vit import norm_option, timm_options
from mimref.encoders.writing import write_safetensors
from mimref.errors import ConfigError
from mimref.files import check_new_file
from mimref.progress import Listener


def export_classifier(
    classifier: Classifier,
    classes: Sequence[str],
    out: Path,
    facts: Mapping[str, Any],
    *,
    force: bool = False,
    listener: Listener | None = None,
) -> Export:
    """Write a file that `timm.create_model(name, checkpoint_path=out, num_classes=C)` loads, and compare its logits.

    As `export_timm`; the metadata of a .safetensors file holds `facts` and the class names. Raises ConfigError for an
    encoder with blocks for which timm has no classifier.
    """
    check_new_file(out, ENDINGS["timm"], force)
    encoder = classifier.encoder
    architecture = encoder.architecture
    name = timm_name(encoder)
    if architecture.post_norm or architecture.swiglu or (name is None and architecture.from_timm):
        raise ConfigError(f"--to timm: timm has no classifier with the blocks of {architecture.name}")
    options, state = classifier_options(classifier), classifier_state(classifier)

    def write(file: Path) -> None:
        if out.suffix == ".safetensors":
            write_safetensors(file, state, {**facts, "classes": list(classes)})
        else:
            torch.save(state, file)

    def read(file: Path) -> dict[str, Tensor]:
        """Return the file's logits, by timm's code alone."""
        size, channels = architecture.image_size, architecture.channels
        if name is not None:
            path = str(file)
            given = options | norm_option(architecture)
            model = timm.create_model(name, checkpoint_path=path, img_size=size, in_chans=channels, **given)
        else:
            model = timm.models.VisionTransformer(**timm_options(architecture) | options | norm_option(architecture))
            timm.models.load_checkpoint(model, str(file))
        with torch.inference_mode():
            return {"logits": model.eval()(comparison_images(encoder))}

    def outputs(_: object) -> dict[str, Tensor]:
        with torch.inference_mode():
            return {"logits": classifier.eval()(comparison_images(encoder))}

    difference = write_verified(out, outputs, write, read, listener)
    return Export(out, difference, reading_line(out, architecture, name, options), name)


def classifier_options(classifier: Classifier) -> dict[str, Any]:
    """Return the options that give timm's model the classifier's head and pooling."""
    vit = classifier.encoder.vit
    options: dict[str, Any] = {"num_classes": classifier.num_classes}
    if pools_patches(classifier):
        options |= {"global_pool": "avg", "fc_norm": not classifier.final_norm}
        if getattr(vit, "pool_include_prefix", False):
            options["pool_include_prefix"] = False
    elif getattr(vit, "global_pool", "token") != "token":
        options |= {"global_pool": "token", "fc_norm": False}
    return options


def pools_patches(classifier: Classifier) -> bool:
    """Return whether the classifier reads the mean of the patches."""
    return classifier.pool == "mean" or not classifier.encoder.has_cls_token


def classifier_state(classifier: Classifier) -> dict[str, Tensor]:
    """Return the tensors of timm's model, whose norm is `norm` for CLS pooling and `fc_norm` after a mean."""
    encoder, head = classifier.encoder, {name: x.float().clone() for name, x in classifier.head_state().items()}
    # Nothing of the encoder's own pooling remains.
    unused = ("fc_norm.", "attn_pool.") if classifier.final_norm else ("norm.", "fc_norm.", "attn_pool.")
    body = {name: tensor for name, tensor in plain_state(encoder).items() if not name.startswith(unused)}
    if not pools_patches(classifier):
        head = {name.replace("fc_norm.", "norm."): tensor for name, tensor in head.items()}
    return body | head
