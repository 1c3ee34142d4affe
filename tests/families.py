"""Tiny models of every family of timm backbones, at sizes that no timm model has."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone
from mimref.encoders.checkpoints import save_encoder


def _architecture(name: str, size: int = 32, channels: int = 3, **options: Any) -> BackboneArchitecture:
    return BackboneArchitecture(name, size, channels, tuple(sorted(options.items())))


_VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
_HIERA: dict[str, Any] = {
    **{"embed_dim": 16, "num_heads": 1, "stages": (1, 2, 1), "q_pool": 2, "mask_unit_size": (4, 4)},
    **{"patch_stride": (2, 2), "patch_kernel": (3, 3), "patch_padding": (1, 1)},
    "mask_unit_attn": (True, True, False),
}
FAMILIES = {
    "eva": _architecture("eva02_tiny_patch14_224", **_VIT),
    "dinov3": _architecture("vit_small_patch16_dinov3", **_VIT),
    "beit": _architecture("beit_base_patch16_224", **_VIT),
    "swin": _architecture(
        "swin_tiny_patch4_window7_224",
        **{"patch_size": 2, "embed_dim": 16, "depths": (1, 2, 1), "num_heads": (1, 2, 2), "window_size": 4},
    ),
    "swinv2": _architecture(
        "swinv2_tiny_window8_256",
        **{"patch_size": 2, "embed_dim": 16, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4},
    ),
    "hiera": _architecture("hiera_tiny_224", **_HIERA),
    "abswin": _architecture("hiera_base_abswin_256", **_HIERA, global_pos_size=(4, 4)),
    "convnextv2": _architecture("convnextv2_atto", depths=(1, 1, 2, 1), dims=(8, 12, 16, 24), patch_size=1),
    "relpos": _architecture("test_vit_relpos", **_VIT),
    "gray": _architecture(
        "swin_tiny_patch4_window7_224",
        channels=1,
        **{"patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4},
    ),
}
BATCH_NORM = BackboneArchitecture("test_efficientnet", 32)


def backbone(architecture: BackboneArchitecture, seed: int = 0) -> TimmBackbone:
    """Return a backbone with random weights, none of which are zeros or ones. Skips models that this timm lacks."""
    if not timm.is_model(architecture.name):
        pytest.skip(f"timm {timm.__version__} has no {architecture.name}")
    torch.manual_seed(seed)
    encoder = TimmBackbone(architecture).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return encoder


def write_backbone(path: Path, architecture: BackboneArchitecture, seed: int = 0) -> Path:
    """Write weights with a header; return `path`."""
    save_encoder(path, backbone(architecture, seed), {"source": "mae"})
    return path


def timms_own(encoder: TimmBackbone, size: int | None = None, **options: Any) -> Any:
    """Return the same model, built by timm alone."""
    architecture = encoder.architecture
    chosen: dict[str, Any] = dict(architecture.options) | options
    if architecture.channels != 3:
        chosen["in_chans"] = architecture.channels
    if "convnext" not in architecture.name and "efficientnet" not in architecture.name:
        chosen["img_size"] = size or architecture.image_size
    return timm.create_model(architecture.name, num_classes=0, **chosen).eval()
