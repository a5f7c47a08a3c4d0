"""A user's own label source: a function or an ASE calculator, in workers, bound to its code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles import Labeller, LabelStore, LocalSettings, UserSourceSettings, structure_identity
from almlip_jax.oracles.sources import user

Waters = Callable[..., list[Atoms]]

TRAP = """
import numpy as np

def trap(stiffness=1.0):
    def label(atoms):
        x = atoms.positions
        return 0.5 * stiffness * np.sum(x**2), -stiffness * x
    return label

def emt(**parameters):
    from ase.calculators.emt import EMT
    return EMT(**parameters)

def bad():
    return lambda atoms: 1.0

def number():
    return 7
"""


@pytest.fixture
def trap(with_module: Callable[[str, str], Path]) -> Iterator[Path]:
    """The module ``trap_label`` of a user."""
    user.source_digest.cache_clear()
    yield with_module("trap_label", TRAP)
    user.source_digest.cache_clear()


def source(name: str, **settings: object) -> UserSourceSettings:
    return UserSourceSettings(function=f"trap_label:{name}", **settings)


def test_functions_and_calculators_label(trap: Path) -> None:
    water, copper = molecule("H2O"), bulk("Cu", cubic=True)
    found = source("trap", parameters={"stiffness": 2.0}).build()(water)
    assert found.energy == np.sum(water.positions**2) and np.all(found.forces == -2 * water.positions)
    copper.rattle(0.05, seed=1)
    for reuse in (False, True):
        label = source("emt", reuse=reuse).build()
        label(bulk("Cu", cubic=True))
        found = label(copper)
        copper.calc = EMT()
        if not reuse:  # a calculator that is kept remembers the neighbours of structures before
            assert found.energy == copper.get_potential_energy() and np.all(found.forces == copper.get_forces())
        assert found.energy == pytest.approx(copper.get_potential_energy(), abs=1e-9)
        assert found.stress == pytest.approx(copper.get_stress(), abs=1e-12)
        copper.calc = None


def test_what_cannot_label_says_so(trap: Path) -> None:
    with pytest.raises(LabelError, match=r"returned no \(energy, forces\)"):
        source("bad").build()(molecule("H2O"))
    with pytest.raises(InputError, match=r"a function of structures or an ASE calculator, but returns a int"):
        source("number").build()
    with pytest.raises(InputError, match="has no function 'none'"):
        source("none").build()
    with pytest.raises(InputError, match="the source of 'not_there' cannot be found"):
        UserSourceSettings(function="not_there:f").version()
    ion = molecule("OH")
    ion.info["charge"] = -1
    with pytest.raises(LabelError, match="charge -1 and multiplicity 2; set oracle.charge_and_spin"):
        source("trap").build()(ion)
    assert source("trap", charge_and_spin=True).build()(ion).energy > 0


def test_the_code_is_part_of_the_identity(trap: Path) -> None:
    water = molecule("H2O")

    def identities() -> list[str]:
        user.source_digest.cache_clear()
        given = [{}, {"parameters": {"stiffness": 2}}, {"code_version": "1"}, {"code_version": "2"}]
        return [structure_identity(water, source("trap", **one)) for one in (*given, {"charge_and_spin": True})]

    before = identities()
    assert len(set(before)) == 4 and before[4] == before[0]
    trap.write_text(TRAP.replace("0.5 *", "0.7 *"))
    after = identities()
    assert [old != new for old, new in zip(before, after, strict=True)] == [True, True, False, False, True]


def test_the_whole_package_is_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "trap_package" / "inner"
    folder.mkdir(parents=True)
    for file in (folder.parent / "__init__.py", folder / "__init__.py", folder / "made.py"):
        file.write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = user.source_digest.__wrapped__("trap_package")
    assert user.source_digest.__wrapped__("trap_package") == before and "trap_package" not in sys.modules
    (folder / "made.py").write_text("x = 1")
    assert user.source_digest.__wrapped__("trap_package") != before


def test_workers_calculate_with_the_code_that_labels_are_told_by(trap: Path, waters: Waters, tmp_path: Path) -> None:
    frames = waters(3)
    with LabelStore(tmp_path / "labels.db") as store:
        with Labeller(source("trap"), store, LocalSettings(workers=1)) as labeller:
            found = labeller.label(frames[:2], {"purpose": "train"})
            expected = [0.5 * np.sum(frame.positions**2) for frame in frames[:2]]
            assert [one.atoms.get_potential_energy() for one in found] == expected
        with Labeller(source("trap"), store, LocalSettings(workers=1)) as labeller:
            trap.write_text(TRAP.replace("0.5 *", "0.7 *"))  # while the program runs
            with pytest.raises(InputError, match="'user' calculates has changed since this program began; resume"):
                labeller.label(frames, {"purpose": "train"})
        assert store.count_calls() == 2


PLUGIN = '''
import sys
from typing import Literal
import numpy as np
from almlip_jax.oracles import Results, SourceSettings

class FlatSettings(SourceSettings):
    """The same energy everywhere."""

    kind: Literal["flat"] = "flat"
    energy: float = 1.0

    def version(self):
        return "1"

    def build(self):
        return lambda atoms: Results(self.energy + ("jax" in sys.modules), np.zeros((len(atoms), 3)))
'''
USE = """
import sys
from ase.build import molecule
from almlip_jax.oracles import LabelStore, SourceSettings, label_structures

with LabelStore(sys.argv[1]) as store:
    source = SourceSettings.parse({"kind": "flat", "energy": 3})
    (found,) = label_structures([molecule("H2O")], source, store, provenance={"purpose": "train"})
print(found.error, found.atoms and found.atoms.get_potential_energy(), "jax" in sys.modules)
"""


def test_a_label_source_of_another_package(with_package: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    environment = with_package(PLUGIN)
    command = [sys.executable, "-c", USE, str(tmp_path / "labels.db")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout == "None 3.0 False\n", done.stderr[-2000:]
