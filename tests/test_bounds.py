"""Bounds of what a config may hold: every number has them, nonsense is refused with key, value, unit and bound."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from almlip_jax.config import load_settings
from almlip_jax.config_errors import sentences
from almlip_jax.dynamics import ExplorationSettings, RelaxationSettings, relaxing
from almlip_jax.errors import InputError
from almlip_jax.settings import Settings, settings_in
from almlip_jax.simulation import MdConfig
from almlip_jax.templates import KINDS
from almlip_jax.training import TrainingSettings

CAMPAIGN = {
    "system": {"structures": "start.xyz"},
    "oracle": {"kind": "tblite"},
    "initial": {"rattle": {"count": 4}},
}
ELSEWHERE = {
    "SweepConfig.seeds": "a validator asks for different numbers from 0 on",
    "SweepConfig.batch_sizes": "a validator asks for different numbers from 1 on",
    "SweepConfig.ensemble_sizes": "a validator asks for different numbers from 1 on",
    "SweepSystem.initial": "a validator asks for at least 1",
}
"""Numbers whose lower bound is not in the schema, and why."""


def numbers(schema: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every number of a JSON schema with the field that it belongs to."""
    if isinstance(schema, list):
        for item in schema:
            yield from numbers(item, name)
    if not isinstance(schema, dict):
        return
    if schema.get("type") in ("number", "integer"):
        yield name, schema
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            for inner, one in value.items():
                yield from numbers(one, inner if key == "$defs" else f"{name}.{inner}")
        elif key not in ("default", "const", "enum", "discriminator"):
            yield from numbers(value, name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_has_finite_bounds(kind):
    schema = KINDS[kind].model_json_schema()
    for name, number in numbers(schema, KINDS[kind].__name__):
        above = number.get("maximum", number.get("exclusiveMaximum"))
        below = number.get("minimum", number.get("exclusiveMinimum"))
        assert above is not None and math.isfinite(above), f"{name} has no upper bound"
        assert name in ELSEWHERE or (below is not None and math.isfinite(below)), f"{name} has no lower bound"


def every_settings(kind: type[Settings], found: dict[type[Settings], None]) -> dict[type[Settings], None]:
    if kind not in found:
        found[kind] = None
        for field in kind.model_fields.values():
            for inner in settings_in(field.annotation):
                every_settings(inner, found)
    return found


SETTINGS = list({model: None for kind in KINDS.values() for model in every_settings(kind, {})})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True], ids=str)
def test_no_number_may_be_infinite_or_true(value):
    said = "should be a number, not true" if value is True else "finite number"
    for model in SETTINGS:
        for name in (name for name, field in model.model_fields.items() if field.annotation in (int, float)):
            with pytest.raises(ValidationError) as caught:
                model.model_validate({name: value})
            assert said in str(caught.value), f"{model.__name__}.{name}"


def refused(tmp_path, kind: str, content: dict[str, Any]) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError) as caught:
        load_settings(KINDS[kind], path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"seed": 2**32}, "seed: 4294967296 is out of bounds; it should be at most 4294967295"),
        ({"exploration": {"timestep": 1000.0}}, "exploration.timestep: 1000.0 fs is out of bounds; .* at most 20 fs"),
        ({"model": {"cutoff": 0.1}}, "model.cutoff: 0.1 Angstrom is out of bounds; .* at least 1 Angstrom"),
        ({"model": {"cutoff": 1000.0}}, "model.cutoff: 1000.0 Angstrom is out of bounds; .* at most 20 Angstrom"),
        (
            {"exploration": {"walkers": [{"temperature": 1e6}]}},
            "walkers.0.temperature: 1000000.0 K is out of bounds; .* at most 100000 K",
        ),
        (
            {"exploration": {"walkers": [{"temperature": [300, -5]}]}},
            "walkers.0.temperature.1: -5 K is out of bounds; it should be more than 0 K",
        ),
        ({"exploration": {"thresholds": {"kind": "fixed", "record": math.inf, "stop": 1}}}, "record: .* finite number"),
        ({"exploration": {"gate": {"species": {"H": math.nan}}}}, "gate.species.H: it should be a finite number"),
        ({"initial": {"md": [{"steps": 5, "every": 6}]}}, "every 6 is more than steps 5, so that no frame"),
        ({"training": {"loss": {"energy": 0, "forces": 0, "virial": 0}}}, "loss has only weights of 0"),
        ({"oracle": {"kind": "tblite", "timeout": 1e9}}, "oracle.timeout: .* s is out of bounds; .* at most 2000000 s"),
        ({"exploration": {"swaps": {"every": 3000}}}, "swaps.every 3000 is more than the run's steps 2000"),
        ({"exploration": {"gate": {"persistence": 3000}}}, "gate.persistence 3000 is more than the run's steps"),
        (
            {"exploration": {"integrator": {"kind": "npt", "barostat_time": 0.1}}},
            "integrator.barostat_time 0.1 fs should be at least two steps of 0.5 fs",
        ),
        ({"model": {"kind": "mace", "read_out": [0]}}, "model.read_out.0: 0 is out of bounds; it should be at least 1"),
    ],
)
def test_nonsense_is_refused(tmp_path, section, message):
    assert re.search(message, refused(tmp_path, "campaign", CAMPAIGN | section))


