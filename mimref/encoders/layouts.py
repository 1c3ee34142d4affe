"""Layouts of public checkpoints: the names of their tensors, and how to tell layouts apart. Used by `formats`."""

import re

from mimref.config.base import Interpolation
from mimref.encoders.vit import Architecture

# Which of two encoders a file's authors evaluate, by the parts in which their prefixes differ: (evaluated, other).
EVALUATED = (
    # solo-learn's main_linear.py; lightly's benchmarks, where DINO's `backbone` is the teacher and BYOL's the student.
    (r"backbone", r"\w+_backbone|backbone_\w+"),
    # MoCo's main_lincls.py, versions 3 and 1.
    (r"base_encoder", r"momentum_encoder"),
    (r"encoder|encoder_q|query_encoder", r"encoder_k|key_encoder"),
    # BYOL.
    (r"online(_\w+)?", r"target(_\w+)?"),
    # mmengine's EMAHook swaps the two when it saves them.
    (r"state_dict", r"ema_state_dict\.module"),
    # The teacher of DINO, iBOT and DINOv2, the target encoder of MSN and I-JEPA, timm's averaged weights; also the
    # default where nothing else is known.
    (r"(\w+_)?(teacher|target|ema|momentum|averaged?)(_\w+)?", r".+"),
)
# Parts of prefixes, the preferred ones first, for files in which no pair above decides between the encoders.
PREFERRED = ("state_dict", "model", "encoder", "student")
# Parts of names that wrapping modules add: FSDP, activation checkpointing, torch.compile.
WRAPPING = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})

PATCHES = re.compile(
    r"(|.+\.)(patch_embed\.proj|patch_embed\.projection|embeddings\.patch_embeddings\.projection|conv_proj|"
    r"modality_encoders\.IMAGE\.local_encoder\.proj)\.weight"
)
BLOCKS = re.compile(r"(blocks|layers|encoder\.layers?)\.(encoder_layer_)?\d+\.")

# Groups of tensors that no encoder needs: patterns for names without the encoder's prefix.
DROPPABLE = {
    "mask token": r"(embeddings\.)?mask_token|masked_embed",
    "decoder": r"decoder[_.].*|dec_norms\..*|wfm\..*|shared_decoder\..*|encoder_to_decoder\..*|"
    r"recon_proj\..*|multi_scale_fusion_heads\..*|modality_encoders\.IMAGE\.decoder\..*",
    "predictor": r"predictor[_.].*",
    "classifier": r"head\.(weight|bias)|head_dist\..*|head_norm\..*|fc_norm\..*|classifier\..*|pooler\..*|heads\..*|"
    r"ln2\.(weight|bias)",
    "projection head": r"((dino|ibot|instance|local_group|group|projection|prediction)_)?head\..*|projector\..*|"
    r"fc\.(fc|bn)\d\..*|relation_blocks\..*|prototypes(\..*)?",
    "other encoder": r"_ema\..*",
}
# Groups that are dropped only outside the encoder.
DROPPABLE_BESIDE = {
    "other encoder": r"(encoder|student|teacher|state_dict|state_dict_ema|model|model_ema|base_encoder)\..*|"
    r"(student|teacher)_mem\..*",
    "text tower": r"text_encoder\..*|(text|vision)_projection(\..*)?|logit_scale",
    "training state": r"(opt|optimizer|scaler|fp16_scaler|amp_scaler|last_optimizer_state|optimizer_history|task_state|"
    r"extra_state|criterion|args|cfg|lr|loss|epoch|\w+_loss|[\w-]+-sup\.?)(\..*)?",
}

# Other vision transformers, each recognised by one of its tensors.
RELATIVES = {
    r".*relative_position.*|.*rel_pos.*": "relative positions (BEiT, data2vec 1.0, EVA)",
    r".*\.(q_norm|k_norm)\..*": "normalised queries and keys",
    r"dist_token": "a distillation token",
    r"attn_pool\..*": "attention pooling",
    r"patch_embed\.backbone\..*": "a convolutional stem",
    r".*alibi.*": "ALiBi positions",
}

