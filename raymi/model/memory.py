"""Memory in use and memory left, in bytes, of this process and of the device it computes on."""

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Snapshot(NamedTuple):
    """Bytes. `vram` is what torch holds on the device; None where there is no device memory apart from RAM."""

    ram: int
    vram: int | None


def snapshot(device: torch.device) -> Snapshot:
    vram = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    return Snapshot(_status("VmRSS") or peak_ram(), vram)


def peak_ram() -> int:
    """Largest resident size this process ever had."""
    if (high_water := _status("VmHWM")) is not None:
        return high_water  # getrusage counts what the parent had at the fork, too
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available(device: torch.device) -> int:
    """What can still be allocated: free device memory, or RAM within the limits of this container."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_system_ram(), _cgroup_ram())


def _system_ram() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # No such file on macOS: half of what is installed is a safe guess.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_ram() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return sys.maxsize if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return sys.maxsize


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


_OUT_OF_MEMORY = ("can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def keep_what_is_freed() -> None:
    """Let this process keep up to 1 GiB of freed memory for its next tensors.

    glibc gives large blocks back to the system as soon as they are freed, and the next tensor of that size then costs
    a page fault for every 4 kB: half of the time of attention over a prompt of a thousand tokens.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    if mallopt := _of_libc("mallopt"):
        mallopt(mmap_threshold, 32 * 2**20)  # the largest that glibc takes
        mallopt(trim_threshold, 2**30)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in RAM: not all of torch has a class for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def give_back() -> None:
    """Return what is free to the system, where the C library knows how: a load frees as much as it keeps."""
    if trim := _of_libc("malloc_trim"):
        trim(0)


def empty_cache(device: torch.device) -> None:
    """Return what torch keeps of a GPU's memory for later: it may be in pieces that are too small."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _of_libc(name: str) -> Any:
    """A function of glibc's own; None where there is none, as with other C libraries."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
