"""What codes say afterwards: labels in our units and order of atoms, and none where a calculation did not converge.

The programs are scripts that leave files as the codes write them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.units import Bohr, GPa, Hartree, Rydberg
from test_code_inputs import PARAMETERS, POTCAR, POTENTIALS, SPECIES, UPF

from almlip_jax.errors import LabelError
from almlip_jax.oracles import CalculatorSettings
from almlip_jax.oracles.base import bare, obtain_label

ORCA = """                                 *****************
 Number of atoms                             ...      3
---------------------------------
CARTESIAN COORDINATES (ANGSTROEM)
---------------------------------
  H      0.000000    0.000000    0.960000
  O      0.000000    0.000000    0.000000
  H      0.920000    0.000000   -0.250000
-------------------------   --------------------
FINAL SINGLE POINT ENERGY{note}      -76.250000000000
-------------------------   --------------------
------------------
CARTESIAN GRADIENT
------------------

   1   H   :    0.010000000    0.000000000    0.020000000
   2   O   :   -0.010000000    0.000000000   -0.050000000
   3   H   :    0.000000000    0.000000000    0.030000000

                             ****ORCA TERMINATED NORMALLY****
"""
ENGRAD = """#
# Number of atoms
#
 3
#
# The current total energy in Eh
#
    -76.250000000000
#
# The current gradient in Eh/bohr
#
       0.010000000000
       0.000000000000
       0.020000000000
      -0.010000000000
       0.000000000000
      -0.050000000000
       0.000000000000
       0.000000000000
       0.030000000000
#
# The atomic numbers and current coordinates in Bohr
#
   1     0.0000000    0.0000000    1.8141371
"""
AIMS = """          Invoking FHI-aims ...
  | Number of atoms                   :        2
  | Number of spin channels           :        1
  | Number of Kohn-Sham states (occupied + empty):       8
  | The structure contains        2 atoms,  and a total of         16.000 electrons.
  Input geometry:
  | Unit cell:
  |        0.00000000        2.10000000        2.10000000
  |        2.10000000        0.00000000        2.10000000
  |        2.10000000        2.10000000        0.00000000
  | Atomic structure:
  |       Atom                x [A]            y [A]            z [A]
  |    1: Species O             0.00000000        0.00000000        0.00000000
  |    2: Species O             1.05000000        1.05000000        1.10000000
  Begin self-consistency iteration #    1
  {verdict}
  | Total energy uncorrected      :         -0.400000000000000E+04 eV
  | Total energy corrected        :         -0.400100000000000E+04 eV  <-- do not rely on this value
  | Electronic free energy        :         -0.400200000000000E+04 eV
  Total atomic forces (unitary forces cleaned) [eV/Ang]:
  |    1         -0.100000000000000E+00          0.200000000000000E+00         -0.300000000000000E+00
  |    2          0.100000000000000E+00         -0.200000000000000E+00          0.300000000000000E+00
  +-------------------------------------------------------------------+
  |              Analytical stress tensor - Symmetrized               |
  |                  Cartesian components [eV/A**3]                   |
  +-------------------------------------------------------------------+
  |                x                y                z                |
  |                                                                   |
  |  x         0.01000000       0.00400000       0.00500000           |
  |  y         0.00400000       0.02000000       0.00600000           |
  |  z         0.00500000       0.00600000       0.03000000           |
  |                                                                   |
  |  Pressure:       -0.02000000   [eV/A**3]                          |
  +-------------------------------------------------------------------+

{end}
"""
OUTCAR = """ vasp.6.4.2 20Jul23 (build) complex
   NBANDS =      8
   EDIFF  = 0.1E-06   stopping-criterion for ELM
------------------------ aborting loop {verdict} ----------------------------------------
 General timing and accounting informations for this job:
