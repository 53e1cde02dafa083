"""Memory of large tensors on a CPU: kept when it is freed, for the next ones."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h. Blocks come from the heap alone, and its end is never given back.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees; whether the C library, glibc, can do that.

    Left to itself it maps every block of 32 MB or more anew, and the system zeroes it page by page, in every training
    step of a few thousand tokens on a CPU. What a process then holds is the most that it ever needed; so this is for
    commands that train, not for libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_M_MMAP_MAX, 0)) and bool(library.mallopt(_M_TRIM_THRESHOLD, -1))
