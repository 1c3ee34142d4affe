"""Synthetic checkpoints in the layouts of public ones, and the tokens that their own models compute.

A layout is a function that turns the state dict of a timm model into file content as the named project writes it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers.mlp import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mimref.encoders.backbones import BackboneArchitecture, TimmBackbone
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.positions import sincos_positions
from mimref.encoders.vit import Architecture, Encoder

WIDTH, DEPTH, PATCH, IMAGE, SIDE = 128, 3, 4, 16, 4
State = dict[str, Tensor]


def load_encoder(
    path: str | Path, architecture: Architecture | BackboneArchitecture | None = None
) -> tuple[Encoder | TimmBackbone, dict[str, Any]]:
    """Return an encoder with a file's weights and the file's header; the architecture is by default the file's own."""
    checkpoint = read_checkpoint(path)
    return encoder_from(checkpoint, architecture or choose_architecture(checkpoint)), checkpoint.header


def timm_vit(**options: Any) -> VisionTransformer:
    """Return timm's own model with random weights, from which the checkpoints are made."""
    torch.manual_seed(0)
    settings = {
        "img_size": IMAGE, "patch_size": PATCH, "num_classes": 0, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2,
    }  # fmt: skip
    vit = VisionTransformer(**(settings | options)).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return vit


def mae_vit() -> VisionTransformer:
    """Return timm's model with MAE's fixed sine-cosine positions."""
    vit = timm_vit()
    assert vit.pos_embed is not None
    vit.pos_embed.data.copy_(sincos_positions(WIDTH, SIDE))
    return vit


def tokens(vit: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Return every block's tokens as timm computes them, prefix tokens first."""
    found: list[Any] = vit.forward_intermediates(
        images, intermediates_only=True, output_fmt="NLC", return_prefix_tokens=True, norm=False
    )
    return [torch.cat([block[1], block[0]], dim=1) if isinstance(block, tuple) else block for block in found]


def rows(count: int, name: str) -> State:
    """Return a weight and a bias of `count` outputs, to stand in for a layer that is dropped."""
    return {f"{name}.weight": torch.zeros(count, 2), f"{name}.bias": torch.zeros(count)}


def prefixed(prefix: str, state: State) -> State:
    """Return the same tensors with a prefix added to every name."""
    return {prefix + name: tensor for name, tensor in state.items()}


MAE_DECODER = {
    "mask_token": torch.zeros(1, 1, 8),
    "decoder_pos_embed": torch.zeros(1, 17, 8),
    **rows(8, "decoder_embed"),
    **rows(8, "decoder_blocks.0.norm1"),
    **rows(8, "decoder_norm"),
}
DINO_HEAD = rows(4, "head.mlp.0") | {"head.last_layer.weight_g": torch.ones(4, 1)}


def mae(state: State) -> Any:
    """MAE's published encoders."""
    return {"model": state}


def mae_with_decoder(state: State) -> Any:
    """MAE's training checkpoints, with decoder, optimizer, scaler and arguments."""
    training = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}, "epoch": 799, "scaler": {"scale": 65536.0}}
    args = argparse.Namespace(lr=1e-3, output=None, best=np.float64(0.5), ids=np.arange(3))
    return {"model": state | MAE_DECODER | rows(48, "decoder_pred"), **training, "args": args}


def dbot(state: State) -> Any:
    """dBOT: a decoder that predicts features."""
    return {"model": state | MAE_DECODER | rows(512, "decoder_predp")}


def crossmae(state: State) -> Any:
    """CrossMAE: no final norm, a norm per decoder block and the weights that mix blocks."""
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("norm.")}
    return {"model": kept | rows(8, "dec_norms.0") | {"wfm.linear.weight": torch.zeros(12, 4)}}


def mae_ct(state: State) -> Any:
    """MAE-CT: positions of the patches only."""
    return state | {"pos_embed": state["pos_embed"][:, 1:]}


def release(state: State) -> Any:
    """The paper's released models: positions as a grid, and the CLS token with its position added."""
    positions = state["pos_embed"]
    kept = {name: tensor for name, tensor in state.items() if name not in ("pos_embed", "cls_token")}
    kept["pos_embed.embed"] = positions[:, 1:].reshape(1, SIDE, SIDE, WIDTH)
    # The CLS token includes its position.
    kept["cls_tokens.tokens"] = state["cls_token"] + positions[:, :1]
    return {"state_dict": kept, "ctor_kwargs": {"kind": "vit", "dim": WIDTH}, "abs_ckpt": {"epoch": 20}}


def release_with_flat_names(state: State) -> Any:
    """A release whose positions and CLS token have the usual names."""
    kept = release(state)["state_dict"]
    return {"state_dict": kept | {"pos_embed": kept.pop("pos_embed.embed"), "cls_token": kept.pop("cls_tokens.tokens")}}


