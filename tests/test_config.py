"""Configs: what is shipped and generated is valid, and every mistake is named with its key, line and remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, create_model

from almlip_jax.campaign.config import ExperimentConfig, LabelConfig, SelectConfig, TrainConfig, load_config
from almlip_jax.config import config_text, load_settings
from almlip_jax.errors import InputError
from almlip_jax.fitting import fit_potential
from almlip_jax.kinds import Spec
from almlip_jax.oracles.codes.base import codes
from almlip_jax.settings import Settings
from almlip_jax.templates import KINDS, TEMPLATES, render

CONFIGS = Path(__file__).parents[1] / "configs"
PLAIN = """\
name: plain
system: {structures: start.xyz}
oracle: {kind: tblite}
initial: {rattle: {count: 4}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_a_round_trip(path, tmp_path):
    kind = KINDS["sweep" if path.stem.startswith("sweep_") else "campaign"]
    config = load_settings(kind, path)
    assert load_settings(kind, written(tmp_path, config_text(config))) == config


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_valid_and_explain_every_key(name, tmp_path):
    text = render(name)
    load_settings(KINDS[TEMPLATES[name].kind], written(tmp_path, text))
    keys = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "-"))]
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert len(comments) >= len(keys) / 2


def test_templates_may_be_labelled_by_any_code(tmp_path):
    for code, known in codes().items():
        for name, template in TEMPLATES.items():
            if not template.elements or (template.periodic and not known.crystals):
                with pytest.raises(InputError, match="own label source|labels molecules"):
                    render(name, code)
                continue
            config = load_config(written(tmp_path, render(name, code)))
            assert config.oracle.code == code and (config.oracle.kspacing is not None) == template.periodic
            assert load_config(written(tmp_path, config_text(config))) == config
    with pytest.raises(InputError, match="no code 'pwscf'"):
        render("crystal", "pwscf")


def test_templates_of_metals_smear():
    """With every code of crystals; in CP2K those without a gap alone, which it then takes with odd electrons."""
    for code in (code for code, known in codes().items() if known.crystals):
        for name in ("slab", "alloy", "mtp"):
            assert re.search("smear|occupation|ismear", render(name, code).lower()), (name, code)
    assert "ADDED_MOS" in render("slab", "cp2k") and "SMEAR" not in render("crystal", "cp2k")
    assert "SMEAR" not in render("molecule", "cp2k")


def test_paths_are_meant_from_the_config_and_overrides_from_here(tmp_path, monkeypatch):
    config = load_config(written(tmp_path, PLAIN))
    assert config.system.structures == tmp_path / "start.xyz"
    monkeypatch.chdir(tmp_path.parent)
    other = load_config(tmp_path / "config.yaml", ["system.structures=mine.xyz", "training.max_steps=7", "seed=3"])
    assert other.system.structures == tmp_path.parent.resolve() / "mine.xyz"
    assert other.training.max_steps == 7 and other.seed == 3
    user = PLAIN + "selection: {selector: {kind: user, function: 'a:b', parameters: {path: x.txt}}}\n"
    assert load_config(written(tmp_path, user)).selection.selector.parameters == {"path": "x.txt"}


class Spectrum(Spec):
    """A family of kinds, as packages and users have them."""


class FromFiles(Spectrum):
    kind: Literal["files"] = "files"
    table: Path
    parts: tuple[Path, ...] = ()
    by_name: dict[str, Path] = {}
    scale: float | Path = 1.0
    origin: Literal["none"] | Path = "none"
    pair: tuple[str, Path] | None = None
    note: str = ""
    parameters: dict[str, Any] = {}


class Study(Settings):
    spectrum: Spectrum


FILES = """\
spectrum:
  kind: files
  table: t.dat
  parts: [a.dat, /b.dat, ~/c.dat, ~nobody_at_all/d.dat]
  by_name: {e: e.dat}
  scale: s.dat
  origin: none
  pair: [p, p.dat]
  note: n.dat
  parameters: {path: q.dat}
"""


def test_what_is_a_path_is_said_by_its_type_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/one")
    found = load_settings(Study, written(tmp_path, FILES)).spectrum
    assert found == FromFiles(
        table=tmp_path / "t.dat",
        parts=(tmp_path / "a.dat", "/b.dat", "/home/one/c.dat", tmp_path / "~nobody_at_all/d.dat"),
        by_name={"e": tmp_path / "e.dat"},
        scale=tmp_path / "s.dat",
        pair=("p", tmp_path / "p.dat"),
        note="n.dat",
        parameters={"path": "q.dat"},
    )
    assert FromFiles(table="t.dat").table == Path("t.dat")  # in Python, where there is no folder of a config