"""
VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1.0</v></varray></kpoints>
 <parameters><separator name="electronic"><i name="ENMAX">400.0</i></separator></parameters>
 <atominfo><array name="atoms"><set>
  <rc><c>H </c><c>1</c></rc><rc><c>H </c><c>1</c></rc><rc><c>O </c><c>2</c></rc></set></array></atominfo>
 <structure name="initialpos">{structure}</structure>
 <calculation>
  <scstep><energy><i name="e_fr_energy">-14.00</i><i name="e_0_energy">-13.90</i></energy></scstep>
  <structure>{structure}</structure>
  <varray name="forces"><v>1.0 0.0 0.0</v><v>0.0 2.0 0.0</v><v>-1.0 -2.0 0.0</v></varray>
  <varray name="stress"><v>10.0 4.0 5.0</v><v>4.0 20.0 6.0</v><v>5.0 6.0 30.0</v></varray>
  <energy><i name="e_fr_energy">-14.00</i><i name="e_0_energy">-13.90</i></energy>
 </calculation>
</modeling>
"""
STRUCTURE = """<crystal><varray name="basis"><v>5.0 0.0 0.0</v><v>0.0 5.0 0.0</v><v>0.0 0.0 5.0</v></varray></crystal>
<varray name="positions"><v>0.0 0.0 0.192</v><v>0.184 0.0 0.95</v><v>0.0 0.0 0.0</v></varray>"""
ESPRESSO = """     Program PWSCF v.7.2 starts on 24Nov2026
     bravais-lattice index     =            0
     lattice parameter (alat)  =      10.0000  a.u.
     number of atoms/cell      =            1
     number of atomic types    =            1
     celldm(1)=  10.000000  celldm(2)=   0.000000  celldm(3)=   0.000000
     celldm(4)=   0.000000  celldm(5)=   0.000000  celldm(6)=   0.000000
     crystal axes: (cart. coord. in units of alat)
               a(1) = (   1.000000   0.000000   0.000000 )
               a(2) = (   0.000000   1.000000   0.000000 )
               a(3) = (   0.000000   0.000000   1.000000 )
     atomic species   valence    mass     pseudopotential
        O              6.00    15.99900     O ( 1.00)
   Cartesian axes
     site n.     atom                  positions (alat units)
         1           O   tau(   1) = (   0.0000000   0.0000000   0.0000000  )
{verdict}
!    total energy              =     -31.50000000 Ry
     Forces acting on atoms (cartesian axes, Ry/au):

     atom    1 type  1   force =     0.10000000   -0.20000000    0.30000000

     Total force =     0.000000     Total SCF correction =     0.000000
          total   stress  (Ry/bohr**3)                   (kbar)     P=       14.71
   0.00010000   0.00004000   0.00005000           14.71        5.88        7.36
   0.00004000   0.00020000   0.00006000            5.88       29.42        8.83
   0.00005000   0.00006000   0.00030000            7.36        8.83       44.13

   JOB DONE.
"""
NWCHEM = """                      NWChem Numerical Gradients Module
                      ---------------------------------

                                 NWChem SCF Module
                                 -----------------
 Total CCSD energy:            -76.250000000000000
 Total CCSD(T) energy:         -76.260000000000000
 Reference energy         -76.26000000
 Total CCSD energy:            -76.240000000000000
 step    -1 energy         -76.25100000

                         CCSD(T) ENERGY GRADIENTS

    atom               coordinates                        gradient
                 x          y          z           x          y          z
   1 H       0.000000   0.000000   {height}   -0.010000   0.000000  -0.020000
   2 O       0.000000   0.000000   0.000000    0.010000   0.000000   0.050000
   3 H       1.738548   0.000000  -0.472432    0.000000   0.000000  -0.030000

 Total times  cpu:        0.1s     wall:        0.1s
"""
REFUSED = """ ------------------------------------------------------------------------
 mp2_grad: unknown SCFTYPE                    0
 ------------------------------------------------------------------------
 ------------------------------------------------------------------------
  current input line :
    24: task mp2 gradient
 ------------------------------------------------------------------------
 There is an error in the input file
 ------------------------------------------------------------------------
 For more information see the NWChem manual
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Potentials and species of oxygen and hydrogen."""
    folder = tmp_path / "data"
    for symbol, number in (("O", 8), ("H", 1)):
        (folder / "potpaw_PBE" / f"{symbol}_pv").mkdir(parents=True)
        (folder / "potpaw_PBE" / f"{symbol}_pv" / "POTCAR").write_text(POTCAR.format(f"{symbol}_pv"))
        (folder / f"{symbol}.UPF").write_text(UPF.format(symbol))
        (folder / f"{number:02d}_{symbol}_default").write_text(SPECIES.format(symbol, number))
    return folder


