"""Rendering of pages from templates: names given by users stay plain text, and pages load nothing."""

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mimref.data.decode import printable


def page_environment() -> Environment:
    """Return the environment of the templates in this folder; all values are escaped."""
    environment = Environment(
        loader=PackageLoader("mimref.reports.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Put names given by users on one line, without characters that could reverse the text direction.
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["base64"] = base64_text
    return environment


def base64_text(content: bytes) -> str:
    """Encode bytes in base64, as data addresses of images need it."""
    return base64.b64encode(content).decode("ascii")
