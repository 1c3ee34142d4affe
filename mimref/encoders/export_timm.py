"""Export to timm: weights that `timm.create_model(name, checkpoint_path=...)` loads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mimref.encoders.backbones import native_size
from mimref.encoders.checkpoints import save_encoder
from mimref.encoders.export import Export, comparison_images, named_features, plain_state, write_verified
from mimref.encoders.vit import Architecture, Encoder, RatesOnCpu, build_encoder
from mimref.errors import ConfigError
from mimref.files import check_new_file
from mimref.progress import Listener, Silent


def export_timm(
    encoder: Encoder, out: Path, facts: Mapping[str, Any], *, force: bool = False, listener: Listener | None = None
) -> Export:
    """Write what `timm.create_model(name, checkpoint_path=out)` or timm's VisionTransformer class loads.

    encoder: in fp32 on the CPU. out: ends in .safetensors, whose metadata holds `facts`, or in .pth or .pt without it.
    Raises ConfigError for an encoder that timm has no model for, OutputError for another ending, a file that exists
    (unless `force`) or cannot be written, and features that differ.
    """
    check_new_file(out, (".safetensors", ".pth", ".pt"), force)
    architecture = encoder.architecture
    if architecture.post_norm:
        raise ConfigError(
            f"--to timm: timm has no post-norm blocks as {architecture.name} has them (data2vec 2.0); "
            "use --to release or --to onnx"
        )
    if not architecture.final_norm:
        raise ConfigError(
            f"--to timm: {architecture.name} has no norm after its last block, as timm's models have; use --to onnx"
        )
    name = _timm_name(encoder)

    def write(file: Path) -> None:
        if out.suffix == ".safetensors":
            save_encoder(file, encoder, facts)
            return
        torch.save(plain_state(encoder), file)
        if facts:
            (listener or Silent()).note(f"{out.suffix} has no place for {', '.join(facts)}; .safetensors has")

    difference = write_verified(out, encoder, write, lambda file: _read_by_timm(file, encoder, name), listener)
    return Export(out, difference, _reading_line(out, architecture, name), name)


def _timm_name(encoder: Encoder) -> str | None:
    """The timm model with the same tensors and attention heads, preferably one made for the encoder's image size."""
    architecture, size = encoder.architecture, encoder.architecture.image_size
    if architecture.from_timm:
        return architecture.name.partition(".")[0]
    start, digits = f"vit_*_patch{architecture.patch_size}", "[0-9][0-9][0-9]"
    endings = (digits, f"gap_{digits}", "dinov2", "reg4_dinov2")
    names = timm.list_models([f"{start}_{ending}" for ending in endings], module="vision_transformer")
    wanted = {key: tensor.shape for key, tensor in encoder.vit.state_dict().items()}
    # timm 1.0.15 records nothing, not even an image size, about some of its models.
    recorded = [name for name in names if timm.get_pretrained_cfg(name)]
    for name in sorted(recorded, key=lambda known: native_size(known) != size):
        with torch.device("meta"), RatesOnCpu():
            vit = timm.create_model(name, num_classes=0, img_size=size, weight_init="skip")
        if type(vit) is not VisionTransformer or type(first := vit.blocks[0]) is not Block:
            continue
        # No shape shows the number of heads.
        same_heads = first.attn.num_heads == architecture.num_heads
        if same_heads and {key: tensor.shape for key, tensor in vit.state_dict().items()} == wanted:
            return str(name)
    return None


def _read_by_timm(file: Path, encoder: Encoder, name: str | None) -> dict[str, Tensor]:
    """Features of the file, by timm's code alone."""
    if name is None:
        vit: nn.Module = build_encoder(encoder.architecture).vit
        timm.models.load_checkpoint(vit, str(file))
    else:
        size = encoder.architecture.image_size
        vit = timm.create_model(name, checkpoint_path=str(file), num_classes=0, img_size=size)
    assert isinstance(vit, VisionTransformer)
    with torch.inference_mode():
        found: Any = vit.eval().forward_intermediates(
            comparison_images(encoder), intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True, norm=False
        )
        tokens = [torch.cat([block[1], block[0]], dim=1) if isinstance(block, tuple) else block for block in found]
        return named_features(tokens, range(1, len(tokens) + 1), vit.norm(tokens[-1]))


def _reading_line(out: Path, architecture: Architecture, name: str | None) -> str:
    if name is None:
        return f"model = {_constructor(architecture)}; timm.models.load_checkpoint(model, {str(out)!r})"
    size = architecture.image_size
    resized = "" if native_size(name) == size else f", img_size={size}"
    return f"timm.create_model({name!r}, checkpoint_path={str(out)!r}, num_classes=0{resized})"


def _constructor(architecture: Architecture) -> str:
    """The call that makes timm's VisionTransformer of these sizes, as `build_encoder` makes it."""
    options: dict[str, object] = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "embed_dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "num_classes": 0,
    }
    if architecture.mlp_width:
        options["mlp_ratio"] = architecture.mlp_ratio
    if not architecture.class_token:
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if architecture.registers:
        options |= {"reg_tokens": architecture.registers, "no_embed_class": True}
    if architecture.layer_scale:
        options["init_values"] = 1e-5
    text = ", ".join(f"{key}={value!r}" for key, value in options.items())
    swiglu = ", mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU" if architecture.swiglu else ""
    return f"timm.models.VisionTransformer({text}{swiglu})"
