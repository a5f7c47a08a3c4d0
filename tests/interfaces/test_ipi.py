"""i-PI with a potential: its units and signs, what members say in its own format, and short runs by both ways in."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.units import kB

from almlip_jax.errors import InputError
from almlip_jax.interfaces import ipi_driver
from almlip_jax.interfaces.ipi_driver import PotentialDriver
from almlip_jax.potential import Potential
from almlip_jax.potential.states import states_note
from almlip_jax.structures.io import write_structures
from almlip_jax.units import BOHR, HARTREE

needs_ipi = pytest.mark.skipif(find_spec("ipi") is None, reason="i-PI is not installed")


@pytest.fixture(scope="module")
def potential(oxide: Potential) -> Potential:
    return replace(oxide, reference_energies={8: -2.0, 14: -3.0})


@pytest.fixture(scope="module")
def folder(potential, tmp_path_factory) -> Path:
    """A potential, and a crystal in a cell without symmetry, as extended XYZ and as i-PI reads it."""
    path = tmp_path_factory.mktemp("ipi")
    potential.save(path / "potential")
    atoms = bulk("Si", cubic=True)
    atoms.numbers[::2] = 8
    atoms.rattle(0.1, seed=1)
    atoms.set_cell([[5.6, 0, 0], [0.4, 5.5, 0], [-0.3, 0.2, 5.4]], scale_atoms=True)
    write_structures(path / "start.extxyz", [atoms])
    a, b, c, alpha, beta, gamma = atoms.cell.cellpar()
    cell = f"# CELL(abcABC): {a} {b} {c} {alpha} {beta} {gamma} positions{{angstrom}} cell{{angstrom}}"
    lines = [str(len(atoms)), cell]
    lines += [f"{one.symbol} {one.x} {one.y} {one.z}" for one in atoms]
    (path / "start.xyz").write_text("\n".join(lines) + "\n")
    return path


def test_units_signs_and_members(potential, folder):
    driver = PotentialDriver(str(folder / "potential"), str(folder / "start.extxyz"), verbose=True)
    atoms = driver.template.copy()
    atoms.rattle(0.05, seed=2)
    energy, forces, virial, text = driver(atoms.cell.array.T / BOHR, atoms.positions / BOHR)
    found = potential.evaluate([atoms])
    assert energy * HARTREE == pytest.approx(found.energy[0], rel=1e-8)
    np.testing.assert_allclose(forces * HARTREE / BOHR, found.forces[0], atol=1e-5)
    xx, yy, zz, yz, xz, xy = -found.stress[0] * atoms.cell.volume
    np.testing.assert_allclose(virial * HARTREE, [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], atol=1e-4)
    extras = json.loads(text)
    for name, mean, size in (("pot", energy, ()), ("force", forces, (24,)), ("virial", virial, (9,))):
        members = np.array(extras[f"committee_{name}"])
        assert members.shape == (3, *size)
        np.testing.assert_allclose(members.mean(axis=0), np.reshape(mean, size), atol=1e-7, rtol=1e-7)
    assert extras["force_std_max"] == pytest.approx(max(extras["force_std"]), rel=1e-6)
    assert HARTREE * np.std(extras["committee_pot"]) == pytest.approx(extras["energy_std"], rel=1e-3)
    (again, *_), _ = driver([atoms.cell.array.T / BOHR] * 2, [atoms.positions / BOHR, atoms.positions / BOHR + 0.1])
    assert again == pytest.approx(energy, rel=1e-12)
    driver.template.pbc = False
    alone = driver.template.copy()
    energy, forces, virial, text = driver(np.zeros((3, 3)), alone.positions / BOHR)  # a molecule without a box
    found = potential.evaluate([Atoms(alone.numbers, alone.positions)])
    assert energy * HARTREE == pytest.approx(found.energy[0], rel=1e-7)
    np.testing.assert_allclose(forces * HARTREE / BOHR, found.forces[0], atol=1e-5)
    assert not virial.any() and not np.any(json.loads(text)["committee_virial"])
    with pytest.raises(InputError, match="7 atoms and the template 8"):
        driver(atoms.cell.array.T / BOHR, atoms.positions[:7])


def test_parameters_are_those_that_there_are(folder):
    """i-PI hands over whatever a config says, and would not tell of what is never looked at."""
    both = {"potential": str(folder / "potential"), "template": str(folder / "start.extxyz")}
    for parameters, why in (
        ({**both, "skinn": 2.0, "verbosity": "low"}, "no parameter 'skinn'; did you mean 'skin'"),
        ({**both, "skin": "wide"}, "skin is 'wide', and should be a number"),
        ({"potential": both["potential"]}, "potential .* and template .* are needed"),
    ):
        with pytest.raises(InputError, match=why):
            PotentialDriver(**parameters)
    with pytest.warns(UserWarning, match="nothing is made of the parameter 'charge'"):
        PotentialDriver(**both, charge=1)


def test_the_state_is_that_of_the_template_or_the_only_one_that_is_known(potential, folder, tmp_path):
    note = states_note([Atoms("H", info={"charge": 1, "spin": 1})], sees_state=False)
    replace(potential, metadata={**potential.metadata, **note}).save(tmp_path / "ions")
    start = bulk("Si", cubic=True)
    for name, info in (("untold", {}), ("ion", {"charge": 1}), ("anion", {"charge": -1})):
        start.info = info
        write_structures(tmp_path / f"{name}.extxyz", [start])
    for name in ("untold", "ion"):
        driver = PotentialDriver(str(tmp_path / "ions"), str(tmp_path / f"{name}.extxyz"))
        assert driver.template.info == {"charge": 1, "spin": 1}
    with pytest.raises(InputError, match="anion.extxyz: Si8 has charge -1 .* learned of charge 1, spin 1"):
        PotentialDriver(str(tmp_path / "ions"), str(tmp_path / "anion.extxyz"))


def test_each_bead_keeps_its_list(folder):
    driver = PotentialDriver(str(folder / "potential"), str(folder / "start.extxyz"))
    rng, atoms = np.random.default_rng(0), driver.template
    beads = [atoms.positions + shift * rng.normal(size=(8, 3)) for shift in (0.0, 0.4, 0.4)]
    for _ in range(10):
        for bead in beads:
            bead += 0.01
            driver(atoms.cell.array.T / BOHR, bead / BOHR)
    assert [following.follower.builds for _, following in driver._following] == [1, 1, 1]


def test_structures_that_ipi_took_apart_are_refused(folder):
    """With pbc='true' it brings atoms into the cell in open directions too; as a whole they may be anywhere."""
    driver = PotentialDriver(str(folder / "potential"), str(folder / "start.extxyz"))
    driver.template.pbc[2] = False
    cell, start = driver.template.cell.array.T / BOHR, driver.template.positions / BOHR
    whole, *_ = driver(cell, start)
    torn, away = start.copy(), start + 2 * cell[:, 2]
    torn[3:5] -= cell[:, 2]
    away[1] += cell[:, 0]
    assert driver(cell, away)[0] == pytest.approx(whole, rel=1e-8)
    with pytest.raises(InputError, match="atom 3 back into the cell in a direction in which the template is open"):
        driver(cell, torn)


INPUT = """
<simulation mode='static' verbosity='low'>
  <output prefix='run'>
    <properties filename='out'>[step, conserved{{electronvolt}}, potential{{electronvolt}}]</properties>
    <trajectory filename='pot' extra_type='committee_pot'> extras </trajectory>
  </output>
  <total_steps>40</total_steps>
  <prng><seed>7</seed></prng>
  {forcefield}
  <system>
    <initialize nbeads='2'>
      <file mode='xyz'>start.xyz</file>
      <velocities mode='thermal' units='kelvin'>600</velocities>
    </initialize>
    <forces><force forcefield='almlip'/></forces>
    <motion mode='dynamics'>
      <dynamics mode='nve'><timestep units='femtosecond'>0.5</timestep></dynamics>
    </motion>
    <ensemble><temperature units='kelvin'>600</temperature></ensemble>
  </system>
