"""Files of moment tensor potentials: read to the last digit, written, told apart, and taken apart from potentials."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from typer.testing import CliRunner

import almlip_jax
from almlip_jax import cli
from almlip_jax.campaign.beginning import with_beginning
from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.continuity import settled
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError, LabelError
from almlip_jax.fitting import check_start, fit_potential
from almlip_jax.learner import Learner
from almlip_jax.models import MtpSettings
from almlip_jax.models.mtp.basis import Basis, basis
from almlip_jax.models.mtp.moments import RadialBasis
from almlip_jax.models.mtp.recognised import recognised
from almlip_jax.models.mtp.text import MtpText, Trained, read_mtp, template
from almlip_jax.oracles import PotentialSourceSettings
from almlip_jax.potential import Potential
from almlip_jax.potential.file_types import FileTypes
from almlip_jax.potential.mtp_files import joined_potential, load_mtp, save_mtp, texts_of
from almlip_jax.saved_potential import SavedPotential
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import TrainingSettings

# a potential with random coefficients, and what motep 0.2.0 gives with it
SILICON = """\
MTP
version = 1.1.0
potential_name = MTP_L8
scaling = 1.000000000000000e-02
species_count = 1
potential_tag =
radial_basis_type = RBChebyshev
\tmin_dist = 1.800000000000000e+00
\tmax_dist = 5.000000000000000e+00
\tradial_basis_size = 8
\tradial_funcs_count = 2
\tradial_coeffs
\t\t0-0
\t\t\t{1.054381134536198e+00, 2.895828719086125e-01, 4.158345126573106e-01, 7.480342257884874e-02, \
5.694001589549719e-01, -2.336345488232223e-01, 6.412154317759446e-01, 1.158777109418161e+00}
\t\t\t{-5.763306154571244e-02, -8.900966078910852e-03, -1.694677450596830e-01, 5.193684092599956e-01, \
-2.750867901098234e-01, 3.552280434927012e-01, -3.797090342800652e-01, 5.208523497975301e-01}
alpha_moments_count = 18
alpha_index_basic_count = 11
alpha_index_basic = {{0, 0, 0, 0}, {0, 1, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1}, {0, 2, 0, 0}, {0, 1, 1, 0}, {0, 1, 0, \
1}, {0, 0, 2, 0}, {0, 0, 1, 1}, {0, 0, 0, 2}, {1, 0, 0, 0}}
alpha_index_times_count = 14
alpha_index_times = {{0, 0, 1, 11}, {1, 1, 1, 12}, {2, 2, 1, 12}, {3, 3, 1, 12}, {0, 11, 1, 13}, {0, 10, 1, 14}, {4, \
4, 1, 15}, {5, 5, 2, 15}, {6, 6, 2, 15}, {7, 7, 1, 15}, {8, 8, 2, 15}, {9, 9, 1, 15}, {0, 12, 1, 16}, {0, 13, 1, 17}}
alpha_scalar_moments = 9
alpha_moment_mapping = {0, 11, 10, 12, 13, 14, 15, 16, 17}
species_coeffs = {-1.228579286373246e+00}
moment_coeffs = {1.238899806479148e+00, 7.611407700498051e-01, -2.174656361248875e-01, -1.422917096835777e-01, \
1.065245045448795e+00, -1.406561410664171e-01, 8.317455332118850e-02, -6.166268188086876e-01, 2.695378887796481e+00}
"""
CRYSTAL = Atoms(
    "Si8",
    cell=[[5.2772, 0.062854, 0.104127], [0.142915, 5.248803, -0.01625], [-0.102134, 0.366839, 5.631908]],
    positions=[
        [-0.274009, 0.195294, 0.15039],
        [1.37114, 1.588905, 1.607759],
        [0.021164, 2.914507, 2.73696],
        [1.333636, 4.240055, 4.340379],
        [2.577656, 0.216359, 2.932181],
        [3.675892, 1.686004, 4.446575],
        [2.872766, 2.762427, -0.0669],
        [4.14105, 4.226073, 1.560641],
    ],
    pbc=True,
)
ENERGY = -9.410675721056755
FORCES = [
    [3.440602671433604, 0.43402670467880294, -0.440995623982115],
    [0.43324621794257506, -0.49930291023962886, -1.7091865606570622],
    [0.4484731619187676, -0.7266596405554409, 2.3972812101870637],
    [-1.781274719317648, 0.9055455969651156, -0.9303637456450334],
    [0.09957375778033702, 0.2893592266524974, 0.44070017988977184],
    [1.203482795578731, -1.1645359138971085, -3.222047285519667],
    [-1.335849546912345, 1.6434845158856728, 3.4463373101176997],
    [-2.5082543384240226, -0.8819175794899102, 0.01827451560934345],
]
STRESS = [
    0.003906318608699758,
    -0.020851265052090517,
    0.015654158493015713,
    0.033812463044823514,
    4.0246995731900904e-05,
    0.055393074297127545,
]
SPECIES = SpeciesTable((1, 8))


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def silicon(tmp_path: Path) -> Path:
    (tmp_path / "silicon.mtp").write_text(SILICON)
    return tmp_path / "silicon.mtp"


def random_potential(settings: MtpSettings, members: EnsembleSettings | None = None, **given) -> Potential:
    """Of hydrogen and oxygen, in the scales of a training that has not been."""
    members = members or EnsembleSettings(size=2)
    ensemble = build_ensemble(settings, members, SPECIES, given.get("isolated", ()))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(ensemble.init, jax.random.key(0))
    params = jax.tree.map(lambda x: 0.5 + 0.2 * rng.normal(size=x.shape), shapes)
    for constants in [params["constants"]] if "constants" in params else []:
        if "binding" in constants:
            constants["binding"] = np.zeros_like(constants["binding"])
    return Potential(settings, SPECIES, params, {1: -13.6, 8: -2040.0}, members=members, **given)


def energies(potential: Potential, frames: list[Atoms]) -> np.ndarray:
    """Of each member [M, n], reference energies within."""
    found = []
    for n in range(potential.ensemble.members):
        one = jax.tree.map(lambda x, n=n: x[n : n + 1], potential.params)
        alone = replace(potential, params=one, members=EnsembleSettings(size=1))
        found.append(alone.evaluate(frames).energy)
    return np.array(found)


def test_energies_forces_and_stress_are_those_of_the_reference(silicon):
    potential = almlip_jax.load(silicon, types=["Si"])
    assert (potential.settings.level, potential.settings.basis, potential.precision) == (8, None, "float64")
    found = potential.evaluate([CRYSTAL])
    np.testing.assert_allclose(found.energy, [ENERGY], rtol=1e-10)
    np.testing.assert_allclose(found.forces[0], FORCES, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found.stress[0], STRESS, rtol=1e-10, atol=1e-12)


def test_every_spelling_is_the_same_potential(silicon, tmp_path):
    known = read_mtp(silicon)
    other = SILICON.replace("_coeffs", "_coefs").replace("\n", "\r\n").replace("\t", "  ").replace(", ", ",")
    (tmp_path / "other.mtp").write_bytes(b"\xef\xbb\xbf" + other.encode())
    assert str(read_mtp(tmp_path / "other.mtp")) == str(known)
    known.write(tmp_path / "again.mtp")
    again = read_mtp(tmp_path / "again.mtp")
    assert str(again) == str(known) and "radial_coeffs" in str(known) and "_coefs" not in str(known)
    for name in ("radial", "species", "moment"):
        np.testing.assert_array_equal(getattr(again.trained, name), getattr(known.trained, name))
    edited = SILICON.replace("max_dist = 5.000000000000000e+00", "max_dist = 4.5")
    (tmp_path / "edited.mtp").write_text(edited)
    assert load_mtp(tmp_path / "edited.mtp", [14]).cutoff == 4.5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("MTP\n", "", "whose first line is MTP"),
        ("1.1.0", "1.2.0", "version is 1.2.0, but only 1.1.0"),
        ("RBChebyshev", "RBTaylor", "radial_basis_type is RBTaylor"),
        ("max_dist = 5", "max_dist = 1", "min_dist 1.8 and max_dist 1 are no interval"),
        ("species_count = 1", "species_count = 2", "each of the 2^2 pairs"),
        ("species_count = 1", "species_count = one", "species_count is 'one'"),
        ("radial_funcs_count = 2", "radial_funcs_count = 1", "takes 2 radial functions"),
        ("radial_basis_size = 8", "radial_basis_size = 7", "should be 2 rows of 7 numbers"),
        ("alpha_scalar_moments = 9", "alpha_scalar_moments = 8", "alpha_scalar_moments is 8, but the lists have 9"),
        ("{0, 0, 1, 11}, {1, 1", "{0, 17, 1, 11}, {1, 1", "not complete"),
        ("species_coeffs = {-1.228579286373246e+00}\n", "", "no species_coeffs"),
        ("potential_tag =", "potential_flag =", "potential_flag =' is not understood"),
        ("1.238899806479148e+00, 7", "x, 7", "moment_coeffs should be numbers"),
        ("1.238899806479148e+00, 7", "nan, 7", "not finite"),
        ("scaling = 1.000000000000000e-02", "scaling = 0", "scaling is 0"),
        ("{0, 11, 10,", "{0, 0, 10,", "comes twice"),
    ],
)
def test_files_that_are_wrong_are_refused(tmp_path, old, new, message):
    assert old in SILICON
    (tmp_path / "wrong.mtp").write_text(SILICON.replace(old, new, 1))
    with pytest.raises(InputError, match=r"wrong\.mtp: ") as caught:
        read_mtp(tmp_path / "wrong.mtp")
    assert message in str(caught.value)


def test_templates_say_what_is_to_be_trained(tmp_path):
    (tmp_path / "untrained.mtp").write_text(template(6, 5, (1.5, 4.5)).replace("scaling = 0.01\n", ""))
    text = read_mtp(tmp_path / "untrained.mtp")
    assert text.trained is None and text.scaling is None
    with pytest.raises(InputError, match=r"template without coefficients; train with model\.template"):
        load_mtp(tmp_path / "untrained.mtp", [14])
    told = {"kind": "mtp", "template": "untrained.mtp", "cutoff": 4.0}
    settings = MtpSettings.model_validate(told, context={"folder": tmp_path})
    known = MtpSettings(level=6, radial_basis_size=5, min_dist=1.5, cutoff=4.0)
    assert settings == known.model_copy(update={"potential_name": "MTP_L6"})
    with pytest.raises(ValueError, match="there.mtp cannot be read"):
        MtpSettings(template=tmp_path / "there.mtp")


def rearranged(known: Basis) -> Basis:
    """Basic moments and scalars in another order, and one scalar made otherwise."""
    order = np.random.default_rng(1).permutation(len(known.moments))
    place = np.concatenate([np.argsort(order), np.arange(len(known.moments), known.size)]).tolist()
    products = tuple((place[j], place[i], factor, place[k]) for i, j, factor, k in known.products)
    return Basis(tuple(known.moments[n] for n in order), products, tuple(place[n] for n in known.scalars[::-1]))


def test_other_orders_are_recognised_and_other_bases_kept_as_they_are(tmp_path):
    known = basis(8)
    found = recognised(rearranged(known))
    assert found == (8, True, tuple(reversed(range(9))))
    fewer = rearranged(known)._replace(scalars=rearranged(known).scalars[1:])
    assert recognised(fewer) is None
    rng = np.random.default_rng(2)
    trained = Trained(rng.normal(size=(1, 1, 2, 4)), rng.normal(size=1), rng.normal(size=8))
    MtpText(fewer, RadialBasis(4, 1.0, 4.0), 1, 0.1, trained).write(tmp_path / "fewer.mtp")
    whole = replace(trained, moment=np.append(0.0, trained.moment))
    MtpText(rearranged(known), RadialBasis(4, 1.0, 4.0), 1, 0.1, whole).write(tmp_path / "whole.mtp")
    one, other = (load_mtp(tmp_path / f"{name}.mtp", [14]) for name in ("fewer", "whole"))
    assert one.settings.basis is not None and other.settings.basis is None
    np.testing.assert_allclose(one.evaluate([CRYSTAL]).energy, other.evaluate([CRYSTAL]).energy, rtol=1e-12)
    one.save(tmp_path / "potential")
    again = Potential.load(tmp_path / "potential")
    assert again.settings == one.settings and str(texts_of(again)[0].basis) == str(fewer)


def test_members_are_files_with_reference_energies_within(tmp_path):
    """Types in an order of their own, on the way out and back."""
    potential = random_potential(MtpSettings(level=6, radial_basis_size=4, cutoff=3.5, min_dist=0.7))
    files = save_mtp(potential, str(tmp_path / "water.mtp"), [8, 1])
    assert [file.name for file in files] == ["water_0.mtp", "water_1.mtp"]
    again = load_mtp(files, [8, 1])
    frames = [molecule("H2O"), Atoms("O"), molecule("H2O2")]
    before, after = energies(potential, frames), energies(again, frames)
    np.testing.assert_allclose(after, before, rtol=1e-13)
    assert np.ptp(before, axis=0).min() > 1e-3
    with pytest.raises(InputError, match="elements H, O of the potential"):
        texts_of(potential, [8])
    with pytest.raises(InputError, match="water_0.mtp has 2 types, but 1 elements"):
        load_mtp(files[0], [8])
    with pytest.raises(InputError, match="O is given for two types"):
        load_mtp(files[0], [8, 8])


def test_what_is_more_than_the_format_holds_is_refused():
    settings = MtpSettings(level=4, radial_basis_size=3, cutoff=3.5)
    anchored = random_potential(settings, isolated=frozenset({1}))
    learned = anchored.params["species"]
    unbound = replace(anchored, params=anchored.params | {"species": learned * [0, 1]})
    (first, _), frames = texts_of(unbound), [molecule("H2O"), Atoms("H"), Atoms("O")]
    assert first.trained.species[0] == -13.6  # that of the isolated atom, exactly
    written = joined_potential([first], [1, 8], ["first"])
    np.testing.assert_allclose(written.evaluate(frames).energy, energies(unbound, frames)[0], rtol=1e-13)
    binding = dict(anchored.params["constants"], binding=np.array([[-2.0, 0]] * 2))
    for params in (anchored.params, unbound.params | {"constants": binding}):  # learned, or fitted beforehand
        with pytest.raises(InputError, match=r"isolated atoms; train without these \(isolated atoms among the data"):
            texts_of(replace(anchored, params=params))
    with pytest.raises(InputError, match="a repulsion of nuclei is added"):
        texts_of(random_potential(settings.model_copy(update={"repulsion": True})))
    with pytest.raises(InputError, match="its heads depend on the species"):
        texts_of(random_potential(settings, EnsembleSettings(size=1, heads=2)))


def test_types_without_atoms_keep_their_places(tmp_path, monkeypatch):
    """A dummy comes first, and an element that was never learned in between: numbers of types stay those of before."""
    settings = MtpSettings(level=4, radial_basis_size=3, cutoff=3.5)
    water = random_potential(settings, EnsembleSettings(size=1)).with_types((0, 8, 7, 1, 6))
    (known,), frames = texts_of(water), [molecule("H2O"), molecule("H2O2")]
    assert known.types == 4 and np.array_equal(known.trained.species != 0, [False, True, False, True])
    assert not known.trained.radial[[0, 2]].any() and not known.trained.radial[:, [0, 2]].any()
    known.write(tmp_path / "water.mtp")
    again = load_mtp(tmp_path / "water.mtp", [0, 8, 7, 1])
    assert again.species.numbers == (1, 8) and again.type_numbers == [0, 8, 7, 1]
    assert str(texts_of(again)[0]) == str(known)
    np.testing.assert_allclose(again.evaluate(frames).energy, water.evaluate(frames).energy, rtol=1e-13)
    assert texts_of(again, [8, 0, 1])[0].types == 3
    with pytest.raises(InputError, match="elements H, O of the potential"):
        texts_of(again, [8, 7, 1])
    with pytest.raises(InputError, match=r"no type of .*water\.mtp is an element"):
        load_mtp(tmp_path / "water.mtp", [8, 0, 1, 0])
    assert SavedPotential.read(tmp_path / "water.mtp", ["X", "O", "N", "H"]).numbers == {1, 7, 8}
    water.save(tmp_path / "p")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["convert", "p", "back.mtp", "--json", "told.json"])
    assert done.exit_code == 0 and "of X, N the potential knows nothing" in done.output, done.output
    assert json.loads(Path("told.json").read_text())["types"] == ["X", "O", "N", "H"]
    assert str(read_mtp("back.mtp")) == str(known)


def test_potentials_are_converted_in_a_circle(silicon, monkeypatch):
    monkeypatch.chdir(silicon.parent)
    monkeypatch.setattr("almlip_jax.compilation.prepare_jax", lambda _: None)  # this process is not the command's

    def convert(*arguments: str) -> dict:
        done = CliRunner().invoke(cli.app, ["convert", *arguments, "--json", "told.json"])
        assert done.exit_code == 0, done.exception
        return json.loads(Path("told.json").read_text())

    assert convert("silicon.mtp", "potential", "--types", "Si") == {"types": ["Si"], "out": ["potential"]}
    assert convert("potential", "again.mtp")["out"] == ["again.mtp"]
    known, again = read_mtp(silicon), read_mtp("again.mtp")
    assert convert("silicon.mtp", "plain.mtp")["types"] == [] and str(read_mtp("plain.mtp")) == str(known)
    for name in ("radial", "species"):
        np.testing.assert_array_equal(getattr(again.trained, name), getattr(known.trained, name))
    np.testing.assert_array_equal(sorted(again.trained.moment), sorted(known.trained.moment))
    for wrong, message in ((("silicon.mtp", "p"), "--types Si,O"), (("told.json", "a.mtp"), "no potential")):
        done = CliRunner().invoke(cli.app, ["convert", *wrong])
        assert done.exit_code == 1 and message in " ".join(done.output.split())


def test_order_of_types_name_and_tag_go_round(tmp_path):
    """Through folders, and through trainings that begin with the potential or its file as a template."""
    settings = MtpSettings(level=4, radial_basis_size=3, cutoff=3.5)
    first = texts_of(random_potential(settings, EnsembleSettings(size=1)), [8, 1])[0]
    replace(first, name="water one", tag="PBE, 3").write(tmp_path / "water.mtp")
    known, plain = read_mtp(tmp_path / "water.mtp"), (1, 8)
    potential = load_mtp(tmp_path / "water.mtp", [8, 1])
    assert potential.type_numbers == [8, 1] and potential.species.numbers == plain
    potential.save(tmp_path / "p")
    again = Potential.load(tmp_path / "p")
    assert str(texts_of(again)[0]) == str(known) and str(texts_of(again, [8, 1])[0]) == str(known)
    assert texts_of(again, [1, 8])[0].name == "water one" and again.with_types(plain).type_numbers == [8, 1]
    np.testing.assert_array_equal(texts_of(again, [1, 8])[0].trained.species, known.trained.species[::-1])
    frames = [molecule("H2O"), molecule("H2O2"), molecule("CH4"), molecule("CH3OH")]
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0 * len(atoms), forces=np.zeros((len(atoms), 3)))
    training = TrainingSettings(projection={"iterations": 1, "starts": 1}, validation_fraction=0.0)
    one = EnsembleSettings(size=1)
    further, further_result = fit_potential(frames, again.settings, one, training, 0, start=again)
    assert further.type_numbers == [8, 1, 6] and texts_of(further)[0].types == 3
    assert (texts_of(further)[0].name, texts_of(further)[0].tag) == ("water one", "PBE, 3")
    longer = further.with_types((8, 1, 7, 6))  # of the files that it was trained on: nitrogen came with them
    assert longer.type_numbers == [8, 1, 7, 6] and texts_of(longer)[0].name == "water one"
    assert further.with_types((8, 6, 1)).type_numbers == [8, 1, 6]
    learner = Learner(4, training=training, start=again, typical=frames)
    told = learner.potential(
        further_result, frames, further.reference_energies, np.random.default_rng(0), FileTypes((8, 1, 7, 6)).note()
    )
    assert told.type_numbers == [8, 1, 7, 6] and texts_of(told)[0].tag == "PBE, 3"
    from_template = MtpSettings(template=tmp_path / "water.mtp")
    fresh, _ = fit_potential(frames[:2], from_template, one, training, 0)
    assert fresh.type_numbers == [1, 8] and fresh.with_types((0, 8, 1)).type_numbers == [0, 8, 1]
    text = texts_of(fresh.with_types((0, 8, 1)))[0]
    assert (text.name, text.tag, text.types) == ("water one", "PBE, 3", 3)
    assert text.trained.species[0] == 0 and text.trained.species[1] == texts_of(fresh)[0].trained.species[1]
    check_start(again, from_template.model_copy(update={"scaling": None}), one)  # names are no part of the architecture
    later = replace(fresh, metadata={"mlip_files": {"version": 2}})
    assert later.type_numbers == [1, 8]


def test_energies_of_atoms_are_references_that_other_data_leave_alone(tmp_path):
    """Those of elements that do not occur among the data stay through a fit; large ones cost no digits of float32."""
    settings = MtpSettings(level=4, radial_basis_size=3, cutoff=3.5)
    files = save_mtp(random_potential(settings), tmp_path / "water.mtp")
    potential, committee = load_mtp(files[0], [1, 8]), load_mtp(files, [1, 8])
    assert potential.reference_energies[8] == read_mtp(files[0]).trained.species[1] < -2000
    np.testing.assert_allclose(energies(committee, [Atoms("O")])[0], energies(potential, [Atoms("O")])[0], rtol=1e-14)
    assert np.abs(committee.params["species"]).max() < 1
    frames = [molecule("H2"), molecule("H2")]
    frames[1].positions *= 1.1
    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=-27.0, forces=np.zeros((2, 3)))
    training = TrainingSettings(projection={"iterations": 1, "starts": 1}, validation_fraction=0.0)
    tuned, _ = fit_potential(frames, settings, EnsembleSettings(size=1), training, 0, start=potential)
    known = potential.evaluate([Atoms("O")]).energy
    np.testing.assert_allclose(tuned.evaluate([Atoms("O")]).energy, known, atol=1)
    np.testing.assert_allclose(tuned.evaluate(frames).energy, -27.0, atol=0.1)


def test_motep_gives_the_same(tmp_path):
    calculator = pytest.importorskip("motep.calculator")
    from motep.io.mlip.mtp import read_mtp as read_by_motep

    potential = random_potential(MtpSettings(level=10, radial_basis_size=6, cutoff=3.5, min_dist=0.6))
    frames = [molecule("H2O2"), molecule("H2O")]
    for member, file in zip(energies(potential, frames), save_mtp(potential, tmp_path / "a.mtp"), strict=True):
        data = read_by_motep(file)
        data.species = [1, 8]
        for atoms, energy in zip(frames, member, strict=True):
            atoms.calc = calculator.MTP(data)
            assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-12)


def crystal_of(folder: Path) -> Path:
    """A folder with the file, a crystal that is not quite perfect, and its label."""
    crystal = bulk("Si", cubic=True)
    crystal.rattle(0.05, seed=1)
    (folder / "si.mtp").write_text(SILICON)
    write_structures(folder / "si.xyz", [crystal])
    crystal.calc = almlip_jax.load(folder / "si.mtp", ["Si"]).calculator()
    labelled = SinglePointCalculator(crystal, energy=crystal.get_potential_energy(), forces=crystal.get_forces())
    crystal.calc = labelled
    write_structures(folder / "labelled.extxyz", [crystal])
    return folder / "si.mtp"


class TestWhereSettingsNamePotentials:
    def test_what_a_file_says_without_being_loaded(self, tmp_path: Path) -> None:
        path = crystal_of(tmp_path)
        saved = SavedPotential.read(path, ["Si"])
        assert saved.numbers == {14} and saved.precision == "float64" and saved.states is saved.remembered is None
        assert saved.model["kind"] == "mtp" and saved.ensemble == {"size": 1}
        assert saved.digest() == saved.digest(training=True) != SavedPotential.read(path, ["Ge"]).digest()
        path.write_text(SILICON.replace("-1.228579286373246e+00", "-1.3"))
        assert SavedPotential.read(path, ["Si"]).digest() != saved.digest() and not saved.holds("")
        assert Potential.load(path, ["Si"]).species.symbols == ("Si",)
        for types, why in ((None, "say which element each of its types is"), (["Si", "O"], "has 1 types, but 2")):
            with pytest.raises(InputError, match=why):
                SavedPotential.read(path, types)
        with pytest.raises(InputError, match="neither a folder of one nor an .mtp file"):
            SavedPotential.read(tmp_path / "si.xyz", ["Si"])

    @pytest.mark.parametrize("where", ["system", "initial"])
    def test_a_campaign_begins_with_a_file(self, tmp_path: Path, where: str) -> None:
        path = crystal_of(tmp_path)
        sections: dict[str, Any] = {
            "system": {"structures": str(tmp_path / "si.xyz")},
            "oracle": {"kind": "ase", "calculator": "ase.calculators.lj:LennardJones"},
            "initial": {"potential": str(path), "rattle": {"count": 4}},
            "selection": {"selector": {"kind": "max_det"}},
            "exploration": {
                "kind": "md",
                "walkers": [{"temperature": 300}],
                "gate": {"kind": "absolute", "score": "latent_distance"},
                "thresholds": {"kind": "fixed", "record": 0.1, "stop": 9.0},
            },
            "stopping": {"share_below": None},
        }
        with pytest.raises(InputError, match="say which element each of its types is"):
            with_beginning(ExperimentConfig.model_validate(sections))
        sections[where]["types"] = ["Si"]
        config = with_beginning(ExperimentConfig.model_validate(sections))
        assert config.model.kind == "mtp" and config.ensemble.size == 1 and config.precision == "float64"
        check_campaign(config)
        start = Inputs(config).start
        assert start is not None and start.species.symbols == ("Si",)
        before = settled(config)["initial_potential"]
        path.write_text(SILICON.replace("-1.228579286373246e+00", "-1.3"))
        assert settled(config)["initial_potential"] != before

    def test_a_file_is_a_label_source(self, tmp_path: Path) -> None:
        source = PotentialSourceSettings(path=crystal_of(tmp_path), types=("Si",))
        (known,) = read_structures(tmp_path / "labelled.extxyz")
        found = source.build()(known)
        assert found.energy == pytest.approx(known.get_potential_energy(), abs=1e-5)
        np.testing.assert_allclose(found.forces, known.get_forces(), atol=1e-5)
        assert found.stress is not None and not source.gives("dipole")
        with pytest.raises(LabelError, match="does not know H"):
            source.check(molecule("H2O"))

    def test_commands_read_files(self, tmp_path: Path) -> None:
        crystal_of(tmp_path)
        run = CliRunner()
        place, data = str(tmp_path / "si.mtp"), str(tmp_path / "labelled.extxyz")
        shown = run.invoke(cli.app, ["evaluate", place, data, "--types", "Si", "--json", str(tmp_path / "e.json")])
        assert shown.exit_code == 0, shown.output
        refused = run.invoke(cli.app, ["export", place, str(tmp_path / "out"), "--like", data, "--stablehlo"])
        assert refused.exit_code != 0 and "almlip convert" in " ".join(refused.output.split())

    @pytest.mark.slow
    def test_a_training_begins_with_a_file(self, tmp_path: Path) -> None:
        """One step of a small rate hardly changes what it says."""
        crystal_of(tmp_path)
        (tmp_path / "train.yaml").write_text(
            "system: {types: [Si]}\ntraining: {max_steps: 1, learning_rate: 1.0e-9, validation_fraction: 0}\n"
        )
        arguments = ["--data", "labelled.extxyz", "--from", "si.mtp", "--out", "tuned"]
        places = [str(tmp_path / one) if not one.startswith("--") else one for one in arguments]
        shown = CliRunner().invoke(cli.app, ["train", str(tmp_path / "train.yaml"), *places])
        assert shown.exit_code == 0, shown.output
        (known,) = read_structures(tmp_path / "labelled.extxyz")
        tuned = almlip_jax.load(tmp_path / "tuned")
        assert tuned.settings.kind == "mtp"
        np.testing.assert_allclose(tuned.evaluate([known]).forces[0], known.get_forces(), atol=1e-4)