_PARAMETER = r"(weight|bias)"
# Some layouts put the number of a chunk of blocks before the block's own number.
_BLOCK = r"blocks\.(?:\d+\.)?(\d+)\."
_MM_LAYER = r"layers\.(\d+)\."
_TORCHVISION_LAYER = r"encoder\.layers\.encoder_layer_(\d+)\."
_HF_LAYER = r"(?:encoder\.layer|layers|encoder\.layers)\.(\d+)\."
# From the layouts' names to timm's. `@0`, `@1`, ... number the parts of a tensor that timm stores as one.
RENAMES = {
    rf"{_BLOCK}(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.{_PARAMETER}": r"blocks.\1.\2.\3",
    rf"{_BLOCK}(ls1|ls2)\.gamma": r"blocks.\1.\2.gamma",
    rf"{_BLOCK}gamma_([12])": r"blocks.\1.ls\2.gamma",
    rf"{_BLOCK}mlp\.w12\.{_PARAMETER}": r"blocks.\1.mlp.fc1.\2",
    rf"{_BLOCK}mlp\.w3\.{_PARAMETER}": r"blocks.\1.mlp.fc2.\2",
    rf"(patch_embed\.proj|norm|norm_pre)\.{_PARAMETER}": r"\1.\2",
    rf"embed_norm\.{_PARAMETER}": r"norm_pre.\1",
    r"(?:cls_token|cls_tokens\.tokens)": "cls_token",
    r"(?:reg_token|register_tokens)": "reg_token",
    r"pos_embed(?:\.embed)?": "pos_embed",
    # data2vec 2.0
    rf"modality_encoders\.IMAGE\.local_encoder\.proj\.{_PARAMETER}": r"patch_embed.proj.\1",
    rf"modality_encoders\.IMAGE\.context_encoder\.norm\.{_PARAMETER}": r"norm_pre.\1",
    r"modality_encoders\.IMAGE\.extra_tokens": "cls_token",
    r"modality_encoders\.IMAGE\.fixed_positional_encoder\.positions": "pos_embed",
    # Hugging Face
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.register_tokens": "reg_token",
    r"embeddings\.position_embeddings": "pos_embed",
    rf"embeddings\.patch_embeddings\.projection\.{_PARAMETER}": r"patch_embed.proj.\1",
    rf"{_HF_LAYER}(?:layernorm_before|norm1)\.{_PARAMETER}": r"blocks.\1.norm1.\2",
    rf"{_HF_LAYER}(?:layernorm_after|norm2)\.{_PARAMETER}": r"blocks.\1.norm2.\2",
    rf"{_HF_LAYER}attention\.(?:attention\.query|q_proj)\.{_PARAMETER}": r"blocks.\1.attn.qkv.\2@0",
    rf"{_HF_LAYER}attention\.(?:attention\.key|k_proj)\.{_PARAMETER}": r"blocks.\1.attn.qkv.\2@1",
    rf"{_HF_LAYER}attention\.(?:attention\.value|v_proj)\.{_PARAMETER}": r"blocks.\1.attn.qkv.\2@2",
    rf"{_HF_LAYER}attention\.(?:output\.dense|o_proj)\.{_PARAMETER}": r"blocks.\1.attn.proj.\2",
    rf"{_HF_LAYER}(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.{_PARAMETER}": r"blocks.\1.mlp.fc1.\2",
    rf"{_HF_LAYER}mlp\.gate_proj\.{_PARAMETER}": r"blocks.\1.mlp.fc1.\2@0",
    rf"{_HF_LAYER}mlp\.up_proj\.{_PARAMETER}": r"blocks.\1.mlp.fc1.\2@1",
    rf"{_HF_LAYER}(?:output\.dense|mlp\.fc2|mlp\.weights_out|mlp\.down_proj)\.{_PARAMETER}": r"blocks.\1.mlp.fc2.\2",
    rf"{_HF_LAYER}layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
    rf"layernorm\.{_PARAMETER}": r"norm.\1",
    # torchvision, also before version 0.13
    r"class_token": "cls_token",
    r"encoder\.pos_embedding": "pos_embed",
    rf"conv_proj\.{_PARAMETER}": r"patch_embed.proj.\1",
    rf"{_TORCHVISION_LAYER}ln_([12])\.{_PARAMETER}": r"blocks.\1.norm\2.\3",
    rf"{_TORCHVISION_LAYER}self_attention\.in_proj_{_PARAMETER}": r"blocks.\1.attn.qkv.\2",
    rf"{_TORCHVISION_LAYER}self_attention\.out_proj\.{_PARAMETER}": r"blocks.\1.attn.proj.\2",
    rf"{_TORCHVISION_LAYER}mlp\.(?:0|linear_1)\.{_PARAMETER}": r"blocks.\1.mlp.fc1.\2",
    rf"{_TORCHVISION_LAYER}mlp\.(?:3|linear_2)\.{_PARAMETER}": r"blocks.\1.mlp.fc2.\2",
    rf"encoder\.ln\.{_PARAMETER}": r"norm.\1",
    # OpenMMLab: mmpretrain's ViT, and MMSegmentation's, whose attention is torch's
    rf"patch_embed\.projection\.{_PARAMETER}": r"patch_embed.proj.\1",
    rf"{_MM_LAYER}ln([12])\.{_PARAMETER}": r"blocks.\1.norm\2.\3",
    rf"{_MM_LAYER}attn\.(?:qkv\.|attn\.in_proj_){_PARAMETER}": r"blocks.\1.attn.qkv.\2",
    rf"{_MM_LAYER}attn\.(?:proj|attn\.out_proj)\.{_PARAMETER}": r"blocks.\1.attn.proj.\2",
    rf"{_MM_LAYER}attn\.gamma1\.(?:weight|scale)": r"blocks.\1.ls1.gamma",
    rf"{_MM_LAYER}ffn\.gamma2\.(?:weight|scale)": r"blocks.\1.ls2.gamma",
    rf"{_MM_LAYER}ffn\.(?:layers\.0\.0|w12)\.{_PARAMETER}": r"blocks.\1.mlp.fc1.\2",
    rf"{_MM_LAYER}ffn\.(?:layers\.1|w3)\.{_PARAMETER}": r"blocks.\1.mlp.fc2.\2",
    rf"ln1\.{_PARAMETER}": r"norm.\1",
    # MAE-pytorch, whose keys have no bias
    rf"{_BLOCK}attn\.q_bias": r"blocks.\1.attn.qkv.bias@0",
    rf"{_BLOCK}attn\.v_bias": r"blocks.\1.attn.qkv.bias@1",
}


