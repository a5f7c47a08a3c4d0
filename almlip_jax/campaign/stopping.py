"""Stopping rules: pure functions of a campaign's history that say whether to stop, by which rule, and why in numbers.

Each rule looks at the records of the rounds so far, the last of which may be unfinished, and returns a `Verdict` or
None; a rule whose numbers are not there yet has no opinion.  `decide` asks them in order: first those that mean the
campaign has converged, then those that mean it has run out of something.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from almlip_jax.campaign.settings import PlateauSettings, StoppingSettings
from almlip_jax.campaign.state import RoundRecord
from almlip_jax.errors import InputError

OF_EXPLORATION = ("share_below", "nothing_recorded")
"""Rules whose verdict is on an exploration, and says nothing of one with other settings."""


@dataclass(frozen=True)
class Verdict:
    """The end of a campaign.

    Attributes:
        rule: name of the rule that held, as in the config.
        converged: whether it says that the potential is good enough, rather than that something ran out.
        reason: one sentence with the numbers.
    """

    rule: str
    converged: bool
    reason: str


def decide(settings: StoppingSettings, history: Sequence[RoundRecord]) -> Verdict | None:
    """The first stopping rule that holds, or None to go on.

    Args:
        settings: which rules there are, and their numbers.
        history: one record a round from round 0 on; the last may be unfinished.
    """
    rules = (target_error, share_below, plateau, user, nothing_recorded, max_labels, max_rounds)
    for rule in rules:
        verdict = rule(settings, history)
        if verdict is not None:
            return verdict
    return None


def target_error(settings: StoppingSettings, history: Sequence[RoundRecord]) -> Verdict | None:
    """The wanted error on the test set is reached (in the named group, or in every group)."""
    target = settings.target_error
    if target is None or not history:
        return None
    prefix = f"{target.metric}_"
    groups = {key.removeprefix(prefix): value for key, value in history[-1].errors.items() if key.startswith(prefix)}
    if target.group is not None:
        groups = {name: value for name, value in groups.items() if name == target.group}
    if not groups or not all(value <= target.value for value in groups.values()):
        return None
    errors = ", ".join(f"{value:.4g} ({name})" for name, value in groups.items())
    reason = f"{target.metric} on the test set is {errors}, at or below the target of {target.value:g}."
    return Verdict("target_error", True, reason)


def share_below(settings: StoppingSettings, history: Sequence[RoundRecord]) -> Verdict | None:
    """Nearly all frames of the latest exploration lay below the record threshold.

    The window is made of whole rounds, latest first: at least ``rounds`` of them, and as many as the asked simulated
    time needs, all explored with the same settings.  Frames are counted by their scores, whatever the gate made of
    them, and against the threshold of the run, also where that of a gate follows the scores.  What a walker did not
    reach because it was ended early counts as above.
    """
    rule = settings.share_below
    if rule is None:
        return None
    explored = [record for record in history if record.frames_planned]
    window: list[RoundRecord] = []
    picoseconds = 0.0
    while explored and (len(window) < rule.rounds or picoseconds < rule.picoseconds):
        window.append(explored.pop())
        picoseconds += window[-1].picoseconds
        if window[-1].explored_anew:
            break
    if len(window) < rule.rounds or picoseconds < rule.picoseconds:
        return None
    below, planned = sum(r.frames_below for r in window), sum(r.frames_planned for r in window)
    if below < rule.share * planned:
        return None
    reason = (
        f"{100 * below / planned:.1f} % of {planned} frames ({picoseconds:.3g} ps of all walkers together, "
        f"{_rounds(len(window))}) lay below the record threshold; {100 * rule.share:g} % were asked for."
    )
    return Verdict("share_below", True, reason)


def plateau(settings: StoppingSettings, history: Sequence[RoundRecord]) -> Verdict | None:
    """The uncertainty of the batch has flattened, and so has that of its pool, which it has come close to."""
    rule = settings.plateau
    if rule is None:
        return None
    known = [r for r in history if _positive(r.sigma_pool) and _positive(r.sigma_batch)]
    level = level_of([float(r.sigma_batch or 0) for r in known], [float(r.sigma_pool or 0) for r in known], rule.rounds)
    if level is None or not level.flat(rule):
        return None
    reason = (
        f"in the last {_rounds(rule.rounds)} the mean {settings.monitor} of the selected batch fell by "
        f"{100 * level.batch_fall:.1f} % a round and that of the pool by {100 * level.pool_fall:.1f} % "
        f"(at most {100 * rule.fall:g} % are asked for); the batch is at {level.ratio:.3g} times the pool, down from "
        f"{level.largest_ratio:.3g} times."
    )
    return Verdict("plateau", True, reason)


@dataclass(frozen=True)
class Level:
    """How the uncertainty of batch and pool has changed.

    Attributes:
        batch_fall: share that the batch has lost a round, geometric mean over the window; negative where it rose.
        pool_fall: the same of the pool.
        ratio: batch over pool in the last round.
        largest_ratio: in any round.
    """

    batch_fall: float
    pool_fall: float
    ratio: float
    largest_ratio: float

    def flat(self, rule: PlateauSettings) -> bool:
        """Whether it is a plateau; see `PlateauSettings`."""
        near = self.ratio - 1 <= rule.approach * (self.largest_ratio - 1)
        return near and max(self.batch_fall, self.pool_fall) <= rule.fall


def level_of(batch: Sequence[float], pool: Sequence[float], rounds: int) -> Level | None:
    """The change over the last rounds of the mean uncertainties of batch and pool, one positive value a round.

    None where there are fewer than ``rounds + 1`` values.
    """
    if len(batch) <= rounds:
        return None
    ratios = [b / p for b, p in zip(batch, pool, strict=True)]
    return Level(_fall(batch, rounds), _fall(pool, rounds), ratios[-1], max(ratios))


def _fall(values: Sequence[float], rounds: int) -> float:
    return float(1 - (values[-1] / values[-1 - rounds]) ** (1 / rounds))


def user(settings: StoppingSettings, history: Sequence[RoundRecord]) -> Verdict | None:
    """A rule of the user's own gives a reason.

    Raises:
        InputError: it cannot be imported or made, or gives something that is not a reason.
    """
    rule = settings.user
    if rule is None or not history:
        return None
    reason = rule.call_for_function("history")(history)
    if reason is None:
        return None
    if not isinstance(reason, str) or not reason:
        raise InputError(f"the rule of '{rule.function}' must give a sentence or None, but gives {reason!r}.")
    return Verdict("user", rule.converged, reason)


def nothing_recorded(settings: StoppingSettings, history: Sequence[RoundRecord]) -> Verdict | None:
    """There is nothing to label: every frame of every walker lay below the record threshold, or the pool is used up.

    Without new labels another round would only repeat this one.  Where walkers ended early, or where frames lay above
    the threshold but none was kept (the gate waited or left them aside, spacing or admission refused them, they are
    labelled already), the campaign goes on: the next round trains anew and explores with other random numbers.
    """
    if not history or history[-1].candidates != 0:
        return None
    last = history[-1]
    if last.frames_planned == 0:
        return Verdict("pool_exhausted", False, "every candidate of the pool has been selected.")
    if any(name not in ("completed", "converged") for name, count in last.walkers.items() if count):
        return None
    if last.frames_below < last.frames_planned:
        return None
    reason = (
        f"all of {last.frames_planned} frames ({last.picoseconds:.3g} ps of all walkers together) in round "
        f"{last.round} lay below the record threshold, and every walker ran to its end."
    )
    return Verdict("nothing_recorded", True, reason)


def max_labels(settings: StoppingSettings, history: Sequence[RoundRecord]) -> Verdict | None:
    """The label budget is spent, and what it bought has been trained on."""
    if settings.max_labels is None or not history or history[-1].labels < settings.max_labels:
        return None
    spent = f"{history[-1].labels} label-source calls were made (those of the test set not counted)"
    return Verdict("max_labels", False, f"{spent}; the budget is {settings.max_labels}.")


def max_rounds(settings: StoppingSettings, history: Sequence[RoundRecord]) -> Verdict | None:
    """As many batches as allowed have been labelled and trained on."""
    if not history or history[-1].round < settings.max_rounds:
        return None
    done = f"{_rounds(settings.max_rounds)} of labelling {'is' if settings.max_rounds == 1 else 'are'} done"
    return Verdict("max_rounds", False, f"{done}, which is all that stopping.max_rounds allows.")


def _rounds(number: int) -> str:
    return f"{number} round" if number == 1 else f"{number} rounds"


def _positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0
