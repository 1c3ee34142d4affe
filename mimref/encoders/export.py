"""Export to timm and to the layout of the MIM-Refiner releases, and what all exports share; see also `export_onnx`.

An export is written to a temporary folder, read back with the code that its users have, and compared with the encoder.
Only then is it moved to its final path.

Shapes: B images, L tokens, D width, S pixels per side.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mimref.config.base import ReadingConfig
from mimref.encoders.backbones import BackboneArchitecture, EncoderArchitecture, TokenEncoder, at_size
from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from, read_checkpoint, save_encoder
from mimref.encoders.meta import RatesOnCpu
from mimref.encoders.timm_models import features_of_blocks, native_size
from mimref.encoders.vit import Architecture, Encoder, build_encoder, norm_option, timm_options
from mimref.errors import ConfigError, OutputError
from mimref.files import atomic_path, check_new_file
from mimref.progress import Listener, Silent

# Header entries that hold for the weights in any format; `transform` includes the normalisation of images.
_FACTS = ("source", "licence", "preset", "data", "transform")
ENDINGS = {
    "timm": (".safetensors", ".pth", ".pt"),
    "publisher": (".safetensors", ".pth", ".pt"),
    "release": (".th", ".pth", ".pt"),
    "onnx": (".onnx",),
}
"""File endings of each format."""
# Largest accepted difference, relative to the largest magnitude of the features.
_TOLERANCE = 1e-4
# Differs from the batch size of the ONNX trace, so that a size traced as a constant is noticed.
_COMPARED_IMAGES = 3


@dataclass(frozen=True)
class Export:
    """A written file that reproduces the encoder's features when it is read."""

    path: Path
    difference: float
    """Largest absolute difference of any feature, in fp32."""
    read_with: str
    """A line of Python that reads the file."""
    timm_name: str | None = None
    """Name of the timm model that loads the file; None for other formats, and if timm has no model of these sizes."""


def plain(encoder: TokenEncoder, what: str) -> Encoder:
    """Return the encoder if it is a plain vision transformer. Otherwise raises ConfigError; `what` asks for one."""
    if not isinstance(encoder, Encoder):
        raise ConfigError(
            f"{what} needs a plain vision transformer, which {encoder.architecture.name} is not; use --to timm"
        )
    return encoder


def read_encoder(
    path: str | Path,
    reading: ReadingConfig | None = None,
    *,
    arch: str | None = None,
    source: str | None = None,
    resolution: int | None = None,
    listener: Listener | None = None,
) -> tuple[TokenEncoder, dict[str, Any], Checkpoint]:
    """Return a checkpoint's encoder in fp32 on the CPU, the facts that every export keeps, and the checkpoint.

    reading, arch, source: as in `read_checkpoint` and `choose_architecture`. resolution: image size in pixels per side
    to which positions are interpolated. Raises CheckpointError for a file that holds no encoder, ConfigError for values
    that do not fit it.
    """
    listener = listener or Silent()
    checkpoint = read_checkpoint(path, reading, progress=listener.progress)
    architecture = choose_architecture(checkpoint, arch, source, resolution)
    size = resolution or architecture.image_size
    for notice in checkpoint.notices(architecture, [size]):
        listener.note(notice)
    if isinstance(architecture, BackboneArchitecture):
        resized: EncoderArchitecture = at_size(architecture, size, "--resolution")
    else:
        resized = replace(architecture, image_size=size)
    encoder = encoder_from(checkpoint, resized)
    facts = {key: checkpoint.header[key] for key in _FACTS if key in checkpoint.header}
    if isinstance(facts.get("transform"), dict):
        facts["transform"] = facts["transform"] | {"image_size": size}
    known = {"source": source or checkpoint.source, "licence": checkpoint.licence}
    return encoder, facts | {key: value for key, value in known.items() if value}, checkpoint


def write_verified(
    out: Path,
    outputs: Callable[[Iterable[str]], Mapping[str, Tensor]],
    write: Callable[[Path], None],
    read: Callable[[Path], Mapping[str, Tensor]],
    listener: Listener | None,
) -> float:
    """Write `out` if the file reproduces the model's outputs on `comparison_images`. Returns the largest difference.

    outputs: returns the model's own by name. read: returns those of a file. The file is first written under its final
    name in a temporary folder beside `out`: readers choose the format by the ending, and ONNX files record the name of
    the weights file beside them.
    """
    (listener or Silent()).note(f"writing {out}, reading it again and comparing outputs")
    with (
        atomic_path(out) as temporary,
        TemporaryDirectory(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent) as folder,
    ):
        file = Path(folder) / out.name
        write(file)
        difference = largest_difference(out, outputs, read(file))
        if data_file(file).exists():
            with atomic_path(data_file(out)) as temporary_data:
                os.replace(data_file(file), temporary_data)
        os.replace(file, temporary)
    return difference


def data_file(out: Path) -> Path:
    """Return the path of the weights file beside a large ONNX file."""
    return out.with_name(f"{out.name}.data")


def plain_state(encoder: TokenEncoder) -> dict[str, Tensor]:
    """Return copies of the weights: `torch.save` writes all of the memory that a tensor is a part of."""
    return {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}


