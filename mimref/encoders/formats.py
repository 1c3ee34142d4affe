"""Recognise public checkpoints by their tensors' names and shapes, and convert them to timm's names.

The internal form is timm's VisionTransformer as `mimref.encoders.vit.build_encoder` makes it. Nothing is dropped
silently: a tensor belongs to the encoder, belongs to a named group that no encoder needs, or is an error.

Shapes: N patches, D width, R registers.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from mimref.encoders.layouts import (
    DROPPABLE,
    DROPPABLE_BESIDE,
    PATCHES,
    PREFERRED,
    RELATIVES,
    RENAMES,
    WRAPPING,
    format_interpolation,
    format_name,
)
from mimref.encoders.positions import resize_positions
from mimref.encoders.reading import first_line, named_tensors
from mimref.encoders.vit import PAPER_SIZES, Architecture, are_sincos, build_encoder
from mimref.errors import ConfigError

# Width to attention heads of the published sizes (S, B, L, H, g, G, 2B, ...): weights do not show them.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16, 2560: 32, 4096: 32}

_HOW_TO_SET = "--set encoder.num_heads=N gives it (export: --num-heads N)"


class Unrecognised(Exception):
    """Why a file is not recognised as a plain vision transformer, in one line without the file's name."""


@dataclass(frozen=True)
class Recognised:
    """A foreign checkpoint in the internal form."""

    format: str
    """For display, such as `data2vec 2.0`."""
    source: str | None
    """Pre-training method as `--source` names it; None when several methods share the layout."""
    architecture: Architecture
    tensors: dict[str, Tensor]
    """Under timm's names; tensors that did not change share the file's memory."""
    origins: dict[str, list[str]]
    """From timm's name to the file's names."""
    dropped: dict[str, list[str]]
    """From group to the file's names."""
    notices: list[str]
    """What was assumed or changed."""
    guesses_interpolation: bool
    """Families that interpolate positions in different ways share the layout."""


def recognise(content: Mapping[Any, Any], *, num_heads: int | None = None) -> Recognised:
    """Find the plain vision transformer in a file's content. Raises Unrecognised with the reason if there is none.

    num_heads: attention heads; None takes those of the published model of this width, else one per 64 channels.
    """
    named, full_names = _clean_names(content)
    root, patches = _find_encoder(named)
    encoder = {name[len(root) :]: tensor for name, tensor in named.items() if name.startswith(root)}
    beside = {_beside(name, root): full_names[name] for name in named if not name.startswith(root)}
    for pattern, feature in RELATIVES.items():
        if any(re.fullmatch(pattern, name) for name in encoder):
            raise Unrecognised(f"is no plain vision transformer: it has {feature}")
    parts = _rename(encoder)
    renamed = {name for names in parts.values() for name in names}
    unused = {name: full_names[root + name] for name in encoder if name not in renamed}
    dropped = _drop(unused, beside)
    tensors = {target: _join([encoder[name] for name in names]) for target, names in parts.items()}
    notices: list[str] = []
    as_image = "pos_embed" in tensors and tensors["pos_embed"].ndim == 4
    _prepare_positions(tensors, notices)
    architecture = _read_architecture(tensors, {*unused, *beside}, num_heads, notices)
    try:
        with torch.device("meta"):
            wanted = build_encoder(architecture).vit.state_dict()
    except (ConfigError, AssertionError) as error:
        raise Unrecognised(f"does not describe an encoder: {error}") from error
    if problems := mismatches(tensors, wanted):
        raise Unrecognised(problems)
    names = {*encoder, *beside}
    format_, source = format_name(root, patches, names, architecture)
    interpolation, guessed = format_interpolation(format_, source, names, architecture, as_image=as_image)
    return Recognised(
        format_,
        source,
        replace(architecture, interpolation=interpolation),
        tensors,
        {target: [full_names[root + name] for name in names] for target, names in parts.items()},
        dropped,
        notices,
        guessed,
    )


