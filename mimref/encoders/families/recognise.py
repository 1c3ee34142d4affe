"""Recognising the family of a foreign file's encoder by a few tensor names, and reading it under timm's names."""

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import BackboneArchitecture
from mimref.encoders.families import aimv2, beit, convnext, eva, hiera, swin
from mimref.encoders.families.family import OPTIONAL, Family, Hints, Tensors
from mimref.encoders.families.origins import origin_names, read_tensor
from mimref.encoders.leftovers import group_leftovers, join_problems
from mimref.encoders.parts import Unrecognised, below, beside, choice_notice, choose_part
from mimref.encoders.recognised import Recognised
from mimref.errors import ConfigError

# Parts of names that transformers' task-specific models put before those of the encoder.
_HF_MODELS = frozenset({"beit", "data2vec_vision", "swin", "swinv2", "hiera", "convnextv2", "dinov3_vit"})


def _refuse_capi(tensors: Tensors, hints: Hints) -> Family:
    raise Unrecognised(
        "is CAPI's encoder, which no timm model can represent: its registers have rotary positions, and rotary "
        "positions turn pairs of channels by two different angles"
    )


_CANDIDATES: tuple[tuple[tuple[str, ...], Callable[[Tensors, Hints], Family]], ...] = (
    (("encoder.blocks.0.residual1.fn.q_proj.weight", "registers"), _refuse_capi),
    (("storage_tokens", "blocks.0.attn.qkv.weight"), eva.describe_dinov3),
    (("rope_embed.periods", "blocks.0.attn.qkv.weight"), eva.describe_dinov3),
    (("layer.0.attention.q_proj.weight", "embeddings.patch_embeddings.weight"), eva.describe_dinov3_hf),
    (("blocks.0.mlp.w12.weight", "blocks.0.attn.q_bias"), eva.describe_eva02),
    (("blocks.0.mlp.w1.weight", "blocks.0.attn.q_proj.weight"), eva.describe_eva02),
    (("rel_pos_bias.relative_position_bias_table", "cls_token"), beit.describe),
    (("blocks.0.attn.relative_position_bias_table", "cls_token"), beit.describe),
    (("encoder.relative_position_bias.relative_position_bias_table", "embeddings.cls_token"), beit.describe_hf),
    (
        (
            "encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table",
            "embeddings.cls_token",
        ),
        beit.describe_hf,
    ),
    (("layers.0.blocks.0.attn.relative_position_bias_table", "patch_embed.proj.weight"), swin.describe),
    (("layers.0.blocks.0.attn.logit_scale", "patch_embed.proj.weight"), swin.describe),
    (
        ("encoder.layers.0.blocks.0.attention.self.query.weight", "embeddings.patch_embeddings.projection.weight"),
        swin.describe_hf,
    ),
    (("encoder.stages.0.layers.0.attn.qkv.weight", "embeddings.position_embeddings"), hiera.describe_hf),
    # The first block of the second stage, after a first stage of one or two blocks.
    (("blocks.1.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed"), hiera.describe),
    (("blocks.2.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed"), hiera.describe),
    (("encoder.stages.0.layers.0.grn.weight", "embeddings.patch_embeddings.weight"), convnext.describe_hf_v2),
    (("stages.0.layers.0.depthwise_conv.weight", "stages.0.downsample_layers.0.weight"), convnext.describe_hf_dinov3),
    (("downsample_layers.0.0.weight", "stages.0.0.grn.gamma"), convnext.describe),
    (("downsample_layers.0.0.weight", "stages.0.0.gamma"), convnext.describe),
    (("trunk.blocks.0.mlp.fc3.weight", "preprocessor.patchifier.proj.weight"), aimv2.describe),
    (("encoder.layers.0.rms_norm1.weight", "embeddings.patch_embed.weight"), aimv2.describe_hf),
)
"""Names that an encoder has below its prefix, and the function that describes it; the first full match applies."""


