"""How pages are made of templates: whatever users have named stays text, and a page loads nothing."""

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mimref.data.decode import printable


def page_environment() -> Environment:
    """Of the templates in this folder; all values are escaped."""
    environment = Environment(
        loader=PackageLoader("mimref.reports.html"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever users have named: on one line, without characters that could turn a line around.
        finalize=lambda value: printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters["base64"] = base64_text
    return environment


def base64_text(content: bytes) -> str:
    """As addresses of images hold it."""
    return base64.b64encode(content).decode("ascii")