def dino(state: State) -> Any:
    """DINO's published backbones: timm's names and nothing else."""
    return state


def maws(state: State) -> Any:
    """MAWS: the same, with MAE's positions."""
    return state


def dino_full(state: State) -> Any:
    """DINO's training checkpoints: the teacher is the encoder; student, heads and optimizer are dropped."""
    student = prefixed("module.backbone.", {name: tensor + 1 for name, tensor in state.items()})
    teacher = prefixed("backbone.", state) | DINO_HEAD
    training = {"optimizer": {"param_groups": []}, "epoch": 3, "args": argparse.Namespace(arch="vit_base")}
    return {"student": student, "teacher": teacher, **training, "dino_loss": {"center": torch.zeros(1, 4)}}


def ibot(state: State) -> Any:
    """iBOT's training checkpoints: two heads, and a masked embedding in the student."""
    head = DINO_HEAD | {"head.last_layer2.weight_g": torch.ones(4, 1)}
    student = prefixed("module.", prefixed("backbone.", state | {"masked_embed": torch.zeros(1, WIDTH)}) | head)
    teacher = prefixed("backbone.", state) | head
    return {"student": student, "teacher": teacher, "ibot_loss": {"center": torch.zeros(1, 4)}, "fp16_scaler": {}}


def mugs(state: State) -> Any:
    """Mugs: relation blocks beside the encoder."""
    return {"state_dict": state | rows(WIDTH, "relation_blocks.0.norm1")}


def msn(state: State) -> Any:
    """MSN: the target encoder with its head, and prototypes."""
    head = rows(4, "fc.fc1") | rows(4, "fc.bn1") | {"fc.bn1.running_mean": torch.zeros(4)}
    return {"target_encoder": prefixed("module.", state | head), "prototypes": torch.zeros(1024, 256)}


def dinov2(state: State) -> Any:
    """DINOv2: a mask token beside the encoder."""
    return state | {"mask_token": torch.zeros(1, WIDTH)}


def dinov2_in_chunks(state: State) -> Any:
    """DINOv2's training checkpoints: a teacher whose block names also contain the number of a chunk."""
    parts = {name: name.split(".") for name in state}
    chunked = {
        f"blocks.{int(part[1]) // 2}.{'.'.join(part[1:])}" if part[0] == "blocks" else name: state[name]
        for name, part in parts.items()
    }
    return {
        "teacher": prefixed("backbone.", dinov2(chunked)) | prefixed("dino_", DINO_HEAD) | prefixed("ibot_", DINO_HEAD)
    }


def dinov2_registers(state: State) -> Any:
    """DINOv2 with registers and SwiGLU, under its own names."""
    kept = {name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): state[name] for name in state}
    cls_position = torch.full((1, 1, WIDTH), 0.25)
    kept["register_tokens"] = kept.pop("reg_token")
    # DINOv2 stores the CLS position with the positions; timm adds it to the token once.
    kept["cls_token"] = state["cls_token"] - cls_position
    kept["pos_embed"] = torch.cat([cls_position, state["pos_embed"]], dim=1)
    return dinov2(kept)


def ijepa(state: State) -> Any:
    """I-JEPA: target encoder, context encoder and predictor, without CLS token."""
    context = {name: tensor + 1 for name, tensor in state.items()}
    predictor = {"predictor_embed.weight": torch.zeros(4, 2), "mask_token": torch.zeros(1, 1, 4)}
    models = {"target_encoder": state, "encoder": context, "predictor": predictor}
    wrapped = {name: prefixed("module.", model) for name, model in models.items()}
    return {**wrapped, "opt": {"state": {}}, "scaler": None, "epoch": 300, "loss": np.float64(0.1), "lr": 1e-6}


def timm_training(state: State) -> Any:
    """timm's training script: the averaged weights are the encoder."""
    return {"epoch": 3, "state_dict": {name: tensor + 1 for name, tensor in state.items()}, "state_dict_ema": state}


def gamma_names(state: State) -> Any:
    """Layer scales with BEiT's names."""
    return {name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): state[name] for name in state}


def wrapped_modules(state: State) -> Any:
    """Names with the prefixes of DDP, FSDP, activation checkpointing and `torch.compile`."""
    inside = {
        name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): state[name]
        for name in state
    }
    return {"model": prefixed("_orig_mod.module.", inside)}


def clip_tower(state: State) -> Any:
    """The vision tower of an image-text model."""
    return prefixed("vision_encoder.", state) | rows(8, "text_encoder.ln") | {"logit_scale": torch.zeros(())}


