"""Fitting a file's tensors to the names and shapes of a timm model."""

import inspect
import sys
import warnings
from collections.abc import Mapping

import timm
from torch import Tensor, nn

# Parts of timm's checkpoints that do not belong to the encoder.
_DROPPED_PREFIXES = ("decoder_", "decoder.", "mask_token", "head.", "fc_norm.", "multi_scale_fusion_heads.")


def tensors_of_model(
    name: str, model: nn.Module, selected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], dropped: tuple[str, ...]
) -> Mapping[str, Tensor]:
    """Return the tensors unchanged if they fit, otherwise as renamed and interpolated by timm's filter for such files.

    selected: the file's tensors below one encoder's prefix. tensors: all of them. dropped: see `without_unneeded`.
    """
    wanted = model.state_dict()
    if _misfits(selected, wanted, dropped)[1:] == (0, 0):
        return selected
    filtered = [filter_names(name, given, model) for given in (selected, tensors)]
    candidates = [selected, *(each for each in filtered if each)]
    return min(candidates, key=lambda each: _misfits(each, wanted, dropped))


def _misfits(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dropped: tuple[str, ...]
) -> tuple[int, int, int]:
    """Return the number of names that differ, of names that are missing, and of tensors with another shape."""
    given = without_unneeded(tensors, wanted, dropped)
    common = given.keys() & wanted.keys()
    other_shapes = sum(given[key].shape != wanted[key].shape for key in common)
    return len(given.keys() ^ wanted.keys()), len(wanted.keys() - common), other_shapes


def without_unneeded(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dropped: tuple[str, ...]
) -> dict[str, Tensor]:
    """Drop tensors that no encoder needs, and those whose names begin with one of `dropped`.

    `wanted` ones stay: some models have a norm where others have a classifier.
    """
    prefixes = _DROPPED_PREFIXES + dropped
    return {key: tensors[key] for key in tensors if key in wanted or not key.startswith(prefixes)}


def filter_names(name: str, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """Return the tensors of a published file as timm's own code renames them for its model; None if it cannot.

    timm passes this function to the builder of each model; it is accessible only by its name in the model's module.
    """
    module = sys.modules[timm.model_entrypoint(name.partition(".")[0]).__module__]
    rename = getattr(module, "checkpoint_filter_fn", None) or getattr(module, "_filter_fn", None)
    if rename is None:
        return None
    try:
        given = dict(tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = rename(given, model) if len(inspect.signature(rename).parameters) > 1 else rename(given)
    except Exception:  # foreign names can cause any error
        return None
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}
