"""A user's own gate, bias, integrator and admission rule are of equal rank with ours, from a module or a package."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import CUTOFF, DEPTH, LENGTH, PARAMS, QUIET, SPECIES, WIDTH, context, dimer, morse, nothing_seen, settings
from pydantic import ValidationError

from almlip_jax.campaign.settings import MdExploration
from almlip_jax.dynamics import ExplorationSettings, Explorer, Status
from almlip_jax.dynamics.admission import AdmissionSettings
from almlip_jax.dynamics.biases import BiasSettings
from almlip_jax.dynamics.gates import GateSettings
from almlip_jax.dynamics.integrators import IntegratorSettings
from almlip_jax.dynamics.thresholds import AtomErrors, Resolved, ThresholdSettings
from almlip_jax.errors import InputError
from almlip_jax.simulation.settings import ExploreConfig

STRETCHED, STIFFNESS, DRAG, LAST = 0.98, 0.7, 0.5, 4

MODULE = """
from dataclasses import dataclass, field
import jax, jax.numpy as jnp
from almlip_jax.dynamics.admission import Admission
from almlip_jax.dynamics.biases import Bias, BiasForce
from almlip_jax.dynamics.gates import Decision
from almlip_jax.dynamics.integrators import Integrator
from almlip_jax.dynamics.integrators.base import drift, kick, take_up

def arms(seen):
    return seen.positions[:, 1] - seen.positions[:, 0]

@dataclass(frozen=True)
class Stretched:
    length: float = field(compare=False)

    def init(self, context):
        return jnp.asarray(self.length, context.dtype)

    def apply(self, state, seen):
        long = jnp.linalg.norm(arms(seen), axis=1) > state
        return jnp.where(long, int(Decision.RECORD), int(Decision.GO_ON)), state

def gate(score, length):
    return Stretched(length)

@dataclass(frozen=True)
class Spring(Bias):
    stiffness: float = field(compare=False)

    def init(self, context):
        return jnp.asarray(self.stiffness, context.dtype)

    def apply(self, state, seen):
        arm = arms(seen)
        forces = jnp.stack([state * arm, -state * arm], axis=1)
        virial = -state * arm[:, :, None] * arm[:, None, :]
        return BiasForce(0.5 * state * jnp.sum(arm**2, axis=1), forces, virial), state

def bias(stiffness):
    return Spring(stiffness)

@dataclass(frozen=True)
class Dragged(Integrator):
    def to_force(self, motion, at, step):
        motion = kick(motion, at.timestep / 2)
        motion = motion.set(momentum=motion.momentum * jnp.exp(-at.numbers["drag"] * at.timestep))
        return drift(motion, at.timestep)

    def from_force(self, motion, evaluation, at):
        return kick(take_up(motion, evaluation), at.timestep / 2)

def integrator():
    return Dragged()

@dataclass(frozen=True)
class Latest(Admission):
    last: int

    def init(self, context):
        return jnp.zeros(context.walkers, jnp.int32)

    def apply(self, state, seen):
        walkers = len(seen.wanted)
        slot = self.last * jnp.arange(walkers) + state % self.last
        return jnp.where(seen.wanted, slot, self.last * walkers), state + seen.wanted

    def full(self, state):
        return jnp.zeros(state.shape, bool)

def admission(last):
    return Latest(last)

def thresholds(factor, relative=None):
    def rule(scores, errors):
        from almlip_jax.dynamics.thresholds import Resolved

        found = errors(4)
        record = factor * (scores().max() if found is None else found.errors.max())
        return Resolved(float(record), float(2 * record), relative)

    return rule

def pairs():
    return lambda scores, errors: (0.1, 0.2)

def nothing():
    return "nothing"
