"""Rattling, and dynamics with the label source: physics, reproducibility and who pays."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import label_calculators as trouble
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.constraints import FixAtoms, FixCartesian
from ase.data import covalent_radii
from label_calculators import assert_same_labels, calls

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles import (
    Labeller,
    LabelStore,
    LocalSettings,
    MDRun,
    TBLiteSettings,
    label_md,
    rattle,
    run_label_md,
)
from almlip_jax.oracles.base import Label, bare
from almlip_jax.oracles.md import Call, Dynamics, DynamicsTask, Steps, Stream, create_stream, read_stream, thinned
from almlip_jax.oracles.sampling import _Plan
from almlip_jax.oracles.sources.calculator import CalculatorSettings
from almlip_jax.oracles.sources.labelled_file import FileSettings
from almlip_jax.oracles.worker import Context
from almlip_jax.structures.carried import carried

Waters = Callable[..., list[Atoms]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    with LabelStore(tmp_path / "labels.db") as opened:
        yield opened


@pytest.fixture
def springs_labeller(springs: CalculatorSettings, store: LabelStore) -> Iterator[Labeller]:
    with Labeller(springs, store, LocalSettings(workers=2)) as labeller:
        yield labeller


@pytest.mark.usefixtures("labels_here")
def test_dynamics_without_friction_conserve_energy(zundel: Atoms, store: LabelStore) -> None:
    with Labeller(TBLiteSettings(accuracy=0.1), store, LocalSettings(workers=1)) as labeller:
        frames = label_md(
            zundel, labeller, temperature=300, steps=300, timestep=0.25, friction=0, seed=0, purpose="test"
        )
    positions = np.array([frame.positions for frame in frames])
    energies = np.array([frame.get_potential_energy() for frame in frames])
    # Velocity Verlet: v(n) is the central difference of the positions, up to a third-order term.
    velocities = (positions[2:] - positions[:-2]) / (2 * 0.25 * units.fs)
    kinetic = 0.5 * np.einsum("a,tax,tax->t", zundel.get_masses(), velocities, velocities)
    total = kinetic + energies[1:-1]
    assert np.std(energies) > 0.02  # something happens
    assert np.std(total) < 0.02 * np.std(energies)
    masses = zundel.get_masses()
    centres = np.einsum("a,tax->tx", masses, positions) / masses.sum()
    np.testing.assert_allclose(centres, np.broadcast_to(centres[0], centres.shape), atol=1e-10)


@pytest.mark.usefixtures("labels_here")
def test_thermostat_reaches_its_temperature(springs_labeller: Labeller) -> None:
    # Ten oxygen atoms on springs; equipartition gives kT/2 to each coordinate but for the resting centre of mass.
    rest = Atoms("O10", np.random.default_rng(0).normal(size=(10, 3)) * 0.1)
    frames = label_md(
        rest,
        springs_labeller,
        temperature=400,
        steps=2000,
        timestep=4,
        friction=0.02,
        equilibration=500,
        every=5,
        seed=1,
        purpose="test",
    )
    centred = np.array([frame.positions - frame.positions.mean(axis=0) for frame in frames])
    temperature = np.mean(centred**2) * 10 / 9 / units.kB
    assert temperature == pytest.approx(400, rel=0.1)


@pytest.mark.usefixtures("labels_here")
def test_frames_are_thinned_and_numbered_and_every_call_is_counted(
    waters: Waters, springs_labeller: Labeller, store: LabelStore, tmp_path: Path
) -> None:
    (start,) = waters(1)
    run = MDRun(300, 15, every=4, equilibration=6)  # nobody keeps a frame of the last three steps
    (trajectory,) = run_label_md(start, springs_labeller, [run], seed=0, purpose="test")
    assert [frame.info["step"] for frame in trajectory.frames] == [10, 14, 18] and trajectory.calls == 18
    assert [row.label.calls for row in store.labelled("test")] == [1, 10, 4, 4]
    assert store.count_calls() == 0 and store.count_calls(None) == 19 == len(calls(tmp_path))
    assert store.summary()["test"]["done"] == 4 and store.summary()["test"]["calls"] == 19
    hotter = MDRun(600, 4, every=2)
    run_label_md(start, springs_labeller, [run, hotter], seed=0, purpose="test")
    assert store.count_calls(None) == 23 == len(calls(tmp_path))  # the start is known
    run_label_md(start, springs_labeller, [MDRun(300, 18)], seed=0, purpose="initial")
    assert store.count_calls() == 18 and store.count_calls(None) == 41 == len(calls(tmp_path))
    run_label_md(start, springs_labeller, [run], seed=0, purpose="teacher")
    assert [row.label.calls for row in store.labelled("teacher")] == [10, 4, 4]


def test_test_dynamics_that_are_cut_off_count_what_they_paid_for(waters: Waters, tmp_path: Path) -> None:
    """Without processes: the stream of a run that nobody asks for any more, and of one whose worker died."""
    (start,) = waters(1)
    made = [Call(n, start, Label(f"{n}", energy=0.0, forces=np.zeros((3, 3)), seconds=0.5)) for n in range(7)]
    kept = thinned(made, Steps(1, 2), {"0"})
    assert [(call.step, call.label.calls, call.label.seconds) for call in kept] == [(3, 3, 1.5), (5, 2, 1.0)]
    again = thinned(made, Steps(1, 2), {"0", "3"})  # after a failure steps before a stored one are paid for once more
    assert [(call.step, call.label.calls) for call in again] == [(5, 4)]
    failed = [*made[:5], Call(5, start, Label("5", error="no convergence", calls=2))]
    assert [(call.step, call.label.calls) for call in thinned(failed, Steps(1, 2))] == [(3, 4), (5, 3)]


@pytest.mark.usefixtures("labels_here")
def test_what_is_paid_for_another_start_waits_for_it(
    waters: Waters, springs_labeller: Labeller, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    """A program killed at its second start comes to the first one again before that."""
    first, second = waters(2)
    run, told = MDRun(300, 8, every=4), {"purpose": "test"}
    springs_labeller.label([second], told)
    plan = _Plan.make(springs_labeller.identity(second), second, run, 0, told)
    cut = replace(plan.task(springs_labeller, carried(second)), steps=5)  # whose stream is left behind
    assert isinstance(cut.run(Context(springs, springs.build(), None)), list) and len(calls(tmp_path)) == 6
    dynamics = [(start, [run]) for start in (first, second)]
    for start, own in dynamics:
        run_label_md(start, springs_labeller, own, seed=0, purpose="test", dynamics=dynamics)
    assert len(calls(tmp_path)) == 18 == store.count_calls(None)
    assert [row.label.calls for row in store.labelled("test")] == [1, 1, 4, 4, 4, 4]


class AlmostFull(io.BytesIO):
    """A file that takes a few bytes at a time, as a disk that has just room for them does."""

    def write(self, content: Any) -> int:
        return super().write(memoryview(content)[:50])


def test_a_line_that_is_written_in_parts_is_whole(waters: Waters, tmp_path: Path) -> None:
    """Behind half a line all that is paid for later would be lost."""
    (start,) = waters(1)
    path, file = tmp_path / "stream.jsonl", AlmostFull()
    create_stream(path, bare(start), {"provenance": {}})
    for step in range(2):
        label = Label(f"{step}", energy=0.1, forces=np.full((3, 3), 1 / 3))
        for call in (Call(step, start, None), Call(step, start, label)):
            Stream(file, []).append(call)
    path.write_bytes(path.read_bytes() + file.getvalue())
    _, calls, size = read_stream(path)
    assert [call.step for call in calls if call.label is not None] == [0, 1] and size == path.stat().st_size


def spending(task: DynamicsTask, seconds: float) -> list[Call]:
    """The calls of dynamics whose every label takes that long."""

    class Timed(Context):
        def label(self, atoms: Atoms, identity: str) -> Label:
            return Label(identity, 0.0, -atoms.positions, seconds=seconds)

    made = task.run(Timed(TBLiteSettings(), TBLiteSettings().build(), None))
    assert isinstance(made, list)
    return made


def test_dynamics_end_when_their_seconds_are_spent(waters: Waters, tmp_path: Path) -> None:
    """Seconds of a run that was cut off count as they were written down, however long labels take now."""
    (start,) = waters(1)

    def task() -> DynamicsTask:
        create_stream(tmp_path / "stream.jsonl", bare(start), {"provenance": {}})
        generator = np.random.default_rng(0)
        kept = Steps(0, 3)
        stream = tmp_path / "stream.jsonl"
        return DynamicsTask(start, Dynamics(300, 0.5, 0.01), 100, generator, kept, {}, stream, seconds=1.0)

    whole = spending(task(), 0.3)  # the start and three steps, the last of which reaches them
    assert [call.step for call in whole] == [3] and whole[0].label is not None
    assert (whole[0].label.calls, whole[0].label.seconds) == (4, pytest.approx(1.2))
    lines = (tmp_path / "stream.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "stream.jsonl").write_text("".join(lines[:5]))  # two labels of 0.3 s
    again = spending(task(), 0.1)
    assert [call.step for call in again] == [3, 5]
    assert sum(call.label.seconds for call in again if call.label is not None) == pytest.approx(1.0)


@pytest.mark.usefixtures("labels_here")
def test_dynamics_that_have_spent_their_seconds_are_not_repeated(
    waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    slow = springs.model_copy(update={"parameters": {**springs.parameters, "delay": 0.02}})
    with Labeller(slow, store, LocalSettings(workers=1)) as labeller:
        run = MDRun(300, 1000, every=2, seconds=0.1)
        found = [run_label_md(waters(1)[0], labeller, [run], seed=0, purpose="teacher")[0] for _ in range(2)]
    assert 1 <= len(calls(tmp_path)) <= 1 + 5 and found[0].error is None
    assert len(found[0].frames) == len(found[1].frames) == (len(calls(tmp_path)) - 1) // 2


def test_a_longer_run_pays_only_for_its_end(
    waters: Waters, springs_labeller: Labeller, store: LabelStore, tmp_path: Path
) -> None:
    (start,) = waters(1)
    runs = [MDRun(300, 5), MDRun(600, 5)]
    short = run_label_md(start, springs_labeller, runs, seed=0, purpose="initial", provenance={"round": 0})
    assert len(calls(tmp_path)) == 11 == store.count_calls()
    again = run_label_md(start, springs_labeller, runs, seed=0, purpose="initial")
    assert len(calls(tmp_path)) == 11
    longer = run_label_md(start, springs_labeller, [MDRun(300, 8, every=2)], seed=0, purpose="initial")
    assert len(calls(tmp_path)) == 14
    assert_same_labels(short[0].frames[3], longer[0].frames[1])
    for one, two in zip(short, again, strict=True):
        for frame, same in zip(one.frames, two.frames, strict=True):
            assert_same_labels(frame, same)
    steps = [
        (row.provenance["step"], row.provenance.get("round")) for row in store.labelled() if "step" in row.provenance
    ]
    assert steps == [(n, 0) for n in range(1, 6)] * 2 + [(6, None), (7, None), (8, None)]


@pytest.mark.usefixtures("labels_here")
def test_seed_temperature_and_purpose_make_other_trajectories(waters: Waters, springs_labeller: Labeller) -> None:
    (start,) = waters(1)

    def end(seed: int = 0, purpose: str = "initial", **options: float) -> bytes:
        run = MDRun(**{"temperature": 300.0, "steps": 3, **options})
        return (
            run_label_md(start, springs_labeller, [run], seed=seed, purpose=purpose)[0].frames[-1].positions.tobytes()
        )

    ends = [end(), end(seed=1), end(temperature=301), end(purpose="test"), end(friction=0.02), end(timestep=0.6)]
    assert len(set(ends)) == len(ends)


@pytest.mark.parametrize(
    "charge, reason", [(trouble.RAISE, "no convergence"), (trouble.ABORT, "SIGABRT"), (trouble.HANG, "timed out")]
)
def test_dynamics_end_where_a_label_fails(
    charge: int, reason: str, waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    (start,) = waters(1, charge)
    oracle = springs.model_copy(update={"timeout": 1.5})
    with Labeller(oracle, store, LocalSettings(workers=1)) as labeller:
        for _ in range(2):
            (trajectory,) = run_label_md(start, labeller, [MDRun(300, 5)], seed=0, purpose="initial")
            assert trajectory.frames == [] and reason in str(trajectory.error)
        with pytest.raises(LabelError, match=reason):
            label_md(start, labeller, temperature=300, steps=3, seed=0, purpose="test")
    assert len(calls(tmp_path)) == 1
    assert store.count_calls() == 1


@pytest.mark.usefixtures("labels_here")
def test_label_that_fails_on_the_way_ends_the_run_and_is_stored(
    waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    (start,) = waters(1)
    with Labeller(springs, store, LocalSettings(workers=1)) as labeller:
        labeller.label([start], {"purpose": "initial"})
        # From a force bound that the start meets and the hot trajectory does not.
        bound = float(np.abs(start.positions).max()) * 1.3
        labeller.oracle = springs.model_copy(update={"max_force": bound})
        labeller.close()
        for _ in range(2):
            (trajectory,) = run_label_md(start, labeller, [MDRun(3000, 400)], seed=0, purpose="initial")
            assert "max_force" in str(trajectory.error) and 0 < len(trajectory.frames) < 400
    steps = len(trajectory.frames) + 1
    assert trajectory.error is not None and trajectory.error.startswith(f"step {steps}:")
    assert len(calls(tmp_path)) == steps + 1 == store.count_calls()
    (failed,) = store.labelled(failed=True)
    assert failed.provenance["step"] == steps


def test_a_source_that_only_looks_up_cannot_drive_dynamics(waters: Waters, store: LabelStore, tmp_path: Path) -> None:
    (tmp_path / "pool.extxyz").write_text("")
    labeller = Labeller(FileSettings(path=tmp_path / "pool.extxyz"), store)
    with pytest.raises(InputError, match="cannot drive molecular dynamics"):
        run_label_md(waters(1)[0], labeller, [MDRun(300, 5)], seed=0, purpose="initial")


@pytest.mark.usefixtures("labels_here")
def test_runs_of_the_same_dynamics_need_names(waters: Waters, springs_labeller: Labeller) -> None:
    (start,) = waters(1)
    with pytest.raises(InputError, match="the same"):
        run_label_md(start, springs_labeller, [MDRun(300, 2), MDRun(300, 2)], seed=0, purpose="test")
    one, two = run_label_md(
        start, springs_labeller, [MDRun(300, 2, name="a"), MDRun(300, 2, name="b")], seed=0, purpose="test"
    )
    assert not np.array_equal(one.frames[0].positions, two.frames[0].positions)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"steps": 0}, {"timestep": 0}, {"every": 0}, {"every": 6}])
def test_dynamics_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="dynamics need"):
        MDRun(**{"temperature": 300, "steps": 5, **options})


def test_rattling_spreads_as_asked_and_keeps_atoms_apart() -> None:
    crystal = bulk("Si", cubic=True) * (2, 1, 1)
    frames = rattle(crystal, 100, np.random.default_rng(0), stdev=0.1)
    moves = np.array([frame.positions for frame in frames]) - crystal.positions
    assert np.std(moves) == pytest.approx(0.1, rel=0.03) and frames[0].pbc.all()
    warm = rattle(crystal, 100, np.random.default_rng(0), temperature=600, stiffness=4.0)
    moves = np.array([frame.positions for frame in warm]) - crystal.positions
    assert np.std(moves) == pytest.approx(np.sqrt(units.kB * 600 / 4.0), rel=0.03)


def test_what_constraints_hold_is_not_rattled(zundel: Atoms) -> None:
    held = zundel.copy()
    held.set_constraint([FixAtoms([0]), FixCartesian([2], mask=[False, True, False])])
    free = rattle(zundel, 3, np.random.default_rng(0), stdev=0.05)
    for frame, other in zip(rattle(held, 3, np.random.default_rng(0), stdev=0.05), free, strict=True):
        moved = frame.positions != zundel.positions
        assert not moved[0].any() and moved[2].tolist() == [True, False, True] and moved[[1, 3, 4, 5, 6]].all()
        np.testing.assert_array_equal(frame.positions[moved], other.positions[moved])


@pytest.mark.usefixtures("labels_here")
def test_dynamics_hold_fixed_atoms_and_have_the_masses_of_the_start(springs_labeller: Labeller) -> None:
    """An atom on a spring of 1 eV/Angstrom^2 swings with ``sqrt(k / m)``: four times slower at 16 times the mass."""
    start = Atoms("H2", [[0.5, 0.5, 0.5], [0.2, 0, 0]], constraint=FixAtoms([0]))

    def swing(mass: float) -> np.ndarray:
        start.set_masses([1.0, mass])
        frames = label_md(
            start, springs_labeller, temperature=0, steps=100, timestep=1, friction=0, seed=0, purpose="train"
        )
        assert all((frame.positions[0] == 0.5).all() for frame in frames)
        assert all(frame.constraints and frame.get_masses()[1] == mass for frame in frames)
        return np.array([frame.positions[1, 0] for frame in frames])

    for mass in (1.0, 16.0):
        time = np.arange(1, 101) * units.fs
        np.testing.assert_allclose(swing(mass), 0.2 * np.cos(time / np.sqrt(mass)), atol=2e-3)


def test_rattled_atoms_keep_their_distance(zundel: Atoms) -> None:
    frames = rattle(zundel, 50, np.random.default_rng(0), stdev=0.25, min_distance=0.7)
    i, j = np.triu_indices(7, 1)
    closest = 0.7 * (covalent_radii[zundel.numbers[i]] + covalent_radii[zundel.numbers[j]])
    assert all(np.all(frame.get_all_distances()[i, j] >= closest) for frame in frames)
    assert frames[0].info == {"charge": 1}
    with pytest.raises(InputError, match="nearly always"):
        rattle(zundel, 1, np.random.default_rng(0), stdev=0.1, min_distance=3)
    with pytest.raises(InputError, match="not both"):
        rattle(zundel, 1, np.random.default_rng(0))


@pytest.mark.usefixtures("labels_here")
@pytest.mark.parametrize("friction", [0.0, 0.02])
def test_a_lone_atom_flies_on(friction: float, springs: CalculatorSettings, store: LabelStore) -> None:
    """It is its centre of mass, which must not be brought to rest: a primitive cell may hold one atom."""
    with Labeller(springs, store, LocalSettings(workers=1)) as labeller:
        frames = label_md(bulk("Cu"), labeller, temperature=300, steps=3, friction=friction, seed=0, purpose="test")
    assert len(frames) == 3 and np.isfinite([frame.positions for frame in frames]).all()
    assert np.linalg.norm(frames[-1].positions) > 1e-4
