"""What the tests of campaigns share: a compilation cache, and one campaign that nobody interrupts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

CompiledIn = Callable[[Path], AbstractContextManager[None]]

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests and the processes they start import `tiny_campaign`, whatever way pytest imports the tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the compilation cache that the campaigns of a test session share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def compile_once(
    cache: Path, compiled_in: CompiledIn, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Lets this test take compiled programs from the cache of the session, and leaves out the reports."""
    monkeypatch.setattr("almlip_jax.campaign.loop.write_report", lambda run_dir: run_dir)
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
