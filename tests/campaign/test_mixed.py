"""Unlike systems in one campaign: what generators make of them, and their shares of the first labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc100, molecule
from pydantic import ValidationError
from tiny_campaign import Killed, KillingProgress, run_or_resume, tiny_config
from typer.testing import CliRunner

from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.sparse import SparseSettings, sparse
from almlip_jax.campaign.teacher import FromTeacherSettings, TeacherSettings
from almlip_jax.campaign.teaching import Teacher, first_choice
from almlip_jax.cli import app
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.models import SharedDensitySettings
from almlip_jax.oracles import CalculatorSettings, Labeller, LabelStore, rattle
from almlip_jax.potential import Potential
from almlip_jax.progress import SilentProgress
from almlip_jax.structures.carried import system_of
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.yaml_text import yaml_text

STARTS = {
    "water": molecule("H2O"),
    "metal": bulk("Cu", cubic=True),
    "slab": fcc100("Cu", (2, 1, 2), vacuum=6, periodic=True),
}
STARTS["slab"].pbc = [True, True, False]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Start geometries of three systems that have nothing in common."""
    for name, start in STARTS.items():
        write_structures(tmp_path / f"{name}.extxyz", [start])
    return {name: str(tmp_path / f"{name}.extxyz") for name in STARTS}


def displaced(**counts: int) -> list[Atoms]:
    """Structures of the systems, so many of each."""
    frames = []
    for name, count in counts.items():
        for frame in rattle(STARTS[name], count, np.random.default_rng(len(name)), stdev=0.05):
            frame.info["system"] = name
            frames.append(frame)
    return frames


def counted(frames: list[Atoms]) -> dict[str | None, int]:
    return dict(Counter(system_of(frame) for frame in frames))


EQUAL = {"water": 1.0, "metal": 1.0, "slab": 1.0}