</simulation>
"""
PARAMETERS = "potential: {folder}/potential, template: {folder}/start.extxyz"


def run(folder: Path, forcefield: str, *client: str) -> np.ndarray:
    """Rows of the properties of a run, and of the socket's client, if there is one."""
    for old in folder.glob("run.*"):
        old.unlink()
    (folder / "input.xml").write_text(INPUT.format(forcefield=forcefield))
    programs = Path(sys.executable).parent
    command = [str(programs / "i-pi"), "input.xml"]
    ipi = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if client:
        helper = subprocess.Popen([str(programs / "i-pi-py_driver"), *client], cwd=folder)
    out, _ = ipi.communicate(timeout=500)
    if client:
        helper.wait(timeout=60)
    assert ipi.returncode == 0, out.decode()[-2000:]
    return np.loadtxt(folder / "run.out")


def committee(file: Path) -> np.ndarray:
    """Energies of the members in the frames of a bead, hartree."""
    rows = [line.split() for line in file.read_text().splitlines() if "#" not in line]
    return np.array([[float(word.strip("[],")) for word in row] for row in rows])


def check_reweighting(folder: Path, members: np.ndarray, seen: np.ndarray) -> None:
    """i-PI's own program takes what it was told of the members: averages shift by covariances with their energies."""
    np.savetxt(folder / "members.dat", members)
    np.savetxt(folder / "seen.dat", seen)
    kt = 600 * kB / HARTREE
    program = str(Path(sys.executable).parent / "i-pi-committee-reweight")
    command = [program, "members.dat", "seen.dat", "--kt", str(kt)]
    told = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    mean, error, *each = (float(word) for word in told.split())
    off = members - members.mean(axis=1, keepdims=True)
    wanted = seen.mean() - ((seen - seen.mean())[:, None] * off).mean(axis=0) / kt
    np.testing.assert_allclose(each, wanted, rtol=1e-7)
    assert mean == pytest.approx(seen.mean(), rel=1e-7) and error == pytest.approx(np.std(wanted), rel=1e-3)


