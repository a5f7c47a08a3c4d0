"""What one section of a config asks of another: refused before anything is paid where it cannot serve."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import ValidationError

from almlip_jax.campaign import resume_campaign, run_campaign
from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.config import ExperimentConfig, load_run_config
from almlip_jax.campaign.consistency import check_columns
from almlip_jax.campaign.preparation import check_target_labels
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import TargetErrorSettings
from almlip_jax.campaign.state import Stage, read_state
from almlip_jax.dynamics import ExplorationSettings
from almlip_jax.dynamics.judging import check_exploration
from almlip_jax.ensembles import EnsembleSettings, gives_score
from almlip_jax.errors import InputError
from almlip_jax.fitting import fit_potential
from almlip_jax.kinds import UserCode, user_code
from almlip_jax.learner import Learner
from almlip_jax.models import ModelSettings
from almlip_jax.oracles import UserSourceSettings
from almlip_jax.scores import names, scores
from almlip_jax.selection import RandomSettings, UserSelector
from almlip_jax.structures.io import write_structures
from almlip_jax.sweep.settings import SweepConfig
from almlip_jax.training import TrainingSettings

ONE = {"size": 1}
NLL = {"loss": {"kind": "nll"}}
BY_LATENT = {
    "kind": "md",
    "gate": {"kind": "absolute", "score": "latent_distance"},
    "thresholds": {"kind": "relative", "floor": 1.0},
}
POOL = {"kind": "pool", "files": "pool.xyz"}
BY_DESIGN = {"selector": {"kind": "max_det"}}


def config(**sections: Any) -> ExperimentConfig:
    plain = {"system": {"structures": "start.xyz"}, "oracle": {"kind": "tblite"}, "initial": {"rattle": {"count": 4}}}
    return ExperimentConfig.model_validate({**plain, **sections})


def sections(ensemble: dict[str, Any] = ONE, exploration: dict[str, Any] = BY_LATENT, **more: Any) -> dict[str, Any]:
    return {"ensemble": ensemble, "exploration": exploration, "selection": BY_DESIGN, **more}


def selecting(**selector: Any) -> dict[str, Any]:
    return sections(selection={"selector": selector})


FILTERED = {
    "kind": "chain",
    "filters": [{"kind": "threshold", "score": "energy_std", "maximum": 1.0}],
    "selector": {"kind": "cost_aware", "selector": {"kind": "max_det"}},
}
WITH_PLATEAU = {"plateau": {}, "share_below": None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (sections(exploration={"kind": "md"}), r"exploration.gate looks at force_std_max, .*latent_distance"),
        (sections({"size": 1, "likelihood": "mean_variance"}, {"kind": "md"}, training=NLL), r"force_total_max"),
        (sections(exploration=BY_LATENT | {"integrator": {"kind": "adversarial"}}), r"'adversarial' follows"),
        (sections(exploration=BY_LATENT | {"biases": [{"kind": "uncertainty"}]}), r"'uncertainty' follows"),
        (selecting(kind="top_k"), r"selection.selector looks at force_std_mean"),
        (selecting(kind="entropy"), r"looks at force_std_mean"),
        (selecting(kind="cost_aware", selector={"kind": "hybrid"}), r"looks at force_std_mean"),
        (selecting(**FILTERED), r"selection.selector looks at energy_std"),
        (selecting(kind="kmeans_pp", features="force_gradient"), r"features 'force_gradient', follows"),
        (sections(stopping=WITH_PLATEAU), r"stopping.plateau looks at force_std_mean"),
    ],
)
def test_one_member_has_no_spread_to_judge_by(given, message):
    with pytest.raises(ValidationError, match=message):
        config(**given)
    config(**given | {"ensemble": {"size": 2}, "training": {}})


@pytest.mark.parametrize(
    "given",
    [
        sections(),
        sections(exploration=POOL),
        sections({"size": 1, "heads": 8}, {"kind": "md"}),
        sections(exploration=POOL, selection={"selector": {"kind": "random"}}),
        sections(
            {"size": 1, "likelihood": "mean_variance"},
            {"kind": "md", "gate": {"kind": "absolute", "score": "force_total_max"}},
            training=NLL,
            stopping=WITH_PLATEAU | {"monitor": "force_total_mean"},
        ),
        sections(
            {"size": 1, "likelihood": "evidential"},
            {"kind": "md", "gate": {"kind": "absolute", "score": "force_epistemic_max"}},
            training=NLL,
        ),
    ],
)
def test_one_member_serves_where_no_spread_is_looked_at(given):
    config(**given)


def test_every_score_is_a_spread_of_members_or_something_that_they_say():
    one, spoken = EnsembleSettings(size=1), EnsembleSettings(size=1, likelihood="mean_variance")
    known = names(scores(fitted=False))
    assert not any(gives_score(name, one) for name in known)
    assert [name for name in known if gives_score(name, spoken)] == [
        "energy_total",
        "force_total_mean",
        "force_total_max",
    ]
    assert all(gives_score(name, EnsembleSettings(size=2)) for name in known)
    assert gives_score("extrapolation_grade", one)


def test_a_sweep_of_single_members_compares_no_spreads():
    systems = {"water": {"pool": "pool.xyz", "tests": {"t": "test.xyz"}}}
    chosen = {"top": {"kind": "top_k"}, "all": {"kind": "random"}}
    with pytest.raises(ValidationError, match=r"selectors.top with ensemble_sizes 1 looks at force_std_mean"):
        SweepConfig.model_validate({"systems": systems, "selectors": chosen, "ensemble_sizes": [2, 1]})
    SweepConfig.model_validate({"systems": systems, "selectors": {"all": RandomSettings()}, "ensemble_sizes": [1]})


@pytest.mark.parametrize(
    ("selector", "refused"),
    [
        ({"kind": "random"}, True),
        ({"kind": "chain", "filters": [{"kind": "threshold", "maximum": 2.0}], "selector": {"kind": "random"}}, True),
        (
            {"kind": "chain", "filters": [{"kind": "top_fraction", "fraction": 0.5}], "selector": {"kind": "random"}},
            False,
        ),
        ({"kind": "top_k"}, False),
    ],
)
def test_a_plateau_needs_a_batch_that_was_chosen(selector, refused):
    given = {"selection": {"selector": selector}, "stopping": WITH_PLATEAU}
    if refused:
        with pytest.raises(ValidationError, match="drawn at random"):
            config(**given)
    else:
        config(**given)


@pytest.mark.parametrize("key", ["ratio", "patience"])
def test_keys_of_the_former_plateau_say_what_it_looks_at_now(key):
    with pytest.raises(ValidationError, match=f"unknown key '{key}'; plateau now looks at"):
        config(stopping={"plateau": {key: 1}})


def test_a_target_needs_its_group_of_the_test_set():
    test = {"md": [{"temperature": 300}], "files": [{"path": "a.xyz", "group": "slab"}], "from_pool": 3}
    for group in ("300K", "slab", "pool", None):
        config(test=test, stopping={"target_error": {"value": 0.1, "group": group}})
    with pytest.raises(ValidationError, match=r"'300' is not a group of the test set, which has: 300K, slab, pool"):
        config(test=test, stopping={"target_error": {"value": 0.1, "group": "300"}})
    with pytest.raises(ValidationError, match=r"target_error needs a test set"):
        config(stopping={"target_error": {"value": 0.1}})


def test_a_run_without_thresholds_has_no_gate_that_judges():
    one, settings = EnsembleSettings(size=1), ExplorationSettings()
    check_exploration(settings, one, gated=False)
    with pytest.raises(ValueError, match=r"exploration.gate looks at force_std_max"):
        check_exploration(settings, one)


def test_a_selector_that_follows_validation_needs_structures_for_it():
    given = {"selection": {"selector": {"kind": "adaptive"}}, "training": {"validation_fraction": 0}}
    with pytest.raises(ValidationError, match=r"selection.selector 'adaptive' follows the error on structures kept"):
        config(**given)
    config(**given | {"training": {}})


IDLE = {
    "warm_steps counts with warm_start: true only": {"training": {"warm_steps": 50}},
    "weight_decay counts with optimiser 'adamw' only": {"training": {"weight_decay": 0.1}},
    "plateau_factor counts with schedule 'plateau' only": {"training": {"plateau_factor": 0.1}},
    "plateau_patience counts with schedule 'plateau' only": {"training": {"plateau_patience": 3}},
    "final_learning_rate counts with schedule 'cosine', 'exponential' or 'plateau' only": {
        "training": {"schedule": "constant", "final_learning_rate": 0.1}
    },
    "forces_delta counts with a loss of kind 'huber' only": {"training": {"loss": {"forces_delta": 0.3}}},
    "energy_floor counts with a loss of kind 'nll' or 'crps' only": {"training": {"loss": {"energy_floor": 0.3}}},
    "loss.evidence_penalty counts with ensemble.likelihood 'evidential' only": {
        "training": {"loss": {"kind": "nll", "evidence_penalty": 0.3}},
        "ensemble": {"likelihood": "mean_variance"},
    },
    "ensemble.bootstrap_variance counts with bootstrap 'gamma' only": {
        "ensemble": {"bootstrap": "poisson", "bootstrap_variance": 0.5}
    },
    "entry 1, training.batch_size: all members share it": {
        "ensemble": {"variants": [{}, {"training": {"batch_size": 3}}]}
    },
    "entry 1, training.replay: all members share it": {"ensemble": {"variants": [{}, {"training": {"replay": 0}}]}},
    "entry 1, training.validate_every: 60 steps are more than the 50": {
        "ensemble": {"variants": [{}, {"training": {"validate_every": 60}}]}
    },
    "share_below judges the frames of walkers, and exploration of kind 'pool' has no walkers": {
        "exploration": POOL,
        "stopping": {"share_below": {"share": 0.9}},
    },
    "executor calculates labels, but those of oracle.kind 'external' are made elsewhere": {
        "oracle": {"kind": "external", "method": "m", "folder": "f"},
        "executor": {"kind": "slurm", "walltime": "01:00:00"},
    },
    "keys says how dataset is read, and none is given": {
        "initial": {"keys": {"energy": "dft"}, "rattle": {"count": 4}},
    },
}


@pytest.mark.parametrize("sentence", IDLE)
def test_what_nothing_would_look_at_is_refused(sentence):
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        config(**IDLE[sentence])


@pytest.mark.parametrize(
    "given",
    [
        {"training": {"warm_start": True, "warm_steps": 50}},
        {"training": {"optimiser": "adamw", "weight_decay": 0.1, "schedule": "plateau", "plateau_factor": 0.1}},
        {"training": {"second_stage": {"loss": {"kind": "huber", "forces_delta": 0.3}}}},
        {"training": {"weight_decay": 0.1}, "ensemble": {"variants": [{}, {"training": {"optimiser": "adamw"}}]}},
        {
            "ensemble": {
                "variants": [{}, {"training": {"optimiser": "adamw", "weight_decay": 0.1, "validate_every": 9}}]
            }
        },
        {
            "training": {"loss": {"kind": "nll", "evidence_penalty": 0.3, "energy_floor": 0.1}},
            "ensemble": {"likelihood": "evidential"},
        },
        {"exploration": POOL, "stopping": {"share_below": None}},
        {"exploration": {"kind": "md"}, "stopping": {"share_below": {"share": 0.9}}},
    ],
)
def test_what_some_member_or_stage_looks_at_is_taken(given):
    known = config(**given)
    assert config(**known.model_dump(mode="json")) == known  # as a run directory holds it, with every key


def test_scripts_are_told_of_what_nothing_would_look_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="warm_steps counts with warm_start: true only"):
        Learner(9, training={"warm_steps": 5})
    with pytest.raises(InputError, match="bootstrap_variance counts with"):
        Learner(9, ensemble={"bootstrap": "none", "bootstrap_variance": 0.5})
    water = molecule("H2O")
    water.calc = SinglePointCalculator(water, energy=0.0, forces=np.zeros((3, 3)))
    with pytest.raises(InputError, match="final_steps is for campaigns"):
        Learner(9, training={"final_steps": 5}).fit([water])
    for training, sentence in (
        ({"warm_steps": 5}, "warm_steps counts with a potential"),
        ({"weight_decay": 1}, "adamw"),
    ):
        with pytest.raises(InputError, match=sentence):
            fit_potential([water], ModelSettings.parse({}), EnsembleSettings(), TrainingSettings(**training), 0)


def test_corrections_that_rewinding_walkers_ask_for_seldom_are_told_of(tmp_path: Path):
    write_structures(tmp_path / "start.xyz", [molecule("H2O")])
    told: list[str] = []

    def check(rewind: dict[str, Any] | None, **correct: Any) -> list[str]:
        exploration = {"kind": "md", "correct": correct, "rewind": rewind}
        told.clear()
        check_campaign(config(system={"structures": str(tmp_path / "start.xyz")}, exploration=exploration), told.append)
        return told

    assert check({"on": ["stop"], "limit": 3})[0].startswith("exploration.correct.on 'stop' is of walkers that end by")
    assert "again 3 times" in told[0] and len(told) == 1
    assert check({"on": ["unphysical"]}) == [] and check(None) == [] and check({"on": ["leave"]}, on=["stop"]) == []


def test_a_target_for_stresses_needs_periodic_structures_that_have_them():
    cluster, crystal = molecule("H2O"), bulk("Si")
    crystal.calc = SinglePointCalculator(crystal, energy=0.0, forces=np.zeros((2, 3)), stress=np.zeros(6))
    cluster.calc = SinglePointCalculator(cluster, energy=0.0, forces=np.zeros((3, 3)))
    cluster.info["group"], crystal.info["group"] = "gas", "solid"
    of_solid = TargetErrorSettings(metric="stress_rmse", value=0.01, group="solid")
    check_target_labels(of_solid, [cluster, crystal])
    check_target_labels(TargetErrorSettings(value=0.01), [cluster])
    check_target_labels(None, [cluster])
    for target in (of_solid.model_copy(update={"group": None}), of_solid.model_copy(update={"group": "gas"})):
        with pytest.raises(
            InputError, match=r"'stress_rmse' needs the stress .* three directions, and test group 'gas' has"
        ):
            check_target_labels(target, [cluster, crystal])


def test_a_target_for_stresses_finds_them_under_the_keys_of_the_test_file(tmp_path: Path) -> None:
    crystal = bulk("Si")
    write_structures(tmp_path / "start.xyz", [crystal])
    crystal.info |= {"my_energy": 0.0, "my_stress": np.zeros((3, 3))}
    crystal.arrays["my_forces"] = np.zeros((2, 3))
    ase.io.write(tmp_path / "test.xyz", crystal)
    keys = {name: f"my_{name}" for name in ("energy", "forces", "stress")}
    given = config(
        system={"structures": tmp_path / "start.xyz"},
        test={"files": [{"path": tmp_path / "test.xyz", "keys": keys}]},
        stopping={"target_error": {"metric": "stress_rmse", "value": 0.01}},
        selection={"selector": RandomSettings()},
    )
    check_campaign(given)


def test_a_target_for_dipoles_needs_molecules_that_have_them_and_a_model_that_gives_them():
    given = {
        "test": {"md": [{"temperature": 300}]},
        "stopping": {"target_error": {"metric": "dipole_rmse", "value": 1}},
    }
    with pytest.raises(
        ValidationError, match=r"target_error.metric is dipole_rmse, .* set model.dipole: true, or name"
    ):
        config(**given)
    config(**given, model={"dipole": True}, oracle={"kind": "tblite", "dipole": True})
    with pytest.raises(ValidationError, match="'dipol_rmse' is not a known error; did you mean 'dipole_rmse'"):
        TargetErrorSettings(metric="dipol_rmse", value=1)
    gas, solid = molecule("H2O"), bulk("Si")
    for atoms, group in ((gas, "gas"), (solid, "solid")):
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, dipole=np.zeros(3))
        atoms.info["group"] = group
    target = TargetErrorSettings(metric="dipole_mae", value=0.01)
    check_target_labels(target, [gas])
    with pytest.raises(InputError, match=r"needs the dipole of .* periodic in none, and test group 'solid' has none"):
        check_target_labels(target, [gas, solid])


def test_what_a_users_selector_looks_for_is_known_before_a_label(with_module):
    text = """
