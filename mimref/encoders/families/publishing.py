"""The publishers' layouts, for writing an encoder in the form that its family's own code reads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mimref.encoders.backbones import BackboneArchitecture
from mimref.encoders.families import aimv2, beit, convnext, eva, hiera, swin
from mimref.encoders.families.family import OPTIONAL, Layout
from mimref.encoders.families.origins import written_tensors

_CONTAINERS = {"eva02": "model", "beit": "model", "swin": "model", "convnextv2": "model", "hiera": "model_state"}
"""From the start of timm's name to the key under which the publisher's files hold the tensors, if there is one."""


def publisher_layout(architecture: BackboneArchitecture, tensors: Mapping[str, Tensor]) -> Layout | None:
    """Return the layout of the publisher of an encoder's family; None for other families. tensors: timm's."""
    name, options = architecture.name, dict(architecture.options)
    if "_dinov3" in name and name.startswith("vit_"):
        return eva.dinov3_layout(swiglu="blocks.0.mlp.fc1_g.weight" in tensors)
    if name.startswith("hiera_") and "abswin" not in name:
        return hiera.layout("encoder_norm" if options.get("q_pool", 3) == 2 else "norm")
    layouts = {
        "eva02_": eva.EVA02,
        "beit": beit.PUBLISHER,
        "swin_": swin.PUBLISHER,
        "swinv2_": swin.PUBLISHER,
        "convnext": convnext.PUBLISHER,
        "aimv2_": aimv2.PUBLISHER,
    }
    return next((layout for start, layout in layouts.items() if name.startswith(start)), None)


def published_state(layout: Layout, model: Any) -> dict[str, Tensor]:
    """Return a timm model's tensors, and what else the publisher's code saves, as contiguous copies under its names.

    A norm that no block passes through is left out if it is the identity: the file it came from had none.
    """
    state = model.state_dict()
    unneeded = {name for name in state if OPTIONAL.fullmatch(name) and _is_identity(name, state[name])}
    kept = {name: tensor for name, tensor in state.items() if name not in unneeded}
    written = written_tensors(layout.naming, kept) | layout.buffers(model)
    return {name: tensor.detach().clone().contiguous() for name, tensor in written.items()}


def container_of(architecture: BackboneArchitecture) -> str | None:
    """Return the key of the tensors in the publisher's pickled files; None for files that hold nothing else."""
    return next((key for start, key in _CONTAINERS.items() if architecture.name.startswith(start)), None)


def _is_identity(name: str, tensor: Tensor) -> bool:
    return torch.equal(tensor, torch.ones_like(tensor) if name.endswith("weight") else torch.zeros_like(tensor))
