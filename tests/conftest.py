"""Shared by all tests: the CPU, compiled programs that are kept between runs, and a counter of compilations."""

from __future__ import annotations

import gc
import io
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# most of the time of a test is compiling, and small shapes gain nothing from the last optimisations; two devices, as
# users have, whatever this machine is and whoever comes first
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_force_host_platform_device_count=2"
    )
    # XLA's older emitter of loops takes six tenths of the time, and programs in one part, not in 32 for cores that are
    # busy with other tests, take eight tenths; at flags that it does not know it ends the process
    wanted = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
    known = set()
    for library in Path(find_spec("jaxlib").origin).parent.glob("*.so"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            known |= {flag for flag in wanted.keys() - known if content.find(flag.encode()) >= 0}
    os.environ["XLA_FLAGS"] += "".join(f" --{flag}={value}" for flag, value in wanted.items() if flag in known)

# workers, child processes, later runs and other checkouts share what is compiled; compilations are counted all the same
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "almlip-jax" / "tests"
    try:
        compiled.mkdir(parents=True, exist_ok=True)
        writable = os.access(compiled, os.W_OK)
    except OSError:
        writable = False
    here = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled if writable else here)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# child processes start by the hundred, and each would compile the whole package's source anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# all tests import `tiny_campaign`, whatever way pytest imports the tests
sys.path.insert(0, str(Path(__file__).parent / "campaign"))

import pytest

if TYPE_CHECKING:
    from almlip_jax import kinds
    from almlip_jax.dynamics.loop import Loop
    from almlip_jax.potential import Potential

# Packages that take seconds to import are imported where they are needed: the process that hands out tests to others,
# which wait for it, needs none of them.


def _lasting(make: Callable[[], Any]) -> Callable[[], Any]:
    """Contexts that serve many programs in turn: making one takes longer than lowering a small program in it."""
    held = threading.local()

    def context() -> Any:
        left = getattr(held, "left", 0) or 100  # a new one now and then, for a context keeps what it was told
        if left == 100:
            held.context = make()
        held.left = left - 1
        return held.context

    return context


def _set_up() -> None:
    """How fast jax traces, and that properties have no deadline."""
    import jax
    from hypothesis import settings
    from jax._src.interpreters import mlir

    gc.set_threshold(50_000, 10, 10)  # tracing makes objects by the million, and collecting was an eighth of the time
    jax.config.update("jax_traceback_in_locations_limit", 0)  # which line made which operation is asked by nobody here
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = _lasting(mlir.make_ir_context)
    settings.register_profile("without_deadline", deadline=None)  # how long a case takes is the machine's affair
    settings.load_profile("without_deadline")


_OLDEST = 14 * 24 * 3600  # seconds after which a program is compiled again, so that the folder does not grow for ever


def pytest_sessionstart(session: pytest.Session) -> None:
    """Sets up the processes that run tests, and forgets programs that were compiled long ago."""
    if session.config.getoption("dist", "no") == "no":  # not the one that hands them out
        _set_up()
    for entry in Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*"):
        with suppress(FileNotFoundError):  # the workers of a run do this side by side
            if entry.stat().st_mtime < time.time() - _OLDEST:
                entry.unlink()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the list belong to the slow set, whether they are marked themselves or not."""
    listed = json.loads((Path(__file__).parent / "slow_seconds.json").read_text())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)


@contextmanager
def _counting() -> Iterator[list[str]]:
    import jax

    compiled: list[str] = []

    def listen(event: str, _seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(1.0)  # a function that was not there before
        assert compiled, "it does count"
        compiled.clear()
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def count_compilations() -> Callable[[], AbstractContextManager[list[str]]]:
    """``with count_compilations() as compiled:`` lists what the backend compiles in the block."""
    return _counting


@contextmanager
def _cache_at(folder: Path) -> Iterator[None]:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Programs of dynamics as users have them, for modules whose steps take longer than compiling."""
    import jax

    from almlip_jax.dynamics import programs
    from almlip_jax.precision import full_precision

    wanted = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
    compiled = partial(jax.jit, compiler_options=wanted)

    @lru_cache
    def of(loop: Loop) -> programs.Programs:
        return programs.Programs(*(compiled(full_precision(one)) for one in (loop.begin, loop.run_chunk)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_programs", of)
        yield


@pytest.fixture(scope="session")
def committee() -> Potential:
    """Three models of H, C and O that were drawn and not trained: modules that share it share what is compiled."""
    import jax
    import numpy as np

    from almlip_jax.ensembles import Ensemble
    from almlip_jax.models import SharedDensitySettings, build_model
    from almlip_jax.models.constants import with_constants
    from almlip_jax.potential import Potential
    from almlip_jax.structures.species import SpeciesTable

    settings = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,))
    species = SpeciesTable((1, 6, 8))
    params = with_constants(
        jax.jit(Ensemble(build_model(settings, species), 3).init)(jax.random.key(0)), density_scale=0.2
    )
    return Potential(settings, species, jax.tree.map(np.asarray, params), {1: -13.6, 6: -1030.0, 8: -2040.0})