from almlip_jax.selection import top_k
def by(k, score): return top_k(k, score)
def raw(k): return lambda key, pool, labelled: pool.scores["forces_std"]
"""
    with_module("mine_of_campaigns", text)

    def user(function: str, **parameters: str) -> UserSelector:
        return UserSelector(function=f"mine_of_campaigns:{function}", parameters=parameters)

    check_columns(user("by", score="force_std_max"), 5, "selection.selector")
    with pytest.raises(InputError, match=r"selection.selector: candidates have no score 'force_std'"):
        check_columns(user("by", score="force_std"), 5, "selection.selector")
    with pytest.raises(InputError, match=r"selection.selector looks for 'forces_std', which candidates do not have"):
        check_columns(user("raw"), 5, "selection.selector")
    with pytest.raises(InputError, match=r"no function 'missing'"):
        check_columns(user("missing"), 5, "selection.selector")


MINE = {"kind": "user", "function": "mine_of_campaigns:missing"}
DISTANCE = {"kind": "distance", "points": [0, 1]}
HILLS = {"kind": "metadynamics", "widths": [0.1, 0.1], "height": 0.1, "pace": 9}
USER_CODE: dict[str, dict[str, Any]] = {
    "exploration.thresholds": {"exploration": {"kind": "md", "thresholds": MINE}},
    "exploration.gate": {"exploration": {"kind": "md", "gate": MINE}},
    "exploration.biases.0": {"exploration": {"kind": "md", "biases": [MINE]}},
    "exploration.biases.0.variables.1": {
        "exploration": {
            "kind": "md",
            "biases": [HILLS | {"variables": [DISTANCE, MINE]}],
        }
    },
    "exploration.integrator": {"exploration": {"kind": "md", "integrator": MINE}},
    "exploration.admission": {"exploration": {"kind": "md", "admission": MINE}},
    "selection.selector": {"selection": {"selector": MINE}},
    "selection.selector.filters.0": {
        "selection": {"selector": {"kind": "chain", "filters": [MINE], "selector": {"kind": "random"}}}
    },
    "stopping.user": {"stopping": {"user": {"function": MINE["function"]}}},
    "model": {"model": MINE},
    "exploration": {"exploration": MINE | {"candidates": 9}},
    "exploration.of.0": {"exploration": {"kind": "generated", "of": [MINE]}},
    "training.loss": {"training": {"loss": MINE}},
    "training.optimiser": {"training": {"optimiser": MINE}},
    "training.schedule": {"training": {"schedule": MINE}},
    "ensemble.bootstrap": {"ensemble": {"bootstrap": MINE}},
    "ensemble.likelihood": {"ensemble": {"likelihood": MINE}, "training": NLL},
}
"""Sections in which a user's own code stands, by the key of that."""