def format_name(root: str, patches: str, names: set[str], architecture: Architecture) -> tuple[str, str | None]:
    """Return the format for display, and the source (pre-training method) if it is known.

    root: the encoder's prefix. patches: name of its patch embedding. names: those of all tensors, without prefixes.
    """
    if patches.startswith("modality_encoders."):
        return "data2vec 2.0", "d2v2"
    if patches.startswith("embeddings."):
        return ("Hugging Face DINOv2", "dinov2") if architecture.layer_scale else ("Hugging Face ViT", None)
    if patches == "conv_proj":
        return "torchvision ViT", None
    if patches == "patch_embed.projection":
        return "OpenMMLab ViT (mmpretrain, MMSegmentation)", None
    if "blocks.0.attn.q_bias" in names:
        return "MAE-pytorch", "mae"
    if "cls_tokens.tokens" in names:
        post_norm = architecture.post_norm
        return f"MIM-Refiner release ({'post' if post_norm else 'pre'}-norm)", "d2v2" if post_norm else None
    if root.startswith("target_encoder."):
        return ("MSN", "msn") if architecture.class_token else ("I-JEPA", "ijepa")
    for pattern, name in (
        (r"register_tokens|.*\.mlp\.w12\.weight|ibot_head\..*", "DINOv2"),
        (r"dec_norms\..*|wfm\..*", "CrossMAE"),
        (r"decoder_predp\..*", "dBOT"),
        (r"decoder_pred\..*", "MAE"),
        (r"relation_blocks\..*|instance_head\..*", "Mugs"),
        (r"ibot_loss\..*|head\.last_layer2\..*|masked_embed", "iBOT"),
        (r"dino_loss\..*", "DINO"),
    ):
        if any(re.fullmatch(pattern, tensor) for tensor in names):
            return name, name.lower()
    if "mask_token" in names and architecture.layer_scale:
        return "DINOv2", "dinov2"
    if not architecture.class_token:
        return "layout of I-JEPA's encoder", None
    if not architecture.fixed_positions:
        return "layout of timm (also DINO, iBOT, Mugs, MSN)", None
    return "layout of MAE (also dBOT, MAWS, MAE-CT, MoCo v3)", None


# Pre-training methods, as `--source` names them, that do not interpolate positions as MAE does.
INTERPOLATIONS: dict[str, Interpolation] = {"dino": "dino", "ibot": "dino", "mugs": "dino", "dinov2": "dinov2"}


def format_interpolation(
    format_: str,
    source: str | None,
    names: set[str],
    architecture: Architecture,
    *,
    as_image: bool,
    grid: tuple[int, int],
) -> tuple[Interpolation, bool]:
    """Return the rule that interpolates a recognised file's positions, and whether it is a guess.

    format_, source: as returned by `format_name`. names: those of all tensors, without prefixes. as_image: whether the
    file stores positions by row and column, as KappaModules' encoders do, among them the paper's released models.
    grid: the file's.
    """
    if format_.startswith(("Hugging Face", "DINOv2")) and architecture.registers:
        return "dinov2_reg", False
    if format_ == "MAE-pytorch":
        return "mae_pytorch", False
    if format_.startswith("torchvision"):
        return "torchvision", False
    if format_.startswith(("Hugging Face", "OpenMMLab")) or architecture.fixed_positions or as_image:
        return "mae", False
    if source is not None:
        return INTERPOLATIONS.get(source, "mae"), False
    if any(name.startswith("head.last_layer") for name in names):
        return "dino", False
    # The backbones of DINO, iBOT and Mugs have no classifier, timm's have one; in MAE's fine-tuned models, a norm
    # precedes it.
    if "fc_norm.weight" in names:
        return "mae", True
    # Of these, only timm's code accepts grids that are not square.
    plain = (
        grid[0] == grid[1] and architecture.class_token and not architecture.layer_scale and not architecture.registers
    )
    return ("dino" if plain and "head.weight" not in names else "timm"), True
