"""The two views of an image that measures compare: the global views of refinement, adapted to the images."""

from mimref.config.run import ViewsConfig
from mimref.data.sample import look_at
from mimref.data.sources import ImageSource
from mimref.data.views import check_colors

# Pixels per side; a blur of BYOL's width destroys smaller views.
LEAST_BLURRED = 64


def fitting_views(views: ViewsConfig, source: ImageSource, image_size: int) -> tuple[ViewsConfig, list[str]]:
    """Return the settings and notes; unless set, `color` is off for gray images, and `blur` is off for small views."""
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
