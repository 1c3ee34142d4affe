"""Public checkpoints recognised by names and shapes of their tensors, and brought to timm's names.

The internal form is that of timm's VisionTransformer as `mimref.encoders.vit.build_encoder` makes it. Nothing is left
out silently: every tensor is the encoder's, belongs to a named group that no encoder needs, or is an error.

Shapes: N patches, D width, R registers.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimref.encoders.layouts import (
    D2V2,
    DATA2VEC,
    DROPPABLE,
    DROPPABLE_BESIDE,
    HUGGING_FACE,
    PATCHES,
    PLAIN,
    PREFERRED,
    RELATIVES,
    WRAPPING,
    format_name,
)
from mimref.encoders.reading import first_line, named_tensors
from mimref.encoders.vit import PAPER_SIZES, Architecture, are_sincos, build_encoder, resize_positions
from mimref.errors import ConfigError

# Attention heads cannot be read from weights. Width to heads of the published sizes (S, B, L, H, g, G, 2B, ...).
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16, 2560: 32, 4096: 32}


class Unrecognised(Exception):
    """Why a file is not taken for a plain vision transformer; one line, without the file's name."""


@dataclass(frozen=True)
class Recognised:
    """A foreign checkpoint in the internal form."""

    format: str
    """For people, such as `data2vec 2.0`."""
    source: str | None
    """Pre-training method as `--source` names it; None where several methods share one layout."""
    architecture: Architecture
    tensors: dict[str, Tensor]
    """By timm's names; what did not have to change is the file's own memory."""
    origins: dict[str, list[str]]
    """timm's name to the file's names."""
    dropped: dict[str, list[str]]
    """Group to the file's names."""
    notices: list[str]
    """What was not in the weights, or was changed on the way."""


def recognise(content: Mapping[Any, Any], *, num_heads: int | None = None) -> Recognised:
    """Find the plain vision transformer in a file's content. Raises Unrecognised with the reason when there is none.

    num_heads: attention heads, which weights do not tell; None takes those of the published model of this width, else
    one per 64 channels.
    """
    named, full_names = _clean_names(content)
    root, patches = _find_encoder(named)
    encoder = {name[len(root) :]: tensor for name, tensor in named.items() if name.startswith(root)}
    beside = {_beside(name, root): full_names[name] for name in named if not name.startswith(root)}
    _refuse_relatives(encoder)
    renames = DATA2VEC if patches.startswith(D2V2) else HUGGING_FACE if patches.startswith("emb") else PLAIN
    parts = _rename(encoder, renames)
    renamed = {name for names in parts.values() for name in names}
    left = {name: full_names[root + name] for name in encoder if name not in renamed}
    dropped = _drop(left, beside)
    tensors = {target: _join([encoder[name] for name in names]) for target, names in parts.items()}
    notices: list[str] = []
    _prepare_positions(tensors, notices)
    architecture = _read_architecture(tensors, {*left, *beside}, num_heads, notices)
    _check(tensors, architecture)
    return Recognised(
        *format_name(root, patches, {*encoder, *beside}, architecture),
        architecture,
        tensors,
        {target: [full_names[root + name] for name in names] for target, names in parts.items()},
        dropped,
        notices,
    )


