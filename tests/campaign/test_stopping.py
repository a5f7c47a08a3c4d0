"""Stopping rules: each holds exactly when its numbers say so, names itself, and quotes the numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from almlip_jax.campaign.settings import (
    PlateauSettings,
    ShareBelowSettings,
    StoppingSettings,
    TargetErrorSettings,
    UserRuleSettings,
)
from almlip_jax.campaign.state import RoundRecord
from almlip_jax.campaign.stopping import Verdict, decide
from almlip_jax.errors import InputError

NONE = StoppingSettings(max_rounds=100, share_below=None)


def settings(**changes: object) -> StoppingSettings:
    return NONE.model_copy(update=changes)


def explored(index: int, below: int, planned: int = 100, picoseconds: float = 1.0, **more: object) -> RoundRecord:
    fields = {"candidates": 5, "walkers": {"completed": 4}, **more}
    return RoundRecord(round=index, frames_below=below, frames_planned=planned, picoseconds=picoseconds, **fields)


def test_no_rule_holds_on_an_empty_history() -> None:
    every = settings(
        max_rounds=0,
        max_labels=1,
        share_below=ShareBelowSettings(),
        plateau=PlateauSettings(),
        target_error=TargetErrorSettings(value=1.0),
    )
    assert decide(every, []) is None


class TestShareBelow:
    rule = settings(share_below=ShareBelowSettings(share=0.95, rounds=2))

    def test_needs_the_whole_window(self) -> None:
        assert decide(self.rule, [explored(0, 100)]) is None

    def test_holds_on_the_frames_of_the_window_together(self) -> None:
        verdict = decide(self.rule, [explored(0, 10), explored(1, 92), explored(2, 98)])
        assert verdict is not None and verdict.rule == "share_below" and verdict.converged
        assert "95.0 % of 200 frames" in verdict.reason and "2 rounds" in verdict.reason

    def test_one_frame_less_does_not_hold(self) -> None:
        assert decide(self.rule, [explored(0, 91), explored(1, 98)]) is None

    def test_rounds_weigh_by_their_frames(self) -> None:
        assert decide(self.rule, [explored(0, 0, planned=10), explored(1, 1000, planned=1000)]) is not None
        assert decide(self.rule, [explored(0, 10, planned=10), explored(1, 900, planned=1000)]) is None

    def test_the_window_grows_to_the_time_asked_for(self) -> None:
        rule = settings(share_below=ShareBelowSettings(share=0.95, rounds=1, picoseconds=2.5))
        assert decide(rule, [explored(0, 100), explored(1, 100)]) is None
        assert decide(rule, [explored(0, 100), explored(1, 100), explored(2, 100)]) is not None
        assert decide(rule, [explored(0, 0), explored(1, 100), explored(2, 100)]) is None

    def test_rounds_of_another_exploration_do_not_count(self) -> None:
        """What walkers at 300 K stayed below says nothing of those at 600 K."""
        hotter = explored(2, 92, explored_anew=True)
        assert decide(self.rule, [explored(0, 100), explored(1, 100), hotter]) is None
        verdict = decide(self.rule, [explored(1, 100), hotter, explored(3, 100)])
        assert verdict is not None and "96.0 % of 200 frames" in verdict.reason

    def test_a_round_that_has_not_explored_yet_does_not_count(self) -> None:
        history = [explored(0, 100), explored(1, 100), RoundRecord(round=2)]
        verdict = decide(self.rule, history)
        assert verdict is not None and "200 frames" in verdict.reason


class TestPlateau:
    rule = settings(plateau=PlateauSettings(rounds=2, fall=0.05, approach=0.5))

    @staticmethod
    def history(*pairs: tuple[float | None, float | None]) -> list[RoundRecord]:
        return [RoundRecord(round=n, sigma_batch=batch, sigma_pool=pool) for n, (batch, pool) in enumerate(pairs)]

    def test_holds_once_batch_and_pool_are_flat_and_near(self) -> None:
        course = [(4.0, 1.0), (2.0, 0.9), (1.5, 0.82), (1.4, 0.8), (1.38, 0.78)]
        for end in range(1, len(course)):
            assert decide(self.rule, self.history(*course[:end])) is None
        verdict = decide(self.rule, self.history(*course))
        assert verdict is not None and verdict.rule == "plateau" and verdict.converged
        assert "fell by 4.1 % a round" in verdict.reason and "that of the pool by 2.5 %" in verdict.reason
        assert "at 1.77 times the pool, down from 4 times" in verdict.reason

    @pytest.mark.parametrize(
        "course",
        [
            [(4.0, 1.0), (1.5, 0.5), (1.3, 0.5), (1.1, 0.5)],  # the batch still falls
            [(4.0, 1.0), (1.1, 0.9), (1.1, 0.8), (1.1, 0.7)],  # the pool still does
            [(4.0, 1.0), (3.9, 1.0), (3.9, 1.0), (3.9, 1.0)],  # as far from the pool as ever
            [(1.02, 1.0), (1.1, 1.0), (1.15, 1.0), (1.15, 1.0)],  # was never far from it
        ],
    )
    def test_either_alone_is_no_plateau(self, course: list[tuple[float, float]]) -> None:
        assert decide(self.rule, self.history(*course)) is None

    @pytest.mark.parametrize("batch, pool", [(None, 1.0), (1.0, None), (float("nan"), 1.0), (1.0, 0.0)])
    def test_rounds_without_numbers_have_no_say(self, batch: float | None, pool: float | None) -> None:
        flat = [(4.0, 1.0), (1.1, 1.0), (1.1, 1.0)]
        assert decide(self.rule, self.history(*flat, (batch, pool))) is None
        assert decide(self.rule, self.history(*flat, (batch, pool), (1.1, 1.0))) is not None


class TestTargetError:
    def test_every_group_has_to_reach_it(self) -> None:
        rule = settings(target_error=TargetErrorSettings(value=0.02))
        errors = {"forces_rmse_300K": 0.015, "forces_rmse_600K": 0.03, "energy_rmse_300K": 0.001}
        assert decide(rule, [RoundRecord(round=0, errors=errors)]) is None
        reached = {**errors, "forces_rmse_600K": 0.02}
        verdict = decide(rule, [RoundRecord(round=0, errors=reached)])
        assert verdict is not None and verdict.rule == "target_error" and verdict.converged
        assert "0.015 (300K)" in verdict.reason and "0.02 (600K)" in verdict.reason

    def test_or_the_named_group_alone(self) -> None:
        rule = settings(target_error=TargetErrorSettings(value=0.02, group="300K"))
        errors = {"forces_rmse_300K": 0.015, "forces_rmse_600K": 0.03}
        assert decide(rule, [RoundRecord(round=0, errors=errors)]) is not None
        assert decide(rule, [RoundRecord(round=0, errors={"forces_rmse_600K": 0.001})]) is None


class TestRunningOut:
    def test_the_budget_holds_once_its_labels_are_trained_on(self) -> None:
        rule = settings(max_labels=30)
        assert decide(rule, [RoundRecord(round=0, labels=29)]) is None
        verdict = decide(rule, [RoundRecord(round=0, labels=29), RoundRecord(round=1, labels=30)])
        assert verdict is not None and verdict.rule == "max_labels" and not verdict.converged
        assert "30" in verdict.reason

    def test_the_last_allowed_batch_is_trained_on(self) -> None:
        rule = settings(max_rounds=2)
        assert decide(rule, [RoundRecord(round=i) for i in range(2)]) is None
        verdict = decide(rule, [RoundRecord(round=i) for i in range(3)])
        assert verdict is not None and verdict.rule == "max_rounds" and not verdict.converged

    def test_nothing_recorded_needs_walkers_that_ran_to_their_end(self) -> None:
        quiet = explored(0, 100, candidates=0)
        verdict = decide(NONE, [quiet])
        assert verdict is not None and verdict.rule == "nothing_recorded" and verdict.converged
        broken = explored(0, 60, candidates=0, walkers={"completed": 3, "unphysical": 1})
        assert decide(NONE, [broken]) is None
        refused = explored(0, 99, candidates=0)  # one frame lay above, and was not kept
        assert decide(NONE, [refused]) is None

    def test_a_pool_is_used_up(self) -> None:
        verdict = decide(NONE, [RoundRecord(round=0, candidates=0)])
        assert verdict is not None and verdict.rule == "pool_exhausted" and not verdict.converged

    def test_convergence_is_named_before_what_ran_out(self) -> None:
        rule = settings(max_rounds=1, share_below=ShareBelowSettings(rounds=1))
        verdict = decide(rule, [explored(0, 0), explored(1, 100)])
        assert verdict is not None and verdict.rule == "share_below"


def falling(by: float) -> Any:
    """Factory of a user's rule: the pool's uncertainty has fallen by some factor."""

    def rule(history: Sequence[RoundRecord]) -> str | None:
        first, last = history[0].sigma_pool, history[-1].sigma_pool
        return f"the pool fell to {last / first:g}." if first and last and last <= first / by else None

    return rule


class TestUser:
    @pytest.fixture(autouse=True)
    def importable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "my_rules", SimpleNamespace(falling=falling, number=lambda: lambda history: 1))

    def test_a_rule_of_the_users_own_ends_the_campaign(self) -> None:
        rule = settings(user=UserRuleSettings(function="my_rules:falling", parameters={"by": 2}))
        history = [RoundRecord(round=0, sigma_pool=1.0), RoundRecord(round=1, sigma_pool=0.6)]
        assert decide(rule, []) is None and decide(rule, history) is None
        verdict = decide(rule, [*history, RoundRecord(round=2, sigma_pool=0.4)])
        assert verdict == Verdict("user", True, "the pool fell to 0.4.")

    def test_what_is_no_reason_is_refused(self) -> None:
        with pytest.raises(InputError, match="must give a sentence or None, but gives 1"):
            decide(settings(user=UserRuleSettings(function="my_rules:number")), [RoundRecord(round=0)])
        with pytest.raises(InputError, match="does not take the parameters given"):
            decide(settings(user=UserRuleSettings(function="my_rules:falling")), [RoundRecord(round=0)])
