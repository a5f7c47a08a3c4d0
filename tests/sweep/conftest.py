"""What the tests of sweeps share: one sweep that nobody interrupts, and what it compiled."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest

# Tests import `tiny_sweep`, whatever way pytest imports the tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def compiled_once(
    compiled_in: Callable[[Path], AbstractContextManager[None]],
) -> Iterator[None]:
    """Sweeps keep every compiled program where all tests keep theirs."""
    with compiled_in(Path(os.environ["JAX_COMPILATION_CACHE_DIR"])):
        yield


@pytest.fixture(scope="module")
def study(
    compiled_once: None,
    count_compilations: Callable[[], AbstractContextManager[list[str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """The whole sweep: folder of its files, its own folder, result, and stages with what each compiled."""
    from tiny_sweep import Watching, sweep, write_sets

    folder = tmp_path_factory.mktemp("sweep")
    write_sets(folder)
    with count_compilations() as compiled:
        watching = Watching(compiled)
        result = sweep(folder, folder / "out", progress=watching)
    return SimpleNamespace(folder=folder, out=folder / "out", result=result, stages=watching.stages)
