"""Checkpoints of encoders that are not plain vision transformers, with the tensor names of publishers and transformers.

Every publisher's file is made from a tiny timm model, whose tensors are renamed here by hand, word by word.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

State = dict[str, Tensor]


def random_model(name: str, **options: Any) -> Any:
    """Return timm's model with all parameters drawn, so that none has its initial value; skip if timm lacks it."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
    return model


def replaced(state: Mapping[str, Tensor], *words: tuple[str, str]) -> State:
    """Return tensors with words of their names replaced, in order; a word is a regular expression."""
    renamed = {}
    for name, tensor in state.items():
        for word, other in words:
            name = re.sub(word, other, name)
        renamed[name] = tensor
    return renamed


@dataclass(frozen=True)
class Published:
    """A publisher's file, and the timm model that it contains."""

    model: Callable[[], Any]
    file: Callable[[Any], State]
    """The encoder's tensors and buffers under the publisher's names."""
    format: str
    source: str | None
    besides: Callable[[State], State] = lambda _: {}
    """What the file holds besides the encoder."""
    prefix: str = ""
    container: str | None = None
    groups: tuple[str, ...] = ()
    """Groups among the dropped tensors."""


def dinov3_model(*, swiglu: bool) -> Any:
    more = {"swiglu_mlp": True, "swiglu_align_to": 1, "mlp_ratio": 1.5} if swiglu else {}
    return random_model(
        "vit_small_patch16_dinov3_qkvb", embed_dim=32, depth=3, num_heads=4, patch_size=8, num_reg_tokens=2, **more
    )


def dinov3_file(model: Any) -> State:
    state: State = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("q_bias"):
            value = model.state_dict()[name.replace("q_bias", "v_bias")]
            state[name.replace("q_bias", "qkv.bias")] = torch.cat([tensor, torch.zeros(32), value])
            state[name.replace("q_bias", "qkv.bias_mask")] = torch.cat(
                [torch.ones(32), torch.zeros(32), torch.ones(32)]
            )
        elif not name.endswith("v_bias"):
            state[name] = tensor
    exponents = 2 * torch.arange(2, dtype=torch.bfloat16) / 4
    state["rope_embed.periods"] = 100.0**exponents
    return replaced(
        state,
        (r"reg_token", "storage_tokens"),
        (r"gamma_(\d)", r"ls\1.gamma"),
        (r"mlp\.fc1_g", "mlp.w1"),
        (r"mlp\.fc1_x", "mlp.w2"),
        (r"mlp\.fc2", "mlp.w3") if "blocks.0.mlp.fc1_g.weight" in state else ("", ""),
    )


def eva02_model(*, packed: bool, side: int = 4, reference: int = 16) -> Any:
    name = "eva02_small_patch14_224" if packed else "eva02_base_patch14_224"
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5, "img_size": 14 * side}
    more = {"ref_feat_shape": (reference, reference)} if reference != 16 else {}
    return random_model(name, global_pool="token", **sizes, **more)


def eva02_file(model: Any) -> State:
    side, reference = model.patch_embed.grid_size[0], model.rope.ref_feat_shape[0]
    tables = torch.zeros(side * side, 8)
    for row in range(side):
        for column in range(side):
            for pair in range(2):
                frequency = 1 / 10000 ** (2 * pair / 4)
                for place in (0, 1):
                    tables[row * side + column, 2 * pair + place] = row / side * reference * frequency
                    tables[row * side + column, 4 + 2 * pair + place] = column / side * reference * frequency
    buffers = {}
    for start in ("rope", *(f"blocks.{number}.attn.rope" for number in range(len(model.blocks)))):
        buffers |= {f"{start}.freqs_cos": tables.cos(), f"{start}.freqs_sin": tables.sin()}
    return buffers | replaced(
        model.state_dict(),
        (r"attn\.([qv])_proj\.bias", r"attn.\1_bias"),
        (r"mlp\.fc1\.", "mlp.w12."),
        (r"mlp\.fc1_g", "mlp.w1"),
        (r"mlp\.fc1_x", "mlp.w2"),
        (r"mlp\.fc2", "mlp.w3"),
        (r"mlp\.norm", "mlp.ffn_ln"),
    )