def write_encoder(
    out: Path, encoder: TokenEncoder, facts: Mapping[str, Any], listener: Listener | None, file: Path
) -> None:
    """Write weights under timm's names in the format of `out`, with the facts if it stores any."""
    if out.suffix == ".safetensors":
        save_encoder(file, encoder, facts)
        return
    torch.save(plain_state(encoder), file)
    note_lost(out, facts, listener or Silent())


def note_lost(out: Path, facts: Mapping[str, Any], listener: Listener) -> None:
    """Report the facts that a file other than .safetensors cannot store."""
    if facts:
        listener.note(f"{out.suffix} cannot store {', '.join(facts)}; .safetensors can")


def comparison_images(encoder: TokenEncoder) -> Tensor:
    """Return the noise images (B, C, S, S) on which exports are compared."""
    size, channels = encoder.architecture.image_size, encoder.architecture.channels
    return torch.randn(_COMPARED_IMAGES, channels, size, size, generator=torch.Generator().manual_seed(0))


def named_features(tokens: Sequence[Tensor], blocks: Sequence[int], normed: Tensor) -> dict[str, Tensor]:
    """Return tokens (B, L, D) as `block_N`, and those of the last block after the final norm as `normed`."""
    return {f"block_{block}": tokens_BLD for block, tokens_BLD in zip(blocks, tokens, strict=True)} | {"normed": normed}


@torch.inference_mode()
def encoder_features(encoder: Encoder, blocks: Sequence[int]) -> dict[str, Tensor]:
    """Return the encoder's own features; sets eval mode. Without a final norm, `normed` is the last block's tokens."""
    wanted, final_norm = [*blocks, encoder.depth], [*(False for _ in blocks), True]
    *tokens, normed = encoder.eval().blocks(comparison_images(encoder), wanted, final_norm=final_norm)
    return named_features(tokens, blocks, normed)