@pytest.mark.parametrize("whole", [False, True])
def test_paths_of_any_name_are_meant_from_here_in_overrides(tmp_path, monkeypatch, whole):
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    given = ["spectrum.table=t.dat", "spectrum.parts.1=b.dat", "spectrum.parameters.path=q.dat", "spectrum.note=m"]
    if whole:
        given = ["spectrum={table: t.dat, kind: files, note: m, parts: [a.dat, b.dat], parameters: {path: q.dat}}"]
    found = load_settings(Study, written(tmp_path, FILES), given).spectrum
    first = here if whole else tmp_path
    assert found.table == here / "t.dat" and found.parts[:2] == (first / "a.dat", here / "b.dat")
    assert found.parameters == {"path": "q.dat"} and found.note == "m" and type(found.note) is str
    assert load_settings(Study, written(tmp_path, config_text(Study(spectrum=found)))).spectrum == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN + "trainig: {}\n", r"line 5, trainig: unknown key 'trainig'; did you mean 'training'\?"),
        (PLAIN + "training:\n  max_stepps: 5\n", r"line 6, training.max_stepps: unknown key .* 'max_steps'"),
        (PLAIN + "training: {max_steps: many}\n", r"line 5, training.max_steps: input should be a valid integer"),
        (PLAIN + "training: {max_steps: 0}\n", r"training.max_steps: 0 is out of bounds; it should be at least 1"),
        (PLAIN.replace("tblite", "tblit"), r"line 3, oracle: 'tblit' is not a valid kind; did you mean 'tblite'\?"),
        (PLAIN.replace("system: {structures: start.xyz}\n", ""), r"system: the key is missing"),
        (PLAIN + "seed: 1\nseed: 2\n", r"'seed' is given twice"),
        (PLAIN + "seed: [1\n", r"not valid YAML"),
        ("- a\n- b\n", r"must hold keys and values"),
        (PLAIN + "exploration: {kind: md, chunk: 33, trace_every: 10}\n", r"chunk 33 is not a multiple of trace_every"),
        (
            PLAIN + "exploration: {kind: md, steps: 60, chunk: 200, trajectory_every: 200}\n",
            r"trajectory_every 200 is more than the run's steps 60, so that nothing would be kept",
        ),
        (
            PLAIN + "exploration: {kind: md, thresholds: {kind: fixed, record: 2, stop: 1}}\n",
            r"stop threshold 1 is below",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_config(written(tmp_path, text))


def test_several_mistakes_are_all_named(tmp_path):
    with pytest.raises(InputError) as caught:
        load_config(written(tmp_path, PLAIN + "seed: -1\ntraining: {max_steps: many}\n"))
    assert "line 5, seed" in str(caught.value) and "line 6, training.max_steps" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "not of the form key=value"),
        ("seed..x=1", "not of the form key=value"),
        ("seed.x=1", "'seed' holds a value"),
        ("seed=[1", "the value of --set seed=.1 is not valid YAML"),
        ("exploration.walkers.2.count=1", "'2' is not an item of exploration.walkers, which has items 0 to 1"),
        ("exploration.walkers.two.count=1", "'two' is not an item"),
        ("exploration.biases.0.tau=1", "the config gives no list exploration.biases"),
        (
            "exploration.gate.record=1",
            r"unknown key 'record'; did you mean exploration.thresholds.record \(of kind fixed",
        ),
        ("selection.selector.kind=top_k", r"unknown key 'sigma' of this kind; kinds that have it: .*bait"),
        ("oracle.kind=[tblite]", r"'\['tblite'\]' is not a valid kind; did you mean 'tblite'\?"),
        ("name=2026", "name: it should be text, not 2026; put it into quotes"),
        ("training.learning_rate=.nan", "training.learning_rate: it should be a finite number, not .nan"),
        ("executor=2", "executor: it should be keys and values, not 2"),
    ],
)
def test_overrides_that_cannot_be(tmp_path, override, message):
    walkers = "exploration: {walkers: [{temperature: 300}, {temperature: 500}]}\n"
    file = written(tmp_path, PLAIN + "seed: 1\nselection: {selector: {kind: bait, sigma: 0.1}}\n" + walkers)
    with pytest.raises(InputError, match=message):
        load_config(file, [override])


def test_overrides_reach_everything(tmp_path):
    walkers = "exploration: {walkers: [{temperature: 300}], rewind: null}\n"
    file = written(tmp_path, PLAIN + walkers)
    given = [
        "executor.workers=2",  # a section that is not in the file is of its default kind
        "selection.selector.kind=top_k",
        "exploration.walkers.0.temperature=[300, 900]",
        "exploration.walkers.1={temperature: 77}",
        "exploration.rewind.on=[stop]",
        "training.learning_rate=1e-3",
        "'name'='a: b'",
    ]
    config = load_config(file, given)
    assert config.executor.kind == "local" and config.executor.workers == 2
    assert config.selection.selector.kind == "top_k"
    assert [group.temperatures for group in config.exploration.walkers] == [(300, 900), (77, 77)]
    assert config.exploration.rewind.on == ("stop",)
    assert config.training.learning_rate == 1e-3 and config.name == "a: b"


