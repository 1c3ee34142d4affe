"""The architecture of an encoder to train, from its settings and its weights."""

from dataclasses import replace

from mimref.config.run import EncoderConfig
from mimref.encoders.backbones import BackboneArchitecture, EncoderArchitecture, at_size, find_architecture, is_backbone
from mimref.encoders.channels import for_images
from mimref.encoders.checkpoints import Checkpoint, with_file_values
from mimref.encoders.likely_models import unrecognised
from mimref.encoders.published import official_name
from mimref.encoders.vit import PAPER_SIZES, Architecture, with_fixed_positions


def weights_name(config: EncoderConfig) -> str:
    """Return the weights to start from: those that are set, otherwise the published ones of `arch` and `source`."""
    return config.weights or official_name(config.arch, config.source or "mae")


def architecture_to_train(config: EncoderConfig, checkpoint: Checkpoint) -> EncoderArchitecture:
    """Return the weights' architecture at the settings' image size, or the settings' own if the weights name none.

    Unlike an evaluation's `--arch`, settings that contradict the weights are ignored: presets work with any weights.
    """
    recorded, asked = checkpoint.architecture, config.model_fields_set
    is_backbone(config.arch)  # an unknown name is an error, whatever the weights are
    # Without advice, no architecture helps: several encoders and no choice, or only a part of the weights.
    if recorded is None and not ("arch" in asked and checkpoint.advice):
        raise unrecognised(checkpoint.path, checkpoint.problem, checkpoint.advice, checkpoint.named)
    if recorded is None or _is_timm(config, checkpoint):
        if is_backbone(config.arch):
            found = for_images(find_architecture(config.arch, None, None), checkpoint.channels_as(config.arch))
            assert isinstance(found, BackboneArchitecture)
            found = at_size(found, config.image_size, "encoder.image_size") if "image_size" in asked else found
            found.check_size(found.image_size, "encoder.image_size")  # a model without intermediate features fails here
            return found
        tensors = checkpoint.recognised.tensors if checkpoint.recognised else checkpoint.tensors
        return with_file_values(with_fixed_positions(Architecture.from_config(config), tensors), checkpoint)
    # A preset's image size belongs to the preset's architecture.
    if "image_size" in asked and ("arch" not in asked or config.arch == recorded.name):
        if isinstance(recorded, BackboneArchitecture):
            return at_size(recorded, config.image_size, "encoder.image_size")
        return replace(recorded, image_size=config.image_size)
    return recorded


def _is_timm(config: EncoderConfig, checkpoint: Checkpoint) -> bool:
    """Return whether weights without a header are read as the timm model that the settings name.

    False if they are recognised as that model: a resumed run names it too, and the weights may have their own sizes.
    """
    recognised = checkpoint.recognised
    if recognised is None or recognised.architecture.name == config.arch:
        return False
    return "arch" in config.model_fields_set and config.arch not in (*PAPER_SIZES, "custom")


def named_architecture(config: EncoderConfig) -> EncoderArchitecture:
    """Return the architecture that the settings name, without reading any weights."""
    if is_backbone(config.arch):
        return find_architecture(
            config.arch, None, config.image_size if "image_size" in config.model_fields_set else None
        )
    return Architecture.from_config(config)


def ignored_settings(config: EncoderConfig, checkpoint: Checkpoint) -> list[str]:
    """Return warnings about settings that the weights contradict."""
    recorded, path, warnings = checkpoint.architecture, checkpoint.path, list[str]()
    if recorded is None or _is_timm(config, checkpoint):
        return warnings
    if "arch" in config.model_fields_set and config.arch not in (recorded.name, "custom"):
        warnings.append(
            f"encoder.arch {config.arch} is ignored: {path} holds {recorded.name} with {recorded.depth} blocks of "
            f"width {recorded.width} for images of {recorded.image_size} pixels"
        )
    if config.source and checkpoint.recognised and checkpoint.source not in (None, config.source):
        warnings.append(f"encoder.source {config.source} is ignored: {path} is of {checkpoint.source}")
    return warnings


def resolved_settings(
    config: EncoderConfig, checkpoint: Checkpoint, architecture: EncoderArchitecture
) -> EncoderConfig:
    """Return settings that describe the encoder as it is, for config.toml."""
    custom, sizes = architecture.name == "custom", ["width", "depth", "patch_size"]
    if isinstance(architecture, Architecture):  # others keep the user's value: their weights are read again
        sizes.append("num_heads")
    return config.model_copy(
        update={
            "arch": architecture.name,
            "source": checkpoint.source or config.source,
            "image_size": architecture.image_size,
            **{name: getattr(architecture, name) if custom else None for name in sizes},
        }
    )