def _program(folder: Path, said: str, files: dict[str, str] | None = None, status: int = 0, kept: str = "") -> str:
    """The command of a program that leaves files and says something; it lists what it finds in ``found``."""
    script = folder / "program.py"
    lines = [
        "import os, sys, pathlib",
        f"open({str(folder / 'found')!r}, 'a').write(' '.join(sorted(os.listdir('.'))) + chr(10))",
        *(f"pathlib.Path({name!r}).write_text({text!r})" for name, text in (files or {}).items()),
        f"pathlib.Path({kept!r}).write_text('density')" if kept else "",
        f"sys.stdout.write({said!r})",
        f"sys.exit({status})",
    ]
    script.write_text("\n".join(lines))
    return f"{sys.executable} {script}"


def _settings(code: str, command: str, **more: Any) -> CalculatorSettings:
    given = {"parameters": PARAMETERS[code], "pseudopotentials": POTENTIALS.get(code, {}), "command": command}
    return CalculatorSettings.model_validate({"kind": "ase", "code": code, **given, **more})


def _water() -> Atoms:
    return Atoms("HOH", [[0, 0, 0.96], [0, 0, 0], [0.92, 0, -0.25]], cell=[5, 5, 5], info={"charge": 0, "spin": 1})


def test_orca(tmp_path: Path) -> None:
    command = _program(tmp_path, ORCA.format(note=""), {"orca.engrad": ENGRAD})
    results = _settings("orca", command).build()(bare(_water()))
    assert results.energy == pytest.approx(-76.25 * Hartree) and results.stress is None
    np.testing.assert_allclose(results.forces[1], np.array([0.01, 0, 0.05]) * Hartree / Bohr, atol=1e-12)
    doubtful = ORCA.format(note=" (SCF not fully converged!)")
    for said, files, why in (
        (doubtful, {"orca.engrad": ENGRAD}, "did not converge its SCF"),
        (ORCA.format(note="")[:400], {"orca.engrad": ENGRAD}, "did not finish"),
        (ORCA.format(note=""), {}, "gave no forces"),
    ):
        with pytest.raises(LabelError, match=why):
            _settings("orca", _program(tmp_path, said, files)).build()(bare(_water()))


def test_nwchem(tmp_path: Path) -> None:
    """A gradient by differences, whose last energy is that of atoms it has moved; and molecules that it has turned."""
    good, turned = NWCHEM.format(height="1.814137"), NWCHEM.format(height="-1.81414")
    results = _settings("nwchem", _program(tmp_path, good)).build()(bare(_water()))
    assert results.energy == pytest.approx(-76.26 * Hartree, abs=1e-9)
    np.testing.assert_allclose(results.forces[1], np.array([-0.01, 0, -0.05]) * Hartree / Bohr, atol=1e-12)
    for said, status, why in (
        (turned, 0, "another geometry than that of the structure"),
        (REFUSED, 1, "nwchem.nwo says: mp2_grad: unknown SCFTYPE$"),
        ("calculation failed to converge", 1, "did not converge its SCF"),
        (good.replace("Reference", "Another"), 0, "which energy its numerical gradient is of"),
    ):
        with pytest.raises(LabelError, match=why):
            _settings("nwchem", _program(tmp_path, said, status=status)).build()(bare(_water()))