"""

SECTIONS = {
    "gate": {"kind": "user", "function": "my_dynamics:gate", "parameters": {"length": STRETCHED}},
    "biases": [
        {"kind": "user", "function": "my_dynamics:bias", "parameters": {"stiffness": STIFFNESS}, "scheduled": False}
    ],
    "integrator": {"kind": "user", "function": "my_dynamics:integrator", "values": {"drag": DRAG}},
    "admission": {"kind": "user", "function": "my_dynamics:admission", "parameters": {"last": LAST}},
}


@pytest.fixture
def my_dynamics(with_module):
    with_module("my_dynamics", MODULE)


def with_sections(sections: dict) -> ExplorationSettings:
    plain = settings(steps=40, chunk=40, trajectory_every=1, record_every=1, buffer=LAST)
    return ExplorationSettings.model_validate(plain.model_dump(mode="json") | sections)


def test_all_of_them_run(my_dynamics):
    """The gate records stretched bonds, the buffer keeps the latest, the bias is harmonic, the drag takes energy."""
    options = with_sections(SECTIONS)
    assert ExplorationSettings.model_validate(options.model_dump(mode="json")) == options
    assert options.follows_progress is None
    explorer = Explorer(morse, SPECIES, CUTOFF, options)
    found = explorer.run(PARAMS, [dimer()] * 3, QUIET, jax.random.key(0))
    assert set(found.status) == {Status.COMPLETED}
    for w, frames in enumerate(found.trajectories):
        lengths = np.array([frame.get_distance(0, 1) for frame in frames])
        wanted = [frame.info["step"] for frame, length in zip(frames, lengths, strict=True) if length > STRETCHED]
        kept = [frame.info["step"] for frame in found.recorded if frame.info["walker"] == w]
        assert len(wanted) > LAST and sorted(kept) == wanted[-LAST:]
    session = explorer.begin(PARAMS, [dimer()] * 3, QUIET, jax.random.key(0))
    (traces,) = session.chunks()
    arms = traces.positions[:, :, 1] - traces.positions[:, :, 0]
    np.testing.assert_allclose(traces.bias, 0.5 * STIFFNESS * np.sum(arms**2, axis=-1), rtol=1e-5)
    bonds = np.linspace(0.9, 1.1, 2001)
    lowest = np.min(DEPTH * (1 - np.exp(-WIDTH * (bonds - LENGTH))) ** 2 + 0.5 * STIFFNESS * bonds**2)
    excess = traces.energy + traces.bias + traces.kinetic - lowest
    assert np.all(excess[-1] > 0) and np.all(excess[-1] < 0.5 * excess[0])


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        (GateSettings, r"has no init\(\)"),
        (BiasSettings, r"has no init\(\)"),
        (IntegratorSettings, "must return an Integrator"),
        (AdmissionSettings, r"has no init\(\)"),
    ],
)
def test_what_is_none_of_them_is_refused(my_dynamics, family, missing):
    factory = "my_dynamics:nothing" if family is not GateSettings else "builtins:dict"
    with pytest.raises(InputError, match=missing):
        family.parse({"kind": "user", "function": factory}).build()
    with pytest.raises(InputError, match="cannot be imported"):
        family.parse({"kind": "user", "function": "nowhere:gate"}).build()


def thresholds_of(**given) -> ThresholdSettings:
    """Those of a config, written and read once more."""
    section = {"kind": "user", "function": "my_dynamics:thresholds", "parameters": {"factor": 3.0}} | given
    found = MdExploration.model_validate({"thresholds": section})
    assert MdExploration.model_validate(found.model_dump(mode="json")) == found
    return found.thresholds


def test_thresholds_of_ones_own(my_dynamics):
    """From scores, or from true errors once there are enough; a campaign draws frames for those that look at errors."""

    def scores():
        return np.array([0.1, 0.2])

    def errors(atoms):
        return AtomErrors(np.full(atoms, 0.5), np.ones(atoms), np.ones(atoms, int))

    both = thresholds_of(looks_at=["training_set", "errors"], parameters={"factor": 3.0, "relative": {"H": 0.5}})
    assert both.resolve(scores, errors) == Resolved(1.5, 3.0, {"H": 0.5}) and both.frames_drawn == 5
    assert both.resolve(scores, lambda _: None).levels == pytest.approx((0.6, 1.2))
    alone = thresholds_of()
    assert alone.looks_at_training_set and alone.frames_drawn == 0
    with pytest.raises(InputError, match="asks for what looks_at of thresholds does not name; add errors"):
        alone.resolve(scores, errors)
    with pytest.raises(InputError, match="gives the record threshold -0.6"):
        thresholds_of(looks_at=["training_set", "errors"], parameters={"factor": -3.0}).resolve(scores, lambda _: None)
    with pytest.raises(InputError, match="must return Resolved, but returns a tuple"):
        thresholds_of(function="my_dynamics:pairs", parameters={}).resolve(scores, errors)
    with pytest.raises(InputError, match="must return a function, but returns a str"):
        thresholds_of(function="my_dynamics:nothing", parameters={}).resolve(scores, errors)
    with pytest.raises(ValueError, match="user thresholds need a gate score of atoms"):
        both.check("energy_std")
    with pytest.raises(ValidationError, match="calibration_set is missing, which is needed for user thresholds"):
        ExploreConfig.model_validate(
            {"potential": "p", "structures": "s.xyz", "exploration": {}, "thresholds": both.model_dump(mode="json")}
        )


PACKAGE = """
from typing import ClassVar, Literal

