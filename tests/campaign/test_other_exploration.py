"""An exploration of a user's own, or of another package, runs in a campaign like ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from tiny_campaign import run_or_resume, tiny_config

from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.choice import Beginning, ExplorationChoice, ExplorationInputs
from almlip_jax.campaign.offers import found_by, offer
from almlip_jax.campaign.report import write_report
from almlip_jax.campaign.round import Round
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import StateReading, UserExploration
from almlip_jax.campaign.state import read_state
from almlip_jax.errors import InputError
from almlip_jax.progress import SilentProgress
from almlip_jax.scores import mean_score
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.likeness import Likeness
from almlip_jax.structures.repeats import geometry_key

MODULE = '''
import jax

def shaken(count=12):
    """The structures trained on, shaken."""

    def explore(given):
        seed = int(jax.random.randint(given.key, (), 0, 10**9))
        frames = [given.labelled[n % len(given.labelled)].copy() for n in range(count)]
        for n, frame in enumerate(frames):
            frame.rattle(0.05, seed=seed + n)
        return [*frames, frames[0], given.labelled[1]]

    return explore

def these(frames):
    return lambda given: frames
'''
PACKAGE = (
    MODULE
    + '''
from typing import Literal

from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.choice import ExplorationChoice
from almlip_jax.generation import GeneratorSettings


class Shaken(ExplorationChoice):
    """The structures trained on, shaken."""

    kind: Literal["shaken"] = "shaken"
    count: int = 12

    def explore(self, given):
        return shaken(self.count)(given)

    def most_candidates(self, pool):
        return self.count


class Borrowing(Shaken):
    """As that, with a gate and generators of ours."""

    kind: Literal["borrowing"] = "borrowing"
    species: tuple[str, ...] = ()
    makes: tuple[GeneratorSettings, ...] = ()

    @property
    def species_named(self):
        return self.species

    @property
    def generators(self):
        return self.makes
'''
)
MINE: dict[str, Any] = {"kind": "user", "function": "my_explorations:shaken", "candidates": 12}


@pytest.fixture
def installed(with_kinds: Callable[[str], None], with_module: Callable[[str, str], Path]) -> None:
    """The same exploration in a package and in a module of the user's."""
    with_kinds(PACKAGE)
    with_module("my_explorations", MODULE)


def test_a_kind_that_cannot_explore_is_refused_when_it_is_defined() -> None:
    with pytest.raises(TypeError, match=r"Idle, kind 'idle', does not define most_candidates\(\)"):

        class Idle(ExplorationChoice):
            kind: Literal["idle"] = "idle"

    with pytest.raises(TypeError, match="Counting has neither explore"):

        class Counting(ExplorationChoice):
            kind: Literal["counting"] = "counting"

            def most_candidates(self, pool: int) -> int:
                return pool

    ExplorationChoice._below.pop("counting", None)
    assert "idle" not in ExplorationChoice.kinds()


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once", "installed")
@pytest.mark.parametrize("exploration", [{"kind": "shaken"}, MINE], ids=["package", "user"])
def test_a_campaign_explores_as_others_do(tmp_path: Path, exploration: dict[str, Any]) -> None:
    """Structures that are known or come twice are left out; the rest is scored, selected from and labelled."""
    outcome = run_or_resume(tmp_path, tmp_path / "run", exploration=exploration)
    run = RunDirectory(tmp_path / "run")
    first, second, last = read_state(run).history
    assert outcome.rule == "max_rounds" and last.selected is None
    assert (first.candidates, first.selected, second.candidates, second.selected) == (12, 3, 12, 3)
    assert first.sigma_batch is not None and first.sigma_pool is not None and first.sigma_pool > 0
    pools = [read_structures(run.round(n).pool) for n in range(2)]
    assert all(frame.info["force_std_max"] == pytest.approx(frame.arrays["force_std"].max()) for frame in pools[0])
    assert not np.allclose(pools[0][0].positions, pools[1][0].positions), "each round has random numbers of its own"
    assert len(read_structures(run.round(2).dataset)) == len(read_structures(run.round(0).dataset)) + 6
    assert write_report(run.path).exists()


