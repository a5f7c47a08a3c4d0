"""What codes of electronic structure are told: every setting reaches the input, or is refused with a sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles import CalculatorSettings, structure_identity
from almlip_jax.oracles.base import bare
from almlip_jax.oracles.codes.base import codes

UPF = '<UPF version="2.0.1">\n<PP_HEADER element="{}" z_valence=" 8.00000000000000E+00"/>\n</UPF>\n'
POTCAR = """  PAW_PBE {0} 06Sep2000
   8.00000000000000
   TITEL  = PAW_PBE {0} 06Sep2000
   LULTRA =        F    use ultrasoft PP ?
   IUNSCR =        1    unscreen
   RPACOR =    1.701    partial core radius
   POMASS =   55.847; ZVAL   =    8.000    mass and valence
 End of Dataset
"""
SPECIES = "  species {0}\n    nucleus {1}\n    mass 1.0\n#  \"First tier\"\n    hydro 2 p 1.2\n"  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files that codes find potentials and species in, of iron, oxygen and hydrogen."""
    folder = tmp_path / "data"
    for symbol, number in (("Fe", 26), ("O", 8), ("H", 1)):
        (folder / "potpaw_PBE" / f"{symbol}_pv").mkdir(parents=True)
        (folder / "potpaw_PBE" / f"{symbol}_pv" / "POTCAR").write_text(POTCAR.format(f"{symbol}_pv"))
        (folder / f"{symbol}.UPF").write_text(UPF.format(symbol))
        (folder / f"{number:02d}_{symbol}_default").write_text(SPECIES.format(symbol, number))
    return folder


PARAMETERS: Mapping[str, dict[str, Any]] = {
    "espresso": {"ecutwfc": 30, "system": {"ecutrho": 240, "occupations": "smearing"},
                 "electrons": {"mixing_beta": 0.4}},
    "gpaw": {"mode": {"name": "pw", "ecut": 300}, "xc": "PBE", "occupations": {"name": "fermi-dirac", "width": 0.1}},
    "cp2k": {"FORCE_EVAL": {"DFT": {"mgrid": {"CUTOFF": 300}, "XC": {"XC_FUNCTIONAL": {"_": "PBE"}},
                                    "SCF": {"ADDED_MOS": 10, "SMEAR": {"_": True, "METHOD": "FERMI_DIRAC"}}},
                            "SUBSYS": {"KIND": {"Fe": {"BASIS_SET": "DZVP-MOLOPT-SR-GTH", "POTENTIAL": "GTH-X"}}}}},
    "vasp": {"xc": "pbe", "ENCUT": 400, "ediff": 1e-7, "LREAL": False,
             "ldau_luj": {"Fe": {"L": 2, "U": 4.0, "J": 0.5}}},
    "aims": {"xc": "pbe", "relativistic": "atomic_zora scalar", "sc_accuracy_rho": 1e-6},
    "orca": {"orcasimpleinput": "PBE def2-SVP TightSCF", "orcablocks": "%scf MaxIter 300 end"},
    "nwchem": {"theory": "dft", "basis": "def2-svp", "dft": {"xc": "pbe96", "iterations": 200}},
    "psi4": {"method": "pbe", "basis": "def2-svp", "scf_type": "df"},
}  # fmt: skip
POTENTIALS = {
    "espresso": {"Fe": "Fe.UPF", "O": "O.UPF", "H": "H.UPF"},
    "vasp": {"Fe": "Fe_pv", "O": "O_pv", "H": "H_pv"},
    "gpaw": {"Fe": "paw"},
    "cp2k": {"Fe": "GTH-PBE-q8"},
}


def _settings(code: str, data: Path, **more: Any) -> CalculatorSettings:
    given = {"parameters": PARAMETERS[code], "pseudopotentials": POTENTIALS.get(code, {})}
    folder = {} if code in ("gpaw", "psi4", "orca", "nwchem") else {"data_dir": data}
    return CalculatorSettings.model_validate({"kind": "ase", "code": code, **folder, **given, **more})


def _crystal() -> Atoms:
    iron = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.52]], cell=[2.87, 2.87, 2.87], pbc=True)
    iron.set_initial_magnetic_moments([2.0, -1.0])
    iron.info["charge"] = 1
    return iron


