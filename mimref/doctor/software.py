"""Check the versions of Python and the packages, the extras, and whether torch.compile finds what it needs."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement

from mimref import __version__
from mimref.doctor.checks import Check

SHOWN = ("torch", "torchvision", "timm", "numpy", "scikit-learn")
"""Packages with a line of their own; the others share one."""
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
"""Range of tested versions."""
EXTRAS = {
    "bands": "compressed TIFF files of many channels",
    "corruptions": "the corrupted images of `mimref robustness`",
    "hf": "images of the Hugging Face hub, `--data hf:NAME`",
    "lance": "tables in Lance format",
    "onnx": "`mimref export --to onnx`",
    "remote": "images on servers, by http",
    "tensorboard": "curves in TensorBoard",
    "wandb": "curves in Weights & Biases",
}
"""Purpose of each extra."""
_FOR_DEVELOPERS = ("test", "dev", "docs")
_COMPILE_S = 60


def version_checks() -> Iterator[Check]:
    """Check the versions of Python and mimref."""
    version = python_version()
    if version < OLDEST_PYTHON:
        yield Check("Python", platform.python_version(), "problem", "mimref needs Python 3.11 or newer")
    elif version > NEWEST_PYTHON:
        yield Check("Python", platform.python_version(), "advice", "mimref is tested with Python 3.11 to 3.13")
    else:
        yield Check("Python", platform.python_version())
    yield Check("mimref", __version__)


def python_version() -> tuple[int, int]:
    """Return the major and minor version of Python."""
    return sys.version_info[:2]


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(extra: str = "") -> list[Requirement]:
    """Return the requirements of mimref on this Python, or those that one of its extras adds."""
    listed = map(Requirement, importlib.metadata.requires("mimref") or ())
    if not extra:
        return [each for each in listed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [
        each
        for each in listed
        if each.marker is not None
        and each.marker.evaluate({"extra": extra})
        and not each.marker.evaluate({"extra": ""})
    ]


def extras() -> list[str]:
    """Return the extras of the installed package that are meant for users."""
    known = importlib.metadata.metadata("mimref").get_all("Provides-Extra") or []
    return sorted(set(known) - set(_FOR_DEVELOPERS))


def package_checks() -> Iterator[Check]:
    """Check the required packages: the versions of some, and whether all others are installed."""
    wanted = {each.name: each for each in requirements()}
    faults: list[str] = []
    for name, requirement in wanted.items():
        version = installed(name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        todo = "" if fits else f"pip install '{name}{requirement.specifier}'"
        if name in SHOWN:
            yield Check(name, version or "missing", "ok" if fits else "problem", todo)
        elif not fits:
            faults.append(f"{name}{requirement.specifier}")
    if faults:
        quoted = " ".join(f"'{fault}'" for fault in faults)
        yield Check("other packages", f"missing or of another version: {', '.join(faults)}", "problem",
                    f"pip install {quoted}")  # fmt: skip
    else:
        yield Check("other packages", f"{len(wanted) - len(SHOWN)} as needed")
    if "cyanure" not in wanted and installed("cyanure") is None:
        yield Check("cyanure", "missing", "advice", "`mimref lowshot` needs it; for this Python it is built by hand")


def extra_checks() -> Iterator[Check]:
    """Report which extras are installed, and what each is for."""
    for extra in extras():
        wanted = requirements(extra)
        found = {each.name: installed(each.name) for each in wanted}
        old = [
            f"{each.name} {found[each.name]}"
            for each in wanted
            if (version := found[each.name]) is not None and not each.specifier.contains(version, prereleases=True)
        ]
        purpose, install = EXTRAS.get(extra, ""), f"pip install 'mimref[{extra}]'"
        name = f"extra {extra}"
        if old:
            yield Check(name, f"does not fit: {', '.join(old)}", "advice", f"{install}; for {purpose}")
        elif all(version is not None for version in found.values()):
            yield Check(name, ", ".join(f"{package} {version}" for package, version in found.items()), todo=purpose)
        else:
            yield Check(name, "not installed", todo=f"only for {purpose}: {install}" if purpose else install)


# --- torch.compile


def compile_check() -> Iterator[Check]:
    """Check whether torch.compile finds a compiler, Python's headers and, on CUDA, Triton; compiling takes a minute."""
    where, error = compiler(), ""
    if where is not None:
        error = build_error(where)
    if where is None:
        yield Check("torch.compile", "no C++ compiler", "advice",
                    "compile=true is ignored; install g++ or clang++, or name one in CXX")  # fmt: skip
    elif error:
        yield Check("torch.compile", f"{where} cannot build an extension: {error}", "advice",
                    "compile=true is ignored; install Python's headers, such as python3-dev")  # fmt: skip
    elif on_cuda() and not has_triton():
        yield Check("torch.compile", "no Triton", "advice", "compile=true is ignored; pip install triton")
    else:
        yield Check("torch.compile", f"{where} and Python's headers found")


def compiler() -> str | None:
    """Return the C++ compiler that torch would use."""
    named = os.environ.get("CXX")
    return next((found for name in (named, "g++", "clang++") if name and (found := shutil.which(name))), None)


def build_error(compiler: str) -> str:
    """Return the compiler's error for a file that includes Python's headers; empty if it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "extension.cpp")
        source.write_text("#include <Python.h>\nint answer() { return 42; }\n")
        command = [compiler, "-c", "-fPIC", f"-I{sysconfig.get_path('include')}", str(source), "-o", f"{source}.o"]
        try:
            built = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    lines = [line for line in built.stderr.splitlines() if "error" in line] or [f"exit code {built.returncode}"]
    return lines[0].strip() if built.returncode else ""


def on_cuda() -> bool:
    """Return whether runs use a GPU, for which torch.compile needs Triton."""
    return torch.cuda.is_available()


def has_triton() -> bool:
    """Return whether Triton, which generates GPU code, can be imported."""
    return find_spec("triton") is not None