def _clean_names(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their names without the parts that wrapping modules add, and those names' full forms."""
    named: dict[str, Tensor] = {}
    full_names: dict[str, str] = {}
    for full, tensor in named_tensors(content):
        name = ".".join(part for part in full.split(".") if part not in WRAPPING)
        if name in named:
            raise Unrecognised(f"contains both {full_names[name]} and {full}, two names of one tensor")
        named[name], full_names[name] = tensor, full
    return named, full_names


def _find_encoder(named: Mapping[str, Tensor]) -> tuple[str, str]:
    """Prefix of the encoder's names, and the name of its patch embedding without it."""
    found = {match[1]: match[2] for name in named if (match := PATCHES.fullmatch(name))}
    if not found:
        names = ", ".join(list(named)[:3])
        raise Unrecognised(f"contains no vision transformer: none of its tensors is a patch embedding ({names}, ...)")

    def rank(root: str) -> list[int]:
        return [(*PREFERRED, part).index(part) for part in root.split(".")[:-1]]

    best = min(map(rank, found))
    roots = [root for root in found if rank(root) == best]
    if len(roots) > 1:
        raise Unrecognised(f"contains several encoders ({', '.join(sorted(roots))}); save only the one you want")
    return roots[0], found[roots[0]]


def _beside(name: str, root: str) -> str:
    """The name of a tensor outside the encoder, without the prefix that it shares with the encoder."""
    parts = name.split(".")
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(parts[:-1], root.split(".")[:-1], strict=False))
    return ".".join(parts[len(list(shared)) :])


def _rename(names: Iterable[str]) -> dict[str, list[str]]:
    """From timm's name to the names of its parts, in order; names that match no rule are left out."""
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


def _drop(unused: Mapping[str, str], beside: Mapping[str, str]) -> dict[str, list[str]]:
    """Full names by group, from names without and with prefix. Raises Unrecognised for a tensor of no group.

    unused: inside the encoder; beside: outside it.
    """
    dropped: dict[str, list[str]] = {}
    of_encoder, of_file = list(DROPPABLE.items()), [*DROPPABLE.items(), *DROPPABLE_BESIDE.items()]
    for names, groups in ((unused, of_encoder), (beside, of_file)):
        for name, full in names.items():
            group = next((group for group, pattern in groups if re.fullmatch(pattern, name)), "")
            dropped.setdefault(group, []).append(full)
    if unexpected := dropped.get(""):
        raise Unrecognised(_join_problems([f"{name} is unexpected" for name in unexpected]))
    return dropped