def _radical() -> Atoms:
    return Atoms("OH", [[2, 2, 2], [2.3, 2, 2.9]], cell=[6, 6, 6], info={"charge": 0, "spin": 2})


OF_CRYSTALS = {
    "espresso": [
        r"ecutwfc\s*=\s*30", r"ecutrho\s*=\s*240", r"occupations\s*=\s*'smearing'", r"mixing_beta\s*=\s*0\.4",
        r"tot_charge\s*=\s*1\b", r"nspin\s*=\s*2", r"starting_magnetization\(1\) = 0\.25",
        r"starting_magnetization\(2\) = -0\.125", r"Fe1\s.*Fe\.UPF", r"K_POINTS automatic\n4 3 2  1 0 1",
        r"tprnfor\s*=\s*\.true\.", r"tstress\s*=\s*\.true\.", r"Fe\s+0\.0000000000 0\.0000000000 0\.0000000000",
    ],
    "gpaw": [
        r"mode=\{'name': 'pw', 'ecut': 300\}", r"xc='PBE'", r"'width': 0\.1", r"charge=1", r"spinpol=True",
        r"kpts=\{'size': \(4, 3, 2\)\}", r"setups=\{'Fe': 'paw'\}", r"moments \[2\.0, -1\.0\]",
    ],
    "cp2k": [
        r"CUTOFF 300", r"&XC_FUNCTIONAL PBE", r"ADDED_MOS 10", r"&SMEAR \.TRUE\.", r"CHARGE 1\b", r"UKS \.TRUE\.",
        r"MULTIPLICITY 2\b", r"&KIND Fe1\n[^&]*ELEMENT Fe\n[^&]*MAGNETIZATION 2\.0",
        r"&KIND Fe2\n[^&]*BASIS_SET DZVP-MOLOPT-SR-GTH\n[^&]*POTENTIAL GTH-PBE-q8\n[^&]*MAGNETIZATION -1\.0",
        r"SCHEME MONKHORST-PACK 4 3 2", r"PERIODIC XYZ", r"STRESS_TENSOR ANALYTICAL", r"\n\s*Fe2 1\.43",
    ],
    "vasp": [
        r"ENCUT = 400", r"EDIFF = 1\.00e-07", r"LREAL = \.FALSE\.", r"GGA = PE", r"NELECT = 15\.0", r"ISPIN = 2",
        r"MAGMOM = 1\*2\.0000 1\*-1\.0000", r"Monkhorst-Pack\n4 3 2", r"PAW_PBE Fe_pv", r"LDAUU = 4\.000",
    ],
    "aims": [
        r"\nxc\s+pbe", r"relativistic\s+atomic_zora scalar", r"sc_accuracy_rho\s+1e-06", r"\ncharge\s+1\b",
        r"spin\s+collinear", r"k_grid\s+4 3 2", r"k_offset\s+0\.125 0\.0 0\.25", r"compute_forces\s+\.true\.",
        r"compute_analytical_stress\s+\.true\.", r"initial_moment\s+2\.0", r"initial_moment\s+-1\.0", r"species\s+Fe",
    ],
}  # fmt: skip
OF_MOLECULES = {
    "espresso": [r"nspin\s*=\s*2", r"tot_magnetization\s*=\s*1\b", r"K_POINTS gamma", r"tstress\s*=\s*\.false\."],
    "gpaw": [r"'fixmagmom': True", r"moments \[0\.5, 0\.5\]", r"charge=0"],
    "cp2k": [
        r"MULTIPLICITY 2\b", r"FIXED_MAGNETIC_MOMENT 1\.0", r"UKS", r"POISSON_SOLVER MT", r"PERIODIC NONE",
        r"&KIND O\n", r"^(?![\s\S]*STRESS_TENSOR)[\s\S]*&COORD",
    ],
    "vasp": [r"ISPIN = 2", r"NUPDOWN = 1", r"Gamma\n1 1 1"],
    "aims": [r"fixed_spin_moment\s+1\b", r"spin\s+collinear", r"^(?![\s\S]*k_grid)[\s\S]*species\s+O"],
    "orca": [r"! PBE def2-SVP TightSCF EnGrad", r"%scf MaxIter 300 end", r"\*xyz 0 2"],
    "nwchem": [r"mult 2", r"xc pbe96", r"iterations 200", r"library def2-svp", r"task dft gradient"],
    "psi4": [r"method = 'pbe'", r"multiplicity = 2", r"reference = 'uhf'", r"set_options\(\{'scf_type': 'df'\}\)"],
}  # fmt: skip


