"""What an exploration found, brought back to the host as structures and traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from numpy.typing import ArrayLike

from almlip_jax.dynamics.sanity import Cause
from almlip_jax.dynamics.seen import Thresholds
from almlip_jax.dynamics.settings import ExplorationSettings
from almlip_jax.dynamics.state import State, Status, Traces
from almlip_jax.structures.carried import BATH_TEMPERATURE, carried


@dataclass(frozen=True)
class Exploration:
    """What a run found; W walkers, T trace entries.

    Attributes:
        step: [T] int.
        time_fs: [T].
        scores: name -> [T, W], NaN once a walker ended.
        temperature: [T, W] K, NaN once a walker ended; 0 where nothing has momenta.
        energy: [T, W] eV, mean of the members, relative to the reference energies.
        bias: [T, W] eV, energy of the biases.
        pressure: [T, W] eV/Angstrom^3, internal; NaN where it was not asked for.
        volume: [T, W] Angstrom^3; meaningless for open structures, as the pressure is.
        walker_temperature: [W] K, of the bath at the start.
        status: [W] `Status`.
        cause: [W] which sanity check ended a walker.
        end_step: [W] int, step at which a walker ended early; -1 for one that did not.
        end_atom: [W] int, atom with the largest spread at that step.
        end_member: [W] int, member that gave no finite energy or forces at that step while others did; else -1.
        restarts: [W] int, times that a walker began again.
        departed_step: [W] int, first step at which an atom had left the training distribution; -1 where none did, or
            no latent distance was computed.
        departed_atom: [W] int, which; -1 where none.
        departure: [W] largest latent distance of an atom at any step.
        recorded: candidate frames by walker and step; ``info``: walker, step, time_fs, temperature (kinetic, K),
            bath_temperature and every score; ``arrays["force_std"]``.
        trajectories: thinned trajectory of each walker, with momenta, and the same ``info`` but for the scores.
        final: last good frame of each walker, with momenta and ``bath_temperature``, without labels.
        frames_planned: frames that all walkers would have come to had none ended early; those after a walker converged
            and Monte Carlo trials that were refused do not count.
        frames_below: physical frames among them whose score lay below the record threshold of the run, whatever the
            gate made of them.
        thresholds: record and stop threshold of each walker.
        offered: frames that the gate recorded, of all walkers; the buffer may have kept fewer.
        steps: planned for each walker.
        timestep: fs.
    """

    step: np.ndarray
    time_fs: np.ndarray
    scores: dict[str, np.ndarray]
    temperature: np.ndarray
    energy: np.ndarray
    bias: np.ndarray
    pressure: np.ndarray
    volume: np.ndarray
    walker_temperature: np.ndarray
    status: tuple[Status, ...]
    cause: tuple[Cause, ...]
    end_step: np.ndarray
    end_atom: np.ndarray
    end_member: np.ndarray
    restarts: np.ndarray
    departed_step: np.ndarray
    departed_atom: np.ndarray
    departure: np.ndarray
    recorded: list[Atoms]
    trajectories: list[list[Atoms]]
    final: list[Atoms]
    frames_planned: int
    frames_below: int
    thresholds: Thresholds
    offered: int
    steps: int
    timestep: float

    @property
    def share_below(self) -> float:
        """Share of the planned frames below the record threshold; what a walker missed as it ended early is above."""
        return self.frames_below / max(self.frames_planned, 1)

    @property
    def picoseconds(self) -> float:
        """Simulated time of all walkers together."""
        return float(np.sum(np.where(self.end_step < 0, self.steps, self.end_step))) * self.timestep / 1000

    @property
    def arrays(self) -> dict[str, ArrayLike]:
        """Times of the traces, how walkers fared, and which frames were recorded, by their names in files."""
        return {
            "step": self.step,
            "time_fs": self.time_fs,
            "walker_temperature": self.walker_temperature,
            "status": np.array([status.name.lower() for status in self.status]),
            "cause": np.array([cause.name.lower() for cause in self.cause]),
            "stop_step": self.end_step,
            "stop_atom": self.end_atom,
            "stop_member": self.end_member,
            "restarts": self.restarts,
            "departed_step": self.departed_step,
            "departed_atom": self.departed_atom,
            "departure": self.departure,
            "recorded_walker": np.array([frame.info["walker"] for frame in self.recorded], np.int64),
            "recorded_step": np.array([frame.info["step"] for frame in self.recorded], np.int64),
        }

    def ended_because(self, walker: int) -> str | None:
        """What made a walker's last frame unphysical, for people; None where nothing did."""
        cause, member = self.cause[walker], int(self.end_member[walker])
        if cause is Cause.NONE:
            return None
        return cause.sentence if member < 0 else f"member {member} gave energy or forces that are not finite"


