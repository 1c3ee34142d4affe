"""Export to a folder that transformers or timm loads, with an image processor.

As with every export, the folder is read back by mimref and by the library, and compared, before it gets its name.

Shapes: B images, L tokens, D width, C classes.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mimref.config.base import DataConfig, ReadingConfig
from mimref.encoders.backbones import TokenEncoder
from mimref.encoders.checkpoints import Checkpoint, choose_architecture, encoder_from, read_checkpoint
from mimref.encoders.classifier import ClassifierRecord, classifier_of
from mimref.encoders.export import comparison_images, largest_difference, named_features, read_encoder
from mimref.encoders.timm_models import features_of_blocks
from mimref.encoders.vit import Encoder
from mimref.errors import ConfigError
from mimref.features.header import eval_transform
from mimref.files import atomic_folder, check_new_folder
from mimref.progress import Listener, Silent
from mimref.sharing.layout import CARD, CONFIG, PROCESSOR, WEIGHTS, Layout, Library, Subject
from mimref.sharing.record import last_part, shareable_data
from mimref.sharing.timm_layout import timm_layout
from mimref.sharing.transformers_layout import transformers_layout

OWN_FILES = (CARD, CONFIG, PROCESSOR, WEIGHTS)
Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class FolderExport:
    """A folder that reproduces the encoder's features when it is read."""

    path: Path
    model: str
    """Class of transformers, or name of a timm model."""
    read_with: str
    """A line of Python that reads the folder."""
    difference: float
    """Largest absolute difference of any feature or logit, in fp32."""
    read_by: list[str]
    """Programs whose features were compared."""


def read_subject(
    path: str | Path,
    reading: ReadingConfig | None = None,
    *,
    arch: str | None = None,
    source: str | None = None,
    resolution: int | None = None,
    listener: Listener | None = None,
) -> tuple[Subject, Checkpoint]:
    """Read a checkpoint's encoder, classifier and transform for `folder_layout`; arguments as in `read_encoder`.

    The record of its training images omits everything that names a place on this machine.
    """
    encoder, facts, checkpoint = read_encoder(
        path, reading, arch=arch, source=source, resolution=resolution, listener=listener
    )
    transform = eval_transform(encoder.architecture, DataConfig(), checkpoint.header, resolution=resolution)
    facts = {key: last_part(value) for key, value in facts.items() if key not in ("data", "transform")}
    if data := shareable_data(checkpoint.header.get("data")):
        facts["data"] = data
    found = classifier_of(checkpoint, encoder) if isinstance(encoder, Encoder) else None
    classifier, classes = found or (None, [])
    return Subject(encoder, transform, facts, classifier, classes), checkpoint


def folder_layout(subject: Subject, library: Library | None, listener: Listener | None = None) -> Layout:
    """Lay out the files of a folder for one library; None: transformers, or timm if transformers has no such model.

    Raises ConfigError, naming an alternative, if the library has no such model.
    """
    rgb = subject.for_rgb()
    if library == "timm":
        return timm_layout(rgb)
    try:
        return transformers_layout(rgb)
    except ConfigError as refused:
        if library is not None:
            raise
        layout = timm_layout(rgb)
        reason = str(refused).partition("; use")[0]
        (listener or Silent()).note(f"{reason}: written as a timm model, which transformers also loads")
        return layout


def export_folder(
    subject: Subject, layout: Layout, card: str, out: Path, *, force: bool = False, listener: Listener | None = None
) -> FolderExport:
    """Write the files of a layout and a card, README.md, if the model read from them reproduces the subject's features.

    Features of every block, or logits and features, are compared as read by mimref and by the layout's library; by
    transformers only if it is installed. Raises OutputError for a folder that holds other files, exists (unless
    `force`) or cannot be written, and for features that differ.
    """
    listener = listener or Silent()
    check_new_folder(out, OWN_FILES, force)
    listener.note(f"writing {out}, reading it again and comparing outputs")
    images = comparison_images(subject.for_rgb().encoder)
    read_by, difference = ["mimref"], 0.0
    readers = [_read_by_mimref]
    if layout.library == "timm":
        readers.append(partial(_read_by_timm, normed=isinstance(subject.encoder, Encoder)))
        read_by.append("timm")
    elif find_spec("transformers") is None:
        listener.note(
            "transformers is not installed: the folder was compared as read by mimref only; pip install transformers"
        )
    else:
        readers.append(partial(_read_by_transformers, layout=layout))
        read_by.append("transformers")
    with atomic_folder(out) as folder:
        for name, content in layout.files().items():
            (folder / name).write_bytes(content)
        (folder / CARD).write_text(card, encoding="utf-8")
        for read in readers:
            found = read(folder, images)
            difference = max(difference, largest_difference(out, lambda _: subject_outputs(subject, images), found))
    return FolderExport(out, layout.model, _reading_line(out, layout), difference, read_by)


