"""Encoders in other programs' formats: timm's and the layout of the MIM-Refiner releases (ONNX is in `onnx`).

Every export is written beside its place, read again by what others read it with, and compared with the encoder. Only
then does it get its name.

Shapes: B images, L tokens, D width, S pixels per side.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mimref.encoders.backbones import native_size
from mimref.encoders.checkpoints import choose_architecture, encoder_from, read_checkpoint, save_encoder
from mimref.encoders.reading import read_file
from mimref.encoders.vit import Architecture, Encoder, build_encoder
from mimref.errors import CheckpointError, ConfigError, OutputError
from mimref.files import atomic_path
from mimref.progress import Listener, Silent

# What a header says that is true of the weights in any format; `transform` has the normalisation of the images.
_FACTS = ("source", "licence", "preset", "data", "transform")
# Largest difference that passes, as a share of the features' largest magnitude.
_TOLERANCE = 1e-4
# Not the batch that ONNX is traced with, which would hide a batch size that was traced as a constant.
_COMPARED_IMAGES = 3
_RELEASE_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Export:
    """A file that was written, read again and found to give the encoder's features."""

    path: Path
    difference: float
    """Largest absolute difference of any feature, in fp32."""
    timm_name: str | None
    """The timm model whose weights the file holds; None for other formats, and where timm names no model so."""
    read_with: str
    """A line of Python that reads the file."""


def read_encoder(
    path: str | Path,
    *,
    arch: str | None = None,
    source: str | None = None,
    num_heads: int | None = None,
    resolution: int | None = None,
    listener: Listener | None = None,
) -> tuple[Encoder, dict[str, Any]]:
    """A checkpoint's encoder in fp32 on the CPU, and what its header says that travels with every export.

    arch, source: for foreign files that are not recognised. num_heads: attention heads of a foreign file of an unusual
    width. resolution: pixels per side to interpolate positions to. listener: told of downloads and assumptions.
    Raises CheckpointError for a file that is no plain vision transformer, ConfigError for values that do not fit it.
    """
    listener = listener or Silent()
    checkpoint = read_checkpoint(path, num_heads=num_heads, progress=listener.progress)
    architecture = choose_architecture(checkpoint, arch, source)
    for notice in checkpoint.notices(architecture):
        listener.note(notice)
    if not isinstance(architecture, Architecture):
        raise ConfigError(f"--arch {arch}: only plain vision transformers can be exported")
    if resolution is not None:
        architecture.check_size(resolution, "--resolution")
        architecture = replace(architecture, image_size=resolution)
    encoder = encoder_from(checkpoint, architecture)
    assert isinstance(encoder, Encoder)
    facts = {key: checkpoint.header[key] for key in _FACTS if key in checkpoint.header}
    known = {"source": source or checkpoint.source, "licence": checkpoint.licence}
    if isinstance(facts.get("transform"), dict):
        facts["transform"] = facts["transform"] | {"image_size": architecture.image_size}
    return encoder, facts | {key: value for key, value in known.items() if value}


# --- timm


def export_timm(
    encoder: Encoder,
    out: Path,
    facts: Mapping[str, Any],
    *,
    force: bool = False,
    listener: Listener | None = None,
) -> Export:
    """Write exactly what `timm.create_model(name, checkpoint_path=out, num_classes=0)` loads.

    out: ends in .safetensors, whose metadata carries `facts`, or in .pth or .pt, a plain state_dict that cannot. Where
    timm names no model of these sizes, its VisionTransformer class loads the file. The encoder, in fp32 on the CPU, is
    put in eval mode.
    Raises ConfigError for an encoder that timm has no model for, OutputError for another ending, a file that exists
    (unless `force`) or cannot be written, and features that differ.
    """
    check_out(out, (".safetensors", ".pth", ".pt"), force)
    _check_for_timm(encoder)
    listener = listener or Silent()
    name = _timm_name(encoder)
    with finished(out, listener) as file:
        if out.suffix == ".safetensors":
            save_encoder(file, encoder, facts)
        else:
            torch.save(_plain_state(encoder), file)
            if facts:
                listener.note(f"{out.suffix} has no place for {', '.join(facts)}; .safetensors has")
        difference = largest_difference(out, encoder, _read_by_timm(file, encoder, name))
    return Export(out, difference, name, _timm_line(out, encoder, name))


def _check_for_timm(encoder: Encoder) -> None:
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


def _timm_name(encoder: Encoder) -> str | None:
    """timm's model of the same tensors and attention heads; one made for the encoder's image size where there is."""
    architecture, size = encoder.architecture, encoder.architecture.image_size
    own = architecture.name.partition(".")[0]
    if architecture.from_timm:
        return own
    start = f"vit_*_patch{architecture.patch_size}"
    digits = "[0-9][0-9][0-9]"
    names = timm.list_models([f"{start}_{end}" for end in (digits, f"gap_{digits}", "dinov2", "reg4_dinov2")])
    wanted = {key: tensor.shape for key, tensor in encoder.vit.state_dict().items()}
    for name in sorted(names, key=lambda known: native_size(known) != size):
        with torch.device("meta"):
            vit = timm.create_model(name, num_classes=0, img_size=size)
        if type(vit) is not VisionTransformer or type(first := vit.blocks[0]) is not Block:
            continue
        # The number of heads shows in no shape.
        same_heads = first.attn.num_heads == architecture.num_heads
        if same_heads and {key: tensor.shape for key, tensor in vit.state_dict().items()} == wanted:
            return str(name)
    return None