def test_a_run_that_would_write_nothing_is_refused():
    common = {"potential": "potential", "structures": "start.xyz"}
    with pytest.raises(ValidationError, match=r"nothing after the start would be written"):
        MdConfig.model_validate(common | {"exploration": {"walkers": [{"temperature": 300}], "steps": 50}})


def test_hills_that_never_come_are_refused():
    variable = {"kind": "distance", "points": [0, 1]}
    bias = {"kind": "metadynamics", "variables": [variable], "widths": [0.1], "height": 0.1, "pace": 300}
    with pytest.raises(ValidationError, match=r"biases\.0\.pace 300 is more than the run's steps 200"):
        ExplorationSettings.model_validate({"steps": 200, "biases": [bias]})
    with pytest.raises(ValidationError, match=r"biases\.0\.pace 300 is all of the run's steps 300"):
        ExplorationSettings.model_validate({"steps": 300, "biases": [bias]})
    ExplorationSettings.model_validate({"steps": 301, "biases": [bias]})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"integrator": {"kind": "nve"}}, "integrator 'nve' has no bath whose temperature could change"),
        ({"integrator": {"kind": "langevin", "friction": 0}}, "has no bath"),
        ({"integrator": {"kind": "fire"}}, "has no bath"),
        ({"integrator": {"kind": "fire"}, "remove_drift": True, "walkers": [{"temperature": 300}]}, "no drift: leave"),
        ({"integrator": {"kind": "adversarial"}, "biases": [{"kind": "sphere", "radius": 5.0}]}, "leave biases out"),
        ({"biases": [{"kind": "uncertainty", "tau": 1.0, "relative": 0.1}]}, "tau is fixed, and relative is"),
    ],
)
def test_what_would_act_on_nothing_in_an_exploration_is_refused(changes, said):
    given = {"walkers": [{"temperature": [300, 600]}]} | changes
    with pytest.raises(ValidationError, match=said):
        ExplorationSettings.model_validate(given)


@pytest.mark.parametrize("kind", ["langevin", "andersen", "csvr", "nose_hoover", "npt", "adversarial"])
def test_baths_take_ramps(kind):
    given = {"walkers": [{"temperature": [300, 600]}], "integrator": {"kind": kind}}
    assert relaxing(ExplorationSettings.model_validate(given), RelaxationSettings()).temperatures == (300,)


def test_a_second_stage_of_nothing_is_refused():
    with pytest.raises(ValidationError, match="second_stage has only weights of 0"):
        TrainingSettings.model_validate({"second_stage": {"energy": 0, "forces": 0, "virial": 0}})


RICH = {
    "executor": {"kind": "slurm", "walltime": "01:00:00"},
    "ensemble": {"size": 3, "variants": [{}, {"model": {"kind": "nequip"}, "training": {"learning_rate": 0.01}}]},
    "training": {"second_stage": {"energy": 3.0}},
    "exploration": {
        "walkers": [{"temperature": [300, 600], "pressure": 0.0}],
        "gate": {"kind": "adaptive", "species": {"H": 0.5}},
        "swaps": {"every": 20, "elements": ["H", "O"]},
        "rewind": {"on": ["stop"]},
        "starts": {"kind": "relaxed"},
        "thresholds": {"kind": "fixed", "record": 0.1, "stop": 1.0},
        "biases": [
            {"kind": "uncertainty", "ramp": [0, 1]},
            {"kind": "wall", "variable": {"kind": "angle", "points": [0, [1, 2], 3]}, "side": "upper", "position": 1}
            | {"stiffness": [1.0, 2.0]},
        ],
    },
    "selection": {
        "selector": {
            "kind": "chain",
            "filters": [{"kind": "threshold", "maximum": 1.0}],
            "selector": {"kind": "user", "function": "a:b", "parameters": {"x": 1}},
        }
    },
}
ODD: list[Any] = [None, [], {}, ["a"], {"kind": ["x"]}, {"a": 1}, "a", "", True, -1, 10**30, 1e300, math.nan, [[["x"]]]]


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if at:
        yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*at, key))


def test_whatever_stands_in_a_place_is_taken_or_refused_in_a_sentence():
    kind = KINDS["campaign"]
    for at in places(RICH):
        for odd in ODD:
            content = copy.deepcopy(CAMPAIGN | RICH)
            inner: Any = content
            for key in at[:-1]:
                inner = inner[key]
            inner[at[-1]] = odd
            try:
                kind.model_validate(content)
            except ValidationError as error:
                assert all(0 < len(one) < 800 for one in sentences(kind, error, {})), (at, odd)
