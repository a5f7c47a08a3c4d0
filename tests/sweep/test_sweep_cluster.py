"""Sweeps on a cluster: the same table as in one process, whatever dies, and one sentence where nothing can be done."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from pydantic import ValidationError
from tiny_sweep import SECTIONS, config_of, sweep, timeless, write_sets

from almlip_jax import cluster
from almlip_jax.cluster import ParslLocalSettings
from almlip_jax.errors import InputError
from almlip_jax.progress import Advance, SilentProgress
from almlip_jax.sweep import SweepConfig, worker
from almlip_jax.sweep import cluster as sweep_cluster
from almlip_jax.sweep.bench import Bench
from almlip_jax.sweep.cluster import ClusterCrew, run_group
from almlip_jax.sweep.crew import ProcessesSettings
from almlip_jax.sweep.points import Group, all_points, first_groups, point_groups
from almlip_jax.sweep.records import SweepDirectory


class Hearing(SilentProgress):
    """Keeps messages, and counts rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.rounds = 0

    def message(self, text: str) -> None:
        self.told.append(text)

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
        with super().stage(name, total, unit=unit) as advance:

            def count(n: int = 1, **fields: Any) -> None:
                self.rounds += n
                advance(n, **fields)

            yield count
            assert self.rounds == total


@pytest.mark.slow
def test_a_cluster_gives_the_table_of_one_process_though_a_worker_is_killed(compiled_once, tmp_path, monkeypatch):
    pytest.importorskip("parsl")
    write_sets(tmp_path)
    monkeypatch.setattr(cluster, "HEARTBEAT_SECONDS", 1)
    for name in ("compilation_cache_dir", "persistent_cache_min_compile_time_secs"):  # as `compiled_once`
        monkeypatch.setenv(f"JAX_{name.upper()}", str(jax.config.values[f"jax_{name}"]))

    system = SECTIONS["systems"]["springs"] | {"tests": {"near": "near.extxyz"}}

    def changes(name: str, dies_at: int) -> dict[str, Any]:
        parameters = {"calls": str(tmp_path / name), "dies_at": dies_at}
        user = {"kind": "user", "function": "tiny_sweep:mortal", "parameters": parameters}
        return {"systems": {"springs": system}, "selectors": {"mortal": user}, "seeds": 1, "side_by_side": 1}

    sweep(tmp_path, tmp_path / "alone", **changes("calls_alone", 0))
    progress = Hearing()
    executor = {"kind": "parsl_local"}
    result = sweep(tmp_path, tmp_path / "out", executor=executor, progress=progress, **changes("calls", 2))
    assert timeless(tmp_path / "out") == timeless(tmp_path / "alone") and result.complete == 1
    assert progress.rounds == 1 + 3
    (told,) = progress.told
    assert "springs/mortal/seed0-batch3-ensemble2 goes on in another job" in told and "worker" in told
    # the selection of two rounds, and once more that of the round in which the worker died
    assert [(tmp_path / name).stat().st_size for name in ("calls_alone", "calls")] == [2, 3]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Of a sweep that has not begun; nobody waits for its file system."""
    write_sets(tmp_path)
    monkeypatch.setattr(sweep_cluster, "PATIENCE_SECONDS", 0.0)
    return Bench(config_of(tmp_path, side_by_side=1), SweepDirectory(tmp_path / "out"))


def point_group(bench: Bench) -> Group:
    return point_groups(bench.config, all_points(bench.config))[0]


@pytest.mark.parametrize(
    ("ends", "sentence", "messages"),
    [
        ("lost", "3 jobs died in the same round of springs/random/seed0-batch3-ensemble2 (.*worker 0", 2),
        ("ModuleNotFoundError", "nodes cannot work on the sweep (ModuleNotFoundError: almlip_jax); correct", 0),
        ("refused", "on the node far: no such file", 0),
        ("elsewhere", "what a node wrote to .* is not seen here", 0),
    ],
)
def test_what_goes_wrong_on_nodes_is_one_sentence(bench, monkeypatch, ends, sentence, messages):
    pytest.importorskip("parsl")
    from parsl.executors.high_throughput.errors import WorkerLost

    class Nodes(cluster.Jobs):
        """Jobs in which every call ends in the same way."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def close(self) -> None: ...

        def call(self, *_: object) -> Future[Any]:
            call: Future[Any] = Future()
            if ends == "lost":
                call.set_exception(WorkerLost(0, "far"))
            elif ends == "ModuleNotFoundError":
                call.set_exception(ModuleNotFoundError("almlip_jax"))
            else:
                call.set_result(InputError("on the node far: no such file") if ends == "refused" else None)
            return call

    monkeypatch.setattr(cluster, "Jobs", Nodes)
    told: list[str] = []
    with bench.folder.lock(), ClusterCrew(bench, ParslLocalSettings(), told.append) as crew:
        with pytest.raises(InputError, match=sentence.replace("(", r"\(").replace(")", r"\)")) as caught:
            crew.work([point_group(bench)], lambda _: None)
    assert "\n" not in str(caught.value) and len(told) == messages


def test_a_node_that_does_not_see_the_folder_says_so(bench):
    with bench.folder.lock():
        owner = bench.folder.lock_owner()
        for folder, who in ((bench.folder.path / "elsewhere", owner), (bench.folder.path, owner | {"pid": 0})):
            error = run_group(bench.config.model_dump_json(), str(folder), who, point_group(bench))
            assert isinstance(error, InputError) and "does not see the folder" in str(error)


def test_a_worker_whose_program_was_killed_stops_at_the_next_round(bench, monkeypatch):
    """Another one may have begun to work in the folder."""
    monkeypatch.setattr(worker, "prepare_jax", lambda precision: None)
    monkeypatch.setattr(worker, "train_firsts", lambda bench, group, progress, on_round: on_round())
    owners = iter([{"pid": 1}, {"pid": 2}])
    monkeypatch.setattr(SweepDirectory, "lock_owner", lambda self: next(owners))
    (group, _) = first_groups(bench.config, all_points(bench.config))
    error = run_group(bench.config.model_dump_json(), str(bench.folder.path), {"pid": 1}, group)
    assert isinstance(error, InputError) and "not locked by the program that sent this group any more" in str(error)


def test_the_old_key_says_what_it_is_now(bench, tmp_path):
    with pytest.raises(ValidationError, match=r"write executor: \{kind: local, processes: 4\}"):
        SweepConfig.model_validate(bench.config.model_dump() | {"processes": 4})
    assert config_of(tmp_path, executor={"processes": 4}).executor == ProcessesSettings(processes=4)
