"""Devices that share out the structures of batches train as one device does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from hypothesis import given
from hypothesis import strategies as st
from small_training import MODEL, PLAIN, SPECIES, labelled, settings_of, water

from almlip_jax import compilation
from almlip_jax.ensembles import EnsembleSettings, devices_side_by_side, training_devices
from almlip_jax.ensembles.sharding import PARTS
from almlip_jax.errors import CapacityError
from almlip_jax.models import MaceSettings, ModelSettings
from almlip_jax.structures.packing import BatchShape, shape_of_part, share_out
from almlip_jax.training import (
    Job,
    SideBySideTrainer,
    Trainer,
    TrainingResult,
    TrainingSettings,
    build_trainer,
    plan_capacity,
)
from almlip_jax.training.program import Program, compiled

SHARED = pytest.mark.skipif(len(jax.devices()) < 2, reason="the tests' settings of XLA were replaced")


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(2, 9), st.integers(0, 50))
def test_parts_have_room_for_whatever_a_batch_holds(sizes: list[int], parts: int, spare: int) -> None:
    batch = BatchShape(max(sum(sizes) - spare, max(sizes)), 8, len(sizes))
    while sum(sizes) > batch.atoms:  # what does not fit any more comes in the next batch
        sizes.remove(min(sizes))
    shape = shape_of_part(batch, max(sizes), parts)
    taken = share_out(sizes, parts, shape.structures)
    assert sorted(place for part in taken for place in part) == list(range(len(sizes)))
    assert max(len(part) for part in taken) <= shape.structures
    assert max(sum(sizes[place] for place in part) for part in taken) <= shape.atoms


def test_equal_structures_leave_no_room_over():
    assert shape_of_part(BatchShape(100 * 9, 8, 100), 9, 8) == BatchShape(13 * 9, 8, 13)


@SHARED
def test_cores_that_nobody_asked_to_be_devices_take_whole_batches(monkeypatch):
    assert training_devices(1, 8).shape[PARTS] == len(jax.devices())
    monkeypatch.setattr(compilation, "_cores_are_devices", True)
    assert training_devices(1, 8).shape[PARTS] == 1 and training_devices(2, 8).shape["members"] == 2


def unlike() -> list[Atoms]:
    """Molecules of several sizes, some with few labels or with weights."""
    found = [water(seed) for seed in range(8)]
    for seed, name in enumerate(("H2", "H2O2", "O2", "H2O2", "H2", "H2O2")):
        atoms = molecule(name)
        atoms.rattle(0.05, seed=seed)
        found.append(labelled(atoms))
    del found[1].calc.results["energy"], found[9].calc.results["forces"]
    found[3].info["weight"], found[11].info["forces_weight"] = 3.0, 0.5
    return found


def trained(
    settings: TrainingSettings, members: EnsembleSettings, model: ModelSettings = MODEL, *, shared: bool
) -> tuple[TrainingResult, Trainer]:
    """A training in double precision."""
    data, references = unlike(), {1: -1.0, 8: -3.0}
    capacity = plan_capacity(data, 4.0, settings)
    with jax.enable_x64(True):
        trainer = build_trainer(model, members, SPECIES, capacity, settings, np.float64)
        assert isinstance(trainer, Trainer)
        trainer = trainer if shared else trainer.on(training_devices(trainer.ensemble.size, 1))
        result = trainer.train(data, None, jax.random.key(2), reference_energies=references)
    return result, trainer


LOSSES = {"energy": 5.0, "kind": "huber", "forces_delta": 0.3}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], ModelSettings]] = {
    "stages": ({"second_stage": {"start": 0.5, "kind": "mse"}, "loss": LOSSES, "schedule": "plateau"}, {}, MODEL),
    "own": ({}, {"order": "own", "bootstrap": "poisson"}, MODEL),
    "heads": ({"loss": {"kind": "nll"}}, {"heads": 2}, MODEL),
    "noise": ({"loss": {"kind": "nll"}, "optimiser": "adamw"}, {"likelihood": "evidential", "size": 1}, MODEL),
    "one by one": ({}, {"order": "own"}, MaceSettings(cutoff=4.0, channels=4, l_max=1)),
}


@SHARED
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_devices_give_what_one_gives(name: str) -> None:
    training, ensemble, model = CASES[name]
    settings = settings_of(**{"batch_size": 5, "max_steps": 24, "validate_every": 6, "ema": 0.9} | training)
    members = EnsembleSettings(**{"size": 3} | ensemble)
    (one, alone), (both, sharing) = (trained(settings, members, model, shared=shared) for shared in (False, True))
    assert alone.program.devices is None and sharing.program.devices.shape[PARTS] == 2
    for a, b in zip(one.history, both.history, strict=True):
        for key, values in a.models.items():
            np.testing.assert_allclose(b.models[key], values, rtol=1e-7, err_msg=key)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(both.params), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-9)
    assert sharing._compiled.segment._cache_size() == 1  # for the first segment, and for those after it


@SHARED
def test_two_parts_of_a_batch_have_its_gradient_and_loss() -> None:
    """Labels of the whole batch count, not those of a part; bootstrap weights and those of structures too."""
    settings, data, members = settings_of(batch_size=9), unlike(), EnsembleSettings(size=3)
    sharing = build_trainer(PLAIN, members, SPECIES, plan_capacity(data, 4.0, settings), settings)
    assert isinstance(sharing, Trainer)
    alone = sharing.on(training_devices(3, 1))
    found = []
    for trainer in (sharing, alone):
        packed = trainer.training_set(data, {1: -1.0, 8: -3.0})
        run = trainer.prepare(packed, 10, jax.random.key(1))
        plan = packed.laid_out([list(range(1, 10))])
        step, late = jnp.int32(0), jnp.asarray(False)
        params = jax.jit(trainer.ensemble.init)(jax.random.key(0))
        gradient = jax.jit(partial(trainer.program._shared_out, Program._gradient))
        found.append(jax.device_get(gradient((params, run.weights), plan, run.data, step, late)))
    (both, losses), (one, expected) = found
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(both), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@SHARED
@pytest.mark.slow
def test_trainings_side_by_side_share_their_batches_out_where_they_leave_a_device_idle() -> None:
    """Three of three members on two devices: each takes a part of every batch of all of them."""
    settings, members = settings_of(batch_size=5, max_steps=18, validate_every=6), EnsembleSettings(size=3)
    data, references = unlike(), {1: -1.0, 8: -3.0}
    assert dict(devices_side_by_side(3, 3, 5).shape) == {"trainings": 1, "members": 1, PARTS: 2}
    with jax.enable_x64(True):
        trainer = build_trainer(MODEL, members, SPECIES, plan_capacity(data, 4.0, settings), settings, np.float64)
        assert isinstance(trainer, Trainer)
        jobs = [Job(data[n:] + data[:n], jax.random.key(n), references) for n in range(3)]
        together = SideBySideTrainer(trainer, fixed=True)
        found = together.train(jobs)
        own = together._together(3).trainer
        whole = trainer.on(training_devices(3, 1))
        alone = [whole.train(job.dataset, None, job.key, reference_energies=references) for job in jobs]
    assert own.program.devices is not None and compiled(own.program).uneven._cache_size() == 1
    for one, other in zip(found, alone, strict=True):
        for a, b in zip(one.history, other.history, strict=True):
            np.testing.assert_allclose(a.train_loss, b.train_loss, rtol=1e-7)
            np.testing.assert_allclose(a.validation_forces_rmse, b.validation_forces_rmse, rtol=1e-7)
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@SHARED
def test_a_structure_larger_than_any_before_needs_other_sizes(waters):
    settings = settings_of(batch_size=4)
    trainer = build_trainer(MODEL, EnsembleSettings(size=1), SPECIES, plan_capacity(waters, 4.0, settings), settings)
    with pytest.raises(CapacityError, match="a structure of 4 atoms does not fit"):
        trainer.training_set([*waters[:4], labelled(molecule("H2O2"))], {1: 0.0, 8: 0.0})


def test_what_is_left_of_an_older_run_knows_no_largest_structure(waters):
    capacity = replace(plan_capacity(waters, 4.0, settings_of(batch_size=4)), largest=0)
    assert capacity.part(2).atoms == capacity.batch.atoms


PROGRAM = """
import shutil, sys
from pathlib import Path
import jax, numpy as np
sys.path.insert(0, sys.argv[3])
from small_training import MODEL, SPECIES, settings_of
from test_shared_batches import unlike
from almlip_jax.training import EnsembleSettings, build_trainer, plan_capacity

