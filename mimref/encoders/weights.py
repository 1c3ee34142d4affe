"""A weights file as it was read: its tensors, and what is known about them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimref.config.base import Interpolation
from mimref.encoders.backbones import BackboneArchitecture, EncoderArchitecture
from mimref.encoders.channels import ChannelRule, first_channels
from mimref.encoders.grids import Grid
from mimref.encoders.parameters import tensors_hash
from mimref.encoders.parts import (
    NoChoice,
    below,
    choice_notice,
    choose_part,
    group_beside,
    left_out_notice,
    matching_prefixes,
)
from mimref.encoders.recognised import Recognised
from mimref.encoders.vit import Architecture, build_encoder
from mimref.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """A file's weights under the file's names, and what is known about them."""

    path: Path
    tensors: dict[str, Tensor]
    """Tensors in the file's own types, mapped into memory where the format allows it."""
    header: dict[str, Any] = field(default_factory=dict)
    """Header of mimref's own files; for foreign ones empty, but for the mean and deviation in `transform` if they are
    known. There, `assumed` marks those that the publisher of such files uses."""
    architecture: EncoderArchitecture | None = None
    """Architecture from the header, or as recognised; None if unknown."""
    source: str | None = None
    """Pre-training method: of published weights by name, as recognised, or from the header; None if unknown."""
    licence: str | None = None
    """Licence of published weights by name, or from the header: a layout does not reveal who trained the weights."""
    recognised: Recognised | None = None
    """A foreign file's encoder in the internal form; None if it is not recognised."""
    problem: str = ""
    """Why a foreign file is not recognised."""
    advice: str = ""
    """What may help in that case, for commands with `--arch`."""
    ignored: list[str] = field(default_factory=list)
    """Notices of what was left out when the file was read."""
    named: dict[str, Tensor] = field(default_factory=dict)
    """All tensors of a foreign file, under their names without the parts that wrapping modules add."""
    part: str | None = None
    """Which encoder of the file was asked for."""
    grid: Grid | None = None
    """Patch grid asked for."""
    interpolation: Interpolation | None = None
    """Interpolation asked for instead of the format's; None means that of the architecture."""
    channel_rule: ChannelRule = field(default_factory=ChannelRule)
    """How the weights are adapted to images with another number of channels."""

    def channels_as(self, model: str) -> int:
        """Return the number of channels of the images that the weights are for, if they are timm's `model`."""
        if self.architecture is not None:
            return self.architecture.channels
        return first_channels(self.tensors, model)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tensors' names and bytes, independent of the file's name. Reads every tensor.

        If the file holds several encoders, averaged weights or a grid that is not square, it depends on the choice.
        """
        digest, found = tensors_hash(self.tensors), self.recognised
        own = set(map(id, self.tensors.values()))
        below = found.prefix if found else ""
        beside = {n: x for n, x in self.named.items() if id(x) not in own and n.startswith(below)}  # averaged weights
        chosen = [found.prefix] if found and found.others else []
        if self.part and found is None and "architecture" not in self.header:
            chosen = [self.part]
        chosen += [tensors_hash(beside)] if beside else []
        chosen += [f"{found.grid}"] if found and found.grid[0] != found.grid[1] else []
        return hashlib.sha256(" ".join((digest, *chosen)).encode()).hexdigest() if chosen else digest

    @property
    def guesses_interpolation(self) -> bool:
        """Whether nothing shows which of several families' rules interpolates the positions."""
        found = self.recognised
        return bool(found and found.guesses_interpolation and self.source is None and self.interpolation is None)

    def notices(self, architecture: EncoderArchitecture, sizes: Sequence[int] = ()) -> list[str]:
        """Return what was ignored, assumed or changed to read the file as this architecture, with the file's name.

        sizes: pixels of the images that the encoder will see.
        """
        if (channels := self.channels_as(architecture.name)) != architecture.channels:
            wanted = f"{architecture.channels} channel{'s' * (architecture.channels > 1)}"
            adapted = f"the patch embedding is made for {wanted}, not the {channels} of the weights"
            own = self.notices(replace(architecture, channels=channels), sizes)
            return [*own, f"{self.path}: {adapted} (encoder.channel_init {self.channel_rule.how})"]
        notices = self.unused_settings(architecture)
        if "architecture" in self.header:
            return [f"{self.path}: {notice}" for notice in notices]
        notices += self.ignored
        if self.recognised and self.recognised.is_of(architecture):
            notices += self.recognised.notices
        elif isinstance(architecture, BackboneArchitecture):
            with torch.device("meta"):
                model = architecture.build()
            notices += self.selection(model.state_dict())[1]
        elif self.recognised is None:
            with torch.device("meta"):
                encoder = build_encoder(architecture)
            notices += self.selection(encoder.vit.state_dict())[1]
        elif architecture.from_timm:
            notices += self.recognised.selection_notices
        else:
            notices += self.recognised.notices
            sizes = (architecture.image_size, *sizes)
            if self.guesses_interpolation and any(self.interpolates(architecture, size) for size in sizes):
                notices.append(
                    f"positions are interpolated as {architecture.interpolation} does, which the layout does not show; "
                    "set encoder.interpolation if that is wrong"
                )
        return [f"{self.path}: {notice}" for notice in notices]

    def unused_settings(self, architecture: EncoderArchitecture) -> list[str]:
        """Return notices of settings that have no effect on reading the file as this architecture."""
        found = self.recognised and self.recognised.architecture
        notices = []
        if self.interpolation is not None and isinstance(architecture, BackboneArchitecture):
            notices.append(f"encoder.interpolation has no effect on {architecture.name}")
        if self.grid is not None and not (isinstance(architecture, Architecture) and isinstance(found, Architecture)):
            notices.append(f"encoder.grid (--grid) has no effect on {architecture.name}")
        if self.part is not None and "architecture" in self.header:
            notices.append(f"contains one encoder; --encoder {self.part} has no effect")
        return notices

    def interpolates(self, architecture: Architecture, size: int) -> bool:
        """Return whether images of `size` pixels need other positions than those in the file."""
        if self.recognised and self.recognised.grid[0] != self.recognised.grid[1]:
            return True
        tensors = (self.recognised or self).tensors
        positions, registers = tensors.get("pos_embed"), tensors.get("reg_token")
        if positions is None:
            return True
        extra = 0 if registers is None else registers.shape[1]
        patches = (size // architecture.patch_size) ** 2
        # With or without rows for CLS and register tokens.
        return positions.ndim != 3 or positions.shape[1] - patches not in (0, 1, extra, 1 + extra)

    def selection(self, wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Return the tensors below the prefix where most names of a timm model are found, and notices of the others.

        Returns all tensors if there is no such prefix. Raises CheckpointError for several and no way to choose.
        """
        prefixes = matching_prefixes(self.named, wanted)
        if not prefixes:
            return self.tensors, []
        try:
            prefix = choose_part(self.named, prefixes, self.part)
        except NoChoice as reason:
            raise CheckpointError(f"{self.path}: {reason}") from None
        own = below(self.named, prefix, prefixes)
        outside = [name for name in self.named if not name.startswith(tuple(prefixes))]
        notices = choice_notice(prefix, prefixes, self.part) + left_out_notice(group_beside(outside, prefix))
        return {name[len(prefix) :]: self.named[name] for name in own}, notices
