"""What a worker of a sweep does, wherever it runs: a bench that stays, and one group after the other."""

from __future__ import annotations

from almlip_jax.compilation import prepare_jax
from almlip_jax.progress import SilentProgress
from almlip_jax.sweep.bench import Bench
from almlip_jax.sweep.course import OnRound, run_points, train_firsts
from almlip_jax.sweep.points import First, Group
from almlip_jax.sweep.records import SweepDirectory
from almlip_jax.sweep.settings import SweepConfig


def open_bench(config: str, folder: str) -> Bench:
    """The bench of a process that does nothing else.

    Args:
        config: of the sweep as JSON, its folder known.
        folder: of the sweep.
    """
    settings = SweepConfig.model_validate_json(config)
    prepare_jax(settings.precision)
    return Bench(settings, SweepDirectory(folder))


def work_at(bench: Bench, group: Group, on_round: OnRound) -> Exception | None:
    """Runs a group; what it met comes back as an error with one text, which survives the way to another process."""
    work = train_firsts if isinstance(group.members[0], First) else run_points
    try:
        work(bench, group, SilentProgress(), on_round)
    except Exception as error:  # the parent knows whom to tell
        return _plain(error)
    return None


def _plain(error: Exception) -> Exception:
    if type(error).__module__.startswith(("almlip_jax.", "builtins")) and len(error.args) == 1:
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