def recognise_family(
    cleaned: Mapping[str, Tensor], full_names: Mapping[str, str], reading: ReadingConfig, config: Mapping[str, Any]
) -> Recognised | None:
    """Read a file's encoder if it belongs to a family other than plain vision transformers; return None otherwise.

    cleaned, full_names: as returned by `clean_names`. config: content of Hugging Face's `config.json`. Raises
    Unrecognised for an encoder of such a family that cannot be read, NoChoice for several and no way to choose.
    """
    shortened = {_without_model(name): name for name in cleaned}
    if len(shortened) != len(cleaned):
        return None
    describes: dict[str, Callable[[Tensors, Hints], Family]] = {}
    for telltales, describe in _CANDIDATES:
        for prefix in _prefixes(shortened, telltales):
            describes.setdefault(prefix, describe)
    if not describes:
        return None
    prefixes = list(describes)
    named = {short: cleaned[name] for short, name in shortened.items()}
    full = {short: full_names[name] for short, name in shortened.items()}
    prefix = choose_part(named, prefixes, reading.part)
    own = set(below(named, prefix, prefixes))
    encoder = {name[len(prefix) :]: named[name] for name in named if name in own}
    outside = {name: beside(name, prefix) for name in named if name not in own}
    family = describes[prefix](encoder, Hints(reading.num_heads, config, frozenset(outside.values())))
    architecture = _architecture(family)
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in _build(architecture).state_dict().items()}
    tensors, used = _read(family, encoder, wanted)
    others = [each for each in prefixes if each != prefix]
    notices = choice_notice(prefix, prefixes, reading.part)
    unused = {name: full[prefix + name] for name in encoder if name not in used}
    of_others = [name for name in outside if name.startswith(tuple(others))]
    rest = [(short, full[name]) for name, short in outside.items() if name not in of_others]
    try:
        dropped = group_leftovers(unused, rest, family.layout.dropped, notices)
    except Unrecognised as reason:
        raise Unrecognised(f"is of the family {family.format}, but {reason}") from None
    if of_others:
        dropped["other encoder"] = [full[name] for name in of_others]
    names = origin_names(family.layout.naming, wanted)
    side = architecture.image_size // architecture.patch_size
    is_imagenet = (family.mean, family.std) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return Recognised(
        family.format,
        family.source,
        architecture,
        tensors,
        {name: [full[prefix + origin] for origin in names[name] if origin in encoder] for name in tensors},
        dropped,
        [*notices, *family.notices],
        notices,
        prefix,
        others,
        (side, side),
        guesses_interpolation=False,
        normalisation={} if is_imagenet else {"mean": list(family.mean), "std": list(family.std)},
    )


def _without_model(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _HF_MODELS)


def _prefixes(names: Mapping[str, str], telltales: tuple[str, ...]) -> list[str]:
    """Return the prefixes below which all the telltale names are found."""
    first = telltales[0]
    found = [name[: -len(first)] for name in names if name == first or name.endswith(f".{first}")]
    return [prefix for prefix in found if all(prefix + telltale in names for telltale in telltales)]


def _architecture(family: Family) -> BackboneArchitecture:
    if not timm.is_model(family.model):
        raise Unrecognised(
            f"is of the family {family.format}, for which timm {timm.__version__} lacks the model {family.model}; "
            "upgrade timm"
        )
    return BackboneArchitecture(family.model, family.image_size, options=tuple(sorted(family.options.items())))


def _build(architecture: BackboneArchitecture) -> Any:
    try:
        return architecture.build()
    except (ConfigError, AssertionError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unrecognised(f"does not describe an encoder: {reason}") from error


def _read(family: Family, encoder: Tensors, wanted: Mapping[str, torch.Size]) -> tuple[dict[str, Tensor], set[str]]:
    """Return the tensors under timm's names, and the names in the file that were used. Raises Unrecognised."""
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()
    problems = []
    for name, shape in wanted.items():
        origin = family.layout.naming(name)
        missing = [each for each in origin.names if each not in encoder]
        if missing and OPTIONAL.fullmatch(name):
            tensors[name] = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
            continue
        used.update(origin.names)
        if missing:
            problems += [f"{each} is missing" for each in missing]
            continue
        tensor = tensors[name] = read_tensor(origin, encoder, shape)
        if tensor.shape != shape:
            problems.append(f"{' and '.join(origin.names)} has shape {tuple(tensor.shape)} instead of {tuple(shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{' and '.join(origin.names)} is of type {tensor.dtype}")
    if problems:
        raise Unrecognised(f"is of the family {family.format}, but {join_problems(list(dict.fromkeys(problems)))}")
    return tensors, used
