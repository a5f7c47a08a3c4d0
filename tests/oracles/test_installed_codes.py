"""Codes of electronic structure themselves, where they are installed: forces, and what did not converge."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from almlip_jax.errors import LabelError
from almlip_jax.oracles import CalculatorSettings
from almlip_jax.templates import labelled_by

pytestmark = pytest.mark.slow

_CP2K: dict[str, Any] = {
    "FORCE_EVAL": {
        "DFT": {
            "BASIS_SET_FILE_NAME": "BASIS_MOLOPT",
            "POTENTIAL_FILE_NAME": "GTH_POTENTIALS",
            "MGRID": {"CUTOFF": 200, "REL_CUTOFF": 50},
            "SCF": {"EPS_SCF": 1e-7},
            "XC": {"XC_FUNCTIONAL": {"_": "PADE"}},
        },
        "SUBSYS": {"KIND": {"O": {"BASIS_SET": "SZV-MOLOPT-SR-GTH", "POTENTIAL": "GTH-PADE-q6"}}},
    }
}


def _installed(command: str, variable: str, folder: str, file: str) -> dict[str, Any]:
    """Command and data folder of a program; skips where one is missing."""
    data = Path(os.environ.get(variable, folder))
    if shutil.which(command) is None or not (data / file).exists():
        pytest.skip(f"{command} is not installed, or {data} holds no {file}")
    return {"command": command, "data_dir": data}


def _settings(code: str) -> tuple[CalculatorSettings, dict[str, Any], Atoms]:
    """Settings of a code, parameters with which it cannot converge, and a structure that is not at rest."""
    silicon, oxygen = bulk("Si", a=5.43), Atoms("O2", [[3, 3, 3], [3, 3, 4.28]], cell=[6, 6, 7.3], info={"spin": 3})
    silicon.positions[1] += [0.06, 0.02, -0.03]
    more: dict[str, Any] = {"kpts": (1, 1, 1)}
    atoms = silicon
    if code == "espresso":
        more |= _installed("pw.x", "ESPRESSO_PSEUDO", "/usr/share/espresso/pseudo", "Si.pz-vbc.UPF")
        more["pseudopotentials"] = {"Si": "Si.pz-vbc.UPF"}
        parameters: dict[str, Any] = {"ecutwfc": 12, "conv_thr": 1e-10}
        bad = {**parameters, "electron_maxstep": 1}
    elif code == "gpaw":
        pytest.importorskip("gpaw")
        parameters = {"mode": {"name": "pw", "ecut": 200}, "xc": "LDA", "convergence": {"density": 1e-6}}
        bad = {**parameters, "maxiter": 3}
    elif code == "cp2k":
        more = _installed("cp2k.psmp", "CP2K_DATA_DIR", "/usr/share/cp2k", "BASIS_MOLOPT")
        parameters, atoms = _CP2K, oxygen
        scf = {**_CP2K["FORCE_EVAL"]["DFT"], "SCF": {"EPS_SCF": 1e-7, "MAX_SCF": 2}}
        bad = {"FORCE_EVAL": {**_CP2K["FORCE_EVAL"], "DFT": scf}}
    else:
        if shutil.which("nwchem") is None:
            pytest.skip("nwchem is not installed")
        more, atoms = {"command": "nwchem"}, molecule("OH")
        parameters = {"theory": "dft", "basis": "3-21g", "dft": {"xc": "xpbe96 cpbe96", "iterations": 100}}
        bad = {**parameters, "dft": {"xc": "xpbe96 cpbe96", "iterations": 1}}
    return CalculatorSettings(code=code, parameters=parameters, **more), bad, atoms


@pytest.mark.parametrize("code", ["espresso", "gpaw", "cp2k", "nwchem"])
def test_labels_of_the_code_itself(code: str) -> None:
    settings, bad, atoms = _settings(code)
    label = settings.build()
    first = label(atoms)
    atom, axis = np.unravel_index(np.argmax(np.abs(first.forces)), first.forces.shape)
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[atom, axis] += sign * 0.01
        energies.append(label(moved).energy)
    assert first.forces[atom, axis] == pytest.approx(-(energies[0] - energies[1]) / 0.02, rel=2e-3, abs=0.01)
    assert (first.stress is not None) == atoms.pbc.all()
    assert label(atoms).energy == pytest.approx(first.energy, abs=1e-6)  # nothing is remembered
    with pytest.raises(LabelError, match="did not converge|not converge"):
        settings.model_copy(update={"parameters": bad}).build()(atoms)


def test_cp2k_labels_a_slab_of_a_metal_as_its_template_says() -> None:
    """With less room than there, and an odd number of electrons."""
    given = copy.deepcopy(labelled_by("slab", "cp2k").content["oracle"])
    given |= {
        "kspacing": None,
        "kpts": [1, 1, 1],
        **_installed("cp2k.psmp", "CP2K_DATA_DIR", "/usr/share/cp2k", "BASIS_MOLOPT"),
    }
    force = given["parameters"]["FORCE_EVAL"]
    force["DFT"]["MGRID"] = {"CUTOFF": 100, "REL_CUTOFF": 30}
    force["DFT"]["SCF"]["EPS_SCF"] = 1e-5
    force["SUBSYS"]["KIND"]["Cu"]["BASIS_SET"] = "SZV-MOLOPT-SR-GTH"
    slab = fcc111("Cu", (1, 1, 3), vacuum=5.0)
    slab.rattle(0.05, seed=1)
    found = CalculatorSettings.model_validate(given).build()(slab)
    assert slab.numbers.sum() % 2 == 1 and np.isfinite(found.energy) and found.forces.any() and found.stress is None


def test_nwchem_begins_with_the_orbitals_of_the_label_before(tmp_path: Path) -> None:
    """To the same energy, for density functionals and for Hartree and Fock, of a radical."""
    for theory, block in (("dft", {"xc": "xpbe96 cpbe96", "iterations": 100}), ("scf", {"maxiter": 50})):
        parameters = {"theory": theory, "basis": "3-21g", theory: block}
        settings, _, atoms = _settings("nwchem")
        settings = settings.model_copy(
            update={"parameters": parameters, "reuse": True, "scratch": tmp_path / theory, "keep_files": "all"}
        )
        label, moved = settings.build(), atoms.copy()
        moved.positions[1, 2] += 0.01
        first, second = label(atoms), label(moved)
        alone = settings.model_copy(update={"reuse": False}).build()(moved)
        assert second.energy == pytest.approx(alone.energy, abs=1e-4) and second.energy != first.energy
        np.testing.assert_allclose(second.forces, alone.forces, atol=5e-3)
        outputs = [path.read_text() for path in (tmp_path / theory).glob("*/nwchem.nwo")]
        assert len(outputs) == 3 and sum("Loading old vectors" in output for output in outputs) == 1