def _read_by_timm(file: Path, encoder: Encoder, name: str | None) -> dict[str, Tensor]:
    """timm's features, by timm's code alone."""
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
        return _named(tokens, range(1, len(tokens) + 1), vit.norm(tokens[-1]))


def _timm_line(out: Path, encoder: Encoder, name: str | None) -> str:
    size = encoder.architecture.image_size
    if name is not None:
        resized = "" if native_size(name) == size else f", img_size={size}"
        return f"timm.create_model({name!r}, checkpoint_path={str(out)!r}, num_classes=0{resized})"
    return f"model = {_timm_constructor(encoder.architecture)}; timm.models.load_checkpoint(model, {str(out)!r})"


def _timm_constructor(architecture: Architecture) -> str:
    """The call that makes timm's VisionTransformer of these sizes; for encoders that `build_encoder` makes."""
    options: dict[str, object] = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "embed_dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "num_classes": 0,
    }
    if architecture.mlp_width:
        # timm multiplies by the width and rounds down.
        options |= {"mlp_ratio": (architecture.mlp_width + 0.5) / architecture.width}
    if not architecture.class_token:
        options |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if architecture.registers:
        options |= {"reg_tokens": architecture.registers, "no_embed_class": True}
    if architecture.layer_scale:
        options |= {"init_values": 1e-5}
    text = ", ".join(f"{key}={value!r}" for key, value in options.items())
    swiglu = ", mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU" if architecture.swiglu else ""
    return f"timm.models.VisionTransformer({text}{swiglu})"


# --- the MIM-Refiner releases' layout


def export_release(
    encoder: Encoder,
    out: Path,
    facts: Mapping[str, Any],
    *,
    force: bool = False,
    listener: Listener | None = None,
) -> Export:
    """Write what the MIM-Refiner repository's models load: `state_dict`, and `ctor_kwargs` for their constructors.

    out: ends in .th, .pth or .pt. The CLS token's position is folded into the token. `facts` stand under `mimref`,
    where nobody else looks. The encoder, in fp32 on the CPU, is put in eval mode.
    Raises ConfigError for what the layout has no place for, OutputError as `export_timm`.
    """
    check_out(out, (".th", ".pth", ".pt"), force)
    _check_for_release(encoder)
    architecture = encoder.architecture
    state = _release_state(encoder)
    sizes = {
        "patch_size": architecture.patch_size,
        "dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "input_shape": (3, architecture.image_size, architecture.image_size),
        "mlp_hidden_dim": state["blocks.0.mlp.fc1.bias"].shape[0],
    }
    with finished(out, listener) as file:
        torch.save({"state_dict": state, "ctor_kwargs": sizes, "mimref": dict(facts)}, file)
        difference = largest_difference(out, encoder, _read_release(file, encoder))
    return Export(out, difference, None, f"torch.load({str(out)!r})['state_dict']")


def _check_for_release(encoder: Encoder) -> None:
    """Raise ConfigError naming what the layout has no place for, and the export that has one."""
    names = encoder.vit.state_dict().keys()
    elsewhere = [
        ("reg_token" in names, "register tokens"),
        ("cls_token" not in names, "an encoder without CLS token"),
        ("blocks.0.ls1.gamma" in names, "LayerScale"),
        (encoder.architecture.swiglu, "SwiGLU"),
    ]
    for is_so, feature in elsewhere:
        if is_so:
            raise ConfigError(f"--to release: the layout has no place for {feature}; use --to timm or --to onnx")
    post_norm = encoder.architecture.post_norm
    if not post_norm and "norm.weight" not in names:
        raise ConfigError("--to release: the layout has no place for an encoder without final norm; use --to onnx")
    ours = {"pos_embed.embed": "pos_embed", "cls_tokens.tokens": "cls_token"}
    ours |= {f"embed_norm.{part}": f"norm_pre.{part}" for part in ("weight", "bias")}
    wanted = {ours.get(name, name) for name in _release_names(encoder.depth, post_norm=post_norm)}
    if odd := sorted(wanted ^ names):
        raise ConfigError(f"--to release: the layout wants other tensors ({odd[0]}); use --to timm or --to onnx")


def _release_names(depth: int, *, post_norm: bool) -> set[str]:
    """The tensors that the repository's models load strictly."""
    layers = ["patch_embed.proj", "embed_norm" if post_norm else "norm"]
    layers += [f"blocks.{block}.{layer}" for block in range(depth) for layer in _RELEASE_BLOCK]
    names = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    return names | {"pos_embed.embed", "cls_tokens.tokens"}


