"""What is set once for a process before jax compiles anything: the persistent compilation cache and the precision."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import jax

Precision = Literal["float32", "float64"]


def cache_directory() -> Path:
    """Where compiled programs are kept: ``ALMLIP_CACHE_DIR``, or ``almlip-jax`` in the user's cache folder."""
    named = os.environ.get("ALMLIP_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(base) if base else Path.home() / ".cache") / "almlip-jax"


def prepare_jax(precision: Precision = "float32") -> None:
    """Sets the precision and turns on the persistent compilation cache, unless the user chose one of jax's own.

    A cache folder that cannot be written is no reason to stop: programs are then compiled anew by each process.
    """
    jax.config.update("jax_enable_x64", precision == "float64")
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