from my_dynamics import Dragged, Latest, Spring, Stretched, arms, thresholds
from almlip_jax.dynamics.admission import AdmissionSettings
from almlip_jax.dynamics.biases import BiasSettings
from almlip_jax.dynamics.biases.collective import UserVariable, VariableSettings
from almlip_jax.dynamics.gates import GateSettings
from almlip_jax.dynamics.integrators import IntegratorSettings
from almlip_jax.dynamics.thresholds import ThresholdSettings

class StretchedGate(GateSettings):
    kind: Literal["stretched"] = "stretched"
    length: float

    def plain(self):
        return Stretched(self.length)

class SpringSettings(BiasSettings):
    kind: Literal["spring"] = "spring"
    stiffness: float

    def plain(self):
        return Spring(self.stiffness)

class DraggedSettings(IntegratorSettings):
    kind: Literal["dragged"] = "dragged"
    drag: float

    def build(self):
        return Dragged()

    def numbers(self):
        return {"drag": self.drag}

class LatestAdmission(AdmissionSettings):
    never_full: ClassVar[bool] = True

    kind: Literal["latest"] = "latest"
    last: int

    def build(self):
        return Latest(self.last)

class LargestThresholds(ThresholdSettings):
    kind: Literal["largest"] = "largest"
    factor: float

    @property
    def looks_at_training_set(self):
        return True

    def resolve(self, scores, errors):
        return thresholds(self.factor)(scores, lambda atoms: None)

class HeightSettings(VariableSettings):
    kind: Literal["height"] = "height"

    def build(self):
        return UserVariable(lambda positions, cell: positions[1, 2] - positions[0, 2], "height")
"""
OF_PACKAGE = {
    "gate": {"kind": "stretched", "length": STRETCHED},
    "biases": [{"kind": "spring", "stiffness": STIFFNESS}],
    "integrator": {"kind": "dragged", "drag": DRAG},
    "admission": {"kind": "latest", "last": LAST},
}


def test_those_of_an_installed_package_do_the_same(my_dynamics, with_kinds, count_compilations):
    """As those of a user's module, which are looked at above; programs are shared, for the objects are equal."""
    with_kinds(PACKAGE)
    found = []
    for sections in (SECTIONS, OF_PACKAGE):
        with count_compilations() as compiled:
            explorer = Explorer(morse, SPECIES, CUTOFF, with_sections(sections))
            found.append(explorer.run(PARAMS, [dimer()] * 3, QUIET, jax.random.key(0)))
    assert not compiled
    users, theirs = (
        [(frame.info["walker"], frame.info["step"], frame.positions.tolist()) for frame in one.recorded]
        for one in found
    )
    assert theirs == users and len(theirs) == 3 * LAST
    held = {"kind": "restraint", "variable": {"kind": "height"}, "stiffness": 2.0, "centre": 0.5}
    restraint = BiasSettings.parse(held).build()
    seen = nothing_seen(atoms=2).replace(positions=jnp.array([[[0, 0, 1.0], [0, 0, 3.0]]]))
    pull, _ = restraint.apply(restraint.init(context(atoms=2)), seen)
    assert pull.energy == pytest.approx(2.25) and pull.forces[0, :, 2] == pytest.approx([3.0, -3.0])
    rule = MdExploration.model_validate({"thresholds": {"kind": "largest", "factor": 3.0}}).thresholds
    assert rule.resolve(lambda: np.array([0.1, 0.2]), lambda _: None).levels == pytest.approx((0.6, 1.2))
    with pytest.raises(ValidationError, match="a buffer of kind 'latest' is never full; leave when_full out"):
        with_sections(OF_PACKAGE | {"when_full": "end_all"})
    with pytest.raises(ValidationError, match="'stretched'"):
        with_sections({"gate": {"kind": "streched"}})