def _release_state(encoder: Encoder) -> dict[str, Tensor]:
    state = _plain_state(encoder)
    positions, token = state.pop("pos_embed"), state.pop("cls_token")
    side = encoder.architecture.image_size // encoder.patch_size
    num_prefix = positions.shape[1] - side**2
    state = {name.replace("norm_pre.", "embed_norm."): tensor for name, tensor in state.items()}
    state["pos_embed.embed"] = positions[:, num_prefix:].reshape(1, side, side, -1).clone()
    state["cls_tokens.tokens"] = token + positions[:, :num_prefix] if num_prefix else token
    return state


def _read_release(file: Path, encoder: Encoder) -> dict[str, Tensor]:
    """Features of the file as any checkpoint from elsewhere, after its names have been checked one by one."""
    architecture = encoder.architecture
    names = read_file(file).content["state_dict"].keys()
    if odd := sorted(names ^ _release_names(encoder.depth, post_norm=architecture.post_norm)):
        raise CheckpointError(f"{file.name}: {odd[0]} is missing or unexpected in the release's layout")
    checkpoint = read_checkpoint(file, num_heads=architecture.num_heads)
    if checkpoint.recognised is None:
        raise CheckpointError(f"{file.name}: is not recognised when read again: {checkpoint.problem}")
    found = encoder_from(checkpoint, checkpoint.recognised.architecture)
    assert isinstance(found, Encoder)
    return _features(found, range(1, found.depth + 1))


# --- writing and comparing


def data_file(out: Path) -> Path:
    """Where the weights of a large ONNX file lie."""
    return out.with_name(f"{out.name}.data")


def check_out(out: Path, endings: Sequence[str], force: bool) -> None:
    """Raise OutputError for another ending than these, a folder, and a file that exists, unless `force`."""
    if out.suffix not in endings:
        raise OutputError(f"--out {out}: the file's name must end in {' or '.join(endings)}")
    check_free(out, force)


def check_free(out: Path, force: bool) -> None:
    """Raise OutputError for a folder, and for a file that exists, unless `force`."""
    if out.is_dir():
        raise OutputError(f"--out {out}: is a folder; give the name of a file")
    if out.exists() and not force:
        raise OutputError(f"--out {out}: exists; give another name, or --force to replace it")


@contextmanager
def finished(out: Path, listener: Listener | None) -> Iterator[Path]:
    """A path of the same name elsewhere, to write and to read again; becomes `out` if the block ends without an error.

    Readers go by the name's ending, and ONNX by the name of the file of weights that lies beside.
    """
    (listener or Silent()).note(f"writing {out}, reading it again and comparing features")
    with (
        atomic_path(out) as temporary,
        TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder,
    ):
        file = Path(folder) / out.name
        yield file
        if data_file(file).exists():
            with atomic_path(data_file(out)) as temporary_data:
                os.replace(data_file(file), temporary_data)
        os.replace(file, temporary)


def _plain_state(encoder: Encoder) -> dict[str, Tensor]:
    """Copies, since `torch.save` writes all of the memory that a tensor is a part of."""
    return {name: tensor.float().clone() for name, tensor in encoder.vit.state_dict().items()}


def comparison_images(encoder: Encoder) -> Tensor:
    """Noise (B, 3, S, S) that exports are compared on."""
    size = encoder.architecture.image_size
    return torch.randn(_COMPARED_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))


def has_norm(vit: VisionTransformer) -> bool:
    """Whether there is a norm after the last block."""
    return not isinstance(vit.norm, nn.Identity)


def _named(tokens: Sequence[Tensor], blocks: Sequence[int], normed: Tensor) -> dict[str, Tensor]:
    return {f"block_{block}": tokens_BLD for block, tokens_BLD in zip(blocks, tokens, strict=True)} | {"normed": normed}


@torch.inference_mode()
def _features(encoder: Encoder, blocks: Sequence[int]) -> dict[str, Tensor]:
    """Tokens of `blocks`, and of the last block after the final norm (as they are where there is none)."""
    tokens = encoder.eval().blocks(comparison_images(encoder), [*blocks, encoder.depth])
    return _named(tokens[:-1], blocks, encoder.vit.norm(tokens[-1]))


def largest_difference(out: Path, encoder: Encoder, found: Mapping[str, Tensor]) -> float:
    """Of the features that the file gives from the encoder's own. Raises OutputError for more than fp32 explains."""
    blocks = [int(name.removeprefix("block_")) for name in found if name != "normed"]
    wanted = _features(encoder, blocks)
    largest = 0.0
    for name, tokens_BLD in found.items():
        if tokens_BLD.shape != wanted[name].shape:
            shapes = f"{tuple(tokens_BLD.shape)} instead of {tuple(wanted[name].shape)}"
            raise OutputError(f"--out {out}: not written: read again, {name} has shape {shapes}")
        difference = float((tokens_BLD - wanted[name]).abs().max())
        magnitude = float(wanted[name].abs().max())
        # Written so that features that are not numbers fail.
        if not difference <= _TOLERANCE * magnitude:
            raise OutputError(
                f"--out {out}: not written: read again, {name} differs by {difference:.2g} from the encoder's "
                f"features of up to {magnitude:.2g}"
            )
        largest = max(largest, difference)
    return largest
