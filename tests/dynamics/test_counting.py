"""What is counted below the record threshold, for every gate and stopping rule; what walkers and states remember."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import DEPTH, PARAMS, context, dimer, explorer, nothing_seen, observed
from ase import Atoms
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from test_refused_trials import springs

from almlip_jax.campaign.settings import StoppingSettings
from almlip_jax.campaign.state import RoundRecord
from almlip_jax.campaign.stopping import decide
from almlip_jax.dynamics import ExplorationSettings, Explorer, SanitySettings, Status
from almlip_jax.dynamics.biases import MetadynamicsSettings, SteeredSettings, UncertaintySettings, build_bias
from almlip_jax.dynamics.gates import AbsoluteGate, AdaptiveGate, BandGate, DecayingGate, Decision
from almlip_jax.dynamics.motion import chosen
from almlip_jax.dynamics.sanity import Cause, SanityLimits
from almlip_jax.dynamics.verdicts import judge
from almlip_jax.structures.species import SpeciesTable

SCORE, RECORD, STOP = "force_std_max", 1.0, 3.0
STEPS, EVERY = 60, 7
PLAIN = (
    AbsoluteGate(),
    AdaptiveGate(window=10, excess=0.5),
    DecayingGate(half_life=20),
    BandGate(above="end"),
    BandGate(above="go_on"),
)
GATES = [one.model_copy(update=more) for one in PLAIN for more in ({}, {"release": 0.5}, {"persistence": 3})]


def names(gate) -> str:
    return f"{gate.kind}-{getattr(gate, 'above', '')}-{gate.release}-{gate.persistence}"


@cache
def program(index: int):
    """Scores [T] and flags [T] -> decisions, frames counted as below, and what was given to a buffer with room."""
    gate, limits = GATES[index].build(), SanityLimits.of(SanitySettings())
    run_context = context([RECORD], [STOP])
    thresholds = run_context.thresholds

    def step(carry, seen):
        memory, last, running = carry
        score, visited, physical, n = seen
        observables = observed(SCORE, score, finite=physical[None])
        judged = judge(gate, memory, SCORE, observables, limits, thresholds, (running & visited)[None])
        recorded = judged.says(Decision.STOP) | (judged.says(Decision.RECORD) & (n - last >= EVERY))
        stayed = judged.visited & ~judged.says(Decision.UNPHYSICAL)
        _, after = gate.apply(memory, observables.replace(kept=recorded))
        memory = chosen(stayed, after, memory)
        ends = judged.says(Decision.STOP, Decision.LEAVE, Decision.UNPHYSICAL)[0]
        told = judged.visited[0], judged.decision[0], judged.below[0], recorded[0]
        return (memory, jnp.where(recorded[0], n, last), running & ~ends), told

    def run(scores, visited, physical):
        begin = gate.init(run_context), jnp.asarray(-1000), jnp.asarray(True)
        return jax.lax.scan(step, begin, (scores, visited, physical, jnp.arange(STEPS)))[1]

    return jax.jit(run)


def told(index: int, scores, visited=None, physical=None) -> tuple[np.ndarray, ...]:
    ones = np.ones(STEPS, bool)
    flags = (ones if one is None else one for one in (visited, physical))
    return tuple(map(np.asarray, program(index)(np.asarray(scores, np.float32), *flags)))


def record_of(index: int, visited, decision, below, recorded, round_index: int) -> RoundRecord:
    """What a campaign would note of a round with one walker."""
    ended = int(np.isin(decision, [Decision.STOP, Decision.LEAVE, Decision.UNPHYSICAL]).sum())
    return RoundRecord(
        round=round_index,
        frames_planned=STEPS,
        frames_below=int(below.sum()),
        candidates=int(recorded.sum()),
        walkers={"stopped": 1} if ended else {"completed": 1},
        picoseconds=0.1,
    )


@pytest.mark.parametrize("index", range(len(GATES)), ids=[names(gate) for gate in GATES])
@budget(max_examples=15, deadline=None)
@given(data=st.data())
def test_below_is_what_scores_and_thresholds_say(index, data):
    """Whatever the gate decides: visited, physical, and a score below the record threshold of the run."""
    scores = np.asarray(data.draw(st.lists(st.floats(0, 4, width=32), min_size=STEPS, max_size=STEPS)), np.float32)
    visited = np.asarray(data.draw(st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)))
    physical = np.asarray(data.draw(st.lists(st.sampled_from([True] * 50 + [False]), min_size=STEPS, max_size=STEPS)))
    ran, decision, below, recorded = told(index, scores, visited, physical)
    np.testing.assert_array_equal(below, ran & physical & (scores < RECORD))
    assert not (below & recorded).any() and not (recorded & ~ran).any()
    steps = np.flatnonzero(recorded & (decision == Decision.RECORD))
    assert (np.diff(steps) >= EVERY).all()


@pytest.mark.parametrize("index", range(len(GATES)), ids=[names(gate) for gate in GATES])
def test_no_gate_makes_a_campaign_converge_above_the_threshold(index):
    """Frames that all lie above are no sign of convergence, whether or not the gate has them recorded."""
    rng = np.random.default_rng(index)
    level = 3.5 if getattr(GATES[index], "above", "") == "go_on" else 2.0
    for scores in (np.full(STEPS, level), level + 0.3 * rng.uniform(-1, 1, STEPS)):
        rounds = [record_of(index, *told(index, scores), n) for n in range(3)]
        assert rounds[0].frames_below == 0
        verdict = decide(StoppingSettings(max_rounds=100), rounds)
        assert verdict is None or not verdict.converged
        nothing = [one.model_copy(update={"candidates": 0}) for one in rounds]  # spacing or admission refused them all
        verdict = decide(StoppingSettings(max_rounds=100), nothing)
        assert verdict is None or not verdict.converged
    quiet = [record_of(index, *told(index, np.full(STEPS, 0.4)), n) for n in range(2)]
    verdict = decide(StoppingSettings(max_rounds=100), quiet)
    assert verdict is not None and verdict.rule == "share_below" and "100.0 %" in verdict.reason
    verdict = decide(StoppingSettings(max_rounds=100, share_below=None), quiet)
    assert verdict is not None and verdict.rule == "nothing_recorded" and verdict.converged


@pytest.mark.parametrize("index", range(len(GATES)), ids=[names(gate) for gate in GATES])
def test_the_share_of_scores_below_decides_for_every_gate(index):
    """With 1 of 20 frames above, the default rule holds; with 2 of 20 it does not.  None of them ends the walker."""
    gate = GATES[index]
    for above, holds in ((3, True), (6, False)):
        scores = np.full(STEPS, 0.4)
        scores[np.arange(above) * 9 + 5] = 2.0
        rounds = [record_of(index, *told(index, scores), n) for n in range(2)]
        assert [one.frames_below for one in rounds] == [STEPS - above] * 2, gate
        verdict = decide(StoppingSettings(max_rounds=100), rounds)
        assert (verdict is not None and verdict.rule == "share_below") == holds


@pytest.mark.parametrize("gate", [DecayingGate(half_life=1e6, excess=0.2), AbsoluteGate(release=0.9)], ids=names)
def test_frames_that_the_spacing_refuses_leave_no_memory(gate):
    """A rise within the spacing of a recorded frame: the gate must still record it when it may."""
    index = len(GATES)
    GATES.append(gate)
    scores = np.full(STEPS, 0.4)
    scores[10], scores[11], scores[12:40] = 1.5, 0.4, 2.5  # the second rise begins two steps after a recorded frame
    _, decision, _, recorded = told(index, scores)
    assert np.flatnonzero(recorded).tolist() == [10, 10 + EVERY]
    assert decision[12] == Decision.RECORD and not recorded[12]


@pytest.fixture(scope="module")
def decaying() -> Explorer:
    """Walkers under a gate that remembers."""
    gate = DecayingGate(half_life=50.0, excess=0.1)
    return explorer(gate=gate, record_every=7, buffer=12, when_full="go_on")


def test_a_gate_in_the_loop_learns_from_what_the_buffer_took(decaying):
    """The threshold of a decaying gate, followed by hand over the scores of a run."""
    found = decaying.run(PARAMS, [dimer()] * 3, (0.02, 1e4), jax.random.key(1))
    assert found.frames_planned == 600 and found.frames_below == int((found.scores[SCORE] < 0.02).sum())
    for w in range(3):
        raised, last, steps = 0.0, -100, []
        for n, score in enumerate(found.scores[SCORE][:, w].astype(float)):
            raised *= 0.5 ** (1 / 50.0)
            assert abs(score - 0.02 - raised) > 1e-6, "too close to call"
            if score > 0.02 + raised and n - last >= 7:
                last = n
                if len(steps) < 12:
                    steps.append(n + 1)
                    raised = 1.1 * score - 0.02
        assert [f.info["step"] for f in found.recorded if f.info["walker"] == w] == steps
        assert len(steps) > 1


TRIALS = {
    "walkers": [{"temperature": 50}],
    "steps": 40,
    "chunk": 40,
    "trace_every": 1,
    "trajectory_every": 1,
    "sanity": {"dissociation": False, "max_temperature": 1e6},
}


def test_hills_and_work_come_from_where_walkers_have_been():
    """Every second step is a trial that puts the oxygen at the end of the chain, and is refused."""
    bond = {"kind": "distance", "points": [0, 1]}
    biases = [
        {"kind": "metadynamics", "variables": [bond], "widths": [0.05], "height": 1e-4, "pace": 2, "hills": 50},
        {"kind": "steered", "variable": bond, "stiffness": 0.5, "start": 1.0, "end": 1.5},
        {"kind": "uncertainty", "relative": 1e-3, "window": 10},
    ]
    settings = ExplorationSettings.model_validate(TRIALS | {"swaps": {"every": 2}, "biases": biases})
    start = Atoms("HOH", [[-1, 0, 0], [0, 0, 0], [1, 0, 0]])
    session = Explorer(springs, SpeciesTable((1, 8)), 6.0, settings).begin(
        jnp.asarray([20.0, 30.0]), [start], (1e3, 1e4), jax.random.key(0)
    )
    found = session.result(list(session.chunks()))
    energy = found.energy[:, 0]
    visited = np.flatnonzero(np.isfinite(energy))
    assert visited.tolist() == list(range(1, 40, 2)), "all trials are refused"
    lengths = np.array([frame.get_distance(0, 1) for frame in found.trajectories[0]])
    hills, steered, pull = session.state.bias
    count = int(hills.count[0])
    # a hill is due at even steps, which are trials, and is left at the next frame of the dynamics
    np.testing.assert_allclose(np.asarray(hills.centres)[0, :count, 0], lengths[visited[1:]], atol=1e-5)
    centre, work = 1.0, 0.0
    for n in visited:
        new = 1.0 + 0.5 * n / 40
        work += 0.25 * ((lengths[n] - new) ** 2 - (lengths[n] - centre) ** 2)
        centre = new
    assert float(steered.work[0]) == pytest.approx(work, rel=1e-3)
    assert found.frames_planned == 20 and found.frames_below == 20
    # springs of trials, stretched by 1 Angstrom, would pull with 7 eV/Angstrom on average
    assert 0 < float(pull.force[0]) < 2


def test_swaps_compare_energies_under_the_same_hills():
    """Two free atoms a hill has just been left at: their exchange changes nothing, so that every trial is taken."""
    bond = {"kind": "distance", "points": [0, 1]}
    bias = {"kind": "metadynamics", "variables": [bond], "widths": [1.0], "height": 0.2, "pace": 1, "bias_factor": None}
    settings = ExplorationSettings.model_validate(TRIALS | {"swaps": {"every": 4}, "biases": [bias]})
    runner = Explorer(springs, SpeciesTable((1, 8)), 6.0, settings)
    session = runner.begin(jnp.zeros(2), [Atoms("OH", [[0, 0, 0], [0, 0, 1.5]])], (1e3, 1e4), jax.random.key(0))
    for _ in session.chunks():
        pass
    held = session.state.motion.extra
    assert int(held.tried[0]) == 10 and int(held.taken[0]) == 10


@pytest.mark.parametrize(
    "settings",
    [
        UncertaintySettings(),
        SteeredSettings(variable={"kind": "distance", "points": [0, 1]}, stiffness=1.0, start=1.0, end=2.0),
        MetadynamicsSettings(variables=[{"kind": "distance", "points": [0, 1]}], widths=[0.1], height=0.1, pace=1),
    ],
    ids=lambda one: one.kind,
)
def test_a_bias_learns_nothing_from_what_was_not_visited(settings):
    bias = build_bias([settings])
    rng = np.random.default_rng(0)
    look = replace(
        nothing_seen(2, 3),
        positions=jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32),
        step=jnp.asarray(1),
        progress=jnp.asarray(0.5),
        member_energy=jnp.asarray(rng.normal(size=(2, 2)), jnp.float32),
        member_forces=jnp.asarray(rng.normal(size=(2, 2, 3, 3)), jnp.float32),
        member_virial=jnp.zeros((2, 2, 3, 3)),
    )
    state = bias.init(context(np.ones(2), np.ones(2), 3))
    apply = jax.jit(bias.apply)
    _, whole = apply(state, replace(look, visited=jnp.asarray([True, True])))
    _, half = apply(state, replace(look, visited=jnp.asarray([True, False])))
    leads = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and len(leaf) == 2]
    assert leads
    differs = 0
    for before, both, one in zip(*map(jax.tree.leaves, (state, whole, half)), strict=True):
        if before.ndim == 0 or len(before) != 2 or before.dtype == bool:
            continue
        np.testing.assert_array_equal(one[0], both[0])
        np.testing.assert_array_equal(one[1], before[1])
        differs += int(not np.array_equal(both[1], before[1]))
    assert differs, "the bias does learn"


def test_a_member_that_is_no_number_is_named(decaying):
    for params, member in (([0.9, np.nan, 1.1], 1), ([np.nan] * 3, -1)):
        found = decaying.run(DEPTH * jnp.asarray(params), [dimer()] * 3, (1e3, 1e4), jax.random.key(0))
        assert set(found.status) == {Status.UNPHYSICAL} and set(found.cause) == {Cause.NOT_FINITE}
        assert found.end_member.tolist() == [member] * 3 and found.end_step.tolist() == [1] * 3
        assert ("member 1" in (found.ended_because(0) or "")) == (member == 1)
        assert found.frames_below == 0 and all(np.isfinite(frame.positions).all() for frame in found.final)
