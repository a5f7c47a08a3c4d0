"""The pages: snippets of YAML are valid configs, lines for a shell are what the program takes, and Python runs."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from ase import Atoms
from ase.build import bulk, molecule

from almlip_jax import cli, scores, targets
from almlip_jax.campaign.choice import ExplorationChoice
from almlip_jax.config import load_settings
from almlip_jax.dynamics import ExplorationSettings
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.interfaces.lammps_script import started
from almlip_jax.kinds import PLUGINS
from almlip_jax.models import ModelSettings, MtpSettings, SharedDensitySettings
from almlip_jax.potential import Potential
from almlip_jax.potential.mtp_files import save_mtp
from almlip_jax.structures.graph import lone_atoms
from almlip_jax.structures.io import write_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.templates import KINDS, TEMPLATES
from almlip_jax.yaml_text import parse_yaml, yaml_text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASES = {"campaign": TEMPLATES["molecule"], **{name: TEMPLATES[name] for name in ("explore", "md", "sweep", "distil")}}
CONFIGURED = ("run", "resume", "train", "label", "select", "generate")
READS = dict.fromkeys(CONFIGURED, "campaign")
SECTIONS = {"biases": "exploration"}
"""Sections that a page shows alone, and where they belong."""


@dataclass(frozen=True)
class Snippet:
    """A block of code on a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def snippets() -> Iterator[Snippet]:
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            yield Snippet(page, text.count("\n", 0, found.start()) + 1, found.group(1), found.group(2))


def of(language: str) -> list[Snippet]:
    return [one for one in snippets() if one.language == language]


def test_every_block_says_what_it_is():
    assert {one.language for one in snippets()} == {"sh", "yaml", "python", "toml", "lammps", "xml"}


