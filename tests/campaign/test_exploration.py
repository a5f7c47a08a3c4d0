"""Exploration as a stage: where walkers start, and what the gate compares with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from almlip_jax.campaign import starts as beginnings
from almlip_jax.campaign.calibration import draw_frames
from almlip_jax.campaign.choice import ExplorationInputs
from almlip_jax.campaign.exploration import offered
from almlip_jax.campaign.gate_levels import gate_thresholds
from almlip_jax.campaign.preparation import start_list
from almlip_jax.campaign.round import Budget, Round
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import MdExploration, SystemSettings
from almlip_jax.campaign.starts import Beginnings, FileStarts, LabelledStarts
from almlip_jax.dynamics import Knowledge, Status
from almlip_jax.dynamics.thresholds import Resolved
from almlip_jax.errors import InputError
from almlip_jax.keys import numpy_generator
from almlip_jax.progress import SilentProgress
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.likeness import Likeness
from almlip_jax.structures.repeats import geometry_key
from almlip_jax.units import KB

HIGHEST = """
from typing import Literal
from almlip_jax.campaign.starts import StartSettings

class HighestStarts(StartSettings):
    kind: Literal["highest"] = "highest"

    def begin(self, given):
        return [max(given.dataset, key=lambda frame: frame.get_potential_energy())] * len(given.temperatures)
