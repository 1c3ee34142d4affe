"""All checks of this machine, in order."""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from mimref.doctor import machine
from mimref.doctor.accelerator import accelerator_checks
from mimref.doctor.checks import Check, attempt
from mimref.doctor.rates import rate_checks
from mimref.doctor.software import compile_check, extra_checks, package_checks, version_checks
from mimref.files import cache_folder
from mimref.progress import Progress

# Folder of cached features and weights, of temporary files, and of runs by default; and how to use another one.
DISKS: Mapping[str, tuple[Callable[[], Path], str]] = {
    "disk of the cache": (cache_folder, "set MIMREF_CACHE to another folder"),
    "disk of temporary files": (lambda: Path(tempfile.gettempdir()), "set TMPDIR to another folder"),
    "disk of this folder": (Path.cwd, "name another one with --out"),
}


def _disk(name: str) -> list[Check]:
    folder, other = DISKS[name]
    return [machine.disk_check(name, folder(), other)]


GROUPS: Mapping[str, Callable[[], Iterable[Check]]] = {
    "versions": version_checks,
    "packages": package_checks,
    "extras": extra_checks,
    "device": accelerator_checks,
    "cores": lambda: [machine.cores_check()],
    "shared memory": lambda: [machine.shared_memory_check()],
    "open files": lambda: [machine.open_files_check()],
    **{name: partial(_disk, name) for name in DISKS},
    "torch.compile": compile_check,
    "rates": rate_checks,
}


def diagnose(progress: Progress | None = None) -> list[Check]:
    """Run all checks. Takes seconds, does not stop at anything missing or broken, and changes nothing."""
    found: list[Check] = []
    for done, (name, check) in enumerate(GROUPS.items(), start=1):
        found += attempt(name, check)
        if progress is not None:
            progress(done, len(GROUPS))
    return found
