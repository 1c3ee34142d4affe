"""All checks of this machine, in order."""

from collections.abc import Callable, Iterable, Mapping

from mimref.doctor import machine
from mimref.doctor.accelerator import accelerator_checks
from mimref.doctor.checks import Check, attempt
from mimref.doctor.rates import rate_checks
from mimref.doctor.software import compile_check, extra_checks, package_checks, version_checks
from mimref.progress import Progress

GROUPS: Mapping[str, Callable[[], Iterable[Check]]] = {
    "versions": version_checks,
    "packages": package_checks,
    "extras": extra_checks,
    "device": accelerator_checks,
    "cores": lambda: [machine.cores_check()],
    "shared memory": lambda: [machine.shared_memory_check()],
    "open files": lambda: [machine.open_files_check()],
    "disk of the cache": lambda: [machine.cache_disk_check()],
    "disk of temporary files": lambda: [machine.temporary_disk_check()],
    "disk of this folder": lambda: [machine.current_disk_check()],
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