def mismatches(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Names, shapes and types in which tensors differ from those that a model needs; empty if they fit."""
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
    return _join_problems(problems)


def _join_problems(problems: list[str], most: int = 4) -> str:
    """The first problems in one line, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _prepare_positions(tensors: dict[str, Tensor], notices: list[str]) -> None:
    """Bring the position embedding to (1, 1 + N, D), or to (1, N, D) with registers or without a CLS token.

    In the second form, the rows of CLS and register tokens are added to the tokens themselves: the same function. A
    grid that is not square is interpolated to a square.
    """
    positions = tensors.get("pos_embed")
    if positions is None:
        raise Unrecognised("has no position embedding (pos_embed), which a plain vision transformer needs")
    is_batch_of_one = positions.ndim == 2 or (positions.ndim in (3, 4) and len(positions) == 1)
    if not is_batch_of_one or not positions.is_floating_point():
        raise Unrecognised(f"has positions of shape {tuple(positions.shape)} and type {positions.dtype}")
    tokens = {name: tensors[name] for name in ("cls_token", "reg_token") if name in tensors}
    for token in tokens.values():
        if token.ndim != 3 or len(token) != 1:
            raise Unrecognised(f"has a CLS or register token of shape {tuple(token.shape)}")
    prefix_1PD, patches_1ND = _split_positions(positions, [token.shape[1] for token in tokens.values()], notices)
    if list(tokens) != ["cls_token"]:
        tensors["pos_embed"] = patches_1ND
        for name, token in tokens.items():
            rows, prefix_1PD = prefix_1PD[:, : token.shape[1]], prefix_1PD[:, token.shape[1] :]
            if rows.any():
                tensors[name] = token.float() + rows.float()
                notices.append(f"the position of {name} was added to the token")
    elif prefix_1PD.shape[1]:
        tensors["pos_embed"] = positions.reshape(1, -1, positions.shape[-1])  # still the file's memory
    else:
        tensors["pos_embed"] = torch.cat([patches_1ND.new_zeros(1, 1, patches_1ND.shape[2]), patches_1ND], dim=1)


def _split_positions(positions: Tensor, lengths: list[int], notices: list[str]) -> tuple[Tensor, Tensor]:
    """Positions (1, P, D) of the prefix tokens, P = 0 if they have none, and (1, N, D) of a square of patches.

    lengths: numbers of CLS and of register tokens.
    """
    if positions.ndim == 4:
        rows, columns = positions.shape[1:3]
        side = max(rows, columns)
        if rows != columns:
            notices.append(f"positions of {rows} x {columns} patches were interpolated to {side} x {side}")
        flat = resize_positions(positions.flatten(1, 2), (side, side), grid=(rows, columns))
        return flat[:, :0], flat
    flat = positions if positions.ndim == 3 else positions[None]
    # A CLS token usually has a position; registers usually have none.
    for count in (1, 0, sum(lengths)) if lengths else (0,):
        patches = flat.shape[1] - count
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return flat[:, :count], flat[:, count:]
    raise Unrecognised(f"has positions of shape {tuple(positions.shape)}, which is not a square grid of patches")


def _read_architecture(
    tensors: Mapping[str, Tensor], others: set[str], num_heads: int | None, notices: list[str]
) -> Architecture:
    projection = tensors["patch_embed.proj.weight"]
    if projection.ndim != 4 or projection.shape[2] != projection.shape[3]:
        raise Unrecognised(f"has a patch embedding of shape {tuple(projection.shape)}; square patches are needed")
    width, channels, patch_size = projection.shape[:3]
    if channels != 3:
        raise Unrecognised(f"expects {channels}-channel images, not RGB")
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)
    first, second = (tensors.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        raise Unrecognised("blocks.0.mlp.fc1.weight or blocks.0.mlp.fc2.weight is missing")
    class_token = "cls_token" in tensors
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    prefix = 1 if class_token and not registers else 0
    side = math.isqrt(tensors["pos_embed"].shape[1] - prefix)
    post_norm = "norm_pre.weight" in tensors
    if post_norm and "patch_embed.proj.bias" not in tensors:
        raise Unrecognised("has a norm before its blocks and no bias in the patch embedding, as CLIP")
    num_heads = _num_heads(width, num_heads, notices)
    # CrossMAE has norms in the decoder instead, a classifier on mean tokens has fc_norm. Otherwise it is missing.
    has_other = any(name.startswith(("dec_norms.", "wfm.", "fc_norm.")) for name in others)
    final_norm = post_norm or "norm.weight" in tensors or not has_other
    if not final_norm:
        notices.append("the encoder has no final norm")
    names = {sizes: name for name, sizes in PAPER_SIZES.items()}
    return Architecture(
        names.get((width, depth, num_heads, patch_size), "custom"),
        side * patch_size,
        width,
        depth,
        num_heads,
        patch_size,
        post_norm=post_norm,
        fixed_positions=are_sincos(tensors["pos_embed"], num_prefix=prefix),
        class_token=class_token,
        registers=registers,
        layer_scale="blocks.0.ls1.gamma" in tensors,
        mlp_width=0 if first.shape[0] == 4 * width else first.shape[0],
        swiglu=first.shape[0] == 2 * second.shape[1],
        final_norm=final_norm,
    )


def _num_heads(width: int, asked: int | None, notices: list[str]) -> int:
    if asked and width % asked:
        raise Unrecognised(f"its width of {width} is not divisible by encoder.num_heads {asked}")
    if known := asked or _HEADS.get(width):
        return known
    if width % 64:
        raise Unrecognised(f"its number of attention heads is unknown for a width of {width}; {_HOW_TO_SET}")
    notices.append(f"{width // 64} attention heads are assumed, 64 channels each; if that is wrong, {_HOW_TO_SET}")
    return width // 64