def collect(
    settings: ExplorationSettings,
    starts: Sequence[Atoms],
    state: State,
    traces: Sequence[Traces],
    thresholds: Thresholds,
) -> Exploration:
    """The result of a run from its last state and the traces of its chunks, all on the host."""
    entries = int(state.step) // settings.trace_every
    step = settings.trace_every * np.arange(1, entries + 1)

    def joined(parts: Sequence[ArrayLike]) -> np.ndarray:
        return np.concatenate([np.asarray(p) for p in parts])[:entries] if parts else np.zeros((0, len(starts)))

    ends = state.ends
    names = tuple(traces[0].scores) if traces else ()
    return Exploration(
        step=step,
        time_fs=step * settings.timestep,
        scores={name: joined([t.scores[name] for t in traces]) for name in names},
        temperature=joined([t.temperature for t in traces]),
        energy=joined([t.energy for t in traces]),
        bias=joined([t.bias for t in traces]),
        pressure=joined([t.pressure for t in traces]),
        volume=joined([t.volume for t in traces]),
        walker_temperature=np.asarray(settings.temperatures),
        status=tuple(Status(int(code)) for code in ends.status),
        cause=tuple(Cause(int(code)) for code in ends.cause),
        end_step=np.asarray(ends.step),
        end_atom=np.asarray(ends.atom),
        end_member=np.where(ends.cause == int(Cause.NOT_FINITE), ends.member, -1),
        restarts=np.asarray(ends.restarts),
        departed_step=np.asarray(ends.departed_step),
        departed_atom=np.asarray(ends.departed_atom),
        departure=np.asarray(ends.departure),
        recorded=_recorded(settings, starts, state),
        trajectories=[trajectory(settings, w, start, traces) for w, start in enumerate(starts)],
        final=_final_frames(settings, starts, state),
        frames_planned=_frames_planned(settings, state),
        frames_below=int(np.sum(ends.below)),
        thresholds=thresholds,
        offered=int(np.sum(state.recorder.offered)),
        steps=settings.steps,
        timestep=settings.timestep,
    )


def trajectory(
    settings: ExplorationSettings,
    w: int,
    start: Atoms,
    traces: Sequence[Traces],
    first: int = 0,
    reference_energy: float | None = None,
) -> list[Atoms]:
    """Thinned trajectory of a walker from some chunks.

    Args:
        settings: of the exploration.
        w: the walker.
        start: its start structure.
        traces: of the chunks.
        first: frames before them.
        reference_energy: eV, of the structure; where it is given, frames carry mean energy and forces as results of a
            calculator.
    """
    frames = []
    number = first
    for part in traces:
        for row in range(part.positions.shape[0]):
            number += 1
            if not np.isfinite(part.positions[row, w, : len(start)]).all():
                continue
            at = number * settings.trajectory_every, part.frame_temperature[row, w]
            frame = _frame(settings, w, start, part.positions[row, w], *at)
            _place_in_cell(frame, part.cells[row, w], part.momenta[row, w])
            _add_evaluation(frame, part, row, w, reference_energy)
            frames.append(frame)
    return frames


def _add_evaluation(frame: Atoms, part: Traces, row: int, w: int, reference_energy: float | None) -> None:
    spread = np.asarray(part.force_std[row, w, : len(frame)], np.float64)
    if not np.isfinite(spread).all():  # a refused Monte Carlo trial: nothing was evaluated where the walker stayed
        return
    frame.arrays["force_std"] = spread
    frame.info["force_std_max"], frame.info["force_std_mean"] = float(spread.max()), float(spread.mean())
    if reference_energy is not None:
        energy = float(part.frame_energy[row, w]) + reference_energy
        forces = np.asarray(part.forces[row, w, : len(frame)], np.float64)
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)


def _final_frames(settings: ExplorationSettings, starts: Sequence[Atoms], state: State) -> list[Atoms]:
    """Last good frame of each walker, with its momenta, and the temperature of the bath where it ended."""
    frames = []
    for w, start in enumerate(starts):
        frame = _moved(start, state.motion.position[w])
        if settings.thermal:
            end = int(state.ends.step[w])
            frame.info[BATH_TEMPERATURE] = settings.bath_temperature(w, int(state.step) if end < 0 else end)
        _place_in_cell(frame, state.motion.cell[w], state.motion.momentum[w])
        frames.append(frame)
    return frames


def _frames_planned(settings: ExplorationSettings, state: State) -> int:
    ends = state.ends
    done = np.where(ends.step < 0, settings.steps, ends.step)
    lost = np.where(ends.status == int(Status.CONVERGED), 0, settings.steps - done)
    return int(np.sum(ends.visited + lost))


def _recorded(settings: ExplorationSettings, starts: Sequence[Atoms], state: State) -> list[Atoms]:
    recorder, frames = state.recorder, []
    taken = np.flatnonzero(np.asarray(recorder.walker) >= 0)
    for slot in sorted(taken, key=lambda s: (int(recorder.walker[s]), int(recorder.step[s]))):
        w = int(recorder.walker[slot])
        start, held = starts[w], recorder.frames
        frame = _frame(settings, w, start, held.positions[slot], int(recorder.step[slot]), held.temperature[slot])
        _place_in_cell(frame, held.cells[slot], None)
        frame.info.update({name: float(values[slot]) for name, values in held.scores.items()})
        frame.arrays["force_std"] = np.asarray(held.force_std[slot, : len(start)], np.float64)
        frames.append(frame)
    return frames


def _frame(
    settings: ExplorationSettings, w: int, start: Atoms, positions: ArrayLike, step: int, temperature: ArrayLike
) -> Atoms:
    frame = _moved(start, positions)
    frame.info.update(walker=w, step=step, time_fs=step * settings.timestep)
    if settings.thermal:
        frame.info["temperature"] = float(np.asarray(temperature))
        frame.info[BATH_TEMPERATURE] = settings.bath_temperature(w, step)
    return frame


def _moved(start: Atoms, positions: ArrayLike) -> Atoms:
    """The start structure with other positions, and what it carries; fixed atoms keep every digit of their places."""
    frame = carried(start)
    frame.set_positions(np.asarray(positions, np.float64)[: len(start)])  # walkers may hold fewer digits
    return frame


def _place_in_cell(frame: Atoms, cell: ArrayLike, momenta: ArrayLike | None) -> None:
    if frame.pbc.any():
        frame.set_cell(np.asarray(cell, np.float64), apply_constraint=False)
    if momenta is not None:  # integrators and ase share the unit of momenta
        frame.set_momenta(np.asarray(momenta, np.float64)[: len(frame)], apply_constraint=False)
