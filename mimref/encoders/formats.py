"""Recognise public checkpoints by their tensors' names and shapes, and convert them to timm's names.

The internal form is timm's VisionTransformer as `mimref.encoders.vit.build_encoder` builds it or, for encoders of
`families`, another timm model. Nothing is dropped silently: a tensor belongs to the encoder, belongs to a named group
that no encoder needs, or is an error.

Shapes: N patches, D width, R registers.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mimref.config.base import ReadingConfig
from mimref.encoders.families.recognise import recognise_family
from mimref.encoders.grids import Grid, prepare_positions, unsaved_positions
from mimref.encoders.layouts import DROPPABLE, RELATIVES, RENAMES, WRAPPING, format_interpolation, format_name
from mimref.encoders.leftovers import group_leftovers, join_problems
from mimref.encoders.num_heads import HEADS, MAE_LITE_HEADS, MOCO_HEADS, find_num_heads
from mimref.encoders.parts import Unrecognised, below, beside, choice_notice, choose_part, find_encoders
from mimref.encoders.positions import are_mocos, are_sincos
from mimref.encoders.reading import first_line, named_tensors
from mimref.encoders.recognised import Recognised as Recognised
from mimref.encoders.vit import NORM_EPS, PAPER_SIZES, Architecture, build_encoder
from mimref.errors import ConfigError


def recognise(
    content: Mapping[Any, Any], reading: ReadingConfig | None = None, *, config: Mapping[str, Any] | None = None
) -> Recognised:
    """Find the encoder of a known kind in a file's content. Raises Unrecognised with the reason if there is none.

    reading: what the file does not record. config: the `config.json` that Hugging Face saves beside the weights; its
    number of attention heads applies if `reading` has none. Raises NoChoice if there are several encoders and no way to
    choose.
    """
    reading = reading or ReadingConfig()
    part, grid = reading.part, reading.grid
    named, full_names = clean_names(content)
    if recognised := recognise_family(named, full_names, reading, config or {}):
        return recognised
    found = _find_encoders(named)
    prefix = choose_part(named, list(found), part)
    own = set(below(named, prefix, found))
    encoder = {name[len(prefix) :]: named[name] for name in named if name in own}
    others = [each for each in found if each != prefix]
    of_others = {name: full_names[name] for each in others for name in below(named, each, found)}
    outside = [(beside(name, prefix), name) for name in named if name not in own]
    names = {*encoder, *(short for short, _ in outside)}
    notices = choice_notice(prefix, list(found), part)
    _refuse_relatives(encoder)
    parts = _rename(encoder)
    renamed = set().union(*parts.values())
    unused = {name: full_names[prefix + name] for name in encoder if name not in renamed}
    rest = [(short, full_names[name]) for short, name in outside if name not in of_others]
    dropped = group_leftovers(unused, rest, DROPPABLE, notices)
    selection_notices = list(notices)
    if of_others:
        dropped["other encoder"] = [*dropped.get("other encoder", []), *of_others.values()]
    tensors = {target: _join([encoder[name] for name in names]) for target, names in parts.items()}
    flat = _complete_flat(encoder, tensors, grid, notices)
    raw = dict(tensors)
    file_grid = prepare_positions(tensors, grid, notices)
    architecture = _read_architecture(tensors, names, reading.num_heads, config or {}, notices)
    _check(tensors, architecture)
    format_and_source = format_name(prefix, found[prefix], names, architecture)
    as_image, fixed = raw["pos_embed"].ndim == 4, architecture.fixed_positions
    usual, guessed = format_interpolation(*format_and_source, names, architecture, as_image=as_image, grid=file_grid)
    if file_grid[0] != file_grid[1]:
        # Only now is it known which rule makes the grid square.
        prepare_positions(tensors := raw, grid, [], reading.interpolation or usual)
    return Recognised(
        *format_and_source,
        replace(architecture, interpolation=reading.interpolation or usual, fixed_positions=fixed or flat),
        tensors,
        {target: [full_names[prefix + name] for name in parts.get(target, [])] for target in tensors},
        dropped,
        notices,
        selection_notices,
        prefix,
        others,
        file_grid,
        guessed,
    )


def _find_encoders(named: Mapping[str, Tensor]) -> dict[str, str]:
    """Call `find_encoders`. Raises Unrecognised if it finds none."""
    if found := find_encoders(named):
        return found
    some = ", ".join(list(named)[:3])
    raise Unrecognised(f"contains no vision transformer: none of its tensors is a patch embedding ({some}, ...)")


def _refuse_relatives(encoder: Mapping[str, Tensor]) -> None:
    """Raise Unrecognised for a vision transformer that is not plain."""
    for pattern, feature in RELATIVES.items():
        if any(re.fullmatch(pattern, name) for name in encoder):
            raise Unrecognised(f"is not a plain vision transformer: it has {feature}")
    if "blocks.0.attn.q_bias" in encoder and not _is_flat(encoder):
        # Files of BEiT's relatives may lack the tensors that distinguish them: rotary positions have none.
        raise Unrecognised(
            "is not a plain vision transformer: it has separate biases of queries and values, and so most likely "
            "relative positions (BEiT, data2vec 1.0, EVA)"
        )


def _is_flat(encoder: Mapping[str, Tensor]) -> bool:
    """Return whether this is MAE-pytorch's encoder: BEiT's code without relative positions or further tokens."""
    foreign = ("cls_token", "reg_token", "pos_embed", "blocks.0.gamma_1", "blocks.0.ls1.gamma")
    return "blocks.0.attn.q_bias" in encoder and not any(name in encoder for name in foreign)


def _complete_flat(
    encoder: Mapping[str, Tensor], tensors: dict[str, Tensor], grid: Grid | None, notices: list[str]
) -> bool:
    """Add positions and a key bias of zero to MAE-pytorch's encoder. Returns whether this is one."""
    if not _is_flat(encoder):
        return False
    for name in [name for name in tensors if name.endswith("attn.qkv.bias")]:
        joined, half = tensors[name], tensors[name].numel() // 2
        tensors[name] = torch.cat([joined[:half], torch.zeros_like(joined[:half]), joined[half:]])
    width, _, patch_size = (*tensors["patch_embed.proj.weight"].shape, 1, 1, 1)[:3]
    tensors["pos_embed"] = unsaved_positions(max(patch_size, 1), width, grid, notices)
    return True


