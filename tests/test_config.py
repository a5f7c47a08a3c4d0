"""Configs: what is shipped and generated is valid, and every mistake is named with its key, line and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from almlip_jax.config import ExperimentConfig, config_text, load_config, load_settings
from almlip_jax.errors import InputError
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


def test_paths_are_meant_from_the_config_and_overrides_from_here(tmp_path, monkeypatch):
    config = load_config(written(tmp_path, PLAIN))
    assert config.system.structures == tmp_path / "start.xyz"
    monkeypatch.chdir(tmp_path.parent)
    other = load_config(tmp_path / "config.yaml", ["system.structures=mine.xyz", "training.max_steps=7", "seed=3"])
    assert other.system.structures == tmp_path.parent.resolve() / "mine.xyz"
    assert other.training.max_steps == 7 and other.seed == 3
    user = PLAIN + "selection: {selector: {kind: user, function: 'a:b', parameters: {path: x.txt}}}\n"
    assert load_config(written(tmp_path, user)).selection.selector.parameters == {"path": "x.txt"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN + "trainig: {}\n", r"line 5, trainig: unknown key 'trainig'; did you mean 'training'\?"),
        (PLAIN + "training:\n  max_stepps: 5\n", r"line 6, training.max_stepps: unknown key .* 'max_steps'"),
        (PLAIN + "training: {max_steps: many}\n", r"line 5, training.max_steps: input should be a valid integer"),
        (PLAIN + "training: {max_steps: 0}\n", r"training.max_steps: input should be greater than or equal to 1"),
        (PLAIN.replace("tblite", "tblit"), r"line 3, oracle: 'tblit' is no valid kind; did you mean 'tblite'\?"),
        (PLAIN.replace("system: {structures: start.xyz}\n", ""), r"system: the key is missing"),
        (PLAIN + "seed: 1\nseed: 2\n", r"'seed' is given twice"),
        (PLAIN + "seed: [1\n", r"not valid YAML"),
        ("- a\n- b\n", r"must hold keys and values"),
        (PLAIN + "exploration: {kind: md, chunk: 33, trace_every: 10}\n", r"chunk 33 is not a multiple of trace_every"),
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
    [("seed", "not of the form key=value"), ("seed.x=1", "'seed' holds a value"), ("seed=[1", "no valid value")],
)
def test_overrides_that_cannot_be(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        load_config(written(tmp_path, PLAIN + "seed: 1\n"), [override])


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml cannot be read"):
        load_config(tmp_path / "nowhere.yaml")


def test_the_schema_describes_every_field():
    schema = ExperimentConfig.model_json_schema()
    for name, model in {"ExperimentConfig": schema, **schema["$defs"]}.items():
        for key, field in model.get("properties", {}).items():
            assert key == "kind" or "description" in field or "$ref" in field, f"{name}.{key}"
