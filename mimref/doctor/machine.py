"""Cores, shared memory, open files and disks."""

import os
import resource
import shutil
from pathlib import Path

import torch

from mimref.devices import own_cores
from mimref.doctor.checks import Check, gib
from mimref.errors import OutputError
from mimref.files import check_writable

NCCL_SHARED_BYTES = 2**30
"""NVIDIA's containers are started with this much (`--shm-size=1g`)."""
NCCL_LEAST_BYTES = 32 * 2**20
"""NCCL maps up to about 10 MB for each pair of GPUs that cannot read each other's memory; with less, it stops."""
FILES_USUAL = 1024
"""Default limit of open files on Linux."""
_FILES_OF_A_PROCESS, _FILES_OF_A_WORKER = 128, 8
"""For libraries, weights and states, and for the pipes to a loader process."""
DISK_LEAST_BYTES = 2**30
DISK_USUAL_BYTES = 20 * 2**30
"""A state of ViT-L/16 takes at most 7.2 GiB (`mimref benchmark cost --preset mae_l16`), and a new one is written while
the previous one still exists."""
SHARED_MEMORY = Path("/dev/shm")


def all_cores() -> int:
    """Return the number of cores of the machine."""
    return os.cpu_count() or 1


def threads() -> int:
    """Return torch's number of threads for one operation."""
    return torch.get_num_threads()


def gpus() -> int:
    """Return the number of GPUs that torch can use."""
    return torch.cuda.device_count()


def load() -> float:
    """Return the mean number of processes that compute or wait for a disk, over the last minute."""
    return os.getloadavg()[0]


def shared_memory() -> tuple[int, int] | None:
    """Return the free and total bytes of /dev/shm; None if it does not exist."""
    if not SHARED_MEMORY.is_dir():
        return None
    usage = shutil.disk_usage(SHARED_MEMORY)
    return usage.free, usage.total


def open_files() -> int:
    """Return how many files this process may open; 2**31 if there is no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else soft


def disk_free(folder: Path) -> int:
    """Return the bytes free where a folder is or would be made. Raises OutputError if it cannot be written."""
    check_writable(folder)
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    return shutil.disk_usage(existing).free


def cores_check() -> Check:
    """Compare the cores with torch's threads."""
    own, used, there = own_cores(), threads(), all_cores()
    value = f"{own} of {there}, torch uses {used} thread{'s' * (used > 1)}"
    if used > own:
        todo = f"threads wait for each other: set OMP_NUM_THREADS={own}, or give the job more cores"
        # With a CPU quota, threads that wait for each other make every operation several times slower.
        return Check("cores", value, "problem" if used >= 4 * own else "advice", todo)
    if used < own and not gpus():
        todo = f"on the CPU torch leaves cores idle; OMP_NUM_THREADS={own} uses them"
        return Check("cores", value, "advice", todo)
    if (busy := load()) > own:
        return Check("cores", f"{value}, load {busy:.1f}", "advice", "other processes compute: times will be longer")
    return Check("cores", value)


def shared_memory_check() -> Check:
    """Check shared memory: NCCL needs it between several GPUs; loader processes do not, as they use pipes."""
    found = shared_memory()
    if found is None:
        return Check("shared memory", "no /dev/shm", todo="only NCCL needs it; loader processes use pipes")
    value, devices = f"{gib(found[0])} free of {gib(found[1])}", gpus()
    if devices > 1 and found[0] < NCCL_SHARED_BYTES:
        todo = "NCCL may not start; start the container with --shm-size 1g, or set NCCL_SHM_DISABLE=1"
        return Check("shared memory", value, "problem" if found[0] < NCCL_LEAST_BYTES * devices else "advice", todo)
    need = (
        f"NCCL: {gib(NCCL_SHARED_BYTES)} for several GPUs" if devices > 1 else "needed by NCCL with several GPUs only"
    )
    return Check("shared memory", value, todo=f"{need}; loader processes use pipes")


def open_files_check() -> Check:
    """Compare the limit of open files with the needs of loader processes, one per core."""
    limit, least = open_files(), _FILES_OF_A_PROCESS + _FILES_OF_A_WORKER * own_cores()
    value = "no limit" if limit >= 2**31 else f"{limit:,}"
    if limit < least:
        todo = f"{own_cores()} loader processes and the run need up to {least}: `ulimit -n {max(least, FILES_USUAL)}`"
        return Check("open files", value, "problem", todo)
    if limit < FILES_USUAL:
        return Check(
            "open files", value, "advice", f"enough for the run, not for many shards: `ulimit -n {FILES_USUAL}`"
        )
    return Check("open files", value)


def disk_check(name: str, folder: Path, other: str) -> Check:
    """Check the space in a folder. other: how to use another one."""
    try:
        free = disk_free(folder)
    except OutputError:
        return Check(name, f"{folder} cannot be written", "problem", other)
    value = f"{gib(free)} free in {folder}"
    if free < DISK_LEAST_BYTES:
        return Check(name, value, "problem", f"free some space, or {other}")
    if free < DISK_USUAL_BYTES:
        todo = f"the states of a ViT-L need {gib(DISK_USUAL_BYTES)}: free some space, or {other}"
        return Check(name, value, "advice", todo)
    return Check(name, value)
