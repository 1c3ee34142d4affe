"""The two views of an image that measures compare: the global ones of refinement, as they suit the images."""

from mimref.config.run import ViewsConfig
from mimref.data.sample import look_at
from mimref.data.sources import ImageSource
from mimref.data.views import check_colors

# Pixels per side; blur of BYOL's width destroys smaller views.
LEAST_BLURRED = 64


def fitting_views(views: ViewsConfig, source: ImageSource, image_size: int) -> tuple[ViewsConfig, list[str]]:
    """The settings, with `color` off for gray images and `blur` off for small views unless they are set, and notes."""
    changes: dict[str, bool] = {}
    notes = []
    if views.color and "color" not in views.model_fields_set and look_at(source).gray:
        changes["color"] = False
        kept = "the two views keep their colours"
        if source.channels == 3:
            notes.append(f"the images are gray: {kept} (--set views.color=true changes them)")
        else:
            notes.append(f"images of {source.channels} channel{'s' * (source.channels > 1)} are not in colour: {kept}")
    side = views.global_size or image_size
    if views.blur and "blur" not in views.model_fields_set and side < LEAST_BLURRED:
        changes["blur"] = False
        notes.append(f"the two views have {side} pixels and are not blurred (--set views.blur=true blurs them)")
    fitting = views.model_copy(update=changes)
    check_colors(fitting, source.channels)
    return fitting, notes
