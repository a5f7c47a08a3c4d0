"""Exported programs: they say what the calculator says, in a process without this package, and tell what is amiss."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.build import molecule as build_molecule
from typer.testing import CliRunner

from almlip_jax import cli
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.interfaces.stablehlo import _exported, capacity_for, export_stablehlo, program_of
from almlip_jax.models import SharedDensitySettings
from almlip_jax.models.constants import with_constants
from almlip_jax.potential import Potential
from almlip_jax.structures import walkers
from almlip_jax.structures.species import SpeciesTable

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
SCORES = ("energy_std", "force_std_max", "force_std_rel", "max_disagreement")
FITTED = ("latent_distance", "extrapolation_grade", "atom_latent_distance", "atom_extrapolation_grade")
CHECKS = ("neighbors_fit", "search_reaches", "elements_known", "finite")
needs_flatbuffers = pytest.mark.skipif(find_spec("flatbuffers") is None, reason="flatbuffers is not installed")


@pytest.fixture(scope="module")
def potential(oxide: Potential) -> Potential:
    params = jax.tree.map(np.asarray, with_constants(oxide.params, energy_scale=0.5))
    return replace(oxide, params=params, reference_energies={8: -2000.0, 14: -7000.0})


def crystal() -> Atoms:
    """Without symmetry, some atoms outside of the cell."""
    atoms = bulk("Si", cubic=True)
    atoms.numbers[::2] = 8
    atoms.rattle(0.1, seed=1)
    atoms.set_cell([[5.6, 0, 0], [0.4, 5.5, 0], [-0.3, 0.2, 5.4]], scale_atoms=True)
    atoms.positions += [31.0, -17.3, 4.0]
    return atoms


def slab() -> Atoms:
    """Periodic in two directions."""
    atoms = crystal()
    atoms.pbc = [True, True, False]
    return atoms


def molecule() -> Atoms:
    """Of fewer atoms, with a cell that means nothing."""
    return Atoms("OSiO", [[0, 0, 0], [1.7, 0.1, 0], [2.5, 1.6, 0.3]], cell=[[1.0, 0, 0]] * 3)


def said(potential: Potential, atoms: Atoms, precision: str) -> dict[str, np.ndarray]:
    """What the calculator says, by the names of exported results."""
    atoms = atoms.copy()
    if not atoms.pbc.any():
        atoms.cell = 3 * [[20.0]] * np.eye(3)  # for a virial
    calculator = potential.calculator(precision=precision)
    atoms.calc = calculator
    atoms.get_forces()
    results = calculator.results
    xx, yy, zz, yz, xz, xy = -atoms.get_stress() * atoms.cell.volume
    found = {"energy": results["energy"], "forces": results["forces"], "force_std": results["force_std"]}
    found |= {"virial": np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])}
    further = [name for name in FITTED if name in calculator.implemented_properties and potential.novelty]
    return found | {name: results[name] for name in ("member_energy", "member_forces", *SCORES, *further)}


def same(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], relative: float, rounded: dict[str, np.ndarray]
) -> None:
    """Numbers by the largest force or virial, or by 1 eV; spreads too, since they are differences of these.

    They may be as wrong as three times what the calculator's are of the same precision (``rounded``).
    """
    force, virial = (float(np.abs(wanted[name]).max()) for name in ("member_forces", "virial"))
    scales = {"virial": virial} | dict.fromkeys(("forces", "member_forces", "force_std", "force_std_max"), force)
    scales |= {name: 1e4 * float(np.abs(wanted[name]).max()) for name in FITTED if name in wanted}  # inverse matrices
    for name, value in wanted.items():
        own = np.asarray(found[name])
        own = own[..., : np.shape(value)[-2], :] if name.endswith("forces") else own
        own = own[: len(value)] if name == "force_std" or name.startswith("atom_") else own
        allowed = relative * scales.get(name, 1.0) + 3 * np.abs(rounded[name] - value).max()
        np.testing.assert_allclose(own, value, atol=allowed, rtol=0, err_msg=name)


def padded(atoms: Atoms, places: int) -> tuple[np.ndarray, ...]:
    numbers, positions = np.zeros(places, np.int32), np.zeros((places, 3))
    numbers[: len(atoms)], positions[: len(atoms)] = atoms.numbers, atoms.positions
    return numbers, positions, atoms.cell.array, atoms.pbc, np.int32(0), np.int32(1)


@pytest.mark.slow
def test_a_program_serves_what_fits_and_tells_what_does_not(potential):
    given = [crystal(), slab(), molecule()]
    potential, capacity = potential.knowing(given), capacity_for(given, potential.cutoff)
    assert capacity.atoms == 8 and capacity.room.capacity >= 8
    with jax.enable_x64(True):
        program = jax.jit(program_of(potential, capacity, "float64"))
        for atoms in given:
            found = jax.device_get(program(*padded(atoms, 8)))
            assert found["ok"] and all(found[name] for name in CHECKS)
            exact = said(potential, atoms, "float64")
            same(found, exact, 1e-12, exact)
            assert (found["forces"][len(atoms) :] == 0).all() and (found["force_std"][len(atoms) :] == 0).all()
        broken = {name: crystal() for name in ("neighbors_fit", "search_reaches", "elements_known", "finite", "flat")}
        broken["neighbors_fit"].set_cell(0.6 * crystal().cell.array, scale_atoms=True)
        broken["search_reaches"].set_cell([[1.0, 0, 0], [0, 30, 0], [0, 0, 30]], scale_atoms=True)
        broken["elements_known"].numbers[3] = 6
        broken["finite"].positions[2, 1] = np.nan
        broken["flat"].cell[2] = broken["flat"].cell[1]
        for name, atoms in broken.items():
            found = jax.device_get(program(*padded(atoms, 8)))
            assert not found["ok"] and not found["finite" if name == "flat" else name], name
            numbers = [value for key, value in found.items() if key not in ("ok", "neighbors", *CHECKS)]
            assert all(np.isnan(value).all() for value in numbers), name
        assert jax.device_get(program(*padded(crystal(), 8)))["ok"]
        strange = list(padded(molecule(), 8))
        strange[0] = strange[0] - 1000 * (strange[0] == 14).astype(np.int32)
        assert not program(*strange)["elements_known"]


@pytest.mark.slow
def test_a_molecule_with_repulsion_has_the_digits_of_its_models():
    """In float32 too: nuclei of ethanol that come close repel each other by far more than its models differ."""
    elements = (1, 6, 8)
    plain = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,))
    repelling = plain.model_copy(update={"repulsion": True})
    species, members = SpeciesTable(elements), EnsembleSettings(size=3)
    params = jax.jit(build_ensemble(repelling, members, species).init)(jax.random.key(3))
    params = jax.device_get(with_constants(params, density_scale=0.2, energy_scale=20.0))
    references = dict(zip(elements, (-13.6, -1030.0, -2040.0), strict=True))
    potential = Potential(repelling, species, params, references, members=members)
    ethanol = build_molecule("CH3CH2OH")
    ethanol.positions *= 0.8
    ethanol.rattle(0.05, seed=2)
    exact, rounded = (said(potential, ethanol, name) for name in ("float64", "float32"))
    bound = exact["energy"] - sum(references[z] for z in ethanol.numbers)
    alone = said(replace(potential, settings=plain), ethanol, "float64")
    assert abs(exact["energy"] - alone["energy"]) > 10  # eV of repulsion
    with jax.enable_x64(True):
        program = jax.jit(program_of(potential, capacity_for([ethanol], potential.cutoff), "float32"))
        found = jax.device_get(program(*padded(ethanol, 9)))
    assert found["ok"]
    for name in ("energy", "member_energy"):
        np.testing.assert_allclose(found[name], exact[name], rtol=0, atol=5e-7 * abs(bound))
        np.testing.assert_allclose(rounded[name], exact[name], rtol=0, atol=2e-6 * abs(bound))
    names = ("forces", "virial", "member_forces", "force_std", "force_std_max")
    same(found, {name: exact[name] for name in names}, 1e-6, exact)
    for name in SCORES:
        np.testing.assert_allclose(found[name], exact[name], rtol=1e-6)


def test_room_that_does_not_hold_what_is_given_is_refused(potential):
    with pytest.raises(InputError, match="5 atoms are asked for, and a structure has 8"):
        capacity_for([crystal()], 3.5, atoms=5)
    with pytest.raises(InputError, match="2 neighbours are asked for, and an atom has"):
        capacity_for([crystal()], 3.5, neighbors=2)
    with pytest.raises(InputError, match="give at least one"):
        capacity_for([], 3.5)
    assert capacity_for([molecule()], 3.5).room.capacity == 3  # of an open molecule no more than all others
    assert capacity_for([crystal()], 3.5, atoms=60).atoms == 60
    thin = Atoms("Si", cell=[7.75, 9, 9], pbc=True)  # a tenth thinner it has images within the cutoff of half of it
    assert capacity_for([thin], 3.5).room.images == (1, 0, 0)


@needs_flatbuffers
def test_one_structure_stands_for_several(potential, tmp_path):
    for structures, platforms, why in (
        (Atoms("Au"), "cpu", "frame 0: atom 0 is Au"),
        ("water.xyz", "cpu", "structures are needed, not text"),
        (crystal(), "cuda", "programs for cpu, gpu, tpu, not for cuda"),
    ):
        with pytest.raises(InputError, match=why):
            export_stablehlo(potential, str(tmp_path / "no.zip"), structures, platforms=platforms)


def test_commands_refuse_what_does_not_go_together(tmp_path, potential, monkeypatch):
    monkeypatch.setattr("almlip_jax.compilation.prepare_jax", lambda *_: None)
    potential.save(tmp_path / "potential")
    molecule().write(tmp_path / "some.extxyz")
    asked = ["export", str(tmp_path / "potential"), str(tmp_path / "out"), "--like", str(tmp_path / "some.extxyz")]
    for further, sentence in (
        ([], "one of them"),
        (["--stablehlo", "--lammps-jax"], "one of them"),
        (["--stablehlo", "--units", "real"], "--units belongs to --lammps-jax"),
        (["--stablehlo", "--without-references"], "--without-references belongs to --lammps-jax"),
        (["--lammps-jax", "--neighbors", "30"], "--neighbors belongs to --stablehlo"),
        (["--lammps-jax"], "needs --elements"),
        (["--lammps-jax", "--elements", "Si,O", "--platforms", "tpu"], "for gpu or for cpu, not for tpu"),
    ):
        result = CliRunner().invoke(cli.app, [*asked, *further])
        assert result.exit_code == 1 and sentence in " ".join(result.output.split()), further


ALONE = """
import sys
for name in ("almlip_jax", "ase", "flax", "e3nn_jax", "orbax", "jax_md"):
    sys.modules[name] = None  # to import it is an error
{reader}
given = np.load("given.npz")
for number in range({count}):
    one = {{name: given[f"{{name}}_{{number}}"] for name in ("numbers", "positions", "cell", "pbc")}}
    np.savez(f"found_{{number}}.npz", **evaluate(**one))