def test_aims(data: Path, tmp_path: Path) -> None:
    end = "          Have a nice day.\n" + "-" * 60
    crystal = Atoms("O2", scaled_positions=[[0, 0, 0], [0.25, 0.25, 0.25]], cell=2.1 * (1 - np.eye(3)), pbc=True)
    good = AIMS.format(verdict="Self-consistency cycle converged.", end=end)
    more = {"data_dir": data, "kpts": [2, 2, 2]}
    results = _settings("aims", _program(tmp_path, good), **more).build()(bare(crystal))
    assert results.energy == -4002.0  # the free energy, of which the forces are the derivatives
    np.testing.assert_allclose(results.forces, [[-0.1, 0.2, -0.3], [0.1, -0.2, 0.3]])
    np.testing.assert_allclose(results.stress, [0.01, 0.02, 0.03, 0.006, 0.005, 0.004])
    bad = AIMS.format(verdict="* WARNING! SELF-CONSISTENCY CYCLE DID NOT CONVERGE", end=end)
    for said, why in ((bad, "did not converge"), (AIMS.format(verdict="", end=""), "did not complete")):
        with pytest.raises(LabelError, match=why):
            _settings("aims", _program(tmp_path, said), **more).build()(bare(crystal))


def test_vasp(data: Path, tmp_path: Path) -> None:
    water = Atoms(_water(), pbc=True)
    xml = VASPRUN.format(structure=STRUCTURE)
    files = {"vasprun.xml": xml, "OUTCAR": OUTCAR.format(verdict="because EDIFF is reached")}
    more = {"data_dir": data, "kpts": [1, 1, 1]}
    command = _program(tmp_path, "", files, kept="WAVECAR")
    results = _settings("vasp", command, **more).build()(bare(water))
    assert results.energy == -14.0
    # VASP has the atoms by element: hydrogens first
    np.testing.assert_allclose(results.forces, [[1, 0, 0], [-1, -2, 0], [0, 2, 0]])
    np.testing.assert_allclose(results.stress, -0.1 * GPa * np.array([10, 20, 30, 6, 5, 4]))
    extrapolated = _settings("vasp", command, **more, force_consistent=False).build()(bare(water))
    assert extrapolated.energy == pytest.approx(-13.9)
    files["OUTCAR"] = OUTCAR.format(verdict="EDIFF was not reached (unconverged)")
    with pytest.raises(LabelError, match="did not converge"):
        _settings("vasp", _program(tmp_path, "", files), **more).build()(bare(water))


def test_espresso(data: Path, tmp_path: Path) -> None:
    oxygen = Atoms("O", cell=np.eye(3) * 10 * Bohr, pbc=True)
    more = {"data_dir": data, "kpts": [1, 1, 1]}
    good = ESPRESSO.format(verdict="     convergence has been achieved in   7 iterations")
    results = _settings("espresso", _program(tmp_path, good), **more).build()(bare(oxygen))
    assert results.energy == pytest.approx(-31.5 * Rydberg)
    np.testing.assert_allclose(results.forces, np.array([[0.1, -0.2, 0.3]]) * Rydberg / Bohr)
    np.testing.assert_allclose(results.stress, -np.array([1, 2, 3, 0.6, 0.5, 0.4]) * 1e-4 * Rydberg / Bohr**3)
    bad = ESPRESSO.format(verdict="     convergence NOT achieved after 100 iterations: stopping")
    for said, status, why in (
        (bad, 2, "did not converge its SCF"),
        (bad, 0, "did not converge its SCF"),
        ("     Error in routine readpp (2):\n     file O.UPF not found\n", 1, r"exit status 1.*file O\.UPF not found"),
    ):
        settings = _settings("espresso", _program(tmp_path, said, status=status), **more)
        label = obtain_label(settings.build(), settings, bare(oxygen), "id")
        with pytest.raises(LabelError, match=why):
            label.attach(oxygen)
    read = "     PseudoPot. # 1 for O  read from file:\n     {}/O.UPF\n"
    assert _settings("espresso", _program(tmp_path, read.format(data) + good), **more).build()(bare(oxygen))
    with pytest.raises(LabelError, match=r"read the pseudopotential /elsewhere/O\.UPF, which is not in .*data_dir"):
        _settings("espresso", _program(tmp_path, read.format("/elsewhere") + good), **more).build()(bare(oxygen))
    old = "     Warning: card HUBBARD {ATOMIC} ignored\n" + good
    plus_u = PARAMETERS["espresso"] | {"additional_cards": ["HUBBARD {atomic}", "U O-2p 4.0"]}
    with pytest.raises(LabelError, match="has no card HUBBARD"):
        _settings("espresso", _program(tmp_path, old), **more | {"parameters": plus_u}).build()(bare(oxygen))
    missing = _settings("espresso", "no_such_pw.x", **more)
    with pytest.raises(LabelError, match=r"could not be started.*oracle\.command"):
        missing.build()(bare(oxygen))