@needs_ipi
@pytest.mark.slow
def test_path_integrals_by_both_ways_in(folder):
    """The committee of ffcommittee is ours, conserved energies stay, and the socket gives the same run."""
    file, pars = ipi_driver.__file__, PARAMETERS.format(folder=folder)
    pes = f"<pes>custom</pes><pes_path>{file}</pes_path><parameters>{{{pars}}}</parameters>"
    direct = f"<ffdirect name='inner'>{pes}</ffdirect>"
    first = run(folder, f"<ffcommittee name='almlip'><parse_json>True</parse_json>{direct}</ffcommittee>")
    assert np.ptp(first[:, 1]) < 0.01 * np.ptp(first[:, 2]) and np.ptp(first[:, 2]) > 1e-4
    beads = [committee(folder / f"run.pot_{bead}") for bead in (0, 1)]
    members = HARTREE * beads[0][0]
    check_reweighting(folder, np.mean(beads, axis=0), first[:, 2])
    atoms = PotentialDriver(str(folder / "potential"), str(folder / "start.extxyz")).template
    found = Potential.load(folder / "potential").evaluate([atoms])
    assert members.mean() == pytest.approx(found.energy[0], abs=1e-3) and len(members) == 3
    assert first[0, 2] == pytest.approx(found.energy[0], abs=1e-4)
    socket = "<ffsocket mode='unix' name='almlip'><address>almlip-test</address></ffsocket>"
    options = pars.replace(": ", "=").replace(", ", ",")
    second = run(folder, socket, "-u", "-a", "almlip-test", "-m", "custom", "-P", file, "-o", options)
    np.testing.assert_allclose(second[:, 2], first[:, 2], atol=1e-6)
