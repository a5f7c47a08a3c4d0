"""Members and walkers spread over eight devices train, evaluate and explore as on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = """
import sys
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from almlip_jax.dynamics import ExplorationSettings, Explorer, WalkerGroup
from almlip_jax.dynamics.programs import programs as programs_of
from almlip_jax.ensembles import Ensemble, spread_members
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, Trainer, TrainingSettings, plan_capacity, reference_energies

def water(seed):
    atoms = molecule("H2O")
    atoms.rattle(0.08, seed=seed)
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms

data, species = [water(seed) for seed in range(10)], SpeciesTable((1, 8))
model = SharedDensitySettings(cutoff=4.0, radial=4, l_max=1, channels=4, hidden=(8,))
settings = TrainingSettings(max_steps=24, validate_every=12, batch_size=2, validation_fraction=0.2)
ensemble = Ensemble(build_model(model, species), 8)
capacity = plan_capacity(data, 4.0, settings)
trainer = Trainer(ensemble, species, capacity, settings, EnsembleSettings(size=8), np.float64)
references = reference_energies(data, species)
result = trainer.train(data, None, jax.random.key(0), reference_energies=references)
found = Potential(model, species, result.params, references).evaluate(data)
walkers = (WalkerGroup(temperature=100.0, count=2),)
walkers = ExplorationSettings(walkers=walkers, steps=20, chunk=10, trajectory_every=10)
explorer = Explorer(ensemble.predict, species, 4.0, walkers, dtype=np.float64)
run = explorer.run(result.params, data[:2], (1e3, 1e4), jax.random.key(1))
single = Potential(model, species, jax.tree.map(lambda x: x[:1], result.params), references)
pool = [sum((water(seed).copy() for seed in range(n, n + 80)), Atoms()) for n in range(9)]  # a batch each
for atoms in pool:
    atoms.positions += np.repeat(4.5 * np.indices((4, 4, 5)).reshape(3, -1).T, 3, axis=0)
many = single.evaluate(pool)
parts = single.batch_shape(pool).parts
seen = set()

def watched(params, graph):
    seen.add((len(jax.tree.leaves(params)[0]), graph.num_structures))
    return ensemble.predict(params, graph)

alone = jax.tree.map(lambda x: x[:1], result.params)
eight = walkers.model_copy(update={"walkers": (WalkerGroup(temperature=100.0, count=8),)})
explorer_of_one = Explorer(watched, species, 4.0, eight, dtype=np.float64)
session = explorer_of_one.begin(alone, data[:8], (np.inf, np.inf), jax.random.key(2))
one_by_one = session.result(list(session.chunks()))
places = [len(session.state.motion.position.sharding.device_set)]
spread = len(jax.tree.leaves(spread_members(result.params))[0].sharding.device_set) if len(jax.devices()) > 1 else 1
shares = [len(spread_members(np.zeros((n, 2))).sharding.device_set) for n in (6, 7, 12, 16) if len(jax.devices()) > 1]
groups = spread_members((np.zeros((4, 2)), np.zeros((6, 2))))
together = jax.jit(lambda pair: pair[0].sum() + pair[1].sum())(groups)  # refused where they lie on different devices
programs = [trainer._compiled.segment, *(program for one in (explorer, explorer_of_one)
    for loop in one._loops.values() for program in programs_of(loop))]
np.savez(
    sys.argv[1], spread=spread, shares=shares, compiled=max(program._cache_size() for program in programs),
    many=many.energy, many_forces=np.concatenate(many.forces), parts=parts,
    energy=found.energy, forces=np.concatenate(found.forces),
    std=found.scores["force_std_max"],
    positions=np.stack([a.positions for a in run.final]), final=np.stack([a.positions for a in one_by_one.final]),
    places=places, seen=sorted(seen), loss=result.history[-1].validation_loss,
    params=np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(result.params)]),
)
"""


def started(out: Path, devices: int) -> subprocess.Popen[str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def one_and_eight(tmp_path_factory) -> list[dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("devices")
    files = {devices: folder / f"{devices}.npz" for devices in (1, 8)}
    processes = [started(file, devices) for devices, file in files.items()]
    complaints = [process.communicate()[1] for process in processes]
    for process, complaint in zip(processes, complaints, strict=True):
        assert process.returncode == 0, complaint[-3000:]
    return [dict(np.load(file)) for file in files.values()]


@pytest.mark.slow
def test_eight_devices_give_the_single_device_result(one_and_eight):
    one, eight = one_and_eight
    assert one.pop("spread") == 1 and eight.pop("spread") == 8
    assert not one.pop("shares").size and eight.pop("shares").tolist() == [6, 7, 6, 8]
    assert one.pop("places").tolist() == [1] and eight.pop("places").tolist() == [8]
    assert one.pop("seen").tolist() == [[1, 8]] and eight.pop("seen").tolist() == [[1, 1]], (
        "members, walkers of a device"
    )
    assert (one.pop("parts"), eight.pop("parts")) == (1, 8), "batches at a time"
    assert one["compiled"] == 1  # and with eight: two validations, two chunks
    for name, wanted in one.items():
        np.testing.assert_allclose(eight[name], wanted, rtol=1e-6, atol=1e-8, err_msg=name)
