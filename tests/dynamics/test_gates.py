"""Gates, rewinding and departure from the training distribution, each against a slow loop over the steps."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import CUTOFF, PARAMS, QUIET, SPECIES, context, dimer, explorer, morse, observed, settings
from ase import Atoms
from ase.data import covalent_radii
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from pydantic import ValidationError

from almlip_jax.dynamics import Explorer, Knowledge, SanitySettings, Status
from almlip_jax.dynamics.biases import UncertaintySettings
from almlip_jax.dynamics.gates import (
    AbsoluteGate,
    BandGate,
    DecayGate,
    Decision,
    Hysteresis,
    ThresholdGate,
    TrustBandGate,
)
from almlip_jax.dynamics.judging import speaks_as
from almlip_jax.dynamics.seen import scaled_by_species
from almlip_jax.dynamics.settings import RewindSettings
from almlip_jax.ensembles import Belief, EvidentialBelief, Noise, Prediction, Speaking
from almlip_jax.errors import InputError
from almlip_jax.potential.novelty import fit_latent_distance
from almlip_jax.structures.graph import Graph

SCORE = "force_std_max"
SCORES = st.lists(st.floats(0, 4, width=32), min_size=1, max_size=30)


def decisions(gate, values: list[float]) -> list[int]:
    state, found = gate.init(context()), []
    for value in values:
        decision, state = gate.apply(state, observed(SCORE, value))
        found.append(int(decision[0]))
    return found


@budget(max_examples=20, deadline=None)
@given(SCORES)
def test_the_trust_band_records_what_lies_between(values):
    for ends, above in ((True, Decision.LEAVE), (False, Decision.GO_ON)):
        expected = [above if v >= 3 else Decision.RECORD if v >= 1 else Decision.GO_ON for v in values]
        assert decisions(TrustBandGate(SCORE, ends), values) == expected


@budget(max_examples=20, deadline=None)
@given(SCORES)
def test_a_recorded_frame_raises_the_threshold_for_a_while(values):
    expected, raised = [], 0.0
    for v in np.asarray(values, np.float32):
        raised *= 0.5 ** (1 / 5.0)
        if abs(v - (1 + raised)) < 1e-4:  # too close to call in float32
            return
        decision = Decision.STOP if v > 3 else Decision.RECORD if v > 1 + raised else Decision.GO_ON
        if decision is Decision.RECORD:
            raised = 1.2 * v - 1
        expected.append(decision)
    assert decisions(DecayGate(SCORE, 5.0, 0.2), values) == expected


@budget(max_examples=20, deadline=None)
@given(SCORES)
def test_hysteresis_waits_for_persistence_and_release(values):
    expected, high, armed = [], 0, True
    for v in values:
        high = high + 1 if v > 3 else 0
        armed = armed or v < 0.5
        decision = Decision.STOP if high >= 2 else Decision.RECORD if v > 1 else Decision.GO_ON
        if decision is Decision.RECORD:
            decision, armed = (Decision.RECORD, False) if armed else (Decision.GO_ON, False)
        expected.append(decision)
    assert decisions(Hysteresis(ThresholdGate(SCORE), SCORE, 2, 0.5), values) == expected


def test_species_have_thresholds_of_their_own():
    atoms = jnp.asarray([[0.4, 0.9, 0.0]])
    seen = observed(SCORE, 0.9, atom_scores={"force_std": atoms})
    factors = jnp.asarray([[1 / 0.25, 1.0, 1.0]])  # a quarter of the threshold for the first atom
    assert float(scaled_by_species(seen, SCORE, factors).scores[SCORE][0]) == pytest.approx(1.6)
    gate = AbsoluteGate(species={"H": 0.5})
    loose, strict = (
        explorer(gate=one, record_every=1, steps=100).run(PARAMS, [dimer()] * 3, (0.15, 1e4), jax.random.key(2))
        for one in (AbsoluteGate(), gate)
    )
    spread = [f.arrays["force_std"].max() for f in strict.recorded]
    assert 0.075 < min(spread) < 0.15 < min(f.arrays["force_std"].max() for f in loose.recorded)
    with pytest.raises(ValidationError, match="score of atoms"):
        AbsoluteGate(score="energy_std", species={"H": 0.5})


def test_beyond_the_band_a_walker_leaves_unrecorded():
    free = explorer(steps=100).run(PARAMS, [dimer()] * 3, QUIET, jax.random.key(7))
    stop = float(np.quantile(free.scores[SCORE].max(axis=0), 0.5))
    found = explorer(steps=100, gate=BandGate(), record_every=1, buffer=100).run(
        PARAMS, [dimer()] * 3, (0.5 * stop, stop), jax.random.key(7)
    )
    assert Status.BEYOND_TRUST in found.status and Status.COMPLETED in found.status
    assert max(f.info[SCORE] for f in found.recorded) < stop
    for w, status in enumerate(found.status):
        if status is Status.BEYOND_TRUST:
            assert found.end_step[w] == 1 + np.flatnonzero(free.scores[SCORE][:, w] >= stop)[0]


def test_a_walker_in_trouble_begins_again_from_a_frame_of_its_own():
    """Restarts are counted, begin at a kept frame with fresh momenta, and come to an end."""
    free = explorer().run(PARAMS, [dimer()] * 3, QUIET, jax.random.key(7))
    stop = float(0.6 * free.scores[SCORE].max(axis=0).min())
    rewind = RewindSettings(on=("stop",), every=10, keep=3, limit=2)
    runner = explorer(rewind=rewind, trajectory_every=1, buffer=300)
    found = runner.run(PARAMS, [dimer()] * 3, (0.5 * stop, stop), jax.random.key(7))
    assert found.restarts.max() == 2
    for w in range(3):
        score = found.scores[SCORE][:, w]
        hits = 1 + np.flatnonzero(score > stop)
        assert len(hits) == found.restarts[w] + (found.status[w] is Status.STOPPED)
        if found.status[w] is Status.STOPPED:
            assert found.end_step[w] == hits[-1] and found.restarts[w] == 2
        origin, safe = 0, [0]
        frames = [dimer().positions, *(f.positions for f in found.trajectories[w])]
        for hit in hits[: found.restarts[w]]:
            safe += range(origin + 10, hit, 10)
            # half a fs after a restart an atom is still close to where it began again
            assert min(np.abs(frames[hit + 1] - frames[n]).max() for n in safe) < 0.05
            origin = hit
    again = runner.run(PARAMS, [dimer()] * 3, (0.5 * stop, stop), jax.random.key(7))
    np.testing.assert_array_equal(again.scores[SCORE], found.scores[SCORE])


def test_a_walker_that_the_gate_ends_is_replaced_by_its_next_start():
    """In the order of the further starts and round again, with fresh momenta and the forces of where it is."""
    free = explorer().run(PARAMS, [dimer()] * 3, QUIET, jax.random.key(7))
    stop = float(0.6 * free.scores[SCORE].max(axis=0).min())
    with pytest.raises(ValidationError, match=r"leave rewind\.every out"):
        RewindSettings(to="starts", every=10)
    rewind = RewindSettings(on=("stop",), to="starts", keep=2, limit=4)
    runner = explorer(rewind=rewind, trajectory_every=1, buffer=300)
    lengths = [[1.0 + 0.01 * w + 0.03 * n for n in range(3)] for w in range(3)]
    starts, further = [dimer(own[0]) for own in lengths], [[dimer(length) for length in own[1:]] for own in lengths]
    session = runner.begin(PARAMS, starts, (0.5 * stop, stop), jax.random.key(7), further=further)
    for n, length in enumerate(lengths[1]):
        other = runner.begin(PARAMS, [dimer(length)] * 3, QUIET, jax.random.key(0), further=further)
        known = session.state.snapshots.force[1, n]
        np.testing.assert_allclose(known, other.state.motion.force[1], rtol=1e-5, atol=1e-6)
        assert float(np.abs(known).max()) > 0.01 or length == 1.0
    traces = [*session.chunks()]
    found = session.result(traces)
    assert found.restarts.max() == 4 and found.restarts.min() > 0
    for w in range(3):
        hits = 1 + np.flatnonzero(found.scores[SCORE][:, w] > stop)
        assert len(hits) == found.restarts[w] + (found.status[w] is Status.STOPPED)
        frames = found.trajectories[w]
        for number, hit in enumerate(hits[: found.restarts[w]], start=1):
            length = np.linalg.norm(np.subtract(*frames[hit].positions))
            assert abs(length - lengths[w][number % 3]) < 0.03
            again = np.linalg.norm(frames[hit].get_momenta()) > 0
            assert again and np.abs(frames[hit].positions - dimer(lengths[w][number % 3]).positions).max() < 0.05
    with pytest.raises(InputError, match="asks for 2 further starts .* each of 3 walkers; given are 1 to 2"):
        runner.begin(PARAMS, starts, QUIET, jax.random.key(0), further=[*further[:2], further[2][:1]])
    with pytest.raises(InputError, match="further start 1 of walker 2 has other atoms"):
        strange = Atoms("OH2", [[0, 0, 0], [0.95, 0, 0], [0, 0.95, 0]])
        runner.begin(PARAMS, starts, QUIET, jax.random.key(0), further=[*further[:2], [further[2][0], strange]])
    with pytest.raises(InputError, match=r"rewind\.to is 'starts' only"):
        explorer().begin(PARAMS, starts, QUIET, jax.random.key(0), further=further)


def test_one_member_has_no_spread_to_judge():
    """Its score is 0 everywhere, so that a gate would find the ensemble sure of everything."""
    one = PARAMS[:1]
    with pytest.raises(InputError, match=r"exploration\.gate looks at.*Infinite thresholds judge nothing"):
        explorer().begin(one, [dimer()] * 3, QUIET, jax.random.key(0))
    with pytest.raises(InputError, match=r"exploration\.biases 'uncertainty' follows"):
        explorer(biases=(UncertaintySettings(),)).begin(one, [dimer()] * 3, (np.inf, np.inf), jax.random.key(0))
    shapes = jax.eval_shape(lambda: jnp.zeros((1, 2)))
    said = Prediction(shapes, shapes, shapes, shapes)
    assert speaks_as(said) == Speaking(1)
    for belief, gives in (
        (Belief(shapes), {"total"}),
        (EvidentialBelief(shapes, shapes, shapes), {"total", "epistemic"}),
    ):
        assert speaks_as(replace(said, noise=Noise(belief, belief, belief))) == Speaking(1, frozenset(gives))


def test_the_whole_run_ends_when_a_buffer_is_full():
    found = explorer(when_full="end_all", buffer=3, record_every=5).run(
        PARAMS, [dimer(), dimer(), dimer(1.001)], (0.02, 1e4), jax.random.key(0)
    )
    assert set(found.status) == {Status.BUFFER_FULL} and len(set(found.end_step)) == 1
    counts = [sum(f.info["walker"] == w for f in found.recorded) for w in range(3)]
    assert max(counts) == 3


def test_explosions_are_undone_too():
    runner = explorer(
        sanity=SanitySettings(closest_contact=0.9, max_temperature=1e3, max_force=1e4, dissociation=False),
        rewind=RewindSettings(every=5, limit=3),
        trajectory_every=1,
    )
    water = Atoms("OH2", [[0, 0, 0], [0.95, 0, 0], [0, 0.95, 0]])
    found = runner.run(PARAMS, [dimer(), water, dimer(0.7)], QUIET, jax.random.key(5))
    for w in range(3):
        assert found.restarts[w] <= 3 and np.isfinite(found.final[w].positions).all()
        if found.status[w] is Status.UNPHYSICAL:
            assert found.restarts[w] == 3
    assert found.restarts.sum() > 0
    visited = [frame for one in found.trajectories for frame in one]
    bonds = np.array([min(f.get_distance(0, n) for n in range(1, len(f))) for f in visited])
    assert bonds.min() > 0.9 * (covalent_radii[1] + covalent_radii[8]) - 1e-5, "none of the frames undone is among them"
    assert len(bonds) == np.sum(np.isfinite(found.energy)) - found.restarts.sum() - np.sum(found.end_step > 0)


def distances(params: jax.Array, graph: Graph) -> Prediction:
    """The Morse committee, with features of an atom that are functions of its nearest distance."""
    found = morse(params, graph)
    length = jnp.sqrt(jnp.sum(jnp.where(graph.edge_mask[..., None], graph.vectors, 1.0) ** 2, axis=-1))
    nearest = jnp.min(jnp.where(graph.edge_mask, length, CUTOFF), axis=1)
    return replace(found, features=jnp.stack([nearest, nearest**2], axis=-1)[None])


def test_departure_names_atom_walker_and_step():
    rng = np.random.default_rng(0)
    lengths = 1 + 0.02 * rng.normal(size=400)
    features = np.repeat(np.stack([lengths, lengths**2], axis=-1)[None], 2, axis=1).astype(np.float32)
    species = np.repeat([0, 1], 400)
    fitted = fit_latent_distance(features, species, 2)
    # the definition, in numpy and float64
    mine = features[0, :400].astype(np.float64)
    covariance = np.cov(mine.T, bias=True)
    inverse = np.linalg.inv(covariance + 1e-4 * np.trace(covariance) / 2 * np.eye(2))
    moved = mine - mine.mean(axis=0)
    plain = np.sqrt(np.einsum("ni,ij,nj->n", moved, inverse, moved) / 2)
    runner = Explorer(distances, SPECIES, CUTOFF, settings(monitor=("latent_distance",)), dtype=np.float32)
    found = runner.run(
        PARAMS, [dimer()] * 3, QUIET, jax.random.key(2), knowledge=Knowledge({"latent_distance": fitted})
    )
    assert float(fitted.unit[0]) == pytest.approx(np.quantile(plain, 0.99), rel=1e-3)
    trace = found.scores["latent_distance"]
    np.testing.assert_allclose(found.departure, trace.max(axis=0), rtol=1e-6)
    for w in range(3):
        beyond = np.flatnonzero(trace[:, w] > 2)
        assert found.departed_step[w] == (1 + beyond[0] if len(beyond) else -1)
        assert found.departed_atom[w] in ((0, 1) if len(beyond) else (-1,))
    assert (found.departed_step > 0).any()
    with pytest.raises(ValueError, match="training set"):
        runner.run(PARAMS, [dimer()] * 3, QUIET, jax.random.key(2))