@pytest.mark.parametrize("selector", [{"kind": "bait"}, {"kind": "top_k", "score": "force_std_max"}])
def test_first_labels_of_a_teacher_are_shared(selector: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the selector prefers, which without shares is one system nearly always."""
    frames = displaced(slab=9, water=12, metal=6)
    model, members, species = SharedDensitySettings(size="tiny", cutoff=4.0), EnsembleSettings(size=2), (1, 8, 29)
    params = jax.jit(build_ensemble(model, members, SpeciesTable(species)).init)(jax.random.key(0))
    potential = Potential(model, SpeciesTable(species), params, dict.fromkeys(species, 0.0), members=members)
    source = CalculatorSettings(calculator="ase.calculators.emt:EMT")

    def first(count: int, shares: dict[str, float]) -> list[Atoms]:
        asked = FromTeacherSettings.model_validate({"count": count, "selector": selector})
        return first_choice(asked, teacher, potential, frames, 1, SilentProgress(), shares)

    with LabelStore(tmp_path / "labels.db") as store, Labeller(source, store) as labeller:
        teacher = Teacher(TeacherSettings(source=source), labeller, labeller)
        alone, shared = first(6, {}), first(6, EQUAL)
        assert counted(shared) == {"water": 2, "metal": 2, "slab": 2} != counted(alone)
        assert counted(first(8, {**EQUAL, "slab": 2.0})) == {"water": 2, "metal": 2, "slab": 4}
        assert counted(first(24, EQUAL)) == {"water": 9, "metal": 6, "slab": 9}, "what one has not goes to the others"
    assert len({frame.positions.tobytes() for frame in shared}) == 6


def test_a_sparse_sample_is_shared() -> None:
    frames = [*displaced(water=8, metal=5, slab=7), *rattle(molecule("CO"), 4, np.random.default_rng(0), stdev=0.1)]

    def chosen(count: int, **more: Any) -> dict[str | None, int]:
        rows = sparse(frames, SparseSettings(count=count), jax.random.key(0), cutoff=4.0, seed=0, **more)
        assert len(set(rows)) == count
        return counted([frames[row] for row in rows])

    assert chosen(6, shares=EQUAL) == {"water": 2, "metal": 2, "slab": 2}
    assert chosen(8, shares={**EQUAL, "metal": 2.0}) == {"water": 2, "metal": 4, "slab": 2}
    assert chosen(22, shares=EQUAL) == {"water": 8, "metal": 5, "slab": 7, None: 2}, "those of no system come last"
    assert chosen(6, shares=EQUAL, known=frames[:3]) == {"water": 2, "metal": 2, "slab": 2}


def test_first_labels_of_a_pool_are_shared(files: dict[str, str], tmp_path: Path) -> None:
    write_structures(tmp_path / "pool.extxyz", displaced(water=20, metal=6, slab=6))
    pool = {"kind": "pool", "files": str(tmp_path / "pool.extxyz")}
    initial = {"rattle": None, "md": (), "from_pool": {"count": 8}}
    system = {"structures": files, "shares": {**EQUAL, "slab": 2.0}}
    given = {"initial": initial, "test": {"md": (), "from_pool": 6}, "exploration": pool}
    inputs = Inputs(tiny_config(tmp_path, system=system, **given))
    assert counted(inputs.of_pool(inputs.pool_split.initial)) == {"water": 2, "metal": 2, "slab": 4}
    plain = Inputs(tiny_config(tmp_path, **given))
    assert plain.pool_split.test == inputs.pool_split.test, "shares change no test set"


def mixed(tmp_path: Path, files: dict[str, str], *generators: dict[str, Any], **sections: Any) -> ExperimentConfig:
    """A campaign of three systems that begins with generated structures and goes on with such."""
    made = {"initial": {"rattle": None, "md": (), "generated": generators}, "test": {"md": ()}}
    exploration = {"kind": "generated", "of": generators}
    given = {"system": {"structures": files}, "oracle": EMT, "exploration": exploration, **made}
    return tiny_config(tmp_path, **{**given, **sections})


EMT = {"kind": "ase", "calculator": "ase.calculators.emt:EMT"}
SIDE_BY_SIDE = (
    {"kind": "strained", "count": 4},
    {"kind": "surfaces", "count": 2, "layers": 1},
    {"kind": "rattled", "count": 6},
    {"kind": "clusters", "count": 3, "pieces": [2, 2]},
    {"kind": "vacancies", "count": 4},
)


def test_generators_take_what_suits_them_side_by_side(files: dict[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    config = mixed(tmp_path, files, *SIDE_BY_SIDE)
    check_campaign(config, said.append)
    assert [sentence.split("'")[1] for sentence in said] == ["strained", "surfaces", "clusters", "vacancies"]
    assert "start geometry 0 (water) is not periodic in three directions" in said[0]
    made = Inputs(config).generated_to_label
    assert {kind: counted(frames) for kind, frames in made.items()} == {
        "strained": {"metal": 4},
        "surfaces": {"metal": 2},
        "rattled": {"water": 2, "metal": 2, "slab": 2},
        "clusters": {"water": 3},
        "vacancies": {"metal": 2, "slab": 2},
    }
    alone = tiny_config(
        tmp_path,
        system={"structures": {"metal": files["metal"]}},
        initial={"rattle": None, "md": (), "generated": SIDE_BY_SIDE[:1]},
    )
    strained = Inputs(alone).generated_to_label["strained"]
    assert all(map(_same, strained, made["strained"])), "as in a campaign of the metal alone"


def _same(one: Atoms, other: Atoms) -> bool:
    return one == other and one.info == other.info


def test_conformers_beside_crystals(files: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    generators = ({"kind": "strained", "count": 4}, {"kind": "conformers", "count": 2, "stdev": 0.02})
    made = Inputs(mixed(tmp_path, files, *generators)).generated_to_label
    assert {kind: counted(frames) for kind, frames in made.items()} == {
        "strained": {"metal": 4},
        "conformers": {"water": 1},
    }


def test_what_is_generated_is_sampled_by_shares(files: dict[str, str], tmp_path: Path) -> None:
    """Of 19 structures, 8 of the metal; the water has 5."""
    config = mixed(tmp_path, files, *SIDE_BY_SIDE, system={"structures": files, "shares": {**EQUAL, "slab": 2.0}})
    initial = config.initial.model_copy(update={"from_generated": SparseSettings(count=8)})
    made = Inputs(config.model_copy(update={"initial": initial})).generated_to_label
    assert counted([frame for frames in made.values() for frame in frames]) == {"water": 2, "metal": 2, "slab": 4}


def test_generators_are_given_systems_by_name(files: dict[str, str], tmp_path: Path) -> None:
    crystals = {"kind": "random_search", "count": 3, "composition": {"Cu": 2}, "volume": [10, 14]}
    made = Inputs(
        mixed(
            tmp_path,
            files,
            {"kind": "rattled", "count": 4, "systems": ["slab", "water"]},
            {"kind": "clusters", "count": 2, "composition": {"Cu": 4}, "systems": ["metal"]},
            crystals,
        )
    ).generated_to_label
    assert {kind: counted(frames) for kind, frames in made.items()} == {
        "rattled": {"water": 2, "slab": 2},
        "clusters": {"metal": 2},
        "random_search": {None: 3},
    }


@pytest.mark.parametrize(
    ("generator", "why"),
    [
        ({"kind": "rattled", "systems": ["copper"]}, "systems names 'copper'; the systems are: water, metal, slab"),
        ({"kind": "strained", "systems": ["metal", "slab"]}, "nothing of system 'slab': start geometry 2"),
        ({"kind": "random_search", "systems": ["water"]}, "start geometry 0 .water. is not periodic .*give a volume"),
        ({"kind": "surfaces", "largest": 1}, "nothing of the start geometries: start geometry 0 .*; start geometry 1"),
    ],
)
@pytest.mark.parametrize("where", ["initial", "exploration"])
def test_generators_that_nothing_suits_are_refused(
    generator: dict[str, Any], why: str, where: str, files: dict[str, str], tmp_path: Path
) -> None:
    other = {"kind": "rattled", "count": 2}
    initial = {"rattle": None, "md": (), "generated": [generator if where == "initial" else other]}
    exploration = {"kind": "generated", "of": [generator if where == "exploration" else other]}
    with pytest.raises((ValidationError, InputError), match=why) as refused:
        check_campaign(mixed(tmp_path, files, initial=initial, exploration=exploration))
    if "copper" in why:
        place = "initial.generated.0" if where == "initial" else "exploration.of.0"
        assert f"{place}.systems" in str(refused.value)


def test_systems_of_generators_need_names(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="but the systems have no names"):
        tiny_config(tmp_path, initial={"generated": [{"kind": "rattled", "systems": ["water"]}]})


def test_a_command_says_what_is_left_out(files: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml_text(mixed(tmp_path, files, *SIDE_BY_SIDE).model_dump(mode="json")))
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "made.extxyz")])
    assert done.exit_code == 0, done.output
    assert done.output.count("leaves out") == 4 and "'clusters' leaves out 2 of 3 start geometries" in done.output
    assert counted(read_structures(tmp_path / "made.extxyz")) == {"metal": 10, "water": 5, "slab": 4}


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once")
def test_a_mixed_campaign_of_generated_structures(files: dict[str, str], tmp_path: Path) -> None:
    """Shares hold of first labels and batches; what is relaxed keeps its system; a killed campaign ends the same."""
    generators = [
        {"kind": "strained", "count": 5, "stdev": 0.02},
        {"kind": "rattled", "count": 8, "systems": ["water", "slab"]},
        {"kind": "random_search", "count": 2, "relax": {"cell": "full", "steps": 5}},
    ]
    sections: dict[str, Any] = {
        "system": {"structures": files, "shares": {**EQUAL, "slab": 2.0}},
        "oracle": EMT,
        "initial": {"rattle": None, "md": (), "generated": generators, "from_generated": {"count": 8}},
        "test": {"md": ()},
        "exploration": {"kind": "generated", "of": generators},
        "training": {"max_steps": 60},
        "selection": {"batch": 4, "selector": {"kind": "bait"}},
        "stopping": {"max_rounds": 1},
    }
    run_or_resume(tmp_path, tmp_path / "run", **sections)
    run = RunDirectory(tmp_path / "run")
    assert counted(read_structures(run.round(0).dataset)) == {"water": 2, "metal": 2, "slab": 4}
    assert counted(read_structures(run.round(0).batch)) == {"water": 1, "metal": 1, "slab": 2}
    pool = counted(read_structures(run.round(0).pool))
    assert pool["water"] == pool["slab"] == 4 and pool["metal"] in (5, 6, 7) and set(pool) == set(STARTS)
    assert run.log.read_text().count("leaves out") == 2, "each generator says so once, rounds and initial set together"
    with pytest.raises(Killed):
        run_or_resume(tmp_path, tmp_path / "killed", KillingProgress(0, "relax", within=True), **sections)
    run_or_resume(tmp_path, tmp_path / "killed", **sections)
    assert RunDirectory(tmp_path / "killed").round(1).dataset.read_bytes() == run.round(1).dataset.read_bytes()