def test_a_line_of_the_file_is_not_blamed_for_an_override(tmp_path):
    with pytest.raises(InputError, match=r"yaml: seed: -1 is out of bounds"):
        load_config(written(tmp_path, PLAIN + "seed: 1\n"), ["seed=-1"])


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_schema_describes_every_field():
    schema = ExperimentConfig.model_json_schema()
    for name, model in {"ExperimentConfig": schema, **schema["$defs"]}.items():
        for key, field in model.get("properties", {}).items():
            assert key == "kind" or "description" in field or "$ref" in field, f"{name}.{key}"


class Above(Settings):
    first: int = 1
    """What it means,
    in two lines."""
    second: int = Field(default=2, description="said in its field")
    """Said below."""
    third: int = 3
    """Changes below."""


def test_keys_mean_what_the_string_below_them_says():
    """Where it was defined last, in functions too; nothing where nothing is said, or the source is not there."""

    class Below(Above):
        third: int = 4

        fourth: int = 5
        """New."""

    inherited = {"first": "What it means,\nin two lines.", "second": "said in its field"}
    assert Above.meanings() == inherited | {"third": "Changes below."}
    assert Below.meanings() == inherited | {"fourth": "New."}
    shown = Below.model_json_schema()["properties"]
    assert {name: one["description"] for name, one in shown.items() if "description" in one} == Below.meanings()
    assert create_model("Made", __base__=Settings, key=(int, 1)).meanings() == {}


def test_a_training_needs_no_campaign(tmp_path):
    """An empty file will do, and sections of a campaign are not looked at; what is its own is checked as ever."""
    assert load_settings(TrainConfig, written(tmp_path, "")).training.max_steps == 6000
    config = load_settings(TrainConfig, written(tmp_path, PLAIN), ["training.max_steps=7"])
    assert config.training.max_steps == 7 and not hasattr(config, "oracle")
    with pytest.raises(InputError, match="did you mean 'training'"):
        load_settings(TrainConfig, written(tmp_path, "trainig: {max_steps: 7}\n"))


def test_a_selection_needs_no_campaign(tmp_path):
    """A selector alone will do; what is its own is checked as ever."""
    config = load_settings(SelectConfig, written(tmp_path, "selection: {selector: {kind: random}}\n"))
    assert config.selection.selector.kind == "random" and not hasattr(config, "oracle")
    whole = load_settings(SelectConfig, written(tmp_path, PLAIN), ["seed=3", "system.charge=1"])
    assert (whole.seed, whole.system.charge) == (3, 1)
    with pytest.raises(InputError, match="did you mean 'selection'"):
        load_settings(SelectConfig, written(tmp_path, "selektion: {batch: 3}\n"))


def test_labels_need_an_oracle_alone(tmp_path):
    """Sections of a campaign are not looked at; what labels are made of is checked as ever."""
    config = load_settings(LabelConfig, written(tmp_path, "oracle: {kind: tblite}\n"))
    assert (config.oracle.kind, config.executor.kind, config.system.charge) == ("tblite", "local", 0)
    whole = load_settings(LabelConfig, written(tmp_path, PLAIN), ["system.charge=1", "initial.rattle.count=0"])
    assert whole.name == "plain" and whole.system.charge == 1 and not hasattr(whole, "initial")
    with pytest.raises(InputError, match="config.yaml: oracle: the key is missing"):
        load_settings(LabelConfig, written(tmp_path, "executor: {kind: local, workers: 2}\n"))
    with pytest.raises(InputError, match="did you mean 'executor'"):
        load_settings(LabelConfig, written(tmp_path, "oracle: {kind: tblite}\nexecuter: {kind: local}\n"))
    elsewhere = "oracle: {kind: external, method: pbe, folder: out}\nexecutor: {kind: slurm}\n"
    with pytest.raises(InputError, match="made elsewhere; leave it out"):
        load_settings(LabelConfig, written(tmp_path, elsewhere))


def test_a_training_may_suit_the_potential_that_it_begins_with(tmp_path):
    """Model and ensemble that are not given are those of the potential, and not yet known."""
    text = "training: {projection: {iterations: 1}}\n"
    config = load_settings(TrainConfig, written(tmp_path, text))
    with pytest.raises(InputError, match="needs a model that is linear in most"):
        fit_potential([], config.model, config.ensemble, config.training, 0)
    given = text + "ensemble: {size: 1}\nmodel: {kind: "
    assert load_settings(TrainConfig, written(tmp_path, given + "mtp}\n")).ensemble.size == 1
    with pytest.raises(InputError, match="kind 'mace' is not"):
        load_settings(TrainConfig, written(tmp_path, given + "mace}\n"))
    with pytest.raises(InputError, match="needs a model that is linear in most"):
        load_settings(ExperimentConfig, written(tmp_path, PLAIN), ["training.projection.iterations=1"])
    begins = ["training.projection.iterations=1", "initial.potential=earlier"]
    assert load_settings(ExperimentConfig, written(tmp_path, PLAIN), begins).training.projection.iterations == 1
