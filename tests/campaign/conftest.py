"""What the tests of campaigns share: a compilation cache, and one campaign that nobody interrupts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests and the processes they start import `tiny_campaign`, whatever way pytest imports the tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the compilation cache that the campaigns of a test session share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compile_once(cache: Path, reference: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets this test take compiled programs from the cache of the session, and leaves out the reports."""
    monkeypatch.setattr("almlip_jax.campaign.loop.write_report", lambda run_dir: run_dir)
    with _cache_at(cache):
        yield


@pytest.fixture(scope="session")
def reference(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the tiny campaign ran from its beginning to its end, in ``run``."""
    from tiny_campaign import run_or_resume

    folder = tmp_path_factory.mktemp("reference")
    with _cache_at(cache):
        run_or_resume(folder, folder / "run")
    return folder


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