@pytest.fixture
def mine(tmp_path: Path, with_module: Callable[[str, str], Path]) -> dict[str, Any]:
    """A campaign that labels rattled molecules; the module of its user has factories that nothing can be made of."""
    text = "def takes_nothing(): return None\ndef no_function(**_): return 7\ndef of_nothing(**_): return lambda: 0\n"
    with_module("mine_of_campaigns", text)
    write_structures(tmp_path / "start.xyz", [molecule("H2O")])
    return {"system": {"structures": tmp_path / "start.xyz"}}


def renamed(section: Any, function: str, **parameters: Any) -> Any:
    """Sections with another function of the user's."""
    if isinstance(section, dict):
        changed = {key: renamed(value, function, **parameters) for key, value in section.items()}
        mine = "function" in section
        return changed | ({"function": f"mine_of_campaigns:{function}", "parameters": parameters} if mine else {})
    return [renamed(one, function, **parameters) for one in section] if isinstance(section, list) else section


@pytest.mark.parametrize("key", USER_CODE)
def test_user_code_is_tried_before_a_label_is_paid(mine, tmp_path, key):
    """One that is not there, one that takes other parameters, and one that makes something else."""

    def refused(sections: dict[str, Any]) -> str:
        with pytest.raises(InputError) as caught:
            run_campaign(config(**mine, **sections), tmp_path / "run")
        assert not (tmp_path / "run" / "labels.db").exists()
        return str(caught.value)

    assert refused(USER_CODE[key]) == f"{key}: module 'mine_of_campaigns' has no function 'missing'."
    takes_nothing = refused(renamed(USER_CODE[key], "takes_nothing", strength=1.0))
    assert takes_nothing.startswith(f"{key}: 'mine_of_campaigns:takes_nothing' does not take the parameters given (")
    assert "'mine_of_campaigns:no_function' " in refused(renamed(USER_CODE[key], "no_function"))
    if key.startswith(("selection", "stopping", "exploration.thresholds", "exploration.biases.0.variables")) or key in (
        "exploration",
        "exploration.of.0",
        "training.loss",
        "training.schedule",
        "ensemble.bootstrap",
        "ensemble.likelihood",
    ):
        told = refused(renamed(USER_CODE[key], "of_nothing"))
        assert "'mine_of_campaigns:of_nothing' must return a function of " in told and "too many positional" in told