@pytest.mark.parametrize("code", OF_CRYSTALS)
def test_a_magnetic_charged_crystal_reaches_the_input(code: str, data: Path) -> None:
    shown = _settings(code, data, kpts=[4, 3, 2], gamma_centred=False).preview(bare(_crystal()))
    missing = [wanted for wanted in OF_CRYSTALS[code] if re.search(wanted, shown) is None]
    assert not missing, shown
    unpolarised = _crystal()
    unpolarised.set_initial_magnetic_moments(None)
    plain = _settings(code, data, kpts=[4, 3, 2]).preview(bare(unpolarised))
    assert re.search(r"nspin|spinpol|UKS|ISPIN|collinear", plain) is None, plain


@pytest.mark.parametrize("code", OF_MOLECULES)
def test_a_radical_reaches_the_input(code: str, data: Path) -> None:
    shown = _settings(code, data).preview(bare(_radical()))
    missing = [wanted for wanted in OF_MOLECULES[code] if re.search(wanted, shown) is None]
    assert not missing, shown
    ion = Atoms(_radical(), info={"charge": -1})
    shown = _settings(code, data).preview(bare(ion))
    assert re.search(r"NELECT = 17|-1\b", shown), shown


@pytest.mark.parametrize(
    "parameters, wanted",
    [
        ({"Theory": "SCF", "SCF": {"UHF": None}}, r"scf\n  UHF\n  nopen 1\nend"),
        ({"theory": "ccsd(t)"}, r"scf\n  nopen 1\nend"),
        ({"theory": "sodft"}, r"dft\n  mult 2\nend"),
        ({"theory": "tce", "tce": {"dft": None}}, r"dft\n  mult 2\nend[\s\S]*scf\n  nopen 1\nend"),
    ],
)
def test_unpaired_electrons_reach_every_theory_of_nwchem(parameters: dict[str, Any], wanted: str, data: Path) -> None:
    """ASE says their number to some theories, in small letters."""
    shown = _settings("nwchem", data, parameters={"basis": "3-21g", **parameters}).preview(bare(_radical()))
    assert re.search(wanted, shown), shown


@pytest.mark.parametrize("code", ["nwchem", "orca"])
def test_moments_that_a_code_would_not_hear_of_are_refused(code: str, data: Path) -> None:
    stretched = Atoms("H2", [[2, 2, 2], [2, 2, 4]], magmoms=[1, -1])
    with pytest.raises(LabelError, match="number of unpaired electrons alone.*have both signs"):
        _settings(code, data).build()(stretched)