@pytest.mark.filterwarnings("ignore:CP2K-shell not ready")
@pytest.mark.parametrize("code", ["cp2k", "nwchem", "vasp"])
def test_a_program_that_is_not_there_is_named(code: str, data: Path) -> None:
    """Those that a shell starts, too, which only says that something ended."""
    water = Atoms(_water(), pbc=False)
    more = {} if code == "nwchem" else {"data_dir": data}
    with pytest.raises(LabelError, match=r"could not be started \(there is no 'no_such_program' here\).*oracle\.comm"):
        _settings(code, "no_such_program -n 4", **more).build()(bare(water))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of ASE, which says goodbye
def test_what_a_program_says_is_not_hidden_by_what_follows_from_it(data: Path, tmp_path: Path) -> None:
    """CP2K says what is wrong and ends; ASE then finds no number where it reads one."""
    shell = tmp_path / "cp2k_shell.py"
    said = "print('* READY'); print('[ABORT] The basis set <X> was not found', flush=True)"
    shell.write_text(f"import sys\nopen('cp2k.out', 'w').write('[ABORT] The basis set was not found')\n{said}\n")
    settings = CalculatorSettings.model_validate(
        {"kind": "ase", "code": "cp2k", "parameters": PARAMETERS["cp2k"], "data_dir": data, "kpts": [1, 1, 1],
         "command": f"{sys.executable} {shell}"}
    )  # fmt: skip
    iron = bare(Atoms("Fe", cell=[2.9, 2.9, 2.9], pbc=True))
    label = obtain_label(settings.build(), settings, iron, "a")
    assert label.error == "CP2K failed; cp2k.out says: [ABORT] The basis set was not found"