jax.config.update("jax_enable_x64", True)
data, out = unlike(), {}
settings = settings_of(batch_size=4, max_steps=60, validate_every=10)

class Interruption(Exception):
    pass

for members in (1, 2):
    capacity = plan_capacity(data, 4.0, settings)
    trainer = build_trainer(MODEL, EnsembleSettings(size=members), SPECIES, capacity, settings, np.float64)

    def train(checkpoint=None, tell=None):
        found = trainer.train(data, None, jax.random.key(2), reference_energies={1: -1.0, 8: -3.0},
            checkpoint=checkpoint, checkpoint_every=1, on_epoch=tell)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(found.params)]), found.history

    def stop(report):
        raise Interruption

    out[f"params {members}"], history = train()
    out[f"losses {members}"] = np.stack([report.train_loss for report in history])
    out[f"validation {members}"] = np.stack([report.validation_forces_rmse for report in history])
    place = trainer.program.devices
    out[f"devices {members}"] = [1, 1] if place is None else place.devices.shape
    here = Path(sys.argv[2]) / f"own {len(jax.devices())} {members}"
    try:
        train(here, stop)
    except Interruption:
        pass
    again, resumed = train(here, None)
    out[f"resumed {members}"] = np.array_equal(again, out[f"params {members}"]) and len(resumed) == len(history)
    if len(jax.devices()) == 1:
        try:
            train(Path(sys.argv[2]) / f"of one {members}", stop)
        except Interruption:
            pass
    elif members == 1:
        heard = []
        copy = Path(sys.argv[2]) / f"taken up {len(jax.devices())}"
        shutil.copytree(Path(sys.argv[2]) / "of one 1", copy)
        out["taken up 1"], _ = train(copy, heard.append)
        out["heard 1"] = len(heard)