@pytest.mark.usefixtures("installed")
def test_their_settings_are_those_of_a_config(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, exploration={"kind": "shaken", "count": 7})
    assert config.exploration.model_dump() == {"kind": "shaken", "count": 7}
    with pytest.raises(ValueError, match="unknown key 'number'"):
        tiny_config(tmp_path, exploration={"kind": "shaken", "number": 7})
    with pytest.raises(ValueError, match="candidates"):
        tiny_config(tmp_path, exploration={"kind": "user", "function": "my_explorations:shaken"})
    mine = tiny_config(tmp_path, exploration=MINE).exploration
    assert mine.most_candidates(0) == 12 and mine.pool_files == () and mine.starts_file is None


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"species": ["Au"]}, "exploration.gate.species names Au, which is in no structure"),
        ({"makes": [{"kind": "strained"}]}, "'strained' can make nothing of the start geometries: start geometry 0"),
    ],
)
def test_what_they_have_of_ours_is_checked_as_ours(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_campaign(tiny_config(tmp_path, exploration={"kind": "borrowing", **section}))


# ------------------------------------------------------------------------------------------ what becomes of their finds


def beginning(*labelled: Atoms, sees_state: bool = False) -> Beginning:
    """That of a potential which knows H and O."""

    def check_elements(frames: Sequence[Atoms], source: str) -> None:
        for number, frame in enumerate(frames):
            if set(frame.numbers) - {1, 8}:
                raise InputError(f"{source}, frame {number}")

    potential: Any = SimpleNamespace(check_elements=check_elements, ensemble=SimpleNamespace(sees_state=sees_state))
    return Beginning(potential, [molecule("H2O")], labelled, jax.random.key(3), 0)


def found(frames: Any, given: Beginning, most: int = 12, **system: int) -> list[Atoms]:
    mine = UserExploration(function="my_explorations:these", parameters={"frames": frames}, candidates=most)
    return found_by(mine, given, StateReading(**system), frozenset(), most)


@pytest.mark.usefixtures("installed")
def test_both_find_the_same_and_no_more_than_they_say() -> None:
    given = beginning(molecule("H2O"), molecule("H2O2"))
    kinds = [ExplorationChoice.parse(one) for one in ({"kind": "shaken"}, MINE)]
    package, user = (found_by(one, given, StateReading(), frozenset(), 12) for one in kinds)
    assert [geometry_key(frame) for frame in package] == [geometry_key(frame) for frame in user] and len(user) == 12
    assert found_by(kinds[1], given, StateReading(), {geometry_key(user[0])}, 12)[0] == user[1], "it is in the test set"
    with pytest.raises(InputError, match=r"'user' finds more structures than the 11 of exploration.candidates"):
        found_by(kinds[1], given, StateReading(), frozenset(), 11)
    with pytest.raises(InputError, match=r"'shaken' finds more structures than the 11 of its most_candidates"):
        found_by(kinds[0], given, StateReading(), frozenset(), 11)


@pytest.mark.usefixtures("installed")
def test_what_they_find_has_the_state_of_the_system_and_can_be_labelled() -> None:
    ion, anion, known = (Atoms("OH", [[0, 0, 0], [0, 0, length]]) for length in (0.97, 0.98, 0.99))
    anion.info["charge"] = -1
    (without, with_one) = found([ion, anion, Atoms("H")], beginning(), charge=-1)
    assert without.info == with_one.info == {"charge": -1, "spin": 1}, "and an isolated atom is no candidate"
    known.info["charge"] = 1
    for sees_state, message in ((False, "others of its composition have"), (True, "no labelled structure has")):
        with pytest.raises(InputError, match=rf"exploration 'user', frame 0 \(HO\) has charge and spin .*{message}"):
            found([anion], beginning(known, sees_state=sees_state))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([Atoms("O2", [[0, 0, 0], [0, 0, np.nan]])], r"structure 0 has no atoms, or numbers in positions or cell"),
        ([molecule("H2O2"), Atoms()], "structure 1 has no atoms"),
        ([molecule("H2O2"), "H2O"], r"structure 1 is a str; it should be an ase.Atoms"),
        ([molecule("H2O2"), molecule("CO")], "exploration 'user', frame 1"),
        (None, "must find a list of structures, but finds a NoneType"),
        (molecule("H2O2"), "must find a list of structures, but finds a Atoms"),
    ],
)
def test_what_is_no_structure_is_refused(frames: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        found(frames, beginning())


@pytest.mark.usefixtures("installed")
def test_start_geometries_stay_as_they_are_whatever_is_done_with_them(with_module: Callable[[str, str], Path]) -> None:
    code = "def shake():\n    return lambda given: [start.rattle(0.1) or start for start in given.starts]"
    with_module("my_shakes", code)
    given = beginning()
    mine = UserExploration(function="my_shakes:shake", candidates=1)
    (one,) = found_by(mine, given, StateReading(), frozenset(), 1)
    assert given.starts[0] == molecule("H2O") and one != given.starts[0]


# ----------------------------------------------------------------------------------------------------------- as a stage


class Counting:
    """A potential in its round, whose scores are the numbers of the structures."""

    potential = beginning().potential
    monitor = "force_std_mean"

    def evaluate(self, name: str, structures: Sequence[Atoms], advance: object) -> object:
        assert name == "candidates"
        spread = [np.zeros(len(frame)) for frame in structures]
        scores = {self.monitor: np.arange(len(structures), dtype=float)}
        return SimpleNamespace(scores=scores, atom_scores={"force_std": spread})


@pytest.mark.usefixtures("installed")
def test_a_stage_uses_nothing_but_what_it_is_given(tmp_path: Path) -> None:
    """A round with a dataset on disk, and a potential that scores: no campaign, label source, learner or explorer."""
    here = Round(RunDirectory(tmp_path).create(), 1, "by hand", 7, SilentProgress())
    start, *dataset = [molecule("H2O") for _ in range(4)]
    for n, frame in enumerate(dataset):
        frame.rattle(0.05, seed=n)
        frame.calc = SinglePointCalculator(frame, energy=0.0, forces=np.zeros((3, 3)))
    write_structures(here.folder.create().dataset, dataset)
    trained: Any = Counting()
    inputs: Any = SimpleNamespace(geometries=[start], system=StateReading(), pool_split=SimpleNamespace(rest=()))
    nothing: Any = None
    given = ExplorationInputs(here, trained, inputs, frozenset(), explorers=nothing, budget=nothing)
    exploration = ExplorationChoice.parse({"kind": "shaken", "count": 5})
    assert exploration.stage(given) == {"candidates": 5, "sigma_pool": 2.0}
    found = read_structures(here.folder.pool)
    assert [frame.info["force_std_mean"] for frame in found] == [0, 1, 2, 3, 4]
    withheld = frozenset(geometry_key(frame) for frame in found[:2])
    assert exploration.stage(replace(given, withheld=withheld))["candidates"] == 3
    assert len(read_structures(here.folder.pool)) == 3
    turned = found[3][[2, 0, 1]]
    turned.rotate(70, (1, 2, 3))
    assert exploration.stage(replace(given, held_out=Likeness([turned])))["candidates"] == 4
    assert found[3] not in read_structures(here.folder.pool)


class Partly(Counting):
    monitor = "dipole_std"

    def evaluate(self, name: str, structures: Sequence[Atoms], advance: object) -> object:
        found: Any = super().evaluate(name, structures, advance)
        found.scores[self.monitor][::2] = np.nan
        return found


def test_the_mean_of_a_pool_is_of_those_that_have_the_score(tmp_path: Path) -> None:
    """Periodic structures have no dipole, whose spread is no number; a pool of these alone has no mean."""
    here = Round(RunDirectory(tmp_path).create(), 1, "by hand", 7, SilentProgress())
    here.folder.create()
    trained: Any = Partly()
    frames = [molecule("H2O") for _ in range(5)]
    assert offer(here, frames, trained) == {"candidates": 5, "sigma_pool": 2.0}, "of 1 and 3"
    assert offer(here, frames[:1], trained) == {"candidates": 1, "sigma_pool": None}
    assert mean_score(np.array([np.nan, 2.0, np.inf])) == 2.0 and mean_score(np.zeros(0)) is None
