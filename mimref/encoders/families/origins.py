"""Where in a foreign file the tensors of a timm model come from, and how they are written back.

Shapes: K kernel size (rows = columns), I and O input and output channels.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mimref.encoders.parts import Unrecognised


@dataclass(frozen=True)
class Origin:
    """The tensors of a file that form one of timm's, and how they are converted."""

    names: tuple[str, ...]
    """Names of the file's tensors, which are joined along their first axis in this order."""
    third: int | None = None
    """Index of the third that is used, of a file's joint tensor for queries, keys and values."""
    axes: int | None = None
    """Number of axes in the file, if it has more or fewer axes of length 1."""
    sparse: bool = False
    """Whether this is a kernel of MinkowskiEngine: (K * K, I, O), or (K * K, O) if depthwise, columns first."""


Naming = Callable[[str], Origin]
"""Maps timm's name of a tensor to its origin."""


def naming_by(rules: Mapping[str, Origin | str]) -> Naming:
    """Return a naming by the first rule whose pattern matches timm's name; names that match none stay unchanged.

    The names of an origin are templates, expanded from the match; a string is an origin of one tensor.
    """
    origins = {pattern: Origin((rule,)) if isinstance(rule, str) else rule for pattern, rule in rules.items()}

    def naming(name: str) -> Origin:
        for pattern, origin in origins.items():
            if match := re.fullmatch(pattern, name):
                return replace(origin, names=tuple(match.expand(template) for template in origin.names))
        return Origin((name,))

    return naming


def read_tensor(origin: Origin, file: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """Read one of timm's tensors, in the file's memory if it is one of the file's. Raises Unrecognised.

    shape: the one that timm's model needs; a tensor of another shape is returned as it is, for the check of all shapes.
    """
    parts = [file[name] for name in origin.names]
    if any(part.layout is not torch.strided or part.is_meta for part in parts):
        raise Unrecognised(f"{origin.names[0]} is sparse or without data")
    widths = {part.shape[1:] for part in parts}
    if len(widths) > 1 or not parts[0].ndim:
        raise Unrecognised(f"{' and '.join(origin.names)} do not match")
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    if origin.third is not None and len(tensor) % 3 == 0:
        tensor = tensor.chunk(3)[origin.third]
    if origin.sparse:
        tensor = _dense_kernel(tensor, origin.names[0])
    if tensor.ndim == origin.axes and [each for each in tensor.shape if each > 1] == [
        each for each in shape if each > 1
    ]:
        tensor = tensor.reshape(shape)
    return tensor


def written_tensors(naming: Naming, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors under the names and in the shapes of a layout; the inverse of `read_tensor`.

    In a joint tensor of queries, keys and values, those that the model lacks are zero: no model here has key biases.
    """
    written: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        origin = naming(name)
        if origin.third is not None:
            thirds.setdefault(origin.names[0], {})[origin.third] = tensor
            continue
        if origin.sparse:
            tensor = _sparse_kernel(tensor)
        elif origin.axes is not None:
            tensor = _with_axes(tensor, origin.axes)
        written |= dict(zip(origin.names, tensor.chunk(len(origin.names)), strict=True))
    for name, parts in thirds.items():
        zero = torch.zeros_like(next(iter(parts.values())))
        written[name] = torch.cat([parts.get(number, zero) for number in range(3)])
    return written


def origin_names(naming: Naming, wanted: Iterable[str]) -> dict[str, list[str]]:
    """Map timm's names to those of the file."""
    return {name: list(naming(name).names) for name in wanted}


def _with_axes(tensor: Tensor, axes: int) -> Tensor:
    while tensor.ndim < axes:
        tensor = tensor[None]
    while tensor.ndim > axes:
        tensor = tensor[0] if len(tensor) == 1 else tensor[..., 0]
    return tensor


def _dense_kernel(kernel: Tensor, name: str) -> Tensor:
    if kernel.ndim not in (2, 3) or math.isqrt(kernel.shape[0]) ** 2 != kernel.shape[0]:
        raise Unrecognised(f"{name} has shape {tuple(kernel.shape)}, which is not a kernel of a sparse convolution")
    side = math.isqrt(kernel.shape[0])
    if kernel.ndim == 2:
        kernel = kernel[:, None]
    return kernel.permute(2, 1, 0).reshape(kernel.shape[2], kernel.shape[1], side, side).transpose(3, 2)


def _sparse_kernel(weight: Tensor) -> Tensor:
    flat = weight.transpose(3, 2).flatten(2).permute(2, 1, 0)
    return flat[:, 0] if flat.shape[1] == 1 else flat
