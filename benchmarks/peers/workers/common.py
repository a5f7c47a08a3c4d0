"""What the workers share: the clock, the task, and the one line of result.

Imported before anything else, so that start-up holds every other import.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import json
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any


def elapsed() -> float:
    """Seconds since the worker began."""
    return time.perf_counter() - BEGAN


def work(parts: dict[str, Callable[[dict[str, Any]], dict[str, Any]]], packages: Sequence[str]) -> None:
    """Does the task of the command line and prints its result, with peak memory and versions."""
    task = json.loads(sys.argv[1])
    result = parts[task["part"]](task)
    result["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    result["versions"] = {name: version(name) for name in packages}
    print("RESULT " + json.dumps(result), flush=True)


def dynamics_result(steps: int, seconds: Sequence[float], first: float, first_at: float) -> dict[str, Any]:
    """Rates from repeats that took ``seconds``; ``first`` is what the first repeat took, which ended at ``first_at``.

    The first repeat also prepared and compiled: what it took beyond a steady one is ``compile``; ``start_up`` is the
    time from the beginning of the process to its first step.
    """
    steady = statistics.median(seconds)
    return {
        "steps_per_second": [steps / s for s in seconds],
        "compile": first - steady,
        "start_up": first_at - steady,
    }


def training_result(seconds: float, curve: Sequence[tuple[float, float]], target: float) -> dict[str, Any]:
    """Of a training that took ``seconds`` from the beginning of the process.

    Args:
        seconds: with imports and compilation.
        curve: after each epoch, seconds since the process began and force MAE of the validation set, eV/Angstrom.
        target: the same MAE, meV/Angstrom.
    """
    at = [0.0, *(when for when, _ in curve)]
    epochs = [after - before for before, after in zip(at[:-1], at[1:], strict=True)]
    reached = [when for when, error in curve if 1e3 * error <= target]
    return {
        "seconds": seconds,
        "epochs": len(epochs),
        "seconds_per_epoch": statistics.median(epochs[1:] or epochs),
        "first_epoch": epochs[0],
        "target_seconds": reached[0] if reached else None,
        "curve": [(round(when, 2), round(1e3 * error, 2)) for when, error in curve],
    }


def errors(name: str, energies: Any, forces: Any, frames: Sequence[Any]) -> dict[str, float]:
    """Mean absolute errors of a test set, meV and meV/Angstrom."""
    import numpy as np

    of_energies = np.array(energies) - np.array([a.get_potential_energy() for a in frames])
    of_forces = np.concatenate([np.asarray(f) - a.get_forces() for f, a in zip(forces, frames, strict=True)])
    return {
        f"energy_mae_{name}": 1e3 * float(np.mean(np.abs(of_energies))),
        f"forces_mae_{name}": 1e3 * float(np.mean(np.abs(of_forces))),
    }
