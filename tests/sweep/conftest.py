"""What the tests of sweeps share: one sweep that nobody interrupts, and what it compiled."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Tests import `tiny_sweep`, whatever way pytest imports the tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sweeps of a module take compiled programs from a cache of their own."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def study(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The whole sweep: folder of its files, its own folder, result, and stages with what each compiled."""
    from tiny_sweep import Watching, sweep, write_sets

    folder = tmp_path_factory.mktemp("sweep")
    write_sets(folder)
    compiled: list[str] = []

    def listen(event: str, _seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    watching = Watching(compiled)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        result = sweep(folder, folder / "out", progress=watching)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return SimpleNamespace(folder=folder, out=folder / "out", result=result, stages=watching.stages)
