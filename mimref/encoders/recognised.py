"""A foreign checkpoint's encoder, as recognised by its tensors' names and shapes."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from mimref.encoders.backbones import EncoderArchitecture
from mimref.encoders.grids import Grid
from mimref.encoders.vit import Architecture


@dataclass(frozen=True)
class Recognised:
    """A foreign checkpoint in the internal form."""

    format: str
    """For display, such as `data2vec 2.0`."""
    source: str | None
    """Pre-training method, as `--source` names it; None if several methods share the layout."""
    architecture: EncoderArchitecture
    tensors: dict[str, Tensor]
    """Under timm's names; tensors that did not change share the file's memory."""
    origins: dict[str, list[str]]
    """From timm's name to the file's names."""
    dropped: dict[str, list[str]]
    """From group to the file's names."""
    notices: list[str]
    """What was left out, assumed or changed."""
    selection_notices: list[str]
    """Those `notices` that report which encoder was chosen and what was left out."""
    prefix: str
    """Prefix of the encoder's names in the file, which may hold other networks as well."""
    others: list[str]
    """Prefixes of the file's other encoders."""
    grid: Grid
    """Rows and columns of patches that the file has positions for."""
    guesses_interpolation: bool
    """Whether the rule that interpolates positions is a guess: families with different rules share the layout."""
    normalisation: dict[str, list[float]] = field(default_factory=dict)
    """Mean and deviation of every channel, if the family's are known and are not ImageNet's."""

    def is_of(self, architecture: EncoderArchitecture) -> bool:
        """Return whether these are weights of this timm model, for images of any size and number of channels."""
        own = self.architecture
        if isinstance(own, Architecture) or isinstance(architecture, Architecture):
            return False
        return replace(own, image_size=architecture.image_size, channels=architecture.channels) == architecture