np.savez(sys.argv[1], **out)
"""


def run(folder: Path, devices: int) -> dict[str, np.ndarray]:
    flags = f"{os.environ.get('XLA_FLAGS', '').replace('device_count=2', f'device_count={devices}')}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    out = folder / f"{devices}.npz"
    command = [sys.executable, "-c", PROGRAM, str(out), str(folder), str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


@SHARED
@pytest.mark.slow
def test_four_and_eight_devices_give_what_one_gives(tmp_path: Path) -> None:
    """One member by four parts; two members by two or four.  A checkpoint of one device goes on with several."""
    one, four, eight = (run(tmp_path, devices) for devices in (1, 4, 8))
    shapes = [[found[f"devices {n}"].tolist() for n in (1, 2)] for found in (one, four, eight)]
    assert shapes == [[[1, 1], [1, 1]], [[1, 4], [2, 2]], [[1, 4], [2, 4]]]
    for found in (four, eight):
        for name, wanted in one.items():
            if name.startswith(("params", "losses", "validation")):
                np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-8, err_msg=name)
        assert found["heard 1"] == len(one["losses 1"]) - 1
        np.testing.assert_allclose(found["taken up 1"], one["params 1"], rtol=1e-5, atol=1e-8)
    for found in (one, four, eight):
        assert found["resumed 1"] and found["resumed 2"]