"""


@needs_flatbuffers
@pytest.mark.slow
@pytest.mark.parametrize(("precision", "relative"), [("float64", 1e-12), ("float32", 1e-6)])
def test_a_process_without_this_package_says_the_same(potential, tmp_path, precision, relative):
    given = [crystal(), slab(), molecule()]
    learned = replace(potential, metadata={"states_met": [[1, 2], [0, 1]]})
    about = export_stablehlo(learned, str(tmp_path / "water.zip"), given, precision=precision, platforms="cpu")
    assert about["states"] == [[0, 1], [1, 2]] and not about["sees_state"]
    assert about["format"] == 1 and about["species"] == ["O", "Si"] and about["precision"] == precision
    assert {"energy", "forces", "virial", "force_std", "force_std_max", "ok"} <= set(about["outputs"])
    assert "mean over the M members" in about["force_std"]
    arrays = {}
    for number, atoms in enumerate(given):
        parts = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell.array, "pbc": atoms.pbc}
        arrays |= {f"{name}_{number}": values for name, values in parts.items()}
    np.savez(tmp_path / "given.npz", **arrays)
    reader = next(
        one for one in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "deserialize" in one
    )
    reader = reader[: reader.index("found = evaluate(")]
    script = ALONE.format(reader=reader, count=len(given))
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=600)
    for number, atoms in enumerate(given):
        with np.load(tmp_path / f"found_{number}.npz") as found:
            assert {name: dict(one)["shape"] for name, one in about["outputs"].items()} == {
                name: list(value.shape) for name, value in found.items()
            }
            same(dict(found), said(potential, atoms, "float64"), relative, said(potential, atoms, precision))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", "gpu", "tpu"])
def test_programs_of_many_atoms_lower_for_every_device(potential, kind, monkeypatch):
    """Through bins, which say where they do not reach."""
    monkeypatch.setattr(walkers, "_MANY", 1)
    large = crystal() * (2, 2, 2)
    capacity = capacity_for([large], potential.cutoff)
    assert capacity.room.bins is not None
    exported = _exported(potential, capacity, "float32", kind)
    text = exported.mlir_module()
    assert "callback" not in text and (kind == "cpu" or "lapack" not in text)
    coarse = [line for line in text.splitlines() if re.search(r"dot_general|convolution", line) and "f32" in line]
    assert [line for line in coarse if "[HIGHEST, HIGHEST]" not in line] == []
    if kind == "cpu":
        with jax.enable_x64(True):
            program = jax.jit(exported.call)
            found = jax.device_get(program(*padded(large, capacity.atoms)))
            assert found["ok"]
            same(found, said(potential, large, "float64"), 1e-6, said(potential, large, "float32"))
            large.pbc = [True, True, False]  # bins know of no open direction
            found = jax.device_get(program(*padded(large, capacity.atoms)))
            assert not found["search_reaches"] and np.isnan(found["energy"])


@needs_flatbuffers
@pytest.mark.slow
def test_the_command_writes_what_fits_the_structures(potential, tmp_path, monkeypatch):
    monkeypatch.setattr("almlip_jax.compilation.prepare_jax", lambda *_: None)
    potential.save(tmp_path / "potential")
    crystal().write(tmp_path / "some.extxyz")
    asked = [str(tmp_path / name) for name in ("potential", "out.zip")]
    options = ["--like", str(tmp_path / "some.extxyz"), "--stablehlo", "--platforms", "cpu", "--atoms", "20"]
    told = tmp_path / "told.json"
    result = CliRunner().invoke(cli.app, ["export", *asked, *options, "--json", str(told)])
    assert result.exit_code == 0, result.output
    assert json.loads(told.read_text())["atoms"] == 20