"""


def settings(**changes: Any) -> MdExploration:
    walkers = [{"temperature": 300, "count": 3}, {"temperature": 600, "count": 3}]
    return MdExploration.model_validate({"walkers": walkers, **changes})


def labelled(formula: str, energy: float, **info: int) -> Atoms:
    atoms = Atoms(formula, np.arange(3.0 * len(Atoms(formula))).reshape(-1, 3), info=info)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
    return atoms


def walker_starts(
    place: Place, chosen: MdExploration, round_index: int, dataset: list[Atoms], listed: Sequence[Atoms] = ()
) -> list[Atoms]:
    """Starts of a round, as the stage finds them."""
    given = Beginnings(place.geometries, listed, dataset, chosen.temperatures, place.seed, round_index)
    final = beginnings.going_on(place.run, round_index) if chosen.continue_walkers else {}
    return beginnings.walker_starts(chosen.starts, given, final)


@dataclass(frozen=True)
class Place:
    """Of a campaign: its directory, start geometries and seed."""

    run: RunDirectory
    geometries: tuple[Atoms, ...]
    seed: int


def campaign(run_dir: Path, *geometries: Atoms, seed: int = 1) -> Place:
    return Place(RunDirectory(run_dir).create(), geometries, seed)


class TestStarts:
    water = Atoms("H2O", np.eye(3))

    def energies(self, starts: list[Atoms]) -> list[float]:
        return [start.get_potential_energy() for start in starts]

    def test_are_labelled_structures_that_are_not_too_high_in_energy(self, tmp_path: Path) -> None:
        thermal = 1.5 * 3 * KB * 300
        dataset = [labelled("H2O", level * thermal) for level in (0.0, 1.9, 2.1, 3.9, 4.1)]
        seen = set()
        for index in range(40):
            starts = walker_starts(campaign(tmp_path, self.water), settings(), index, dataset)
            levels = np.round(np.array(self.energies(starts)) / thermal, 1)
            assert set(levels[:3]) <= {0.0, 1.9} and set(levels[3:]) <= {0.0, 1.9, 2.1, 3.9}
            seen.update(levels)
        assert seen == {0.0, 1.9, 2.1, 3.9}

    def test_follow_from_seed_round_and_walker(self, tmp_path: Path) -> None:
        dataset = [labelled("H2O", 1e-3 * n) for n in range(50)]
        one = self.energies(walker_starts(campaign(tmp_path, self.water), settings(), 3, dataset))
        assert one == self.energies(walker_starts(campaign(tmp_path, self.water), settings(), 3, dataset))
        assert one != self.energies(walker_starts(campaign(tmp_path, self.water), settings(), 4, dataset))
        assert one != self.energies(walker_starts(campaign(tmp_path, self.water, seed=2), settings(), 3, dataset))
        assert len(set(one)) > 1

    def test_walkers_are_dealt_out_to_the_geometries(self, tmp_path: Path) -> None:
        ion = Atoms("H2O", np.eye(3), info={"charge": 1})
        dataset = [labelled("H2O", -1.0, charge=1), labelled("H2O", -2.0)]
        starts = walker_starts(campaign(tmp_path, self.water, ion, Atoms("Ar")), settings(), 0, dataset)
        assert [start.get_chemical_formula() for start in starts] == ["H2O", "H2O", "Ar"] * 2
        assert [start.info.get("charge", 0) for start in starts] == [0, 1, 0] * 2
        assert starts[2].calc is None  # nothing like it is labelled: the geometry itself

    def test_hold_what_their_geometry_holds_where_it_holds_it(self, tmp_path: Path) -> None:
        """Labelled structures whose fixed atoms lie elsewhere do not serve; masses are those of the geometry."""
        geometry = Atoms("H2O", np.eye(3), constraint=FixAtoms([2]))
        geometry.set_masses([2.014, 2.014, 15.999])
        dataset = [labelled("H2O", -0.01 * n) for n in range(4)]
        for n, frame in enumerate(dataset):
            frame.positions = np.eye(3) + [[0, 0, 0.01 * n], [0, 0, 0], [0.1 * (n == 3), 0, 0]]
            frame.calc = SinglePointCalculator(frame, energy=-0.01 * n, forces=np.zeros((3, 3)))
        starts = walker_starts(campaign(tmp_path, geometry), settings(), 0, dataset)
        assert set(self.energies(starts)) <= {0.0, -0.01, -0.02} and len(set(self.energies(starts))) > 1
        path = tmp_path / "starts.extxyz"
        write_structures(path, starts)
        for start in [*starts, *read_structures(path)]:
            assert start.constraints[0].todict() == FixAtoms([2]).todict()
            np.testing.assert_array_equal(start.get_masses(), geometry.get_masses())
            np.testing.assert_array_equal(start.positions[2], geometry.positions[2])

    def test_a_walker_that_ran_to_its_end_may_go_on(self, tmp_path: Path) -> None:
        place = campaign(tmp_path, self.water)
        ends = [Atoms("H2O", np.eye(3) + n) for n in range(6)]
        for n, end in enumerate(ends):
            end.info.update(walker=n, status="stopped" if n == 2 else "completed")
        write_structures(place.run.round(0).create().last_frames, ends)
        dataset = [labelled("H2O", 0.0)]
        starts = walker_starts(place, settings(continue_walkers=True), 1, dataset)
        went_on = [
            bool(np.array_equal(start.positions, end.positions)) for start, end in zip(starts, ends, strict=True)
        ]
        assert went_on == [True, True, False, True, True, True]
        assert all(start.calc is not None for start in walker_starts(place, settings(), 1, dataset))

    def test_may_be_those_of_a_package(self, tmp_path: Path, with_kinds: Callable[[str], None]) -> None:
        with_kinds(HIGHEST)
        dataset = [labelled("H2O", energy) for energy in (0.1, 0.9, 0.5)]
        chosen = settings(starts={"kind": "highest"})
        starts = walker_starts(campaign(tmp_path, self.water), chosen, 0, dataset)
        assert self.energies(starts) == [0.9] * 6
        assert not chosen.starts_labelled and settings().starts_labelled and chosen.starts_file is None

    def test_the_energy_bound_is_a_setting_of_the_starts(self, tmp_path: Path) -> None:
        thermal = 1.5 * 3 * KB * 300
        dataset = [labelled("H2O", level * thermal) for level in (0.0, 2.9, 3.1)]
        for kind in ("labelled", "relaxed"):  # what is relaxed is drawn in the same way
            chosen = settings(starts={"kind": kind, "energy": 3.0})
            found = [walker_starts(campaign(tmp_path, self.water), chosen, index, dataset)[:3] for index in range(20)]
            levels = {round(energy / thermal, 1) for starts in found for energy in self.energies(starts)}
            assert levels == {0.0, 2.9}
        assert settings().starts == LabelledStarts(energy=2.0)
        with pytest.raises(ValueError, match=r"start_energy.*starts: \{kind: labelled, energy: 1\.5\}"):
            settings(start_energy=1.5)

    def test_of_a_file_are_dealt_out_in_turn_from_round_to_round(self, tmp_path: Path) -> None:
        place = campaign(tmp_path)  # needs neither geometries nor labels
        listed = [Atoms("H2O", np.eye(3) + n) for n in range(4)]
        chosen = settings(starts={"kind": "file", "path": "list.xyz"})
        dealt = [int(start.positions[0, 1]) for n in range(2) for start in walker_starts(place, chosen, n, [], listed)]
        assert dealt == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
        ends = [Atoms("H2O", np.eye(3) + 10 + n, info={"walker": n, "status": "stopped"}) for n in range(6)]
        ends[1].info["status"] = "completed"
        write_structures(place.run.round(0).create().last_frames, ends)
        again = walker_starts(place, chosen.model_copy(update={"continue_walkers": True}), 1, [], listed)
        assert [int(start.positions[0, 1]) for start in again] == [2, 11, 0, 1, 2, 3]

    def test_need_a_geometry(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"system\.structures"):
            walker_starts(campaign(tmp_path), settings(), 0, [])


class TestStartList:
    """A file of starts holds what the campaign knows, in the electronic state in which it knows it."""

    system = SystemSettings(charge=1)
    known = (Atoms("H2O", np.eye(3), info={"charge": 1, "spin": 1}),)

    def listed(self, folder: Path, *frames: Atoms) -> list[Atoms]:
        write_structures(folder / "list.extxyz", frames)
        return start_list(folder / "list.extxyz", self.system, self.known)

    def test_takes_charge_and_spin_where_a_frame_does_not_say(self, tmp_path: Path) -> None:
        frames = self.listed(tmp_path, labelled("H2O", 1.0), labelled("HO", 1.0, charge=0, spin=2))
        assert [frame.info for frame in frames] == [{"charge": 1, "spin": 1}, {"charge": 0, "spin": 2}]
        assert all(frame.calc is None for frame in frames)

    @pytest.mark.parametrize(
        "frame, refusal",
        [
            (Atoms("HOAr", np.eye(3)), r"list\.extxyz, frame 1 holds Ar, which no start geometry .* holds"),
            (labelled("H2O", 0.0, charge=0), r"list\.extxyz, frame 1 \(H2O\) has charge and spin \(0, 1\)"),
            (labelled("H2O", 0.0, charge=1, spin=3), r"frame 1 \(H2O\) has charge and spin \(1, 3\)"),
        ],
    )
    def test_refuses_what_a_potential_cannot_know(self, tmp_path: Path, frame: Atoms, refusal: str) -> None:
        with pytest.raises(InputError, match=refusal):
            self.listed(tmp_path, Atoms("H2O", np.eye(3)), frame)

    def test_takes_states_that_are_known_where_the_potential_sees_them(self, tmp_path: Path) -> None:
        path = tmp_path / "list.extxyz"
        write_structures(path, [labelled("H2O", 1.0, charge=0, spin=2)])
        known = (*self.known, Atoms("HO", np.eye(3)[:2], info={"charge": 0, "spin": 2}))
        assert start_list(path, self.system, known, sees_state=True)[0].info == {"charge": 0, "spin": 2}
        with pytest.raises(InputError, match=r"frame 0 \(H2O\) .* \(0, 2\), which no start geometry"):
            start_list(path, self.system, self.known, sees_state=True)

    def test_is_a_setting_with_a_path(self) -> None:
        assert settings(starts={"kind": "file", "path": "list.xyz"}).starts == FileStarts(
            kind="file", path=Path("list.xyz")
        )
        with pytest.raises(ValueError, match="fmax"):
            settings(starts={"kind": "relaxed", "fmax": 0})
        with pytest.raises(ValueError, match="unknown key 'fmx'; did you mean 'fmax'"):
            settings(starts={"kind": "relaxed", "fmx": 0.1})


class TestThresholds:
    scores = {"force_std_max": np.linspace(0, 1, 101), "energy_std": np.full(101, 7.0)}

    def found(self, folder: Path, chosen: MdExploration, scores: Any = None, round_index: int = 0) -> Any:
        here = Round(RunDirectory(folder).create(), round_index, "", 1, SilentProgress())
        trained: Any = SimpleNamespace(
            potential=Doubling(),
            evaluate=lambda *_: SimpleNamespace(scores=scores) if scores else pytest.fail("not needed"),
        )
        return gate_thresholds(chosen, here, [], trained, Knowledge())

    def test_fixed_ones_do_not_look_at_scores(self, tmp_path: Path) -> None:
        fixed = settings(thresholds={"kind": "fixed", "record": 0.2, "stop": 1.5})
        assert self.found(tmp_path, fixed) == Resolved(0.2, 1.5)

    def test_relative_ones_follow_the_training_set_down_to_the_floor(self, tmp_path: Path) -> None:
        relative = {"kind": "relative", "quantile": 0.5, "record_factor": 3.0, "stop_factor": 4.0, "floor": 0.6}
        assert np.allclose(self.found(tmp_path, settings(thresholds=relative), self.scores).levels, (1.5, 6.0))
        small = {name: 0.1 * values for name, values in self.scores.items()}
        assert np.allclose(self.found(tmp_path, settings(thresholds=relative), small).levels, (0.6, 2.4))

    def test_are_in_the_unit_of_the_gates_score(self, tmp_path: Path) -> None:
        relative = {"kind": "relative", "record_factor": 1.0, "stop_factor": 2.0}
        chosen = settings(thresholds=relative, gate={"kind": "absolute", "score": "energy_std"})
        assert self.found(tmp_path, chosen, self.scores) == Resolved(7.0, 14.0)

    @pytest.mark.parametrize("kind", ["calibrated", "conformal"])
    def test_true_errors_are_those_of_frames_drawn_in_earlier_rounds(self, tmp_path: Path, kind: str) -> None:
        """`Doubling` is wrong by twice its spread on every atom: a tolerance of 0.3 is reached at a spread of 0.15."""
        chosen = settings(thresholds={"kind": kind, "tolerance": 0.3, "stop_factor": 2.0})
        rounds = [campaign(tmp_path).run.round(index).create() for index in range(3)]
        write_structures(rounds[0].labelled, [labelled("H2O", 0.0) for _ in range(10)])  # a batch says nothing
        assert self.found(tmp_path, chosen, round_index=1) == Resolved(0.3, 0.6, {})  # spreads at their face value
        for drawn in rounds[:2]:
            write_structures(drawn.calibration, [labelled("H2O", 0.0) for _ in range(5)])
        found = self.found(tmp_path, chosen, round_index=2)
        assert np.allclose(found.levels, (0.15, 0.3)) and np.allclose(found.relative["H"], 1)
        assert ("O" in found.relative) == (kind == "calibrated")  # ten atoms are too few for one in twenty
        write_structures(rounds[2].calibration, [labelled("H2O", 0.0)])
        assert self.found(tmp_path, chosen, round_index=2) == found  # of this round nothing is known yet
        with pytest.raises(ValueError, match="gate score of atoms"):
            settings(thresholds={"kind": kind, "tolerance": 0.3}, gate={"kind": "absolute", "score": "energy_std"})


class TestDraw:
    def test_every_visited_frame_is_as_likely_as_any_other(self) -> None:
        trajectories = [
            [Atoms("H", [[w, n, 0.0]], info={"walker": w, "step": n}) for n in range(1 + 3 * w)] for w in range(3)
        ]
        counts = np.zeros(12)
        for round_index in range(3000):
            drawn = draw_frames(trajectories, 4, numpy_generator(0, "calibration", round_index))
            places = [int(frame.positions[0, 1]) + (0, 1, 5)[int(frame.positions[0, 0])] for frame in drawn]
            assert len(set(places)) == 4 and places == sorted(places)
            counts[places] += 1
        assert np.all(np.abs(counts / 3000 - 1 / 3) < 5 * np.sqrt(2 / 9 / 3000))

    def test_leaves_out_what_is_known_and_keeps_no_velocities(self) -> None:
        frames = [
            Atoms("H", [[0, n, 0.0]], momenta=np.ones((1, 3)), info={"step": n, "force_std_max": 1.0}) for n in range(3)
        ]
        drawn = draw_frames([frames], 5, np.random.default_rng(0), {geometry_key(frames[1])})
        assert [frame.info for frame in drawn] == [{"step": 0}, {"step": 2}] and not drawn[0].has("momenta")
        frames[0].set_masses([2.014])  # labels and dynamics may depend on what a structure carries
        assert draw_frames([frames[:1]], 1, np.random.default_rng(0))[0].get_masses() == 2.014

    def test_the_budget_is_the_batchs_first(self) -> None:
        chosen = settings(thresholds={"kind": "conformal", "tolerance": 0.3, "frames": 4})
        asked = chosen.thresholds.frames_drawn
        assert [Budget(10, left).drawn(asked) for left in (None, 20, 12, 10, 3)] == [4, 4, 2, 0, 0]
        assert [Budget(10, left).selected for left in (None, 20, 10, 3, -1)] == [10, 10, 10, 3, 0]
        assert settings().thresholds.frames_drawn == 0
        with pytest.raises(ValueError, match=r"trajectory_every 100 is more than steps 50"):
            settings(thresholds={"kind": "conformal", "tolerance": 0.3}, steps=50)


def test_nothing_that_is_labelled_after_a_round_is_a_test_structure_in_other_words(tmp_path: Path) -> None:
    """Neither candidates, nor frames for thresholds, nor corrections: of each there is one that is one, turned."""
    chosen = settings(thresholds={"kind": "conformal", "tolerance": 0.3, "frames": 9}, correct={"around": 0})
    bent = [Atoms("H2O", np.eye(3) + 0.05 * np.random.default_rng(n).normal(size=(3, 3))) for n in range(8)]
    for step, frame in enumerate(bent):
        frame.info["step"] = step
    held_out = [bent[n][[1, 0, 2]] for n in (1, 4, 6)]
    for frame in held_out:
        frame.rotate(70, (1, 2, 3))
    found: Any = SimpleNamespace(
        recorded=bent[:3], trajectories=[bent[3:6]], final=bent[6:], status=2 * [Status.STOPPED], departed_step=[-1, -1]
    )

    def evaluate(frames: list[Atoms]) -> Any:
        spread = np.ones((len(frames), 3))
        return SimpleNamespace(scores={"force_std_max": spread[:, 0]}, atom_scores={"force_std": spread})

    trained: Any = SimpleNamespace(potential=SimpleNamespace(evaluate=evaluate))
    here, nothing = Round(RunDirectory(tmp_path).create(), 0, "", 1, SilentProgress()), SimpleNamespace()
    here.folder.create()
    given: Any = ExplorationInputs(here, trained, nothing, frozenset(), nothing, Budget(3, None))  # type: ignore[arg-type]

    def steps(given: ExplorationInputs) -> tuple[list[int], ...]:
        fresh, candidates = offered(chosen, given, found, [])
        made = [frame for frame in candidates if "correction" in frame.info]
        others = [frame.info["step"] for frame in candidates if "correction" not in frame.info]
        drawn = [frame.info["step"] for frame in read_structures(here.folder.drawn)]
        return [frame.info["step"] for frame in fresh], others, drawn, [frame.info["walker"] for frame in made]

    assert steps(given) == ([0, 1, 2], [0, 1, 2], [3, 4, 5], [0, 1])
    assert steps(replace(given, held_out=Likeness(held_out))) == ([0, 2], [0, 2], [3, 5], [1])


class Doubling:
    """A potential whose force on every atom is off by twice the spread that it claims."""

    def evaluate(self, structures: list[Atoms]) -> Any:
        spread = [0.1 + 0.01 * np.arange(len(frame)) for frame in structures]
        off = [2 * one[:, None] * np.array([0.6, 0.0, -0.8]) for one in spread]
        forces = [frame.get_forces() + one for frame, one in zip(structures, off, strict=True)]
        return SimpleNamespace(forces=forces, atom_scores={"force_std": spread})
