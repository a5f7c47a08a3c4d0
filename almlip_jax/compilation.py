"""What is set once for a process before jax compiles anything: precision, the persistent compilation cache, memory."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Literal

import jax

Precision = Literal["float32", "float64"]

_KEPT = 1 << 30  # bytes
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # parameters of mallopt, from glibc's malloc.h


def cache_directory() -> Path:
    """Where compiled programs are kept: ``ALMLIP_CACHE_DIR``, or ``almlip-jax`` in the user's cache folder."""
    named = os.environ.get("ALMLIP_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "almlip-jax"


def prepare_jax(precision: Precision = "float32") -> None:
    """Sets the precision, has memory reused, and turns on the compilation cache unless the user chose one of jax's own.

    A cache folder that cannot be written is no reason to stop: programs are then compiled anew by each process.
    """
    jax.config.update("jax_enable_x64", precision == "float64")
    reuse_memory()
    if jax.config.values.get("jax_compilation_cache_dir") is not None:
        return
    try:
        folder = cache_directory() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home folder
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # the many small programs of a start take longer to compile than to read
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def reuse_memory() -> None:
    """Has the C library keep blocks of up to 1 GiB that the process frees, for its next requests.

    glibc returns blocks above 32 MiB to the system at once.  A program that is called again and again and needs more
    than that for its intermediate arrays, as an evaluation of some 500 atoms does, then waits in every call until the
    system has filled new pages with zeros, for as long as it computes.  All threads share one arena, as the others
    cannot hold blocks above 64 MiB.  Other libraries are left as they are, and so is one that the user has tuned
    through the environment.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    for parameter, value in ((_MMAP_THRESHOLD, _KEPT), (_TRIM_THRESHOLD, _KEPT), (_ARENA_MAX, 1)):
        library.mallopt(parameter, value)