def features_by_name(encoder: Encoder, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the encoder's own features under names that `named_features` assigns."""
    return encoder_features(encoder, [int(name.removeprefix("block_")) for name in names if name != "normed"])


def largest_difference(
    out: Path, outputs: Callable[[Iterable[str]], Mapping[str, Tensor]], found: Mapping[str, Tensor]
) -> float:
    """Return a file's largest difference from the model's outputs. Raises OutputError for more than fp32 explains."""
    wanted = outputs(found)
    largest = 0.0
    for name, read in found.items():
        if read.shape != wanted[name].shape:
            shapes = f"{tuple(read.shape)} instead of {tuple(wanted[name].shape)}"
            raise OutputError(f"--out {out}: not written: read again, {name} has shape {shapes}")
        difference = float((read - wanted[name]).abs().max())
        magnitude = float(wanted[name].abs().max())
        if not difference <= _TOLERANCE * magnitude:  # NaN fails too
            raise OutputError(
                f"--out {out}: not written: read again, {name} differs by {difference:.2g} from the original's "
                f"values of up to {magnitude:.2g}"
            )
        largest = max(largest, difference)
    return largest


def export_timm(
    encoder: Encoder, out: Path, facts: Mapping[str, Any], *, force: bool = False, listener: Listener | None = None
) -> Export:
    """Write a file that `timm.create_model(name, checkpoint_path=out)` or timm's VisionTransformer class loads.

    encoder: in fp32 on the CPU. out: ends in .safetensors, whose metadata holds `facts`, or in .pth or .pt without it.
    Raises ConfigError for an encoder that timm has no model for, OutputError for another ending, a file that exists
    (unless `force`) or cannot be written, and features that differ.
    """
    check_new_file(out, ENDINGS["timm"], force)
    architecture = encoder.architecture
    if architecture.post_norm:
        raise ConfigError(
            f"--to timm: timm has no post-norm blocks (data2vec 2.0), which {architecture.name} needs; "
            "use --to release or --to onnx"
        )
    if not architecture.final_norm:
        raise ConfigError(
            f"--to timm: {architecture.name} lacks the norm that timm's models have after the last block; use --to onnx"
        )
    name = timm_name(encoder)
    write = partial(write_encoder, out, encoder, facts, listener)
    difference = write_verified(
        out, partial(features_by_name, encoder), write, lambda file: _read_by_timm(file, encoder, name), listener
    )
    return Export(out, difference, reading_line(out, architecture, name), name)


def timm_name(encoder: Encoder) -> str | None:
    """Return the timm model with the same tensors and attention heads, preferably one made for the same image size."""
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
            channels = architecture.channels
            vit = timm.create_model(name, num_classes=0, img_size=size, in_chans=channels, weight_init="skip")
        if type(vit) is not VisionTransformer or type(first := vit.blocks[0]) is not Block:
            continue
        # The number of heads does not show in any shape.
        same_heads = first.attn.num_heads == architecture.num_heads
        if same_heads and {key: tensor.shape for key, tensor in vit.state_dict().items()} == wanted:
            return str(name)
    return None


def _read_by_timm(file: Path, encoder: Encoder, name: str | None) -> dict[str, Tensor]:
    """Return the file's features, by timm's code alone."""
    if name is None:
        vit: nn.Module = build_encoder(encoder.architecture).vit
        timm.models.load_checkpoint(vit, str(file))
    else:
        size = encoder.architecture.image_size
        options = {"img_size": size, "in_chans": encoder.architecture.channels, **norm_option(encoder.architecture)}
        vit = timm.create_model(name, checkpoint_path=str(file), num_classes=0, **options)
    assert isinstance(vit, VisionTransformer)
    with torch.inference_mode():
        found = features_of_blocks(vit, comparison_images(encoder))
        return found | {"normed": vit.norm(found[f"block_{encoder.depth}"])}


def reading_line(out: Path, architecture: Architecture, name: str | None, more: Mapping[str, Any] | None = None) -> str:
    """Return a line of Python with which timm reads the file. more: options of the model that replace others."""
    eps = f"functools.partial(torch.nn.LayerNorm, eps={architecture.norm_eps})"
    norm = f", norm_layer={eps}" if norm_option(architecture) else ""
    if name is None:
        chosen = timm_options(architecture) | dict(more or {})
        options = ", ".join(f"{key}={value!r}" for key, value in chosen.items())
        swiglu = ", mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU" if architecture.swiglu else ""
        model = f"timm.models.VisionTransformer({options}{swiglu}{norm})"
        return f"model = {model}; timm.models.load_checkpoint(model, {str(out)!r})"
    size = architecture.image_size
    resized = "" if native_size(name) == size else f", img_size={size}"
    resized += "" if architecture.channels == 3 else f", in_chans={architecture.channels}"
    options = "".join(f", {key}={value!r}" for key, value in ({"num_classes": 0} | dict(more or {})).items())
    return f"timm.create_model({name!r}, checkpoint_path={str(out)!r}{options}{resized}{norm})"


def export_release(
    encoder: Encoder, out: Path, facts: Mapping[str, Any], *, force: bool = False, listener: Listener | None = None
) -> Export:
    """Write a file that the MIM-Refiner repository's models load: `state_dict` and the constructor's `ctor_kwargs`.

    out: ends in .th, .pth or .pt. `facts` are saved as `mimref`, which other programs ignore.
    Raises ConfigError for an encoder that the layout cannot store, OutputError as in `export_timm`.
    """
    check_new_file(out, ENDINGS["release"], force)
    architecture = encoder.architecture
    state = _release_state(encoder)
    sizes = {
        "patch_size": architecture.patch_size,
        "dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.num_heads,
        "input_shape": (architecture.channels, architecture.image_size, architecture.image_size),
        "mlp_hidden_dim": state["blocks.0.mlp.fc1.bias"].shape[0],
    }
    content = {"state_dict": state, "ctor_kwargs": sizes, "mimref": dict(facts)}
    difference = write_verified(
        out,
        partial(features_by_name, encoder),
        lambda file: torch.save(content, file),
        lambda file: _read_release(file, encoder),
        listener,
    )
    return Export(out, difference, f"torch.load({str(out)!r})['state_dict']")


def _release_state(encoder: Encoder) -> dict[str, Tensor]:
    """Return the weights under the layout's names. Raises ConfigError for an encoder that it cannot store."""
    state, architecture = plain_state(encoder), encoder.architecture
    unsupported = {
        "register tokens": "reg_token" in state,
        "an encoder without CLS token": "cls_token" not in state,
        "LayerScale": "blocks.0.ls1.gamma" in state,
        "SwiGLU": architecture.swiglu,
        f"the blocks of {architecture.name}": "blocks.0.mlp.fc1.bias" not in state,
    }
    for feature, present in unsupported.items():
        if present:
            raise ConfigError(f"--to release: the layout cannot store {feature}; use --to timm or --to onnx")
    if not architecture.post_norm and "norm.weight" not in state:
        raise ConfigError("--to release: the layout cannot store an encoder without final norm; use --to onnx")
    positions, token = state.pop("pos_embed"), state.pop("cls_token")
    side = architecture.image_size // encoder.patch_size
    num_prefix = positions.shape[1] - side**2
    if architecture.post_norm:
        state = {name.replace("norm_pre.", "embed_norm."): tensor for name, tensor in state.items()}
    state["pos_embed.embed"] = positions[:, num_prefix:].reshape(1, side, side, -1).clone()
    state["cls_tokens.tokens"] = token + positions[:, :num_prefix] if num_prefix else token
    return state


def _read_release(file: Path, encoder: Encoder) -> dict[str, Tensor]:
    """Return the file's features, read as any foreign checkpoint. Raises ConfigError if it is not recognised."""
    checkpoint = read_checkpoint(file, ReadingConfig(num_heads=encoder.architecture.num_heads))
    if checkpoint.recognised is None:
        name, problem = encoder.architecture.name, checkpoint.problem
        raise ConfigError(f"--to release: the layout does not fit {name} ({problem}); use --to timm or --to onnx")
    found = encoder_from(checkpoint, checkpoint.recognised.architecture)
    assert isinstance(found, Encoder)
    return encoder_features(found, range(1, found.depth + 1))
