"""What is set once for a process before jax compiles anything: precision, devices, memory, the compilation cache."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Literal, get_args

import jax
import numpy as np

from almlip_jax.errors import InputError

Precision = Literal["float32", "float64"]

_KEPT = 1 << 30  # bytes
_DEVICE_FLAG = "xla_force_host_platform_device_count"
_MOST_DEVICES = 16  # committees of more members are rare
_cores_are_devices = False
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
_written_for: ContextVar[str | None] = ContextVar("written_for", default=None)


def backend() -> str:
    """What programs are written for, ``cpu``, ``gpu`` or ``tpu``: what they will run on, or what `written_for` says."""
    return _written_for.get() or jax.default_backend()


@contextmanager
def written_for(kind: str) -> Iterator[None]:
    """Programs that are traced inside are written for another kind of device: ``cpu``, ``gpu`` or ``tpu``."""
    token = _written_for.set(kind)
    try:
        yield
    finally:
        _written_for.reset(token)


def cache_directory() -> Path:
    """Where compiled programs are kept: ``ALMLIP_CACHE_DIR``, or ``almlip-jax`` in the user's cache folder."""
    named = os.environ.get("ALMLIP_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "almlip-jax"


def prepare_jax(precision: Precision = "float32") -> None:
    """Sets the precision, makes devices of the cores, has memory reused, and turns on the compilation cache.

    Devices and cache are left as they are where the user chose them by jax's own means (``JAX_NUM_CPU_DEVICES`` or
    ``XLA_FLAGS``; ``JAX_COMPILATION_CACHE_DIR``).

    A CPU runs programs of one device in the thread that calls them, if this comes before the first of them: only there
    are blocks of any size reused.  A cache folder that cannot be written does not stop the run: programs are then
    compiled anew by each process.

    Raises:
        InputError: the precision is not one of the two.
    """
    check_name(precision)
    jax.config.update("jax_enable_x64", precision == "float64")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    use_cores()
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


def check_precision(precision: str) -> None:
    """Refuses a precision in which this process does not compute.

    Raises:
        InputError: says what to call first, or that there is none of that name.
    """
    check_name(precision)
    if precision == "float64" and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise InputError('precision is float64, but jax computes in float32 here; call prepare_jax("float64") first.')


def check_name(precision: str) -> None:
    """Refuses a precision that there is none of, which would be taken for single precision.

    Raises:
        InputError: it is another than ``float32`` and ``float64``.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision is 'float32' or 'float64', not {precision!r}.")


def use_cores() -> None:
    """Makes each core that the process may use a device of its own, over which members are spread.

    One device divides every operation among all cores, which for small structures costs more than it gains; devices of
    one core each divide the members, and meet once in a step.
    """
    global _cores_are_devices
    chosen = jax.config.values.get("jax_num_cpu_devices", -1) >= 0 or _DEVICE_FLAG in os.environ.get("XLA_FLAGS", "")
    if chosen:
        return
    with suppress(RuntimeError):  # jax has begun to work, with the devices that it has
        jax.config.update("jax_num_cpu_devices", min(_cores(), _MOST_DEVICES))
        _cores_are_devices = True


def cores_are_devices() -> bool:
    """Whether devices are cores that `use_cores` made to such, which other programs may be using too."""
    return _cores_are_devices and jax.default_backend() == "cpu"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reuse_memory() -> None:
    """Has the C library keep blocks of up to 1 GiB that the process frees, for its next requests.

    glibc returns blocks above 32 MiB to the system at once.  A program that is called again and again and needs more
    than that for its intermediate arrays, as an evaluation of some 500 atoms does, then waits in every call until the
    system has filled new pages with zeros, for as long as it computes.  Blocks above 64 MiB are kept in the main
    thread only: others have arenas of their own, which hold no such blocks.  One arena for all would hold them, but
    compilations leave so many fragments there that steps of dynamics, whose operations each make small requests, took
    up to 1.75 times as long.  Other libraries are left as they are, and so is one that the user has tuned through the
    environment.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or platform.libc_ver()[0] != "glibc":
        return
    library = ctypes.CDLL(None)
    for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        library.mallopt(parameter, _KEPT)
