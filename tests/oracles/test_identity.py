"""A label's identity changes with everything that decides the label, and with nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.oracles import TBLiteSettings, structure_identity
from almlip_jax.oracles.sources.dft import PySCFSettings
from almlip_jax.oracles.sources.labelled_file import FileSettings


def _changed(atoms: Atoms, change: Callable[[Atoms], None]) -> Atoms:
    atoms = atoms.copy()
    change(atoms)
    return atoms


def _one_ulp(atoms: Atoms) -> None:
    atoms.positions[3, 1] = np.nextafter(atoms.positions[3, 1], 10)


CHANGES: dict[str, Callable[[Atoms], None]] = {
    "one ulp in a position": _one_ulp,
    "cell": lambda a: a.set_cell([9, 9, 9]),
    "pbc": lambda a: a.set_pbc(True),
    "charge": lambda a: a.info.update(charge=2),
    "spin": lambda a: a.info.update(spin=3),
    "species": lambda a: a.numbers.__setitem__(6, 9),
    "order of atoms": lambda a: a.positions.__setitem__([3, 4], a.positions[[4, 3]]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_decides_a_label_changes_its_identity(name: str, zundel: Atoms) -> None:
    zundel.set_cell([8, 8, 8])
    oracle = TBLiteSettings()
    assert structure_identity(_changed(zundel, CHANGES[name]), oracle) != structure_identity(zundel, oracle)


def test_settings_and_source_change_the_identity(zundel: Atoms) -> None:
    sources = [
        TBLiteSettings(),
        TBLiteSettings(accuracy=0.5),
        TBLiteSettings(method="GFN1-xTB"),
        PySCFSettings(),
        PySCFSettings(density_fit=False),
    ]
    assert len({structure_identity(zundel, source) for source in sources}) == len(sources)


def test_version_of_the_source_changes_the_identity(zundel: Atoms, monkeypatch: pytest.MonkeyPatch) -> None:
    before = structure_identity(zundel, TBLiteSettings())
    monkeypatch.setattr(TBLiteSettings, "version", lambda self: "tblite 99.0")
    assert structure_identity(zundel, TBLiteSettings()) != before


def test_content_of_a_labelled_file_decides_and_its_place_does_not(zundel: Atoms, tmp_path: Path) -> None:
    for name, content in {"a": "1", "b": "1", "c": "2"}.items():
        (tmp_path / name).write_text(content)
    a, b, c = (structure_identity(zundel, FileSettings(path=tmp_path / name)) for name in "abc")
    assert a == b != c


def test_limits_and_bookkeeping_do_not_change_the_identity(zundel: Atoms) -> None:
    identity = structure_identity(zundel, TBLiteSettings())
    assert len(identity) == 64 and int(identity, 16) >= 0
    assert structure_identity(zundel, TBLiteSettings(timeout=1, max_force=7, attempts=3)) == identity
    zundel.info.update(step=3, spin=1)
    zundel.set_momenta(np.ones((7, 3)))
    assert structure_identity(zundel, TBLiteSettings()) == identity


def test_negative_zero_is_zero() -> None:
    minus, plus = Atoms("H", [[-0.0, 0, 0]]), Atoms("H", [[0.0, 0, 0]])
    assert structure_identity(minus, TBLiteSettings()) == structure_identity(plus, TBLiteSettings())


def test_identity_is_the_same_in_another_process(zundel: Atoms) -> None:
    code = (
        "from ase import Atoms; from almlip_jax.oracles import *; import sys;"
        f"zundel = Atoms('O2H5', {zundel.positions.tolist()!r}, info=dict(charge=1));"
        "print(structure_identity(zundel, TBLiteSettings()));"
        "assert 'jax' not in sys.modules and 'tblite' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == structure_identity(zundel, TBLiteSettings())


@pytest.mark.parametrize("key, value", [("charge", 0.5), ("charge", "one"), ("spin", 0)])
def test_charge_and_spin_must_make_sense(key: str, value: object, zundel: Atoms) -> None:
    zundel.info[key] = value
    with pytest.raises(InputError, match=f"H5O2: {key} is"):
        structure_identity(zundel, TBLiteSettings())