def beit_model(*, shared: bool, name: str = "beit_base_patch16_224", side: int = 4) -> Any:
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "img_size": 8 * side}
    more = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "global_pool": "token"} if shared else {}
    return random_model(name, **sizes, **more)


def beit_file(model: Any) -> State:
    return {**model.state_dict(), **beit_indices(model)}


def beit_indices(model: Any) -> State:
    """Return the relative position indices of a square grid, by its rows, with three more for the CLS token."""
    side = model.patch_embed.grid_size[0]
    count = (2 * side - 1) ** 2 + 3
    index = torch.zeros(side * side + 1, side * side + 1, dtype=torch.int64)
    for one in range(side * side):
        for other in range(side * side):
            rows, columns = one // side - other // side, one % side - other % side
            index[one + 1, other + 1] = (rows + side - 1) * (2 * side - 1) + columns + side - 1
    index[0], index[:, 0], index[0, 0] = count - 3, count - 2, count - 1
    if model.rel_pos_bias is not None:
        return {"rel_pos_bias.relative_position_index": index}
    return {f"blocks.{number}.attn.relative_position_index": index for number in range(len(model.blocks))}


def swin_model(*, version: int = 1) -> Any:
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "img_size": 32}
    name = "swin_tiny_patch4_window7_224" if version == 1 else "swinv2_tiny_window8_256"
    return random_model(name, **sizes)


def swin_file(model: Any) -> State:
    ends = ("relative_position_index", "relative_coords_table", "attn_mask")
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith(ends)}
    return replaced({**model.state_dict(), **buffers}, (r"layers\.1\.downsample", "layers.0.downsample"))


def hiera_model(*, pools: int) -> Any:
    more = {"q_pool": pools} if pools != 3 else {}
    return random_model("hiera_tiny_224", embed_dim=16, num_heads=1, stages=(1, 2, 1, 1), img_size=64, **more)


def hiera_file(model: Any, norm: str) -> State:
    return replaced(model.state_dict(), (r"head\.norm", norm))


def convnext_model(name: str, *, normed: bool = True) -> Any:
    model = random_model(name, depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))
    if not normed:
        model.head.norm.reset_parameters()
    return model