def _check(tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Raise Unrecognised unless these are the tensors of an encoder."""
    try:
        with torch.device("meta"):
            wanted = build_encoder(architecture).vit.state_dict()
    except (ConfigError, AssertionError) as error:
        raise Unrecognised(f"does not describe an encoder: {error}") from error
    if problems := mismatches(tensors, wanted):
        raise Unrecognised(problems)


def clean_names(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors by their names without the parts that wrapping modules add, and the full form of these names."""
    named: dict[str, Tensor] = {}
    full_names: dict[str, str] = {}
    for full, tensor in named_tensors(content):
        name = ".".join(part for part in full.split(".") if part not in WRAPPING)
        if name in named:
            raise Unrecognised(f"contains both {full_names[name]} and {full}, two names of one tensor")
        named[name], full_names[name] = tensor, full
    return named, full_names


def _rename(names: Iterable[str]) -> dict[str, list[str]]:
    """Map timm's names to the file's names of their parts, in order; names that match no rule are left out."""
    numbered: dict[str, dict[int, str]] = {}
    for name in names:
        for pattern, replacement in RENAMES.items():
            match = re.fullmatch(pattern, name)
            if match:
                target, _, part = match.expand(replacement).partition("@")
                parts, number = numbered.setdefault(target, {}), int(part or 0)
                if number in parts:
                    raise Unrecognised(f"contains both {parts[number]} and {name}, two names of one tensor")
                parts[number] = name
                break
    return {target: [parts[number] for number in sorted(parts)] for target, parts in numbered.items()}


def _join(parts: list[Tensor]) -> Tensor:
    try:
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    except (RuntimeError, TypeError) as error:
        raise Unrecognised(f"query, key and value do not match ({first_line(error)})") from error


def mismatches(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Describe the names, shapes and types that differ from those that a model needs; empty if the tensors fit."""
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in wanted]
    for name in [name for name in wanted if name in given]:
        tensor, model = given[name], wanted[name]
        if tensor.shape != model.shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(model.shape)}")
        elif tensor.layout is not torch.strided or tensor.is_meta:
            problems.append(f"{name} is sparse or without data")
        elif tensor.is_floating_point() != model.is_floating_point():
            problems.append(f"{name} is of type {tensor.dtype} instead of {model.dtype}")
    return join_problems(problems)


def _read_architecture(
    tensors: Mapping[str, Tensor], names: set[str], num_heads: int | None, config: Mapping[str, Any], notices: list[str]
) -> Architecture:
    """Infer the architecture. names: those of all tensors in the file, without prefixes."""
    projection = tensors["patch_embed.proj.weight"]
    if projection.ndim != 4 or projection.shape[2] != projection.shape[3]:
        raise Unrecognised(f"has a patch embedding of shape {tuple(projection.shape)}; square patches are needed")
    width, channels, patch_size = projection.shape[:3]
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)
    first, second = (tensors.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        raise Unrecognised("blocks.0.mlp.fc1.weight or blocks.0.mlp.fc2.weight is missing")
    class_token = "cls_token" in tensors
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    prefix = 1 if class_token and not registers else 0
    positions = tensors["pos_embed"]
    side = math.isqrt(positions.shape[1] - prefix)
    post_norm = "norm_pre.weight" in tensors
    if post_norm and "patch_embed.proj.bias" not in tensors:
        raise Unrecognised("has a norm before its blocks and no bias in the patch embedding, like CLIP")
    config = config if config.get("hidden_size") == width else {}
    if config.get("hidden_act", "gelu") != "gelu":
        raise Unrecognised(f"uses {config['hidden_act']} in its MLPs, as config.json says, not gelu")
    mocos, fixed = are_mocos(positions, num_prefix=prefix), are_sincos(positions, num_prefix=prefix)
    published = MOCO_HEADS if mocos else HEADS
    # In MAE's fine-tuned models, positions are trained and a norm precedes the classifier.
    others = MAE_LITE_HEADS if (fixed and not mocos) or "fc_norm.weight" in names else None
    num_heads = find_num_heads(width, num_heads, config, notices, published=published, others=others)
    # The final norm may be absent: CrossMAE has norms in the decoder instead, a classifier on mean tokens has its own
    # (OpenMMLab's ln2), and MMSegmentation, recognised by its attention, has none. Otherwise its absence is an error.
    replaced = ("dec_norms.", "wfm.", "fc_norm.", "ln2.", "layers.0.attn.attn.")
    final_norm = post_norm or "norm.weight" in tensors or not any(name.startswith(replaced) for name in names)
    if not final_norm:
        notices.append("the encoder has no final norm")
    known = {sizes: name for name, sizes in PAPER_SIZES.items()}
    return Architecture(
        known.get((width, depth, num_heads, patch_size), "custom"),
        side * patch_size,
        width,
        depth,
        num_heads,
        patch_size,
        post_norm=post_norm,
        fixed_positions=fixed,
        class_token=class_token,
        registers=registers,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        mlp_width=0 if first.shape[0] == 4 * width else first.shape[0],
        swiglu=first.shape[0] == 2 * second.shape[1],
        final_norm=final_norm,
        channels=channels,
        norm_eps=_norm_eps(config, notices),
    )


def _norm_eps(config: Mapping[str, Any], notices: list[str]) -> float:
    saved = config.get("layer_norm_eps")
    if type(saved) is not float or not 0 < saved < 1 or saved == NORM_EPS:
        return NORM_EPS
    notices.append(f"the LayerNorm's epsilon of {saved:g} is taken from config.json")
    return saved