@pytest.fixture(autouse=True)
def single_precision() -> Iterator[None]:
    """A command that runs in this process sets its precision for good; the next test begins with that of the first."""
    yield
    if (jax := sys.modules.get("jax")) is not None and jax.config.values["jax_enable_x64"]:
        jax.config.update("jax_enable_x64", False)


@pytest.fixture
def labels_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Label sources work in this process: for tests that look at labels, not at the processes that make them.

    A process of its own imports for more than a second.
    """
    from almlip_jax.oracles.base import SourceSettings

    monkeypatch.setattr(SourceSettings, "in_process", True)


def _damages(path: Path, *, parts: bool = True) -> dict[str, bytes]:
    """What may stand in the place of a file, by a word for it; ``parts``: also wrong in one key or array only."""
    import numpy as np

    whole, foreign = path.read_bytes(), io.BytesIO()
    np.savez(foreign, a=np.zeros(3))
    found = {"nothing": b"", "bytes": bytes(range(256)) * 40, "half": whole[: len(whole) // 2]}
    found |= {"foreign arrays": foreign.getvalue(), "{}": b"{}", "[]": b"[]", "nested": b'{"a": [1]}'}
    if parts and path.suffix == ".json":
        content = json.loads(whole)
        for name, value in content.items():
            for other in ("text", [[7]], {"a": [1]}, None):
                if type(other) is not type(value):
                    found[f"{name}: {other}"] = json.dumps(content | {name: other}).encode()
    if parts and path.suffix == ".npz":
        with np.load(path) as held:
            arrays = dict(held)
        for name in arrays:
            building = io.BytesIO()
            np.savez(building, **{key: value for key, value in arrays.items() if key != name})
            found[f"without {name}"] = building.getvalue()
    return found


@pytest.fixture(scope="session")
def damages() -> Callable[..., dict[str, bytes]]:
    """``damages(path)`` gives contents that may stand in the place of a file and are not what a run writes."""
    return _damages


@pytest.fixture
def with_package(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Installs another package, ``other_kinds``, whose one module adds kinds: gives the environment that knows it."""

    def install(code: str) -> dict[str, str]:
        installed = tmp_path / "other_kinds-1.0.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: other-kinds\nVersion: 1.0\n")
        (installed / "entry_points.txt").write_text("[almlip_jax.kinds]\nother = other_kinds\n")
        (installed / "top_level.txt").write_text("other_kinds\n")
        (tmp_path / "other_kinds.py").write_text(code)
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    return install


@pytest.fixture
def with_kinds(
    with_package: Callable[[str], object], with_module: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """Installs ``other_kinds`` as far as this process is concerned: what it adds is there until the test ends."""
    from almlip_jax import kinds, scores, targets

    for module, name in ((targets, "_TARGETS"), (scores, "_STRUCTURES"), (scores, "_ATOMS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))

    def install(code: str) -> None:
        with_package(code)
        with_module("other_kinds", code)
        kinds.imported_plugins.cache_clear()

    yield install
    for family in _below(kinds.Spec):
        for name in [name for name, kind in family._below.items() if kind.__module__ == "other_kinds"]:
            del family._below[name]
    kinds._union.cache_clear()
    kinds.imported_plugins.cache_clear()


_DESKS = '''
from concurrent.futures import ThreadPoolExecutor
from typing import Literal
from almlip_jax.cluster import Calls, RemoteSettings

class Room(Calls):
    def __init__(self):
        self._threads = ThreadPoolExecutor(1)

    def call(self, function, *arguments):
        return self._threads.submit(function, *arguments)

    def close(self):
        self._threads.shutdown()

class DesksSettings(RemoteSettings):
    """A thread of this process."""

    kind: Literal["desks"] = "desks"

    def calls(self, folder, *, whole_nodes, retries):
        return Room()
'''


@pytest.fixture
def with_desks(with_kinds: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Installs a package whose executor, ``kind: desks``, is no cluster; ends what it leaves in this process."""
    from almlip_jax.oracles import cluster as labels
    from almlip_jax.sweep import cluster as sweeps

    with_kinds(_DESKS)
    made = []

    def worker(*arguments: Any) -> labels.WorkerProcess:
        made.append(process := WorkerProcess(*arguments))
        return process

    WorkerProcess = labels.WorkerProcess
    monkeypatch.setattr(labels, "WorkerProcess", worker)
    yield
    for process in made:
        process.close()
    labels._worker.cache_clear()
    sweeps._bench.cache_clear()


def _below(kind: type[kinds.Spec]) -> Iterator[type[kinds.Spec]]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


@pytest.fixture
def with_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Writes a module that this process finds until the test ends: ``with_module(name, code)`` is its file."""
    names = []

    def write(name: str, code: str) -> Path:
        file = tmp_path / f"{name}.py"
        file.write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        names.append(name)
        return file

    yield write
    for name in names:
        sys.modules.pop(name, None)  # another test writes another one
