"""LAMMPS with a potential: the numbers of `evaluate`, whatever LAMMPS does with its atoms, and scripts that stop."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from typer.testing import CliRunner

from almlip_jax import cli
from almlip_jax.errors import InputError
from almlip_jax.interfaces.lammps import AttachedPotential, Coupling, attach
from almlip_jax.interfaces.lammps_script import run_script, started
from almlip_jax.interfaces.lammps_text import Copies, pieces_of, without_quit
from almlip_jax.interfaces.recording import Recording
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures

QUIET = ("-screen", "none", "-log", "none")
BAR = 1e5 * units.Pascal


@pytest.fixture(scope="module")
def potential(oxide: Potential) -> Potential:
    return oxide


@pytest.fixture(scope="module")
def lammps() -> Callable[..., Any]:
    try:
        started(QUIET).close()
    except InputError as error:
        pytest.skip(f"LAMMPS cannot be started here: {error}")
    return started


@pytest.fixture
def lmp(lammps) -> Iterator[Any]:
    running = lammps(QUIET)
    yield running
    running.close()


def crystal() -> Atoms:
    """A triclinic cell of two elements as LAMMPS has it, atoms well apart and some of them outside."""
    cell = np.array([[5.4, 0, 0], [1.1, 5.6, 0], [-0.9, 1.3, 5.2]])
    grid = np.stack(np.meshgrid(*[[0.0, 0.5]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    atoms = Atoms(numbers=[14, 8, 8, 14, 8, 14, 14, 8], scaled_positions=grid, cell=cell, pbc=True)
    atoms.rattle(0.15, seed=1)
    atoms.positions += [0.2, -0.4, 7.0]
    return atoms


def setup(atoms: Atoms, *, style: str = "pair_style none", of_units: str = "metal") -> list[str]:
    """Commands that make the atoms; types are 1 for silicon and 2 for oxygen."""
    a, b, c = atoms.cell.array
    box = f"prism 0 {a[0]} 0 {b[1]} 0 {c[2]} {b[0]} {c[0]} {c[1]}"
    lines = [f"units {of_units}", "atom_style atomic", "atom_modify map array sort 5 2.0", "boundary p p p"]
    lines += ["box tilt large", f"region box {box} units box", "create_box 2 box"]
    for number, (x, y, z) in zip(atoms.numbers, atoms.positions.tolist(), strict=True):
        lines.append(f"create_atoms {1 if number == 14 else 2} single {x!r} {y!r} {z!r} units box")
    return [*lines, "mass 1 28.085", "mass 2 15.999", style, "thermo_modify norm no", "timestep 0.0005"]


def wrapped(atoms: Atoms) -> Atoms:
    """As `create_atoms` takes them: inside the cell."""
    inside = atoms.copy()
    inside.wrap()
    return inside


def attached_to(lmp: Any, potential: Potential, lines: list[str], **coupling: Any) -> AttachedPotential:
    lmp.commands_list(lines)
    return attach(lmp, potential, Coupling(**coupling))


def of_atoms(lmp: Any, name: str) -> np.ndarray:
    """A property of the atoms in the order of their IDs, without images."""
    count = lmp.extract_setting("nlocal")
    order = np.argsort(lmp.numpy.extract_atom("id")[:count])
    return np.array(lmp.numpy.extract_atom(name)[:count])[order]


def pressure_of(lmp: Any) -> np.ndarray:
    """ASE's stress, eV/Angstrom^3, from the pressure tensor in bar."""
    return -BAR * np.array([lmp.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")])


def test_energies_forces_and_pressures_are_those_of_evaluate(lmp, potential):
    atoms = wrapped(crystal())
    found = potential.evaluate([atoms])
    ours = attached_to(lmp, potential, setup(atoms), per_atom=("force_std", "energies", "stresses"))
    lmp.command("compute each all pe/atom")
    lmp.command("compute virials all stress/atom NULL virial")
    lmp.command("compute virial all reduce sum c_virials[1] c_virials[4]")
    lmp.command("compute total all reduce sum c_each")
    lmp.command("compute spread all property/atom d_almlip_force_std")
    lmp.command("compute largest all reduce max c_spread")
    lmp.command("thermo_style custom step pe press c_total c_largest c_virial[*] v_almlip_force_std_max")
    ours.command("run 0")
    assert lmp.get_thermo("pe") == pytest.approx(found.energy[0], abs=1e-5, rel=1e-9)
    np.testing.assert_allclose(of_atoms(lmp, "f"), found.forces[0], atol=1e-5)
    np.testing.assert_allclose(pressure_of(lmp), found.stress[0], atol=1e-6)
    spread = of_atoms(lmp, "d_almlip_force_std")
    np.testing.assert_allclose(spread, found.atom_scores["force_std"][0], atol=1e-5)
    virial = BAR * np.array([lmp.extract_compute("virial", 0, 1)[n] for n in range(2)]) / atoms.cell.volume
    np.testing.assert_allclose(virial, found.stress[0][[0, 5]], atol=1e-6)
    assert lmp.extract_compute("total", 0, 0) == pytest.approx(found.energy[0], rel=1e-7)
    assert lmp.extract_compute("largest", 0, 0) == pytest.approx(found.scores["force_std_max"][0], rel=1e-4)
    for name, values in found.scores.items():
        assert lmp.extract_variable(f"almlip_{name}") == pytest.approx(values[0], rel=1e-3, abs=1e-6)
    members = [lmp.extract_variable(f"almlip_energy_{member}") for member in (1, 2, 3)]
    assert np.std(members) == pytest.approx(found.scores["energy_std"][0], rel=1e-3)
    assert np.mean(members) == pytest.approx(found.energy[0], rel=1e-9)
    assert ours.evaluations == 1


def test_units_real_are_converted(lmp, potential):
    atoms = wrapped(crystal())
    found = potential.evaluate([atoms])
    lines = [line for line in setup(atoms, of_units="real") if not line.startswith("timestep")]
    attached_to(lmp, potential, lines).command("run 0")
    unit = units.kcal / units.mol
    assert unit * lmp.get_thermo("pe") == pytest.approx(found.energy[0], rel=1e-6)
    np.testing.assert_allclose(unit * of_atoms(lmp, "f"), found.forces[0], rtol=1e-5, atol=1e-5)
    pressure = -1.01325 * BAR * lmp.get_thermo("pxy")
    assert pressure == pytest.approx(found.stress[0][5], rel=1e-4)


def test_dynamics_are_those_of_ase(lmp, potential):
    """While LAMMPS sorts atoms and brings them back into the cell; without a list for each of that."""
    atoms = wrapped(crystal())
    ours = attached_to(lmp, potential, setup(atoms))
    lmp.command("velocity all create 900 7 mom yes")
    velocities = of_atoms(lmp, "v") / (1000 * units.fs)  # Angstrom/ps
    lmp.commands_list(["fix move all nve", "neigh_modify every 1 delay 0 check no", "neighbor 0.5 bin"])
    ours.command("run 60")
    lmp.command("reset_timestep 60")
    atoms.set_velocities(velocities)
    atoms.calc = potential.calculator()
    VelocityVerlet(atoms, 0.5 * units.fs).run(60)
    places = of_atoms(lmp, "x")
    off = np.linalg.solve(atoms.cell.array.T, (places - atoms.positions).T)
    np.testing.assert_allclose(off - np.round(off), 0, atol=2e-5)
    np.testing.assert_allclose(of_atoms(lmp, "f"), atoms.get_forces(), atol=2e-3)
    assert ours.following.follower.builds < 15 and ours.evaluations == 61


def test_a_restart_goes_on_as_if_nothing_had_been(lammps, potential, tmp_path):
    atoms = wrapped(crystal())
    ends = []
    for parts in ((40,), (20, 20)):
        running = lammps(QUIET)
        ours = attached_to(running, potential, setup(atoms))
        running.commands_list(["velocity all create 600 7", "fix move all nve", f"run {parts[0]}"])
        if len(parts) == 2:
            running.command(f"write_restart {tmp_path / 'half'}")
            running.command("clear")
            lines = [f"read_restart {tmp_path / 'half'}", "pair_style none", "timestep 0.0005", "fix move all nve"]
            ours = attached_to(running, potential, lines)
            ours.command(f"run {parts[1]}")
        ends.append(of_atoms(running, "v"))
        running.close()
    np.testing.assert_allclose(*ends, atol=1e-3)


def test_a_group_is_all_that_it_sees(lmp, potential):
    """The pair style acts on all atoms, the potential on its group, as if nothing else were there."""
    atoms = wrapped(crystal())
    lj = ["pair_style lj/cut 4.0", "pair_coeff * * 0.01 2.0"]
    lmp.commands_list([*setup(atoms, style=lj[0]), lj[1], "run 0"])
    alone = of_atoms(lmp, "f")
    lmp.command("group silicon type 1")
    attach(lmp, potential, Coupling(fix="ml", group="silicon")).command("run 0")
    silicon = atoms[atoms.numbers == 14]
    expected = alone.copy()
    expected[atoms.numbers == 14] += potential.evaluate([silicon]).forces[0]
    np.testing.assert_allclose(of_atoms(lmp, "f"), expected, atol=1e-5)
    spread = of_atoms(lmp, "d_ml_force_std")
    assert (spread[atoms.numbers == 14] > 0).all() and not spread[atoms.numbers == 8].any()


def test_a_group_that_is_filled_anew_is_what_it_sees_then(lmp, potential):
    """The same atoms in memory, others of them in the group: forces and spreads are those of the new ones alone."""
    atoms = wrapped(crystal())
    lmp.commands_list([*setup(atoms, style="pair_style zero 4.0"), "pair_coeff * *", "group ml id 1:3"])
    ours = attach(lmp, potential, Coupling(fix="ml", group="ml"))
    for first, last in ((1, 3), (4, 8), (2, 4)):
        lmp.command("group ml clear")
        lmp.command(f"group ml id {first}:{last}")
        ours.command("run 0")
        inside = slice(first - 1, last)
        found, expected = potential.evaluate([atoms[inside]]), np.zeros((8, 3))
        expected[inside] = found.forces[0]
        np.testing.assert_allclose(of_atoms(lmp, "f"), expected, atol=1e-5)
        assert lmp.get_thermo("pe") == pytest.approx(found.energy[0], abs=1e-4)
        assert np.flatnonzero(of_atoms(lmp, "d_ml_force_std")).tolist() == list(range(first - 1, last))


@pytest.mark.parametrize("elements", [None, ["Si", "O", "Ar", "Si"]])
def test_types_of_others_may_be_any_element(lmp, potential, elements):
    """Argon of the pair style beside a potential that knows none, and a type that no atom has."""
    atoms = wrapped(crystal())
    lines = [line.replace("create_box 2", "create_box 4") for line in setup(atoms, style="pair_style lj/cut 4.0")]
    lines += ["create_atoms 3 single 1.4 1.2 1.3 units box", "mass 3 39.948", "mass 4 1.0"]
    lmp.commands_list([*lines, "pair_coeff * * 0 2.0", "pair_coeff 3 3 0.01 2.0", "group ml type 1 2"])
    attach(lmp, potential, Coupling(group="ml", elements=elements)).command("run 0")
    np.testing.assert_allclose(of_atoms(lmp, "f")[:8], potential.evaluate([atoms]).forces[0], atol=1e-5)
    with pytest.raises(InputError, match=r"type 3 (are Ar|have a mass of 39.948 amu), which.*leave them out of"):
        attach(lmp, potential, Coupling(fix="all", elements=elements)).command("run 0")


def test_a_molecule_is_relaxed_within_walls_that_shrink(lmp, potential):
    """Open boundaries, and energies that a minimiser believes."""
    lines = ["units metal", "boundary s s s", "region box block -9 9 -9 9 -9 9", "create_box 2 box"]
    lines += ["create_atoms 1 single 0 0 0", "create_atoms 2 single 1.1 0.2 0", "create_atoms 2 single -0.4 1.2 0.1"]
    ours = attached_to(lmp, potential, [*lines, "mass 1 28.085", "mass 2 15.999", "pair_style none"])
    ours.command("run 0")
    start, before = lmp.get_thermo("pe"), np.abs(of_atoms(lmp, "f")).max()
    ours.command("minimize 0 1e-3 100 1000")
    atoms = Atoms("SiO2", of_atoms(lmp, "x"))
    assert lmp.get_thermo("pe") == pytest.approx(potential.evaluate([atoms]).energy[0], abs=1e-4)
    assert lmp.get_thermo("pe") < start and np.abs(of_atoms(lmp, "f")).max() < before / 10


def test_what_goes_wrong_in_a_step_ends_the_run(lmp, potential):
    ours = attached_to(lmp, potential, setup(wrapped(crystal())))
    lmp.command("fix move all nve")
    ours.command("run 1")
    calls = []

    def fail(*_: object) -> None:
        calls.append(1)
        raise InputError("no more of this.")

    ours.observe = fail
    with pytest.raises(InputError, match="no more of this"):
        ours.command("run 1000")
    assert calls == [1] and int(lmp.extract_global("ntimestep")) < 10


def test_what_cannot_be_served_is_refused(lammps, potential):
    atoms = wrapped(crystal())

    def refused(lines: list[str], match: str, **coupling: Any) -> None:
        running = lammps(QUIET)
        with pytest.raises(InputError, match=match):
            attached_to(running, potential, lines, **coupling).command("run 0")
        running.close()

    plain = setup(atoms)
    refused(["units lj", *plain[1:-1]], "units 'lj'; a potential works in metal or real")
    refused([*plain, "mass 2 2.014"], "type 2 have a mass of 2.014 amu, which is not that of one of O, Si")
    refused(plain, "2 types of atoms; give one for each", elements=["Si"])
    refused(plain, "type 2 are C, which is not that of one of O, Si", elements=["Si", "C"])
    refused([*plain, "labelmap atom 1 Si 2 glass"], "type 2 have a label, which is not that of one of O, Si")
    refused(plain, "'Qq' is not a chemical element", elements=["Si", "Qq"])
    refused(plain, "'force' is no number of each atom", per_atom=("force",))
    refused([*plain, "group none empty"], "holds no atom", group="none")


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["linear", "all"])
def test_grades_over_an_active_set_are_variables(lmp, potential, parameters):
    atoms = wrapped(crystal())
    known = [atoms.copy() for _ in range(4)]
    for number, one in enumerate(known):
        one.rattle(0.1, seed=number)
    grades = potential.spanning(known, {"parameters": parameters})
    ours = attached_to(lmp, grades, setup(atoms), per_atom=("force_std", "atom_extrapolation_grade"))
    ours.command("run 0")
    found = grades.evaluate([atoms])
    assert lmp.extract_variable("almlip_extrapolation_grade") == pytest.approx(
        found.scores["extrapolation_grade"][0], rel=1e-2
    )
    each = of_atoms(lmp, "d_almlip_atom_extrapolation_grade")
    np.testing.assert_allclose(each, found.atom_scores["extrapolation_grade"][0], rtol=1e-2, atol=1e-3)


def test_type_labels_say_elements(lmp, potential):
    atoms = wrapped(crystal())
    lines = [*setup(atoms), "labelmap atom 1 O 2 Si", "mass 1 15.999", "mass 2 28.085"]
    attached_to(lmp, potential, lines).command("run 0")
    other = atoms.copy()
    other.numbers = 22 - atoms.numbers
    np.testing.assert_allclose(of_atoms(lmp, "f"), potential.evaluate([other]).forces[0], atol=1e-5)


def test_labels_and_masses_of_two_elements_are_not_passed_over(lmp, potential):
    lines = [*setup(wrapped(crystal())), "labelmap atom 1 O 2 Si"]
    ours = attached_to(lmp, potential, lines)
    with pytest.raises(InputError, match="type 1 have the label O, and a mass of 28.085 amu, .* that of Si; correct"):
        ours.command("run 0")


@pytest.mark.parametrize(
    ("masses", "told"), [((28.085, 17.999), None), ((72.63, 3.024), "Si.* 72.63 amu.* of Ge; .*for Si")]
)
def test_masses_of_isotopes_are_those_of_no_other_element(lmp, potential, masses, told):
    """A mass of an element that the potential does not know may be a coarse one; it is told."""
    lines = [*setup(wrapped(crystal())), "labelmap atom 1 Si 2 O", f"mass 1 {masses[0]}", f"mass 2 {masses[1]}"]
    ours = attached_to(lmp, potential, lines)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.command("run 0")
    assert len(caught) == (told is not None)
    assert told is None or re.search(told, str(caught[0].message))


def test_elements_in_another_order_than_masses_are_told_of(lmp, potential):
    """They are taken as they were said, and nothing is told of masses of elements that are not known, or of none."""
    for masses, told in (((28.085, 15.999), "type 1 are O, as was said, .* 28.085 .* of Si"), ((4.5, 72.63), None)):
        lines = [*setup(wrapped(crystal())), *(f"mass {n} {mass}" for n, mass in enumerate(masses, 1))]
        ours = attached_to(lmp, potential, ["clear", *lines], elements=["O", "Si"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours.command("run 0")
            ours.command("run 0")
        assert len(caught) == (told is not None)
        assert told is None or re.search(told, str(caught[0].message))


def test_a_run_stays_one_while_labels_are_looked_for(lmp, potential):
    """LAMMPS takes a run for ended wherever it has found an error, that there are no labels too."""
    ours = attached_to(lmp, potential, setup(wrapped(crystal())))
    lmp.commands_list(["variable far equal elapsed", "thermo_style custom step v_far", "fix move all nve"])
    ours.command("run 2")
    assert lmp.get_thermo("step") == 2


# ------------------------------------------------------------------------------------------------------------ scripts


def script(folder: Path, *lines: str) -> Path:
    path = folder / "in.test"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_a_script_that_uncertainty_stopped_feeds_labels(lammps, potential, tmp_path):
    """From the command line: NPT, a halt on the spread, the frame it stopped at, and labels of it."""
    atoms = wrapped(crystal())
    level = 1.05 * potential.evaluate([atoms]).scores["force_std_max"][0]
    path = script(
        tmp_path,
        *setup(atoms),
        "fix ml all external pf/callback 1 1  # here",
        "velocity all create 3000 7",
        "fix move all npt temp 3000 3000 0.05 tri 0 0 0.5",
        f"fix stop all halt 1 v_ml_force_std_max > {level} error continue",
        f"dump frames all custom 10 {tmp_path}/frames.dump id type x y z d_ml_force_std",
        "variable left loop 2",
        "label again",
        "run 200",
        "next left",
        "jump SELF again",
        f"print $(step) file {tmp_path}/steps",
    )
    potential.save(tmp_path / "potential")
    uncertain = tmp_path / "uncertain.extxyz"
    command = [sys.executable, "-m", "almlip_jax.cli", "lammps", str(tmp_path / "potential"), str(path), *QUIET]
    options = ["--record", str(uncertain), "--above", str(level), "--every", "1000", "--json", str(tmp_path / "j")]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "j").read_text())
    frame, after = read_structures(uncertain)  # the last frames of both runs: the second is halted at its first step
    assert told["recorded"] == 2 and after.info["step"] == frame.info["step"] + 1
    assert frame.calc is None and frame.info["force_std_max"] > level
    assert sorted(frame.numbers) == sorted(atoms.numbers) and frame.pbc.all()
    found = potential.evaluate([frame])
    assert found.scores["force_std_max"][0] == pytest.approx(frame.info["force_std_max"], rel=1e-3)
    assert int((tmp_path / "steps").read_text()) < 400 and (tmp_path / "frames.dump").stat().st_size > 0
    config = tmp_path / "config.yaml"
    config.write_text(
        f"oracle: {{kind: potential, path: {tmp_path}/potential, any_state: true}}\n"
    )
    label = [sys.executable, "-m", "almlip_jax.cli", "label", str(config), str(uncertain)]
    done = subprocess.run([*label, "--out", str(tmp_path / "labelled.extxyz")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    labelled, _ = read_structures(tmp_path / "labelled.extxyz", require_labels=True)
    np.testing.assert_allclose(labelled.get_forces(), found.forces[0], atol=1e-4)


def test_a_script_may_be_in_error(lammps, potential, tmp_path):
    fix = "fix almlip all external pf/callback 1 1"
    path = script(tmp_path, *setup(wrapped(crystal())), fix, "fix move all nonsense", "run 1")
    with pytest.raises(InputError, match="in.test: LAMMPS stopped with.*nonsense"):
        run_script(potential, path, arguments=QUIET)
    lines = [line for line in setup(wrapped(crystal())) if not line.startswith("mass 2")]
    path = script(tmp_path, *lines, "mass 2 1.0", fix, "run 1")
    with pytest.raises(InputError, match="type 2 have a mass of 1 amu"):
        run_script(potential, path, arguments=QUIET, recording=Recording(tmp_path / "none.extxyz"))


def test_labels_of_types_come_before_the_potential(lammps, potential, tmp_path):
    late = ("fix almlip all external pf/callback 1 1", "labelmap atom 1 Si 2 O", "run 0")
    path = script(tmp_path, *setup(wrapped(crystal())), *late)
    with pytest.raises(InputError, match="in.test gives types their labels after a line.*put labelmap before it"):
        run_script(potential, path, arguments=QUIET)
    assert run_script(potential, path, coupling=Coupling(elements=["Si", "O"]), arguments=QUIET).evaluations == 1


def test_each_of_several_fixes_says_what_went_wrong(lammps, potential, tmp_path):
    """A mass of no element in the first group, nothing wrong in the second."""
    lines = [*setup(wrapped(crystal())), "group a type 2", "group b type 1", "mass 2 3.0"]
    lines += ["fix a a external pf/callback 1 1", "fix b b external pf/callback 1 1", "run 0", "quit"]
    with pytest.raises(InputError, match="type 2 have a mass of 3 amu"):
        run_script(potential, script(tmp_path, *lines), arguments=QUIET)


def test_a_run_that_is_started_again_loses_no_frame(lammps, potential, tmp_path):
    path = script(tmp_path, *setup(wrapped(crystal())), "fix almlip all external pf/callback 1 1", "run 2")
    frames = Recording(tmp_path / "made" / "frames.extxyz", above=1e-9)
    assert run_script(potential, path, arguments=QUIET, recording=frames).recorded == 3
    with pytest.raises(InputError, match="threshold .* is not a number"):
        run_script(potential, path, arguments=QUIET, recording=replace(frames, above=math.nan))
    written = frames.file.read_bytes()
    with pytest.raises(InputError, match=r"frames.extxyz is there already.*--append"):
        run_script(potential, path, arguments=QUIET, recording=replace(frames, above=1e9))
    assert frames.file.read_bytes() == written
    assert run_script(potential, path, arguments=QUIET, recording=replace(frames, append=True)).recorded == 3
    assert frames.file.read_bytes() == 2 * written
    with pytest.raises(InputError, match="frames.cfg should end in .extxyz or .xyz"):
        run_script(potential, path, arguments=QUIET, recording=Recording(tmp_path / "frames.cfg"))
    assert not (tmp_path / "frames.cfg").exists()


@pytest.mark.parametrize("after", [("run 0",), ("run 60 every 20 NULL",), ("reset_timestep 0", "run 1"), ()])
def test_the_frame_of_a_halt_is_recorded_whatever_every_says(lammps, potential, tmp_path, after):
    """The first uncertain frame is that of the start, the next one that of the halt; what lies between is left out."""
    atoms = wrapped(crystal())
    lines = ["fix ml all external pf/callback 1 1", "velocity all create 900 7", "fix move all nve"]
    halt = "fix stop all halt 1 v_past > 6.5 error continue"
    lines += ["variable past equal step*(v_ml_force_std_max>0)", halt, "run 50", f"print $(step) file {tmp_path}/at"]
    path = script(tmp_path, *setup(atoms), *lines, "unfix stop", *after)
    recording = Recording(tmp_path / "frames.extxyz", every=1000)
    run_script(potential, path, arguments=QUIET, recording=recording)
    assert (tmp_path / "at").read_text().split() == ["7"]
    steps = {"run 0": [0, 7], "run 60 every 20 NULL": [0, 7, 67], "reset_timestep 0": [0, 7, 1]}
    frames = read_structures(recording.file)
    assert [frame.info["step"] for frame in frames] == steps.get(after[0] if after else "", [0, 7])
    found = potential.evaluate([frames[1]])
    assert frames[1].info["predicted_energy"] == pytest.approx(found.energy[0], abs=1e-4)


def test_a_halt_within_a_part_of_a_run_is_told_from_the_end_of_a_part(lammps, potential, tmp_path):
    """Of a run in parts of 5 steps, one of which stops early."""
    lines = ["fix ml all external pf/callback 1 1", "velocity all create 900 7", "fix move all nve"]
    lines += ["variable past equal step==7", "fix stop all halt 1 v_past > 0.5 error continue", "run 20 every 5 NULL"]
    path = script(tmp_path, *setup(wrapped(crystal())), *lines)
    recording = Recording(tmp_path / "frames.extxyz", every=1000)
    run_script(potential, path, arguments=QUIET, recording=recording)
    steps = [frame.info["step"] for frame in read_structures(recording.file)]
    assert steps == [0, 7, 17]


def test_a_halt_that_is_an_error_leaves_its_frame(lammps, potential, tmp_path):
    lines = ["fix ml all external pf/callback 1 1", "velocity all create 900 7", "fix move all nve"]
    lines += ["variable at equal step", "fix stop all halt 2 v_at > 5 error hard", "run 50"]
    recording = Recording(tmp_path / "frames.extxyz", every=4)
    with pytest.raises(InputError, match="Fix halt condition for fix-id stop met on step 6"):
        run_script(
            potential, script(tmp_path, *setup(wrapped(crystal())), *lines), arguments=QUIET, recording=recording
        )
    assert [frame.info["step"] for frame in read_structures(recording.file)] == [0, 4, 6]


def test_frames_of_a_group_are_recorded_without_the_box(lammps, potential, tmp_path):
    """A molecule across the faces of its box is written in one piece, for codes that label molecules."""
    lines = ["units metal", "region box block 0 20 0 20 0 20", "create_box 2 box", "mass 1 28.085", "mass 2 15.999"]
    lines += ["create_atoms 1 single 0.2 9 9", "create_atoms 2 single 19.1 9.2 9", "create_atoms 2 single 1.2 9.7 9"]
    lines += ["create_atoms 2 single 10 1 1", "pair_style none", "group ml id 1:3"]
    path = script(tmp_path, *lines, "fix p ml external pf/callback 1 1", "run 0")
    recording = Recording(tmp_path / "frames.extxyz")
    run_script(potential, path, recording=recording, arguments=QUIET)
    frame = read_structures(tmp_path / "frames.extxyz")[0]
    assert len(frame) == 3 and not frame.pbc.any()
    np.testing.assert_allclose(frame.get_distances(0, [1, 2]), [np.hypot(1.1, 0.2), np.hypot(1.0, 0.7)], atol=1e-6)
    found = potential.evaluate([frame])
    assert frame.info["predicted_energy"] == pytest.approx(found.energy[0], abs=1e-4)
    np.testing.assert_allclose(frame.arrays["predicted_forces"], found.forces[0], atol=1e-4)
    with pytest.raises(InputError, match="this potential gives no 'latent_distance'; it gives energy, "):
        run_script(potential, path, recording=replace(recording, score="latent_distance"), arguments=QUIET)


def test_charge_and_spin_are_those_that_were_learned(lammps, potential, tmp_path):
    """Recorded frames say them; others are refused before anything runs."""
    learned = replace(potential, metadata={"states_met": [[1, 2]]})
    path = script(tmp_path, *setup(wrapped(crystal())), "fix almlip all external pf/callback 1 1", "run 0")

    def frame(of: Potential, **given: int) -> Atoms:
        recording = Recording(tmp_path / f"{len(list(tmp_path.iterdir()))}.extxyz", above=1e-9)
        run_script(of, path, coupling=Coupling(**given), arguments=QUIET, recording=recording)
        (found,) = read_structures(recording.file)
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_learned = frame(learned)
    assert (of_learned.info["charge"], of_learned.info["spin"]) == (1, 2)
    assert frame(potential, charge=2).info["charge"] == 2 and "charge" not in frame(potential).info
    with pytest.raises(InputError, match="charge 0 and spin 1, but the potential has learned of charge 1, spin 2 only"):
        frame(learned, charge=0)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ('if "$(step) > 3" then "print here" quit else "print \'goes on\'"', 0),
        ('if "$(step) < 3" then "print here" &\n   elif "$(step) > 3" "quit 3" else "print there"', 3),
        ("if '$(step) > 3' then 'if \"1 == 1\" then quit'", 0),
        ('variable s equal 5\nif "$(step) > 3" then "quit $(v_s)"', 5),
        ("quit 2  # at once\nlabel later", 2),
        ('label again\nrun 1\nif "$(step) > 5" then quit\njump SELF again', 0),
    ],
)
def test_a_script_that_quits_says_what_it_did(lammps, potential, tmp_path, command, status):
    """It ends where it says so, also within a condition or a loop, and the program goes on with its tables."""
    lines = ["fix a all external pf/callback 1 1", "run 4", *command.split("\n"), "run 7"]
    lines += ["group rest empty", "fix b all external pf/callback 1 1", "run 1"]
    outcome = run_script(potential, script(tmp_path, *setup(wrapped(crystal())), *lines), arguments=QUIET)
    assert outcome.status == status
    assert outcome.evaluations == (9 if "again" in command else 5)


@pytest.mark.parametrize(
    "command",
    [
        "include {end}",
        "include '{end}'  # the end",
        'if "$(step) > 3" then "include {end}" "print there"',
        'if "$(step) > 3" then "if \'1 == 1\' then \'include {end}\'"',
        'label again\nrun 0\nif "$(step) > 3" then &\n "include {end}"\njump in.test again',
        "variable stem string end\ninclude ${{stem}}.in",
        "variable a string '{end}'\nprint 'include $a' file made.in\ninclude made.in",
    ],
)
def test_a_file_that_is_included_may_quit(lammps, potential, tmp_path, monkeypatch, command):
    """Also one that is included by another, and where there is a loop in it; nothing after it is done."""
    monkeypatch.chdir(tmp_path)
    loop = "variable n loop 2\nlabel more\nnext n\njump SELF more\nprint done file end.txt"
    (tmp_path / "end.in").write_text(f'{loop}\ninclude further.in\nprint "too far" file far.txt\n')
    (tmp_path / "further.in").write_text('if "$(step) > 3" then "quit 6"\nprint "too far" file far.txt\n')
    lines = ["fix a all external pf/callback 1 1", "run 4", *command.format(end="end.in").split("\n"), "run 7"]
    outcome = run_script(potential, script(tmp_path, *setup(wrapped(crystal())), *lines), arguments=QUIET)
    assert outcome.status == 6 and outcome.evaluations == (6 if "again" in command else 5)
    assert (tmp_path / "end.txt").exists() and not (tmp_path / "far.txt").exists()


def test_files_without_a_quit_or_made_by_the_script_are_read_as_they_are(tmp_path, monkeypatch):
    """No LAMMPS is needed for that."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.in").write_text("print hello\n")
    (tmp_path / "made.in").write_text("quit\n")
    text = "print 'run 1' file made.in\ninclude made.in\ninclude plain.in\ninclude nothing.in"
    (tmp_path / "copies").mkdir()
    assert without_quit(text, Copies(tmp_path / "copies", text)) == text


def test_the_line_of_the_potential_may_stand_in_a_file_that_is_included(lammps, potential, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fixes.in").write_text("include deeper.in\nfix move all nve\n")
    (tmp_path / "deeper.in").write_text("fix ml all external pf/callback 1 1  # here\n")
    path = script(tmp_path, *setup(wrapped(crystal())), "include fixes.in", "thermo_style custom v_ml_energy", "run 2")
    assert run_script(potential, path, arguments=QUIET).evaluations == 3
    (tmp_path / "deeper.in").write_text("label here\nfix ml all external pf/callback 1 1\n")
    with pytest.raises(InputError, match="deeper.in, line 1: a file that is included and asks.*labels and jumps"):
        run_script(potential, path, arguments=QUIET)


def test_computes_of_parts_of_atoms_are_not_left_without_the_potential(lammps, potential, tmp_path):
    """They would hold zeros."""
    start = [*setup(wrapped(crystal())), "fix a all external pf/callback 1 1"]
    for line, asked in (("compute e all pe/atom", "energies"), ("compute s all stress/atom NULL virial", "stresses")):
        path = script(tmp_path, *start, line, "run 0")
        with pytest.raises(InputError, match=f"in.test: compute {line[8]} .*--per-atom force_std,{asked}, or name"):
            run_script(potential, path, arguments=QUIET)
        given = Coupling(per_atom=("force_std", asked))
        assert run_script(potential, path, coupling=given, arguments=QUIET).evaluations == 1
    path = script(tmp_path, *start, "compute e all pe/atom pair", "compute s all stress/atom NULL ke", "run 0")
    assert run_script(potential, path, arguments=QUIET).evaluations == 1


def test_computes_of_parts_of_atoms_are_told_of_from_python_too(lmp, potential):
    """Those that it is asked for itself are refused; which parts others hold LAMMPS does not say."""
    lmp.commands_list([*setup(wrapped(crystal())), "compute e all pe/atom"])
    with pytest.warns(UserWarning, match=r"compute e \(pe/atom\) lacks .*per_atom=\('force_std', 'energies'\)"):
        ours = attach(lmp, potential)
    with pytest.raises(InputError, match=r"compute s \(stress/atom\) lacks .*'stresses'"):
        ours.command("compute s all stress/atom NULL")
    assert not lmp.has_id("compute", "s")
    ours.command("compute k all stress/atom NULL ke")
    lmp.command("compute t all stress/atom NULL")
    with pytest.warns(UserWarning, match="compute t"):
        ours.command("run 0")
    with warnings.catch_warnings(action="error"):
        ours.command("run 0")


def test_data_that_is_written_can_be_read_again(lammps, potential, tmp_path):
    """Without a section of the fix that holds properties of atoms, which read_data would have to be told of."""
    start = [*setup(wrapped(crystal())), "fix a all external pf/callback 1 1", "run 0", f"write_data {tmp_path}/data"]
    again = ["clear", "units metal", f"read_data {tmp_path}/data", "pair_style none"]
    path = script(tmp_path, *start, *again, "fix a all external pf/callback 1 1", "run 0")
    assert run_script(potential, path, arguments=QUIET).evaluations == 2


@pytest.mark.slow
def test_the_program_ends_with_the_status_of_its_script(lammps, potential, tmp_path, monkeypatch):
    monkeypatch.setattr("almlip_jax.compilation.prepare_jax", lambda *_: None)
    potential.save(tmp_path / "potential")
    end = ["fix a all external pf/callback 1 1", "run 2", 'if "$(step) > 1" then "quit 4"', "run 100"]
    path = script(tmp_path, *setup(wrapped(crystal())), *end)
    asked = ["lammps", str(tmp_path / "potential"), str(path), "--json", str(tmp_path / "told.json"), *QUIET]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 4, result.output
    assert "evaluations" in result.output and json.loads((tmp_path / "told.json").read_text())["evaluations"] == 3


def test_quits_are_told_from_what_only_looks_like_one():
    """No LAMMPS is needed for that."""
    kept = ["print quit", 'if "1 > 2" then "print quit" "quitting 1"', "# quit", "variable quit equal 1", "label quit"]
    assert without_quit("\n".join(kept)) == "\n".join(kept)


def test_scripts_are_cut_where_the_potential_comes_in(tmp_path):
    """No LAMMPS is needed for that."""
    one = script(tmp_path, "units metal", "fix a &", "  mine external pf/callback 1 1", "run 1", "# end")
    assert pieces_of(one) == [
        ("units metal\nfix a &\n  mine external pf/callback 1 1", ("a", "mine")),
        ("run 1\n# end", None),
    ]
    ended = script(tmp_path, "fix a all external pf/callback 1 1", "run 1", "quit", "nonsense")
    assert pieces_of(ended)[-1] == ("run 1", None)
    skipped = script(tmp_path, "fix a all external pf/callback 1 1", "jump SELF on", "quit", "label on", "run 1")
    assert pieces_of(skipped)[-1] == ("jump SELF on\nquit\nlabel on\nrun 1", None)
    with pytest.raises(InputError, match="has no line 'fix almlip all external"):
        pieces_of(script(tmp_path, "run 1", "# fix a all external pf/callback 1 1"))
    with pytest.raises(InputError, match="line 1: forces are needed at every step.*1 1'"):
        pieces_of(script(tmp_path, "fix a all external pf/callback 5 1"))
    with pytest.raises(InputError, match="without variables"):
        pieces_of(script(tmp_path, "fix ${name} all external pf/callback 1 1"))
    with pytest.raises(InputError, match="jumps back to the label 'again'"):
        pieces_of(script(tmp_path, "label again", "fix a all external pf/callback 1 1", "run 1", "jump SELF again"))
    with pytest.raises(InputError, match="cannot be read"):
        pieces_of(tmp_path / "nothing")