def over(base: Any, changes: Any) -> Any:
    """Keys of a fragment over those of a whole config; a section of another kind replaces the one that is there."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    if "kind" in changes and changes["kind"] != base.get("kind"):
        return changes
    return base | {key: over(base.get(key), value) for key, value in changes.items()}


@pytest.mark.parametrize("snippet", of("yaml"), ids=str)
def test_yaml_is_valid(snippet, tmp_path):
    fragment = parse_yaml(snippet.text, str(snippet)).value
    for key in set(fragment) & set(SECTIONS):
        fragment = {SECTIONS[key]: {key: fragment.pop(key)}} | fragment
    kind = snippet.page.stem if snippet.page.stem in BASES else "campaign"
    path = tmp_path / "config.yaml"
    path.write_text(yaml_text(over(BASES[kind].content, fragment)))
    load_settings(KINDS[kind], path)


def lines(program: str) -> list[Any]:
    found = [
        (f"{snippet}, {line.split('#')[0].strip()}", shlex.split(line, comments=True))
        for snippet in of("sh")
        for line in snippet.text.splitlines()
    ]
    return [pytest.param(words[1:], id=name) for name, words in found if words and words[0] == program]


@pytest.mark.parametrize("words", lines("almlip"))
def test_the_program_takes_what_the_pages_write(words, tmp_path):
    program = typer.main.get_command(cli.app)
    context = program.make_context("almlip", list(words))
    name, *arguments = words
    command = program.get_command(context, name)
    assert command is not None, f"there is no command '{name}'"
    parsed = command.make_context(name, arguments, parent=context).params
    kind = READS.get(name, name)
    if parsed.get("overrides"):
        path = tmp_path / "config.yaml"
        path.write_text(yaml_text(BASES[kind].content))
        load_settings(KINDS[kind], path, parsed["overrides"])


@pytest.mark.parametrize("words", lines("pip"))
def test_extras_are_there(words):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"\[([\w-]+)\]", " ".join(words))
    assert set(asked) <= set(extras)


@pytest.mark.parametrize("snippet", of("toml"), ids=str)
def test_packages_name_the_group_that_is_looked_for(snippet):
    assert PLUGINS in tomllib.loads(snippet.text)["project"]["entry-points"]


@pytest.mark.parametrize("words", lines("python3"))
def test_the_starter_has_the_commands(words):
    assert words[0] == "start.py" and f'"{words[1]}"' in (ROOT / "start.py").read_text()


LAMMPS_SETUP = """
units metal
region box block 0 8 0 8 0 8
create_box 2 box
create_atoms 1 single 4 4 4
create_atoms 2 single 4.76 4.6 4
create_atoms 2 single 3.24 4.6 4
mass 1 15.999
mass 2 1.008
timestep 0.0002
fix move all nve
"""


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> dict[str, Any]:
    """What Python on the pages takes for granted: a folder with files, a tiny potential, structures, a short run."""
    folder = tmp_path_factory.mktemp("pages")
    species, members = SpeciesTable((1, 8)), EnsembleSettings(size=2)
    model = SharedDensitySettings(cutoff=3.0, radial=4, l_max=0, channels=4, hidden=(8,))
    params = jax.jit(build_ensemble(model, members, species).init)(jax.random.key(0))
    potential = Potential(model, species, params, {1: 0.0, 8: 0.0}, members=members)
    potential.save(folder / "runs" / "my" / "rounds" / "010" / "potential")
    (folder / "runs" / "my" / "potential").symlink_to("rounds/010/potential")
    linear = MtpSettings(level=4, radial_basis_size=3)
    moments = jax.jit(build_ensemble(linear, EnsembleSettings(size=1), species).init)(jax.random.key(0))
    for name in ("pot.mtp", "a.mtp", "b.mtp"):
        save_mtp(Potential(linear, species, moments, {1: 0.0, 8: 0.0}), folder / name, [8, 1])
    frames = [molecule("H2O") for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.rattle(0.02, seed=number)
    for name in ("structure.xyz", "many.extxyz", "pool.extxyz"):
        write_structures(folder / name, frames)
    (folder / "runs" / "md").mkdir()
    (folder / "in.setup").write_text(LAMMPS_SETUP)
    (folder / "solvated.pdb").write_text(waters_in_a_box())
    with h5py.File(folder / "runs" / "md" / "trajectory.h5", "w") as file:
        file["particles/walker000/position/value"] = [frame.positions for frame in frames]
    settings = ExplorationSettings.model_validate(
        {"walkers": [{"temperature": 300}], "steps": 10, "chunk": 10, "trajectory_every": 10, "buffer": 2}
    )
    context = {"potential": potential, "frames": frames, "training_set": frames, "starts": frames[:1]}
    context["crystal"] = bulk("O", "fcc", a=3.6)
    return context | {"folder": folder, "settings": settings, "seed": 0, "key": jax.random.key(0), "atoms": frames[0]}


def waters_in_a_box() -> str:
    """A PDB file with a water in a chain of its own, and three in another."""
    lines = ["CRYST1   20.000   20.000   20.000  90.00  90.00  90.00 P 1           1"]
    atoms = (("O", 0.0, 0.0), ("H1", 0.957, 0.0), ("H2", -0.24, 0.927))
    for number in range(4):
        for place, (name, x, y) in enumerate(atoms, 3 * number + 1):
            where = f"{'AB'[number > 0]}{number + 1:4}    {x + 5 * number:8.3f}{y:8.3f}{0.0:8.3f}"
            lines.append(f"HETATM{place:5}  {name:3} HOH {where}  1.00  0.00          {name[0]:>2}")
        lines += ["TER"] if number in (0, 3) else []
    return "\n".join([*lines, "END", ""])


def installed(snippet: Snippet) -> None:
    """Skips pages on programs that are not there."""
    if snippet.page.stem == "openmm":
        pytest.importorskip("openmmml")
        if not entry_points(group="openmmml.potentials", name="almlip"):
            pytest.skip("the package was installed before it had a plug-in of openmmml")
    if snippet.page.stem == "lammps":
        try:
            started(("-screen", "none", "-log", "none")).close()
        except InputError as error:
            pytest.skip(f"LAMMPS cannot be started here: {error}")


# jax-md as a whole takes seconds to import; its page runs below
@pytest.mark.parametrize("snippet", [one for one in of("python") if one.page.stem != "jax_md"], ids=str)
def test_python_is_python_and_imports_what_is_there(snippet):
    installed(snippet)
    tree = ast.parse(snippet.text, str(snippet))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(imports, []), str(snippet), "exec"), {})


def compiling(snippet: Snippet) -> Any:
    """Dynamics and gradients of all parameters take long to compile."""
    slow = snippet.page.stem in ("differentiable", "exploration", "jax_md", "python", "selection")
    return pytest.param(snippet, id=str(snippet), marks=[pytest.mark.slow] if slow else [])


# exported programs run in a process of their own: tests/interfaces/test_stablehlo.py
@pytest.mark.parametrize("snippet", [compiling(one) for one in of("python") if one.page.stem != "export"])
def test_python_runs(snippet, known, monkeypatch, count_compilations):
    installed(snippet)
    monkeypatch.chdir(known["folder"])
    for declared in ("_STRUCTURES", "_ATOMS"):  # what a page declares is known there only
        monkeypatch.setattr(scores, declared, dict(getattr(scores, declared)))
    monkeypatch.setattr(targets, "_TARGETS", dict(targets._TARGETS))
    for family in (ExplorationChoice, ModelSettings, SharedDensitySettings):
        monkeypatch.setattr(family, "_below", dict(family._below))
    names = {**known, "frames": [frame.copy() for frame in known["frames"]], "atoms": known["atoms"].copy()}
    compiled_at: list[int] = []  # each line that is printed
    with count_compilations() as compiled:
        names["print"] = lambda *_: compiled_at.append(len(compiled))
        exec(compile(snippet.text, str(snippet), "exec", dont_inherit=True), names)
    made = {name: value for name, value in names.items() if name not in known}
    if "learner" in made and "explorer" in made:
        assert compiled_at[0] > 0 and len(set(compiled_at[:3])) == 1, "later rounds compile nothing"
    if "field" in made and snippet.page.stem == "biases":
        assert made["field"](0.1) == made["field"](0.2), "numbers need no other program"
    if "above" in made:
        assert made["above"](3.0)(lambda: np.array([0.1, 0.3]), None).levels == pytest.approx((0.5, 2.0))
    if "Rattled" in made:
        given = SimpleNamespace(labelled=known["frames"], key=known["key"])
        assert len(made["Rattled"].explore(SimpleNamespace(count=7), given)) == 7
    if "ChargedSettings" in made:
        model = ModelSettings.parse({"kind": "charged", "cutoff": 3.0, "size": "tiny", "hidden": (8,)})
        ensemble = build_ensemble(model, EnsembleSettings(size=2), SpeciesTable((1, 8)))
        params, graph = jax.jit(ensemble.init)(jax.random.key(0)), lone_atoms(2, jnp.dtype(jnp.float32))
        committee = ensemble.committee(params, replace(graph, charge=jnp.asarray([1.0, -1.0])))
        np.testing.assert_allclose(committee.further["charges"], [1.0, -1.0], atol=1e-5)
        assert {"charges_std_max", "charges_std_mean"} <= set(committee.scores)
    if "height" in made:
        assert made["height"](2)(known["atoms"].positions, known["atoms"].cell.array) < 0
    if snippet.page.stem == "differentiable":
        assert made["uphill"].shape[-1] == 3
    if "rows" in made:
        assert made["rows"].shape == (3, 512)
    if isinstance(names["atoms"], Atoms) and names["atoms"].calc is not None:
        assert names["atoms"].get_forces().shape == (3, 3)
