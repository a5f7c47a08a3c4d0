"""The campaign: the loop from one config to an actively learned potential, its durable state, and what it reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from almlip_jax.campaign.loop import Outcome, finish_campaign, resume_campaign, run_campaign

__all__ = ["Outcome", "finish_campaign", "resume_campaign", "run_campaign"]


def __getattr__(name: str) -> Any:
    # imported when asked for: reading a run directory, which `almlip status` does, needs no jax
    if name in __all__:
        from almlip_jax.campaign import loop

        return getattr(loop, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