def test_every_kind_of_user_code_is_tried():
    def below(kind: type[UserCode]) -> Iterator[type[UserCode]]:
        for one in kind.__subclasses__():
            yield from below(one)
            if not one.__name__.startswith("_") and one.__module__.startswith("almlip_jax"):
                yield one

    met = {type(code) for sections in USER_CODE.values() for _, code in user_code(config(**sections))}
    assert met == set(below(UserCode)) - {UserSourceSettings}


def test_a_label_source_that_is_not_there_is_missed_before_the_first_training(mine, tmp_path, monkeypatch):
    frame = molecule("H2O")
    frame.calc = SinglePointCalculator(frame, energy=0.0, forces=np.zeros((3, 3)))
    write_structures(tmp_path / "given.xyz", [frame])
    monkeypatch.chdir(tmp_path)
    given = config(**mine, oracle=MINE, initial={"dataset": "given.xyz"})
    with pytest.raises(InputError, match="module 'mine_of_campaigns' has no function 'missing'"):
        run_campaign(given, tmp_path / "run")
    state = read_state(RunDirectory(tmp_path / "run"))
    assert state.stage is Stage.INITIAL and state.labels == 0 and "no function 'missing'" in (state.reason or "")
    assert load_run_config(tmp_path / "run").initial.dataset == tmp_path / "given.xyz"  # holds from anywhere
    other = given.model_copy(update={"stopping": config(**USER_CODE["stopping.user"]).stopping})
    with pytest.raises(InputError, match=r"stopping.user: module 'mine_of_campaigns' has no function"):
        resume_campaign(other, tmp_path / "run")
