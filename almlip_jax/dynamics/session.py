"""One run of an explorer: chunk after chunk, with a state that can be kept on disk and gone on from, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike

from almlip_jax.dynamics.results import Exploration, collect
from almlip_jax.dynamics.seen import Thresholds
from almlip_jax.dynamics.settings import ExplorationSettings
from almlip_jax.dynamics.state import Setup, State, Status, Traces
from almlip_jax.errors import InputError
from almlip_jax.files import replacing
from almlip_jax.models import Params
from almlip_jax.structures.walkers import Room


class Runner(Protocol):
    """What a run asks of the `Explorer` that began it."""

    @property
    def settings(self) -> ExplorationSettings:
        """Of the exploration."""
        ...

    def grown(self, before: State, overflowed: State) -> State:
        """The state at the beginning of a chunk, with room for what overflowed during it."""
        ...

    def relisted(self, state: State, room: Room) -> State:
        """A state with another room for neighbours."""
        ...


class Session:
    """One run of an explorer: `chunks` moves it on, `save` and `restore` keep it.

    Attributes:
        state: after the last whole chunk.
    """

    def __init__(
        self,
        explorer: Runner,
        params: Params,
        starts: Sequence[Atoms],
        thresholds: Thresholds,
        setup: Setup,
        run_chunk: Callable[..., tuple[State, Traces]],
        state: State,
    ) -> None:
        self.explorer = explorer
        self.params = params
        self.starts = starts
        self.thresholds = thresholds
        self.setup = setup
        self.state = state
        self._run_chunk = run_chunk

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state.step)

    @property
    def running(self) -> int:
        """Walkers that still run."""
        return int(np.sum(np.asarray(self.state.ends.status) == int(Status.RUNNING)))

    def chunks(self) -> Iterator[Traces]:
        """Moves on, chunk after chunk, until every walker has ended or its steps are done.

        Where a neighbour list overflows, the chunk is done again from its beginning with more room.

        Yields:
            traces of each chunk, on the host; NaN from where a walker, or the run, ended.
        """
        while self.step < self.explorer.settings.steps and self.running > 0:
            state, traces = self._run_chunk(self.params, self.state, self.setup)
            if bool(state.neighbors.overflow):
                self.state = self.explorer.grown(self.state, state)
                continue
            self.state = state
            yield jax.device_get(traces)

    def result(self, traces: Sequence[Traces]) -> Exploration:
        """What the run found, from the traces of all its chunks."""
        thresholds = jax.device_get(self.thresholds)
        return collect(self.explorer.settings, self.starts, self.on_host(), traces, thresholds)

    def on_host(self) -> State:
        """The state as numpy arrays, random streams as their bits."""
        return jax.device_get(_with_plain_keys(self.state))  # type: ignore[no-any-return]

    def save(self, path: Path, notes: Mapping[str, ArrayLike] | None = None) -> None:
        """Writes the state to a file, which appears whole and durably or not at all.

        Args:
            path: the file.
            notes: arrays that belong to this state, by name; `restore` gives them back.
        """
        leaves = jax.tree.leaves(self.on_host())
        content: dict[str, Any] = {"room": np.asarray(json.dumps(self.state.neighbors.room.as_dict()))}
        content |= {f"leaf_{n}": leaf for n, leaf in enumerate(leaves)}
        content |= {f"note_{name}": np.asarray(value) for name, value in (notes or {}).items()}
        with replacing(path) as building, building.open("wb") as file:
            np.savez(file, **content)

    def restore(self, path: Path) -> dict[str, np.ndarray]:
        """Goes back to a state that `save` wrote in a run of these settings, perhaps with fewer steps planned.

        Returns:
            the notes saved with it.

        Raises:
            InputError: the file is damaged, or of a run with other settings.
        """
        try:
            with np.load(path) as held:
                room = Room.of(json.loads(str(held["room"])))
                leaves = [held[f"leaf_{n}"] for n in range(sum(name.startswith("leaf_") for name in held.files))]
                notes = {name.removeprefix("note_"): held[name] for name in held.files if name.startswith("note_")}
        except Exception as error:  # numpy and zipfile stumble over foreign files in many ways
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{path} cannot be read ({why}); begin this run again.") from error
        state = self.state
        if state.neighbors.room != room:
            state = self.explorer.relisted(state, room)
        plain, structure = jax.tree.flatten(_with_plain_keys(state))
        if [(x.shape, x.dtype) for x in plain] != [(x.shape, x.dtype) for x in leaves]:
            raise InputError(f"{path} belongs to a run with other settings; begin this run again.")
        found = jax.tree.unflatten(structure, [jax.device_put(x) for x in leaves])
        keys = jax.random.wrap_key_data(found.motion.rng)
        self.state = self._reopened(replace(found, motion=found.motion.set(rng=keys)))
        return notes

    def _reopened(self, state: State) -> State:
        """The state, whose walkers run again where they had done the steps of a run that was planned to be shorter."""
        if int(state.step) >= self.explorer.settings.steps:
            return state
        status = state.ends.status
        status = jnp.where(status == int(Status.COMPLETED), int(Status.RUNNING), status)
        return replace(state, ends=replace(state.ends, status=status))


def _with_plain_keys(state: State) -> State:
    return replace(state, motion=state.motion.set(rng=jax.random.key_data(state.motion.rng)))
