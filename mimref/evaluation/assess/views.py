"""The two views of an image that measures compare: the global ones of refinement, as they suit the images."""

import numpy as np

from mimref.config.run import ViewsConfig
from mimref.data.decode import BadImage
from mimref.data.sources import ImageSource

# Blur of BYOL's width destroys smaller images.
LEAST_BLURRED = 64
_LOOKED_AT = 32


def fitting_views(views: ViewsConfig, source: ImageSource, image_size: int) -> ViewsConfig:
    """The settings with `color` and `blur`, where they are not set, on for colour images and for large ones."""
    fitting: dict[str, bool] = {}
    if views.color and "color" not in views.model_fields_set and _is_gray(source):
        fitting["color"] = False
    if views.blur and "blur" not in views.model_fields_set and (views.global_size or image_size) < LEAST_BLURRED:
        fitting["blur"] = False
    return views.model_copy(update=fitting)


def _is_gray(source: ImageSource) -> bool:
    """Whether the channels of some images, spread over the data set, are equal."""
    for index in np.linspace(0, len(source) - 1, min(_LOOKED_AT, len(source))).astype(int):
        try:
            image = source.read(int(index))
        except BadImage:
            continue
        if not bool((image == image[:1]).all()):
            return False
    return True