def convnext_file(model: Any) -> State:
    state = replaced(
        model.state_dict(),
        (r"stem\.", "downsample_layers.0."),
        (r"stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"\.blocks\.", "."),
        (r"conv_dw", "dwconv"),
        (r"mlp\.fc", "pwconv"),
        (r"mlp\.grn\.weight", "grn.gamma"),
        (r"mlp\.grn\.bias", "grn.beta"),
        (r"head\.norm", "norm"),
    )
    for name, tensor in state.items():
        if ".grn." in name:
            state[name] = tensor.reshape(1, 1, 1, -1)
        elif re.search(r"pwconv\d\.weight", name):
            state[name] = tensor.reshape(tensor.shape[:2])
    return state


def sparse_file(model: Any) -> State:
    """Return kernels as MinkowskiEngine stores them: positions column by column, then input and output channels."""
    state: State = {}
    for name, tensor in convnext_file(model).items():
        module = name.rpartition(".")[0]
        if name.startswith("norm."):
            continue
        if tensor.ndim == 4 and not name.startswith("downsample_layers.0.") and ".grn." not in name:
            outputs, inputs, side, _ = tensor.shape
            kernel = torch.zeros(side * side, inputs, outputs)
            for row in range(side):
                for column in range(side):
                    kernel[column * side + row] = tensor[:, :, row, column].T
            state[f"{module}.kernel"] = kernel.squeeze(1)
            state[f"{module}.bias"] = convnext_file(model)[f"{module}.bias"][None]
        elif ".grn." in name:
            state[name] = tensor.reshape(1, -1)
        elif ".pwconv" in name:
            state[re.sub(r"pwconv(\d)", r"pwconv\1.linear", name)] = tensor
        elif f"{module}.kernel" not in state and not (module.endswith(".dwconv") or module.endswith(".1")):
            state[re.sub(r"(norm|downsample_layers\.[123]\.0)\.", r"\1.ln.", name)] = tensor
        elif name.startswith("downsample_layers.0."):
            state[name] = tensor
    return state


def aimv2_model() -> Any:
    return random_model("aimv2_large_patch14_224", embed_dim=32, depth=2, num_heads=4, mlp_ratio=1.5, img_size=56)


def aimv2_file(model: Any) -> State:
    return replaced(
        model.state_dict(),
        (r"^patch_embed", "preprocessor.patchifier"),
        (r"^pos_embed", "preprocessor.pos_embed"),
        (r"^blocks", "trunk.blocks"),
        (r"^norm", "trunk.post_trunk_norm"),
        (r"norm(\d)", r"norm_\1"),
        (r"mlp\.fc1_g", "mlp.fc1"),
        (r"mlp\.fc1_x", "mlp.fc3"),
    )


def mask_and_head(outputs: int) -> Callable[[State], State]:
    return lambda _: {
        "mask_token": torch.randn(1, 1, 32),
        "lm_head.weight": torch.randn(outputs, 32),
        "lm_head.bias": torch.randn(outputs),
    }


def cls_layers(state: State) -> State:
    """Return mask token, head and BEiT v2's further blocks for its CLS token, here copies of the encoder's first."""
    return mask_and_head(50)(state) | {
        name.replace("blocks.", "cls_pt_layers."): tensor.clone()
        for name, tensor in state.items()
        if name.startswith("blocks.0.")
    }


def hiera_decoder(_: State) -> State:
    return {
        "mask_token": torch.randn(1, 1, 24),
        "decoder_pos_embed": torch.randn(1, 4, 24),
        "decoder_embed.weight": torch.randn(24, 128),
        "decoder_blocks.0.attn.qkv.weight": torch.randn(72, 24),
        "decoder_norm.weight": torch.randn(24),
        "decoder_pred.weight": torch.randn(48, 24),
        "multi_scale_fusion_heads.0.weight": torch.randn(128, 16, 4, 4),
        "multi_scale_fusion_heads.1.weight": torch.randn(128, 32, 2, 2),
    }


PUBLISHED = {
    "dinov3": Published(
        lambda: dinov3_model(swiglu=False),
        dinov3_file,
        "DINOv3",
        "dinov3",
        lambda _: {"mask_token": torch.randn(1, 32), "local_cls_norm.weight": torch.randn(32)},
        groups=("mask token", "training state", "computed"),
    ),
    "dinov3_swiglu": Published(
        lambda: dinov3_model(swiglu=True),
        dinov3_file,
        "DINOv3",
        "dinov3",
        prefix="teacher.backbone.",
        container="model",
    ),
    "eva02_packed": Published(
        lambda: eva02_model(packed=True),
        eva02_file,
        "EVA-02",
        "eva02",
        mask_and_head(40),
        container="model",
        groups=("mask token", "classifier", "computed"),
    ),
    "eva02": Published(lambda: eva02_model(packed=False, reference=4), eva02_file, "EVA-02", None, container="module"),
    "beit": Published(
        lambda: beit_model(shared=True),
        beit_file,
        "BEiT",
        "beit",
        mask_and_head(50),
        container="model",
        groups=("mask token", "classifier", "computed"),
    ),
    "beit_fine_tuned": Published(
        lambda: beit_model(shared=False),
        beit_file,
        "BEiT (or BEiT v2, data2vec 1.0)",
        None,
        lambda _: {"head.weight": torch.randn(5, 32), "head.bias": torch.randn(5)},
        container="model",
        groups=("classifier", "computed"),
    ),
    "beitv2": Published(
        lambda: beit_model(shared=True, name="beitv2_base_patch16_224"),
        beit_file,
        "BEiT v2",
        "beitv2",
        cls_layers,
        container="model",
        groups=("mask token", "classifier", "computed"),
    ),
    "data2vec": Published(
        lambda: beit_model(shared=True), beit_file, "data2vec 1.0", "d2v1", mask_and_head(32), container="model"
    ),
    "simmim_vit": Published(
        lambda: beit_model(shared=True),
        beit_file,
        "SimMIM",
        "simmim",
        lambda _: {"^decoder.0.weight": torch.randn(48, 32, 1, 1), "mask_token": torch.randn(1, 1, 32)},
        prefix="encoder.",
        container="model",
        groups=("mask token", "decoder", "computed"),
    ),
    "simmim": Published(
        swin_model,
        swin_file,
        "SimMIM Swin",
        "simmim",
        lambda _: {"^decoder.0.weight": torch.randn(48, 32, 1, 1), "mask_token": torch.randn(1, 1, 16)},
        prefix="encoder.",
        container="model",
        groups=("mask token", "decoder", "computed"),
    ),
    "swinv2": Published(
        lambda: swin_model(version=2),
        swin_file,
        "Swin V2",
        None,
        lambda _: {"head.weight": torch.randn(5, 32), "head.bias": torch.randn(5)},
        container="model",
        groups=("classifier", "computed"),
    ),
    "hiera_mae": Published(
        lambda: hiera_model(pools=2),
        lambda model: hiera_file(model, "encoder_norm"),
        "Hiera",
        "mae",
        hiera_decoder,
        container="model_state",
        groups=("decoder",),
    ),
    "hiera": Published(
        lambda: hiera_model(pools=3),
        lambda model: hiera_file(model, "norm"),
        "Hiera",
        None,
        lambda _: {"head.projection.weight": torch.randn(5, 128), "head.projection.bias": torch.randn(5)},
        container="model_state",
        groups=("classifier",),
    ),
    "convnextv2": Published(
        lambda: convnext_model("convnextv2_tiny"), convnext_file, "ConvNeXt V2", "fcmae", container="model"
    ),
    "convnextv2_sparse": Published(
        lambda: convnext_model("convnextv2_tiny", normed=False),
        sparse_file,
        "ConvNeXt V2 (FCMAE)",
        "fcmae",
        lambda _: {
            "^decoder.0.grn.gamma": torch.randn(1, 1, 1, 64),
            "^mask_token": torch.randn(1, 16, 1, 1),
            "^proj.weight": torch.randn(16, 32, 1, 1),
            "^pred.weight": torch.randn(48, 16, 1, 1),
        },
        prefix="encoder.",
        container="model",
        groups=("decoder",),
    ),
    "convnextv2_small": Published(
        lambda: convnext_model("convnextv2_atto"),
        convnext_file,
        "ConvNeXt V2",
        None,
        lambda _: {"head.weight": torch.randn(5, 32), "head.bias": torch.randn(5)},
        container="model",
        groups=("classifier",),
    ),
    "dinov3_convnext": Published(
        lambda: convnext_model("convnext_tiny"),
        convnext_file,
        "DINOv3 ConvNeXt",
        "dinov3",
        lambda state: {f"norms.3.{part}": state[f"norm.{part}"].clone() for part in ("weight", "bias")},
        groups=("copy",),
    ),
    "aimv2": Published(aimv2_model, aimv2_file, "AIMv2", "aimv2"),
}


def content(case: Published, model: Any) -> tuple[Any, State]:
    """Return the file's content, and the encoder's tensors in it under the publisher's names without prefix."""
    encoder = case.file(model)
    besides = case.besides(encoder)
    whole = {f"{case.prefix}{name}": tensor for name, tensor in encoder.items()}
    whole |= {name[1:] if name.startswith("^") else f"{case.prefix}{name}": besides[name] for name in besides}
    return ({case.container: whole} if case.container else whole), encoder


def timm_features(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Return every block's tokens from timm's own code: prefix tokens, then those of the map in reading order."""
    forward: Any = model.forward_intermediates
    options = {"return_prefix_tokens": True} if getattr(model, "num_prefix_tokens", 0) else {}
    found = forward(images, intermediates_only=True, **options)
    pairs = [each if isinstance(each, tuple) else (each, None) for each in found]
    flat = [(feature_map.flatten(2).transpose(1, 2), prefix) for feature_map, prefix in pairs]
    return [tokens if prefix is None else torch.cat([prefix, tokens], dim=1) for tokens, prefix in flat]
