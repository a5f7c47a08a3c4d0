"""Shared by all tests: the CPU, no persistent cache, and a counter of compilations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# most of the time of a test is compiling, and small shapes gain nothing from the last optimisations; two devices, as
# users have, whatever this machine is and whoever comes first
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=2")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@contextmanager
def _counting() -> Iterator[list[str]]:
    compiled: list[str] = []

    def listen(event: str, _seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def count_compilations() -> Callable[[], AbstractContextManager[list[str]]]:
    """``with count_compilations() as compiled:`` lists what the backend compiles in the block."""
    return _counting


@contextmanager
def _cache_at(folder: Path) -> Iterator[None]:
    wanted = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def compiled_in() -> Callable[[Path], AbstractContextManager[None]]:
    """``with compiled_in(folder):`` keeps compiled programs in a folder, and takes them from there."""
    return _cache_at
