"""Shared by all tests: the CPU, no persistent cache, and a counter of compilations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# most of the time of a test is compiling, and small shapes gain nothing from the last optimisations
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import jax
import pytest


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


@pytest.fixture
def count_compilations() -> Callable[[], AbstractContextManager[list[str]]]:
    """``with count_compilations() as compiled:`` lists what the backend compiles in the block."""
    return _counting
