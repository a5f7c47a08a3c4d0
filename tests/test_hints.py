"""What a user is told who puts a setting where it does not stand, or takes one name for another."""

from __future__ import annotations

from typing import Any

import pytest

from almlip_jax.config import load_settings
from almlip_jax.dynamics import ExplorationSettings
from almlip_jax.errors import InputError
from almlip_jax.given import given_settings
from almlip_jax.learner import Learner
from almlip_jax.oracles import SourceSettings
from almlip_jax.selection import SelectorSettings
from almlip_jax.steps import explorer_of
from almlip_jax.templates import KINDS, TEMPLATES
from almlip_jax.yaml_text import yaml_text

STRATIFIED = {"kind": "stratified", "by": "system", "selector": {"kind": "max_det"}}


def told(kind: Any, given: Any) -> str:
    with pytest.raises(InputError) as refused:
        given_settings(kind, given, "section")
    return str(refused.value)


def test_a_kind_that_is_there_but_not_here():
    """`stratified` chooses from groups; costs weigh what one selector adds, so that they stand inside it."""
    said = told(SelectorSettings, {"kind": "cost_aware", "selector": STRATIFIED})
    assert said.startswith("section.selector: kind 'stratified' cannot stand here; kinds that can: adaptive, bait,")
    assert "stratified" not in said.partition("kinds that can")[2]
    inside = STRATIFIED | {"selector": {"kind": "cost_aware", "selector": {"kind": "max_det"}}}
    assert given_settings(SelectorSettings, inside, "section").selector.kind == "cost_aware"


def test_a_hint_names_what_may_stand_there():
    said = told(SelectorSettings, {"kind": "cost_aware", "selector": {"kind": "stratifid"}})
    assert "did you mean" not in said and "valid are adaptive" in said


def test_the_name_of_a_kind_alone():
    assert told(ExplorationSettings, {"gate": "adaptive"}).endswith("not adaptive; write {kind: adaptive}.")
    assert told(ExplorationSettings, {"gate": "adaptiv"}).endswith("not adaptiv.")


@pytest.mark.parametrize("given", [1.0, 0.5, 1, 0])
def test_a_pressure_is_no_answer_to_whether_traces_hold_one(given):
    said = told(ExplorationSettings, {"integrator": {"kind": "npt"}, "pressure": given})
    assert f"walkers: [{{temperature: 300, pressure: {given:g}}}]" in said
    assert given_settings(ExplorationSettings, {"pressure": True}, "section").pressure


@pytest.mark.parametrize("key", ["thresholds", "starts", "continue_walkers", "correct"])
def test_keys_of_campaigns_say_what_a_script_does(key):
    with pytest.raises(InputError, match=f"exploration.{key}: this is a key of campaigns; in a script .*`"):
        explorer_of(None, {key: {"kind": "grade"}})


def test_a_form_is_shown_by_an_example():
    """`calculator` names a class as everything of a user's own is named, by module and function."""
    said = told(SourceSettings, {"kind": "ase", "calculator": "ase.calculators.emt.EMT"})
    assert said == "section.calculator: ase.calculators.emt.EMT has not the form of ase.calculators.emt:EMT."


def test_a_section_of_the_config_in_another_one(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml_text(TEMPLATES["mtp"].content))
    with pytest.raises(InputError, match="unknown key 'oracle' here; it is a section of its own, at the top"):
        load_settings(KINDS["campaign"], path, ["teacher={oracle: {kind: tblite}}"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["active_set={start: identity, epsilon: 0.1}"], "active_set.epsilon counts with start 'epsilon' only"),
        (["active_set={per_atom: false}"], "active_set.per_atom counts with mode 'configuration' only"),
        (["exploration.monitor=[configuration_grade]"], "looks at configuration_grade, which the active set"),
        (["active_set.mode=configuration"], "looks at extrapolation_grade, which the active set"),
    ],
)
def test_keys_of_active_sets_that_nothing_looks_at(tmp_path, changes, told):
    """An MLIP-2 user who edits what `almlip init mtp` wrote."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml_text(TEMPLATES["mtp"].content))
    with pytest.raises(InputError, match=told):
        load_settings(KINDS["campaign"], path, changes)
    rows = ["active_set={mode: configuration, per_atom: false, start: identity}"]
    rows.append("exploration.gate.score=configuration_grade")
    assert not load_settings(KINDS["campaign"], path, rows).active_set.per_atom


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["training.schedule=plateau"], "training.schedule plateau follows errors on structures kept for validation"),
        (["training.patience=3"], "training.patience 3 follows errors"),
    ],
)
def test_nothing_follows_errors_that_nobody_measures(tmp_path, changes, told):
    """A learning rate that falls where errors stop falling would stay as it is for ever."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml_text(TEMPLATES["molecule"].content))
    load_settings(KINDS["campaign"], path, changes)
    with pytest.raises(InputError, match=told):
        load_settings(KINDS["campaign"], path, ["training.validation_fraction=0", *changes])
    training = dict(one.removeprefix("training.").split("=") for one in changes) | {"validation_fraction": 0}
    with pytest.raises(InputError, match=told):
        Learner(10, training=training)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"when_full": "end_all", "admission": {"kind": "log_det"}}, "a buffer of kind 'log_det' is never full"),
        ({"walkers": [{"temperature": 300, "bias": 0.5}]}, "there are no biases"),
        ({"gate": {"kind": "band", "above": "go_on", "persistence": 3}}, "persistence counts with above 'end' only"),
    ],
)
def test_what_has_nothing_to_act_on(given, told):
    with pytest.raises(InputError, match=told):
        given_settings(ExplorationSettings, given, "section")


def test_what_has_something_to_act_on():
    for given in (
        {"when_full": "end_all"},
        {"when_full": "go_on", "admission": {"kind": "log_det"}},
        {"walkers": [{"temperature": 300, "bias": 0.5}], "biases": [{"kind": "uncertainty", "relative": 0.1}]},
        {"gate": {"kind": "band", "persistence": 3}},
        {"gate": {"kind": "band", "above": "go_on"}},
    ):
        given_settings(ExplorationSettings, given, "section")
