"""Import of the package that fits low-shot classifiers, which pip cannot install everywhere."""

from typing import Any

from mimref.errors import ConfigError


def load_solver() -> type[Any]:
    """Return cyanure's `Classifier`, imported late because the other protocols do not need it.

    Raises ConfigError if it cannot be imported: on Python 3.13, cyanure has no wheel and must be built.
    """
    try:
        from cyanure.estimators import Classifier
    except ImportError as error:
        raise ConfigError(
            f"low-shot classification needs cyanure ({error}): use Python 3.11 or 3.12, where pip installs it with "
            "mimref, or build it with a C++ compiler and OpenBLAS (Debian: libopenblas-dev), by "
            "pip install setuptools && pip install --no-build-isolation cyanure"
        ) from error
    return Classifier  # type: ignore[no-any-return]