@pytest.mark.parametrize("keep, kept", [("none", 0), ("failed", 1), ("all", 2)])
def test_files_stay_where_they_are_asked_for(keep: str, kept: int, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    good = _settings("orca", _program(tmp_path, ORCA.format(note=""), {"orca.engrad": ENGRAD}),
                     scratch=scratch, keep_files=keep)  # fmt: skip
    good.build()(bare(_water()))
    bad = good.model_copy(update={"command": _program(tmp_path, "nothing")})
    moved = _water()
    moved.positions[0, 2] += 0.01
    with pytest.raises(LabelError):
        bad.build()(bare(moved))
    assert len(list(scratch.glob("*/orca.inp"))) == kept
    assert not list(scratch.glob("almlip-label-*"))


def test_a_density_is_handed_on_where_atoms_and_cell_are_alike(data: Path, tmp_path: Path) -> None:
    files = {
        "vasprun.xml": VASPRUN.format(structure=STRUCTURE),
        "OUTCAR": OUTCAR.format(verdict="because EDIFF is reached"),
    }
    command = _program(tmp_path, "", files, kept="WAVECAR")
    water = Atoms(_water(), pbc=True)
    strained = water.copy()
    strained.set_cell([5, 5, 5.1])
    frames = [water, water, strained, strained]
    for reuse, begun in ((False, [0, 0, 0, 0]), (True, [0, 1, 0, 1])):
        (tmp_path / "found").write_text("")
        label = _settings("vasp", command, data_dir=data, kpts=[1, 1, 1], reuse=reuse).build()
        for frame in frames:
            label(bare(frame))
        assert ["WAVECAR" in line for line in (tmp_path / "found").read_text().splitlines()] == begun


def test_aims_begins_with_the_density_matrices_of_the_label_before(data: Path, tmp_path: Path) -> None:
    """Of each k-point and of both spins; the first label, and one of another cell, begin anew."""
    end = "          Have a nice day.\n" + "-" * 60
    said = AIMS.format(verdict="Self-consistency cycle converged.", end=end)
    names = ["D_spin_01_kpt_000001.csc", "D_spin_01_kpt_000002.csc", "S_spin_01_kpt_000001.csc"]
    command = _program(tmp_path, said, dict.fromkeys(names, "density"))
    crystal = Atoms("O2", scaled_positions=[[0, 0, 0], [0.25, 0.25, 0.25]], cell=2.1 * (1 - np.eye(3)), pbc=True)
    moved, strained = crystal.copy(), crystal.copy()
    moved.positions[0, 0] += 0.05
    strained.set_cell(1.01 * crystal.cell.array, scale_atoms=True)
    for reuse, begun in ((False, [0, 0, 0, 0]), (True, [0, 3, 0, 3])):
        (tmp_path / "found").write_text("")
        label = _settings("aims", command, data_dir=data, kpts=[2, 2, 2], reuse=reuse).build()
        for frame in (crystal, moved, strained, strained):
            label(bare(frame))
        lines = (tmp_path / "found").read_text().splitlines()
        assert [sum(name in line for name in names) for line in lines] == begun


def _psi4(scratch: Path, told: list[dict[str, Any]]) -> ModuleType:
    """A package that does with options, files and names of files what Psi4 does, and takes note of each calculation."""
    psi4, options, state = ModuleType("psi4"), dict[str, Any](), dict[str, Any]()

    class Wavefunction:
        def __init__(self, orbitals: str) -> None:
            self.orbitals = orbitals

        @staticmethod
        def from_file(name: str) -> Wavefunction:
            return Wavefunction(Path(name).read_text())

        def to_file(self, name: str) -> None:
            Path(f"{name}.npy").write_text(self.orbitals)

        def get_scratch_filename(self, number: int) -> str:
            return str(scratch / f"{Path(state['output']).stem}.default.1.{number}")

        def energy(self) -> float:
            return -75.0

    def gradient(method: str, *, molecule: str, return_wfn: bool) -> tuple[np.ndarray, Wavefunction]:
        assert return_wfn
        begun = Path(Wavefunction("").get_scratch_filename(180) + ".npy")
        read = begun.read_text() if options.get("guess") == "read" and begun.is_file() else None
        told.append({"method": method, "read": read, **options})
        found = Wavefunction(f"orbitals of calculation {len(told)}")
        found.to_file(found.get_scratch_filename(180))
        return np.zeros((molecule.count("\t") // 3, 3)), found

    psi4.core = SimpleNamespace(  # type: ignore[attr-defined]
        clean_options=options.clear,
        set_output_file=lambda name, _: state.update(output=name),
        Wavefunction=Wavefunction,
    )
    psi4.driver = SimpleNamespace(gradient=gradient)  # type: ignore[attr-defined]
    psi4.set_options = options.update  # type: ignore[attr-defined]
    psi4.set_num_threads = psi4.set_memory = lambda _: None  # type: ignore[attr-defined]
    psi4.geometry = str  # type: ignore[attr-defined]
    return psi4


def test_psi4_begins_with_the_orbitals_of_the_label_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same molecule in the same state; what one label was told is not said of the next, and no file is left."""
    told: list[dict[str, Any]] = []
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setitem(sys.modules, "psi4", _psi4(scratch, told))
    moved, ion = _water(), Atoms(_water(), info={"charge": 1, "spin": 2})
    moved.positions[0, 0] += 0.1
    settings = {"parameters": {"method": "pbe", "basis": "def2-svp", "basis_guess": True, "guess": "sad"}}
    for reuse in (False, True):
        told.clear()
        made = CalculatorSettings.model_validate({"kind": "ase", "code": "psi4", "reuse": reuse, **settings})
        label = made.build()
        for frame in (_water(), moved, ion, ion, _water()):
            assert label(bare(frame)).energy == pytest.approx(-75.0 * Hartree)
        begun = [None, "orbitals of calculation 1", None, "orbitals of calculation 3", None]
        assert [one["read"] for one in told] == (begun if reuse else [None] * 5)
        assert [one["guess"] for one in told] == [["sad", "read"][reuse and one["read"] is not None] for one in told]
        assert ["basis_guess" in one for one in told] == [one["read"] is None for one in told]
        assert [one.get("reference") for one in told] == [None, None, "uhf", "uhf", None]
        assert not reuse or list(scratch.iterdir()) == []
