"""Export of timm models other than plain vision transformers, to files that timm loads.

Shapes: B images, L tokens, D width.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone
from mimref.encoders.export import ENDINGS, Export, comparison_images, write_encoder, write_verified
from mimref.encoders.timm_models import build_options, features_of_blocks, native_size
from mimref.files import check_new_file
from mimref.progress import Listener


def export_backbone(
    encoder: TimmBackbone, out: Path, facts: Mapping[str, Any], *, force: bool = False, listener: Listener | None = None
) -> Export:
    """Write a file that `timm.create_model(name, checkpoint_path=out)` loads, with options for its sizes if it has any.

    encoder: in fp32 on the CPU. out, facts and errors: as in `export_timm`.
    """
    check_new_file(out, ENDINGS["timm"], force)
    name, options = timm_model(encoder.architecture)

    def read(file: Path) -> dict[str, Tensor]:
        model = timm.create_model(name, checkpoint_path=str(file), num_classes=0, **options)
        with torch.inference_mode():
            return features_of_blocks(model, comparison_images(encoder))

    write = partial(write_encoder, out, encoder, facts, listener)
    difference = write_verified(out, partial(own_features, encoder), write, read, listener)
    chosen = "".join(f", {key}={value!r}" for key, value in ({"num_classes": 0} | options).items())
    return Export(out, difference, f"timm.create_model({name!r}, checkpoint_path={str(out)!r}{chosen})", name)


def timm_model(architecture: BackboneArchitecture) -> tuple[str, dict[str, Any]]:
    """Return timm's name, without a tag, and the options of `timm.create_model` that set the model's sizes."""
    name = architecture.name.partition(".")[0]
    options: dict[str, Any] = dict(architecture.options)
    if architecture.image_size != native_size(name):
        options |= build_options(name, architecture.image_size)
    if architecture.channels != 3:
        options["in_chans"] = architecture.channels
    return name, options


@torch.inference_mode()
def own_features(encoder: TimmBackbone, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the encoder's own features of every block, under the names of a file's features; sets eval mode."""
    names = list(names)
    tokens = encoder.eval().blocks(comparison_images(encoder), range(1, encoder.depth + 1))
    return dict(zip(names, tokens, strict=True))
