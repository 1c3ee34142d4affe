"""The two views of an image that measures compare: the global ones of refinement, as they suit the images."""

import numpy as np

from mimref.config.run import ViewsConfig
from mimref.data.decode import BadImage
from mimref.data.sources import ImageSource

# Blur of BYOL's width destroys smaller images.
LEAST_BLURRED = 64
_LOOKED_AT = 32


def fitting_views(views: ViewsConfig, source: ImageSource, image_size: int) -> tuple[ViewsConfig, list[str]]:
    """The settings, with `color` off for gray images and `blur` off for small ones, unless they are set; with notes."""
    changes: dict[str, bool] = {}
    notes = []
    if views.color and "color" not in views.model_fields_set and _is_gray(source):
        changes["color"] = False
        notes.append("the images are gray: the two views keep their colours (--set views.color=true changes them)")
    side = views.global_size or image_size
    if views.blur and "blur" not in views.model_fields_set and side < LEAST_BLURRED:
        changes["blur"] = False
        notes.append(f"the images have {side} pixels: the two views are not blurred (--set views.blur=true blurs them)")
    return views.model_copy(update=changes), notes


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