LEARNED: Callable[[], VisionTransformer] = timm_vit
SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 5.0}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5, **SWIGLU}
# Layout, the model from which it is made, and the format and source that must be recognised.
LAYOUTS: list[tuple[Callable[[State], Any], Callable[[], VisionTransformer], str, str | None]] = [
    (mae, mae_vit, "layout of MAE", None),
    (mae_with_decoder, mae_vit, "MAE", "mae"),
    (dbot, mae_vit, "dBOT", "dbot"),
    (crossmae, lambda: timm_vit(final_norm=False), "CrossMAE", "crossmae"),
    (release, LEARNED, "MIM-Refiner release (pre-norm)", None),
    (release_with_flat_names, mae_vit, "layout of MAE", None),
    (mae_ct, mae_vit, "layout of MAE", None),
    (maws, mae_vit, "layout of MAE", None),
    (dino, LEARNED, "layout of timm", None),
    (dino_full, LEARNED, "DINO", "dino"),
    (ibot, LEARNED, "iBOT", "ibot"),
    (mugs, LEARNED, "Mugs", "mugs"),
    (msn, LEARNED, "MSN", "msn"),
    (dinov2, lambda: timm_vit(init_values=1e-5), "DINOv2", "dinov2"),
    (dinov2_in_chunks, lambda: timm_vit(init_values=1e-5), "DINOv2", "dinov2"),
    (dinov2_registers, lambda: timm_vit(**REGISTERS), "DINOv2", "dinov2"),
    (ijepa, lambda: timm_vit(class_token=False, global_pool="avg", fc_norm=False), "I-JEPA", "ijepa"),
    (timm_training, LEARNED, "layout of timm", None),
    (gamma_names, lambda: timm_vit(init_values=0.1), "layout of timm", None),
    (wrapped_modules, mae_vit, "layout of MAE", None),
    (clip_tower, mae_vit, "layout of MAE", None),
]


# --- data2vec 2.0, with its own model in plain tensor code


def data2vec(*, prefix: str = "", width: int = WIDTH, channels: int = 3) -> State:
    """Return random weights under data2vec 2.0's names, with the decoder, which is dropped."""
    torch.manual_seed(0)
    image = "modality_encoders.IMAGE."
    shapes = {
        f"{image}local_encoder.proj.weight": (width, channels, PATCH, PATCH),
        f"{image}local_encoder.proj.bias": (width,),
        f"{image}extra_tokens": (1, 1, width),
        f"{image}context_encoder.norm.weight": (width,),
        f"{image}context_encoder.norm.bias": (width,),
        f"{image}decoder.blocks.0.0.weight": (8, width, 3, 3),
        f"{image}decoder.proj.bias": (width,),
    }
    for block in range(DEPTH):
        layers = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        layers |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for name, shape in layers.items():
            shapes[f"blocks.{block}.{name}.weight"] = shape
            shapes[f"blocks.{block}.{name}.bias"] = shape[:1]
    state = {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    state[f"{image}fixed_positional_encoder.positions"] = sincos_positions(width, SIDE, num_prefix=0)
    return prefixed(prefix, state)


def data2vec_tokens(state: State, images: Tensor, heads: int) -> list[Tensor]:
    """Return every block's tokens for `data2vec` weights without a prefix, CLS token first."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    image = "modality_encoders.IMAGE."
    weight = state[f"{image}local_encoder.proj.weight"]
    grid = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # B, 3, rows, columns, P, P
    patches = torch.einsum("bchwpq,dcpq->bhwd", grid, weight).flatten(1, 2) + state[f"{image}local_encoder.proj.bias"]
    patches = patches + state[f"{image}fixed_positional_encoder.positions"]
    x = torch.cat([state[f"{image}extra_tokens"].expand(len(images), -1, -1), patches], dim=1)
    x = norm(x, f"{image}context_encoder.norm")
    found = []
    for block in range(DEPTH):
        name = f"blocks.{block}"
        batch, length, width = x.shape
        qkv = linear(x, f"{name}.attn.qkv").reshape(batch, length, 3, heads, width // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1)
        attended = linear((weights @ value).transpose(1, 2).reshape(batch, length, width), f"{name}.attn.proj")
        x = norm(x + attended, f"{name}.norm1")
        hidden = linear(x, f"{name}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = norm(x + linear(hidden, f"{name}.mlp.fc2"), f"{name}.norm2")
        found.append(x)
    return found


# --- shapes only


def outline(width: int, depth: int, patch: int, *, grid: int, mlp: int | None = None) -> State:
    """Return a state dict with true shapes that takes no memory."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid**2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(depth):
        outputs = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        outputs |= {"mlp.fc1": (mlp or 4 * width, width), "mlp.fc2": (width, mlp or 4 * width)}
        shapes |= {f"blocks.{block}.{name}.weight": shape for name, shape in outputs.items()}
        shapes |= {f"blocks.{block}.{name}.bias": shape[:1] for name, shape in outputs.items()}
        shapes |= {f"blocks.{block}.norm{n}.{part}": (width,) for n in (1, 2) for part in ("weight", "bias")}
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