def _clean_names(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their names without parts that wrapping modules have added, and the full names."""
    named: dict[str, Tensor] = {}
    full_names: dict[str, str] = {}
    for full, tensor in named_tensors(content):
        name = ".".join(part for part in full.split(".") if part not in WRAPPING)
        if name in named:
            raise Unrecognised(f"holds both {full_names[name]} and {full}, which are the same tensor of one model")
        named[name], full_names[name] = tensor, full
    return named, full_names


def _find_encoder(named: Mapping[str, Tensor]) -> tuple[str, str]:
    """Prefix of the encoder's names, and the name of its patch embedding without it."""
    found = {match[1]: match[2] for name in named if (match := PATCHES.fullmatch(name))}
    if not found:
        names = ", ".join(list(named)[:3])
        raise Unrecognised(f"holds no vision transformer: no patch embedding among its tensors ({names}, ...)")

    def rank(root: str) -> list[int]:
        parts = root.split(".")[:-1]
        return [PREFERRED.index(part) if part in PREFERRED else len(PREFERRED) for part in parts]

    best = min(map(rank, found))
    roots = [root for root in found if rank(root) == best]
    if len(roots) > 1:
        raise Unrecognised(f"holds several encoders ({', '.join(sorted(roots))}); save the one you want alone")
    return roots[0], found[roots[0]]


def _beside(name: str, root: str) -> str:
    """The name of a tensor that is not the encoder's, without the prefixes that both share."""
    parts, prefix = name.split("."), root.split(".")[:-1]
    shared = 0
    while shared < min(len(parts) - 1, len(prefix)) and parts[shared] == prefix[shared]:
        shared += 1
    return ".".join(parts[shared:])


def _refuse_relatives(names: Iterable[str]) -> None:
    for pattern, feature in RELATIVES.items():
        if any(re.fullmatch(pattern, name) for name in names):
            raise Unrecognised(f"is a vision transformer with {feature}, which is not a plain one")


def _rename(names: Iterable[str], renames: Mapping[str, str]) -> dict[str, list[str]]:
    """timm's name to the names of its parts, in order; names that fit no rule are left out."""
    numbered: dict[str, dict[int, str]] = {}
    for name in names:
        for pattern, replacement in renames.items():
            match = re.fullmatch(pattern, name)
            if match:
                target, _, number = match.expand(replacement).partition("@")
                parts = numbered.setdefault(target, {})
                if int(number or 0) in parts:
                    raise Unrecognised(f"holds both {parts[int(number or 0)]} and {name}, two names of one tensor")
                parts[int(number or 0)] = name
                break
    return {target: [parts[number] for number in sorted(parts)] for target, parts in numbered.items()}


def _join(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    try:
        return torch.cat(parts)
    except (RuntimeError, TypeError) as error:
        raise Unrecognised(f"query, key and value do not fit each other ({first_line(error)})") from error


def _drop(left: Mapping[str, str], beside: Mapping[str, str]) -> dict[str, list[str]]:
    """Full names by group; raises Unrecognised for a tensor of none. Keys are the names without prefixes."""
    dropped: dict[str, list[str]] = {}
    unexpected = []
    of_encoder, of_file = list(DROPPABLE.items()), [*DROPPABLE.items(), *DROPPABLE_BESIDE.items()]
    for names, groups in ((left, of_encoder), (beside, of_file)):
        for name, full in names.items():
            group = next((group for group, pattern in groups if re.fullmatch(pattern, name)), None)
            if group:
                dropped.setdefault(group, []).append(full)
            else:
                unexpected.append(f"{full} is unexpected")
    if unexpected:
        raise Unrecognised(shortened(unexpected))
    return dropped


def shortened(problems: list[str], most: int = 4) -> str:
    """The first problems in one line, and how many more there are."""
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _prepare_positions(tensors: dict[str, Tensor], notices: list[str]) -> None:
    """Bring the position embedding to (1, 1 + N, D), or with registers or without CLS token to (1, N, D).

    Rows of the CLS token and of registers that the internal form has no place for are added to the tokens themselves,
    which is the same function. A grid that is not square is interpolated to one.
    """
    positions = tensors.get("pos_embed")
    if positions is None:
        raise Unrecognised("has no position embedding (pos_embed), which a plain vision transformer needs")
    if (
        not positions.is_floating_point()
        or positions.ndim not in (2, 3, 4)
        or (positions.ndim > 2 and len(positions) != 1)
    ):
        raise Unrecognised(f"has positions of shape {tuple(positions.shape)} and type {positions.dtype}")
    prefix_tokens = [tensors[name] for name in ("cls_token", "reg_token") if name in tensors]
    if any(token.ndim != 3 or len(token) != 1 for token in prefix_tokens):
        raise Unrecognised(f"has a CLS or register token of shape {tuple(prefix_tokens[0].shape)}")
    prefix_1PD, patches_1ND = _split_positions(positions, prefix_tokens, notices)
    if "reg_token" in tensors or not prefix_tokens:
        start = 0
        for name, token in (("cls_token", tensors.get("cls_token")), ("reg_token", tensors.get("reg_token"))):
            rows = prefix_1PD[:, start : start + token.shape[1]] if token is not None else prefix_1PD[:, :0]
            if token is not None and rows.shape[1] and rows.any():
                tensors[name] = token.float() + rows.float()
                notices.append(f"the position of {name} was added to the token")
            start += rows.shape[1]
        tensors["pos_embed"] = patches_1ND
        return
    if not prefix_1PD.shape[1]:
        prefix_1PD = patches_1ND.new_zeros(1, 1, patches_1ND.shape[2])
    elif prefix_1PD.shape[1] + patches_1ND.shape[1] == positions.shape[-2] and positions.ndim == 3:
        return  # as it should be, and stays the file's own memory
    tensors["pos_embed"] = torch.cat([prefix_1PD, patches_1ND], dim=1)


def _split_positions(positions: Tensor, prefix_tokens: list[Tensor], notices: list[str]) -> tuple[Tensor, Tensor]:
    """Positions (1, P, D) of the prefix tokens, P = 0 where they have none, and (1, N, D) of a square of patches."""
    if positions.ndim == 4:
        rows, columns = positions.shape[1:3]
        flat = positions.flatten(1, 2)
        if rows != columns:
            side = max(rows, columns)
            flat = resize_positions(flat, (side, side), grid=(rows, columns))
            notices.append(f"positions of {rows} x {columns} patches were interpolated to {side} x {side}")
        return flat[:, :0], flat
    flat = positions if positions.ndim == 3 else positions[None]
    # A CLS token usually has a position; registers usually have none.
    lengths = [token.shape[1] for token in prefix_tokens]
    for count in dict.fromkeys((*([1] if lengths else []), 0, sum(lengths))):
        patches = flat.shape[1] - count
        if patches > 0 and math.isqrt(patches) ** 2 == patches:
            return flat[:, :count], flat[:, count:]
    raise Unrecognised(f"has positions of shape {tuple(positions.shape)}, which is no square of patches")


def _read_architecture(
    tensors: Mapping[str, Tensor], others: set[str], num_heads: int | None, notices: list[str]
) -> Architecture:
    projection = tensors["patch_embed.proj.weight"]
    if projection.ndim != 4 or projection.shape[2] != projection.shape[3]:
        raise Unrecognised(f"has a patch embedding of shape {tuple(projection.shape)}; square patches are needed")
    width, channels, patch_size = projection.shape[:3]
    if channels != 3:
        raise Unrecognised(f"takes images of {channels} channels, not 3")
    depth = 1 + max((int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")), default=-1)
    first, second = (tensors.get(f"blocks.0.mlp.{layer}.weight") for layer in ("fc1", "fc2"))
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        raise Unrecognised("blocks.0.mlp.fc1.weight or blocks.0.mlp.fc2.weight is missing")
    class_token, reg_token = "cls_token" in tensors, tensors.get("reg_token")
    registers = 0 if reg_token is None else reg_token.shape[1]
    prefix = 1 if class_token and not registers else 0
    side = math.isqrt(tensors["pos_embed"].shape[1] - prefix)
    post_norm = "norm_pre.weight" in tensors
    if post_norm and "patch_embed.proj.bias" not in tensors:
        raise Unrecognised(
            "has a norm before its blocks and no bias in the patch embedding, as CLIP; name it by --arch"
        )
    num_heads = _num_heads(width, num_heads, notices)
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
        final_norm=_has_final_norm(tensors, others, notices),
    )


def _num_heads(width: int, asked: int | None, notices: list[str]) -> int:
    if asked and width % asked:
        raise Unrecognised(f"its width of {width} is not divisible by encoder.num_heads {asked}")
    known = asked or _HEADS.get(width)
    if known:
        return known
    if width % 64:
        raise Unrecognised(f"its number of attention heads is unknown for a width of {width}; set encoder.num_heads")
    notices.append(
        f"{width // 64} attention heads are assumed, 64 channels each; set encoder.num_heads where that is wrong"
    )
    return width // 64


def _has_final_norm(tensors: Mapping[str, Tensor], others: set[str], notices: list[str]) -> bool:
    if "norm.weight" in tensors or "norm_pre.weight" in tensors:
        return True
    # CrossMAE's decoder norms stand for the encoder's; a classifier on mean tokens has fc_norm instead.
    if any(name.startswith(("dec_norms.", "wfm.", "fc_norm.")) for name in others):
        notices.append("the encoder has no final norm")
        return False
    return True  # then `_check` says that it is missing


def _check(tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
    """Raise Unrecognised unless the tensors are exactly those of the architecture."""
    try:
        with torch.device("meta"):
            wanted = build_encoder(architecture).vit.state_dict()
    except (ConfigError, AssertionError) as error:
        raise Unrecognised(f"makes no encoder: {error}") from error
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in wanted]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
            problems.append(f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}, sparse or without data")
    if problems:
        raise Unrecognised(shortened(problems))
