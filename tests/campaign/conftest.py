"""What the tests of campaigns share: a compilation cache, and one campaign that nobody interrupts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest

CompiledIn = Callable[[Path], AbstractContextManager[None]]

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def cache() -> Path:
    """Folder of the compilation cache of all tests, whichever worker runs them."""
    return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(scope="session")
def own_cache(cache: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it for processes that are killed, maybe in the middle of an entry."""
    folder = tmp_path_factory.mktemp("compiled")
    with suppress(shutil.Error):  # all else is copied where another worker has just replaced or removed an entry
        shutil.copytree(cache, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def compile_once(
    cache: Path, compiled_in: CompiledIn, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Lets this test keep every compiled program, and leaves out the reports."""
    monkeypatch.setattr("almlip_jax.campaign.loop.write_report", lambda run_dir, drawn: run_dir)
    with compiled_in(cache):
        yield


@pytest.fixture(scope="session")
def reference(cache: Path, compiled_in: CompiledIn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the tiny campaign ran from its beginning to its end, in ``run``."""
    from tiny_campaign import run_or_resume

    folder = tmp_path_factory.mktemp("reference")
    with compiled_in(cache):
        run_or_resume(folder, folder / "run")
    return folder