def _reading_line(out: Path, layout: Layout) -> str:
    if layout.library == "timm":
        return f"timm.create_model({f'local-dir:{out}'!r}, pretrained=True)"
    auto = "AutoModelForImageClassification" if "id2label" in layout.config else "AutoModel"
    return f"transformers.{auto}.from_pretrained({str(out)!r})"


@torch.inference_mode()
def subject_outputs(subject: Subject, images: Tensor) -> Outputs:
    """Return the tokens of every block and after the final norm, and logits, for images (B, 3, S, S)."""
    found = encoder_outputs(subject.encoder, images)
    if subject.classifier is not None:
        found |= {"logits": subject.classifier.eval()(images)}
    return found


@torch.inference_mode()
def encoder_outputs(encoder: TokenEncoder, images: Tensor) -> dict[str, Tensor]:
    """Return tokens (B, L, D) of every block as `block_N`; of a plain ViT also those after the final norm, as `normed`.

    Other encoders have their norm elsewhere, and none in the features of blocks.
    """
    every = list(range(1, encoder.depth + 1))
    if not isinstance(encoder, Encoder):
        tokens = encoder.eval().blocks(images, every)
        return {f"block_{number}": tokens_BLD for number, tokens_BLD in zip(every, tokens, strict=True)}
    normed_flags = [*(False for _ in every), True]
    *tokens, normed = encoder.eval().blocks(images, [*every, encoder.depth], final_norm=normed_flags)
    return named_features(tokens, every, normed)


@torch.inference_mode()
def _read_by_mimref(folder: Path, images: Tensor) -> Outputs:
    checkpoint = read_checkpoint(folder)
    encoder = encoder_from(checkpoint, choose_architecture(checkpoint))
    found = encoder_outputs(encoder, images)
    if not isinstance(encoder, Encoder):
        return found
    if ClassifierRecord.of(checkpoint) is not None and (read := classifier_of(checkpoint, encoder)):
        found["logits"] = read[0](images)
        del found["normed"]  # the classifier's norm may replace the encoder's
    return found


@torch.inference_mode()
def _read_by_timm(folder: Path, images: Tensor, *, normed: bool) -> Outputs:
    """Read the folder as `timm.create_model("local-dir:FOLDER")` does, which timm supports from version 1.0.16.

    normed: also return the tokens after the final norm, unless there are logits.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    args, classes = config.get("model_args", {}), config["num_classes"]
    path = str(folder / WEIGHTS)
    model: Any = timm.create_model(config["architecture"], checkpoint_path=path, num_classes=classes, **args)
    found = features_of_blocks(model, images)
    if classes:
        return found | {"logits": model(images)}
    return found | ({"normed": model.forward_features(images)} if normed else {})


@torch.inference_mode()
def _read_by_transformers(folder: Path, images: Tensor, *, layout: Layout) -> Outputs:
    import transformers  # optional, and slow

    has_classes = "id2label" in layout.config
    auto = transformers.AutoModelForImageClassification if has_classes else transformers.AutoModel
    with _quiet(transformers), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, loading = auto.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        if missing := loading["missing_keys"]:
            raise ConfigError(f"--layout transformers: its {layout.model} also needs {sorted(missing)[0]}")
        output = model.eval()(images, output_hidden_states=True)
    found = {f"block_{number}": tokens_BLD for number, tokens_BLD in enumerate(output.hidden_states[1:], start=1)}
    return found | ({"logits": output.logits} if has_classes else {"normed": output.last_hidden_state})


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence the progress bars and warnings of transformers."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