def test_an_input_is_shown_where_potentials_are_not_there_yet(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of VASP and FHI-aims, whose inputs hold them: the rest, where they would be read, and the key that says so."""
    for variable in ("VASP_PP_PATH", "AIMS_SPECIES_DIR"):
        monkeypatch.delenv(variable, raising=False)
    more = {"kpts": [4, 3, 2], "data_dir": "/none/here"}
    shown = _settings("vasp", data, **more, pseudopotentials={}).preview(bare(_crystal()))
    assert "Not there: /none/here/potpaw_PBE/Fe/POTCAR. oracle.data_dir names the folder" in shown
    assert "oracle.pseudopotentials" in shown and "NELECT follows from them and the charge" in shown
    for wanted in ("ENCUT = 400", "ISPIN = 2", "MAGMOM = 1*2.0000 1*-1.0000", "Gamma\n4 3 2", "--- POSCAR\nFe"):
        assert wanted in shown, shown
    shown = _settings("vasp", data, pseudopotentials={"O": "O_s", "H": "H_pv"}).preview(bare(_radical()))
    assert f"Not there: {data}/potpaw_PBE/O_s/POTCAR. " in shown and "NELECT" not in shown and "GGA = PE" in shown
    shown = _settings("aims", data, **more, parameters={"xc": "pbe", "tier": 1}).preview(bare(_crystal()))
    assert "Not there: /none/here/26_Fe_default. oracle.data_dir names the folder of the species" in shown
    assert re.search(r"k_grid\s+4 3 2", shown) and "lattice_vector" in shown and "initial_moment" in shown
    (data / "01_H_default").unlink()
    shown = _settings("aims", data).preview(bare(_radical()))
    assert f"Not there: {data}/01_H_default. " in shown and re.search(r"species\s+O\n", shown)
    assert "Not there: 26_Fe_default" in _settings("aims", data, **{**more, "data_dir": None}).preview(bare(_crystal()))
    with pytest.raises(InputError, match="input of VASP cannot be made .*; correct oracle.parameters"):
        _settings("vasp", data, parameters={"xc": "no functional"}).preview(bare(_radical()))


def test_cp2k_takes_an_odd_number_of_electrons_where_it_can(data: Path) -> None:
    """A metal that smears does, and finds its moment; the multiplicity that it begins with is one that there may be."""
    copper = Atoms("Cu3", [[0, 0, 0], [0, 0, 2.1], [0, 0, 4.2]], cell=[2.6, 2.6, 16], pbc=[True, True, False])
    shown = _settings("cp2k", data, kpts=[1, 1, 1]).preview(bare(copper))
    assert "SMEAR" in shown and "UKS" not in shown and "MULTIPLICITY" not in shown
    moments = _settings("cp2k", data, kpts=[1, 1, 1], magnetic_moments={"Cu": 0.7}).preview(bare(copper))
    assert re.search(r"UKS \.TRUE\.\s+MULTIPLICITY 4\b", moments) and "FIXED_MAGNETIC_MOMENT" not in moments
    copper.info["spin"] = 2
    fixed = _settings("cp2k", data, kpts=[1, 1, 1]).preview(bare(copper))
    assert re.search(r"UKS \.TRUE\.\s+MULTIPLICITY 2\b", fixed) and "FIXED_MAGNETIC_MOMENT 1.0" in fixed
    with pytest.raises(LabelError, match="Cu3 with charge 0 has an odd number of electrons; give CP2K a SMEAR section"):
        _settings("cp2k", data, kpts=[1, 1, 1], parameters={}).preview(bare(Atoms(copper, info={})))


def test_all_codes_are_looked_at() -> None:
    assert set(codes()) == set(PARAMETERS) == set(OF_MOLECULES)
    assert {name for name, code in codes().items() if code.crystals} == set(OF_CRYSTALS)


@pytest.mark.parametrize("code", PARAMETERS)
def test_what_has_a_key_of_its_own_is_no_parameter(code: str, data: Path) -> None:
    for key in codes()[code].set_elsewhere:
        parameters: Any = 1
        for part in reversed(key.split(".")):
            parameters = {part: parameters}
        with pytest.raises(ValueError, match=re.escape(f"parameters.{key} cannot be given here")):
            _settings(code, data, parameters=parameters)


def test_settings_that_a_code_has_no_use_for_are_refused(data: Path) -> None:
    for code, more, why in (
        ("gpaw", {"command": "gpaw"}, "called within Python"),
        ("orca", {"kpts": [2, 2, 2]}, "no k-points"),
        ("aims", {"pseudopotentials": {"Fe": "x"}}, "no pseudopotentials"),
        ("espresso", {"force_consistent": False}, "only the free energy"),
        ("espresso", {"kpts": [2, 2, 2], "kspacing": 0.3}, "either kpts or kspacing"),
        ("vasp", {"charge_key": "nelect"}, "own words"),
        ("vasp", {"parameters": {"LDAUU": [4.0, 0.0]}}, "LDAUU cannot|ldauu cannot.*ldau_luj names elements"),
        ("vasp", {"keep_files": "all"}, "scratch"),
        ("espresso", {"pseudopotentials": {"Xx": "x"}}, "no.*symbol|symbol of an element"),
        ("vaps", {}, "vasp"),
    ):
        with pytest.raises(ValueError, match=why):
            _settings(code, data, **more) if code in PARAMETERS else CalculatorSettings(code=code)
    with pytest.raises(ValueError, match="either code"):
        CalculatorSettings()
    with pytest.raises(ValueError, match="kpts belongs to a code"):
        CalculatorSettings(calculator="ase.calculators.emt:EMT", kpts=(1, 1, 1))
    with pytest.raises(ValueError, match="which k-points there are"):
        _settings("vasp", data, parameters={"KSPACING": 0.3}, kpts=[2, 2, 2])


def test_parameters_that_would_be_lost_are_refused(data: Path) -> None:
    for code, parameters, why in (
        ("espresso", {"ecutwf": 30}, "no key 'ecutwf'"),
        ("espresso", {"sytem": {"ecutwfc": 30}}, "no key 'sytem'"),
        ("espresso", {"input_data": {"ecutwfc": 30}}, "input_data stands here itself"),
        ("espresso", {"control": {"tprnfor": False}}, "a label has forces"),
        ("espresso", {"system": {"Hubbard_U(1)": 4.0}}, r"'hubbard_u\(1\)', follows from.*as hubbard_u\(Fe\)"),
        ("espresso", {"system": {"starting_magnetization(1)": 0.5}}, "oracle.magnetic_moments"),
        ("espresso", {"system": {"noncolin": True}}, "keeps no number of unpaired electrons"),
        ("orca", {"method": "PBE"}, "has no 'method'"),
        ("espresso", {"ecutwfc": 30, "additional_cards": ["K_POINTS gamma"]}, "takes the cards HUBBARD.*'K_POINTS'"),
        ("espresso", {"additional_cards": "HUBBARD {atomic}\nU O-2p 1\nCELL_PARAMETERS"}, "'CELL_PARAMETERS'"),
        ("orca", {"orcasimpleinput": "PBE Opt"}, "'opt' is no calculation"),
        ("orca", {"orcasimpleinput": "PBE VeryTightOpt def2-SVP"}, "'verytightopt' is no calculation"),
        ("orca", {"orcasimpleinput": "! L-Opt XTB2"}, "'l-opt' is no calculation"),
        ("orca", {"orcasimpleinput": "PBE Zoom-NEB-TS"}, "'zoom-neb-ts' is no calculation"),
        ("vasp", {"xc": "pbe", "LSORBIT": True}, "lsorbit: VASP takes three components"),
        ("vasp", {"xc": "pbe", "encutt": 500}, "'encutt' is no tag of VASP.*did you mean 'encut'.*custom"),
        ("psi4", {"basis": "def2-svp"}, "method of Psi4 is missing"),
        ("nwchem", {"basis": "x", "theory": "band"}, "not for plane waves"),
        ("nwchem", {"basis": "x", "theory": "scf", "xc": "pbe"}, "theory scf has no functional"),
        ("nwchem", {"basis": "x", "xc": "pbe", "DFT": {"XC": "pbe96"}}, "both name the functional"),
        ("nwchem", {"basis": "x", "Basis": "y"}, "Basis is there twice"),
        ("nwchem", {"basis": "x", "dft": "xc pbe96"}, "dft is a section"),
        ("vasp", {"xc": "pbe"}, "no potential of O"),
        ("aims", {"xc": "pbe", "symmetry_reduced_k_grid_spg": True}, "differ from structure to structure"),
    ):
        more: dict[str, Any] = {"pseudopotentials": {"O": "Os_pv", "H": "_pv"}} if code == "vasp" else {}
        more |= {"reuse": True} if code == "aims" else {}
        with pytest.raises(InputError, match=why):
            _settings(code, data, parameters=parameters, **more).preview(bare(_radical()))


def test_aims_keeps_its_density_where_the_next_label_may_begin_with_it(data: Path) -> None:
    """With overlaps, unless they are left out for a version that does not know the keyword."""
    shown = _settings("aims", data, reuse=True).preview(bare(_radical()))
    assert re.search(r"elsi_restart +read_and_write 1\n", shown)
    assert re.search(r"elsi_restart_use_overlap +\.true\.", shown)
    older = PARAMETERS["aims"] | {"elsi_restart_use_overlap": False}
    shown = _settings("aims", data, reuse=True, parameters=older).preview(bare(_radical()))
    assert "read_and_write" in shown and "use_overlap" not in shown
    assert "elsi_restart" not in _settings("aims", data).preview(bare(_radical()))


def test_what_looks_like_something_else_is_passed_on(data: Path) -> None:
    """Basis sets of ORCA that are called after optimisations, tags of VASP that ASE does not know, cards of pw.x."""
    basis = {"orcasimpleinput": "PBE cc-pVDZ-F12-OptRI NoFreqx"}
    assert "cc-pVDZ-F12-OptRI" in _settings("orca", data, parameters=basis).preview(bare(_radical()))
    tags = {"xc": "pbe", "lnewtag": True, "custom": {"encutt": 5}}
    told = _settings("vasp", data, parameters=tags).preview(bare(_radical()))
    assert re.search(r"LNEWTAG = \.TRUE\.", told) and re.search(r"ENCUTT = 5", told)
    cards = {"ecutwfc": 30, "additional_cards": ["HUBBARD {ortho-atomic}", "U O-2p 4.0"]}
    told = _settings("espresso", data, parameters=cards).preview(bare(_radical()))
    assert re.search(r"HUBBARD \{ortho-atomic\}\s+U O-2p 4\.0", told)


def test_what_pw_says_of_species_is_said_of_elements(data: Path) -> None:
    """Each moment makes a species of its own, and their order is that of the atoms."""
    crystal = _crystal() + Atoms("O", [[1.0, 0.3, 0.2]])
    crystal.set_initial_magnetic_moments([2.0, -1.0, 0.0])
    keys = {"ecutwfc": 30, "system": {"Hubbard_U(Fe)": 4.0, "starting_ns_eigenvalue(1,2,O)": 0.5, "hubbard_u(H)": 9.0}}
    told = _settings("espresso", data, parameters=keys, kpts=[1, 1, 1]).preview(bare(crystal))
    for found in (r"hubbard_u\(1\) += 4\.0", r"hubbard_u\(2\) += 4\.0", r"eigenvalue\(1,2,3\) += 0\.5"):
        assert re.search(found, told)
    assert "9.0" not in told and "hubbard_u(3)" not in told
    cards = ["HUBBARD {ortho-atomic}", "U Fe-3d 4.0", "J0 H-1s 1", "U O-2p 3.0"]
    keys = {"ecutwfc": 30, "additional_cards": cards}
    told = _settings("espresso", data, parameters=keys, kpts=[1, 1, 1]).preview(bare(crystal))
    assert re.search(r"HUBBARD \{ortho-atomic\}\s+U Fe-3d 4\.0\s+U Fe1-3d 4\.0\s+U O-2p 3\.0", told)
    assert "J0" not in told
    pair = {"ecutwfc": 30, "additional_cards": ["HUBBARD {ortho-atomic}", "V Fe-3d O-2p 1 3 0.5"]}
    with pytest.raises(InputError, match="pairs of atoms, and moments"):
        _settings("espresso", data, parameters=pair, kpts=[1, 1, 1]).preview(bare(crystal))


def test_numbers_and_logicals_may_be_written_as_in_fortran(data: Path) -> None:
    keys = {"ecutwfc": 30, "system": {"noncolin": ".true.", "degauss": "2.D-2"}, "electrons": {"conv_thr": "1.0d-9"}}
    told = _settings("espresso", data, parameters=keys, kpts=[1, 1, 1]).preview(bare(_crystal()))
    for found in (r"noncolin += \.true\.", r"degauss += 0\.02", r"conv_thr += 1e-09", r"magnetization\(2\) = -0\.125"):
        assert re.search(found, told)
    assert "nspin" not in told
    tags = {"xc": "pbe", "LASPH": ".T.", "LWAVE": ".f.", "LREAL": ".FALSE."}
    told = _settings("vasp", data, parameters=tags).preview(bare(_radical()))
    assert all(found in told for found in ("LASPH = .TRUE.", "LWAVE = .FALSE.", "LREAL = .FALSE."))


@pytest.mark.parametrize("code", PARAMETERS)
def test_constraints_are_no_part_of_a_label(code: str, data: Path) -> None:
    """What a code is told is the same; some would leave out the forces on atoms that are held."""
    held = _radical()
    held.set_constraint(FixAtoms([0]))
    settings = _settings(code, data)
    told = [re.sub(r"almlip-input-\w+|\d+:\d\d:\d\d", "", settings.preview(bare(one))) for one in (held, _radical())]
    assert told[0] == told[1]


def test_structures_that_a_code_would_get_wrong_are_refused(data: Path) -> None:
    iron, radical = _crystal(), _radical()
    for code, atoms, more, why in (
        ("espresso", iron, {}, r"oracle\.kpts"),
        ("espresso", iron, {"kpts": [1, 1, 1], "pseudopotentials": {"O": "O.UPF"}}, "names none for Fe"),
        ("espresso", Atoms("OH", radical.positions, info={"spin": 2}), {}, "cell with three vectors"),
        ("orca", iron, {}, "labels molecules"),
        ("orca", Atoms(radical, info={"spin": 1}), {}, "cannot have the multiplicity"),
        ("aims", Atoms(iron, magmoms=[[0, 0, 1], [0, 1, 0]]), {"kpts": [1, 1, 1]}, "not vectors"),
        ("vasp", Atoms(iron, info={"spin": 4}), {"kpts": [1, 1, 1]}, "add up to 1 unpaired"),
        ("espresso", Atoms(iron, magmoms=[9, 9]), {"kpts": [1, 1, 1]}, "larger than the number of valence"),
    ):
        with pytest.raises(LabelError, match=why):
            _settings(code, data, **more).preview(bare(atoms))
    no_smearing = {"parameters": {"FORCE_EVAL": {"DFT": {"SCF": {"MAX_SCF": 5}}}}}
    iron.set_initial_magnetic_moments([2.2, -1.0])
    with pytest.raises(LabelError, match=r"add up to 1\.2, so give a multiplicity"):
        _settings("cp2k", data, kpts=[1, 1, 1], **no_smearing).preview(bare(iron))


def test_moments_of_elements_are_those_of_structures_without_any(data: Path) -> None:
    iron = bulk("Fe", cubic=True)
    iron.set_initial_magnetic_moments(None)
    settings = _settings("vasp", data, kpts=[2, 2, 2], magnetic_moments={"Fe": 2.2})
    assert "MAGMOM = 2*2.2000" in settings.preview(bare(iron)) and "NUPDOWN" not in settings.preview(bare(iron))
    iron.set_initial_magnetic_moments([3.0, 3.0])
    assert "MAGMOM = 2*3.0000" in settings.preview(bare(iron))
    iron.info["spin"] = 7
    assert "NUPDOWN = 6" in settings.preview(bare(iron))


def test_a_spacing_gives_each_cell_its_grid(data: Path) -> None:
    settings = _settings("vasp", data, kspacing=0.5)
    small = Atoms("Fe", cell=np.diag([2.8, 5.6, 20.0]), pbc=True)
    assert "Gamma\n5 3 1" in settings.preview(bare(small))
    small.pbc = [True, False, True]
    assert "Gamma\n5 1 1" in settings.preview(bare(small))
    fine = _settings("vasp", data, kpts=[3, 3, 3])
    assert "Gamma\n3 1 3" in fine.preview(bare(small))


def test_identity_holds_what_decides_a_label_and_no_more(data: Path) -> None:
    iron = bare(_crystal())
    base = structure_identity(iron, _settings("vasp", data, kpts=[2, 2, 2]))
    same = {"command": "mpirun -n 8 vasp_std", "timeout": 5.0, "scratch": data, "keep_files": "all"}
    assert structure_identity(iron, _settings("vasp", data, kpts=[2, 2, 2], **same)) == base
    for other in ({"kpts": [3, 2, 2]}, {"gamma_centred": False}, {"reuse": True}, {"code_version": "6.4"}):
        assert structure_identity(iron, _settings("vasp", data, **({"kpts": [2, 2, 2]} | other))) != base
    # labels of calculators have the identity that they had before codes were known by name
    assert set(CalculatorSettings(calculator="ase.calculators.emt:EMT").identity()) == {
        "kind", "calculator", "parameters", "charge_key", "spin_key", "force_consistent", "reuse", "code_version"
    }  # fmt: skip


def test_a_molecule_needs_no_cell_where_its_code_does_not(data: Path) -> None:
    assert "O " in _settings("orca", data).preview(bare(molecule("OH")))


def test_what_else_a_label_holds_is_asked_for(data: Path) -> None:
    settings = _settings("aims", data, targets=["dipole"])
    assert re.search(r"output\s+dipole", settings.preview(bare(_radical())))
