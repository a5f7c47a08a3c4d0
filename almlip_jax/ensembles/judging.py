"""Which scores an ensemble can give: a spread needs two members; one alone has to say something about its errors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from almlip_jax.models import how_given
from almlip_jax.scores import names, score_of, scores


class Speaks(Protocol):
    """What members can tell, as `EnsembleSettings` say of them."""

    @property
    def members(self) -> int:
        """Their number."""

    @property
    def gives(self) -> frozenset[str]:
        """What a single one tells of its errors: ``total`` deviations, ``epistemic`` ones."""


@dataclass(frozen=True)
class Speaking:
    """The same of members whose settings are not at hand; see `Speaks`."""

    members: int
    gives: frozenset[str] = frozenset()


def has_spread(members: Speaks) -> bool:
    """Whether there are two members at least, models and their heads counted.

    >>> from almlip_jax.ensembles import EnsembleSettings, has_spread
    >>> has_spread(EnsembleSettings(size=1)), has_spread(EnsembleSettings(size=1, heads=8))
    (False, True)
    """
    return members.members > 1


def gives_score(score: str, members: Speaks) -> bool:
    """Whether an ensemble tells structures apart by a score, which is 0 everywhere otherwise.

    One member has no spread; with ``mean_variance`` it has total deviations, with ``evidential`` epistemic ones too.
    Scores that are not deviations (novelty) look at features, which every ensemble has.

    >>> from almlip_jax.ensembles import EnsembleSettings, gives_score
    >>> gives_score("force_std_max", EnsembleSettings(size=1))
    False
    >>> gives_score("force_total_max", EnsembleSettings(size=1, likelihood="mean_variance"))
    True
    """
    found = score_of(score)
    needs = "features" if found is None else found.needs
    if has_spread(members) or needs in ("features", "training_set"):
        return True
    return needs in members.gives


def require_score(score: str, members: Speaks, where: str) -> None:
    """Refuses a score that the ensemble cannot give.

    Args:
        score: its name.
        members: settings of the ensemble.
        where: what looks at it, as in a config.

    Raises:
        ValueError: it would be 0 everywhere; says what to do.

    >>> from almlip_jax.ensembles import EnsembleSettings, require_score
    >>> require_score("force_std_max", EnsembleSettings(size=4), "exploration.gate")
    >>> require_score("energy_std", EnsembleSettings(size=1), "exploration.gate")
    Traceback (most recent call last):
    ValueError: exploration.gate looks at energy_std, which is 0 everywhere ...
    """
    if not gives_score(score, members):
        able = [name for name in names(scores(fitted=False)) if gives_score(name, members)]
        instead = f" or look at another score ({', '.join(able)})" if able else ""
        raise ValueError(
            f"{where} looks at {score}, which is 0 everywhere in an ensemble of one member; raise ensemble.size or "
            f"ensemble.heads{instead}."
        )


def require_target(score: str, further: Collection[str], where: str) -> None:
    """Refuses a score of something that the model does not give.

    Args:
        score: its name.
        further: what the model gives besides the energy, `ModelSettings.further`.
        where: what looks at it, as in a config.

    Raises:
        ValueError: says what to do.

    >>> from almlip_jax.ensembles import require_target
    >>> require_target("dipole_std", (), "exploration.gate")
    Traceback (most recent call last):
    ValueError: exploration.gate looks at dipole_std, but the model gives no dipole; set model.dipole: true.
    """
    found = score_of(score)
    target = None if found is None else found.target
    if target is not None and target not in further:
        raise ValueError(f"{where} looks at {score}, but the model gives no {target}; {how_given(target)}.")


def require_spread(members: Speaks, where: str) -> None:
    """Refuses what follows the differences between members where there is one; raises ValueError.

    >>> from almlip_jax.ensembles import EnsembleSettings, require_spread
    >>> require_spread(EnsembleSettings(size=1), "a bias of kind 'uncertainty'")
    Traceback (most recent call last):
    ValueError: a bias of kind 'uncertainty' follows ...
    """
    if not has_spread(members):
        raise ValueError(
            f"{where} follows disagreement between members, and there is only one; raise ensemble.size or "
            "ensemble.heads, or leave it out."
        )
