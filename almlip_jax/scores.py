"""Scores: what tells uncertain structures from certain ones, each declared once, with its name, unit and meaning.

Whatever looks at scores (gates, selectors, traces, files, the calculator, figures) iterates over declarations or looks
one up by its name.  `declare` adds one; other packages do so in the modules of their entry points
(`almlip_jax.kinds`).  Those of the spread of a target come with the target (`targets.declare`).

M members; deviations have 1/M.  ``force_std`` of an atom is the vector norm ``s_i = sqrt(mean_m |F_mi - F_i|^2)``, not
averaged over the components.  Each name holds one meaning in code, configs, files and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import BeforeValidator

from almlip_jax.kinds import load_plugins
from almlip_jax.names import Known
from almlip_jax.targets import Target, further_targets

Needs: TypeAlias = Literal["spread", "epistemic", "total", "features", "training_set"]
"""What a score needs to tell structures apart.

``spread``: two members.  ``epistemic``, ``total``: these, or members that say something about the error of their
prediction, or of any error of their own.  ``features``: the features of one member.  ``training_set``: to be fitted to
a training set (`potential.novelty`, `potential.active_set`)."""


@dataclass(frozen=True)
class Score:
    """A score of a structure, or of an atom.

    Attributes:
        name: the same everywhere; a score of structures may be called as the score of atoms that it is the largest of.
        unit: empty for a plain number; A is the Angstrom.
        meaning: in a few words.
        of: its values, [S] of structures or [A] of atoms (0 for padding), from an `ensembles.prediction.Seen`, when it
            follows from predictions alone and is not a reduction of a score of atoms.
        largest_of: the score of atoms that it is the largest value of; such scores may have thresholds of species.
        mean_of: the score of atoms that it is the mean of.
        per: whose it is.
        needs: what it needs.
        target: the target that it is about, where not every model gives that (`targets`).
    """

    name: str
    unit: str
    meaning: str
    of: Callable[[Any], Any] | None = None
    largest_of: str | None = None
    mean_of: str | None = None
    per: Literal["structure", "atom"] = "structure"
    needs: Needs = "spread"
    target: str | None = None

    @property
    def fitted(self) -> bool:
        """Whether it follows from what was fitted to a training set, and not from predictions alone."""
        return self.needs == "training_set"

    @property
    def says_errors(self) -> bool:
        """Whether it differs from the spread only where members say something about their own errors."""
        return self.needs in ("epistemic", "total")


_STRUCTURES: dict[str, Score] = {}
_ATOMS: dict[str, Score] = {}


def declare(*scores: Score) -> None:
    """Makes scores known; declaring one again unchanged, as when a cell of a notebook runs twice, is allowed.

    Raises:
        ValueError: a name is taken by another score, is not a valid name, or what a score reduces is not declared.
    """
    for score in scores:
        _check(score)
        (_ATOMS if score.per == "atom" else _STRUCTURES)[score.name] = score


def _alike(held: Score, score: Score) -> bool:
    """Whether two say the same, their functions by what they do: one made by the same lines is another object."""
    codes = [getattr(one.of, "__code__", one.of) for one in (held, score)]
    free = any(getattr(one.of, "__closure__", None) for one in (held, score))  # what it holds may differ
    functions = held.of == score.of or (codes[0] == codes[1] and not free)
    return functions and replace(held, of=None) == replace(score, of=None)


def _check(score: Score) -> None:
    held = (_ATOMS if score.per == "atom" else _STRUCTURES).get(score.name)
    if held is not None and not _alike(held, score):
        raise ValueError(f"there is another score '{score.name}' of each {score.per}.")
    if not score.name.isidentifier():
        raise ValueError(f"'{score.name}' cannot be the name of a score: use letters, digits and underscores.")
    reduced = score.largest_of or score.mean_of
    if reduced is not None and reduced not in _ATOMS:
        raise ValueError(f"score '{score.name}' needs the score '{reduced}' of atoms, which is not declared.")
    ways = [score.of is not None, reduced is not None, score.fitted and reduced is None]
    if sum(ways) != 1 or (score.largest_of and score.mean_of) or (score.per == "atom" and reduced):
        raise ValueError(f"score '{score.name}' needs one of: of, largest_of, mean_of.")


def spreads(target: Target) -> tuple[Score, ...]:
    """Scores of how far members are apart in a further target, over all of its components.

    ``dipole_std`` of structures; of a target of atoms ``charges_std`` of each, and its largest value and mean,
    ``charges_std_max`` and ``charges_std_mean``.
    """
    name = f"{target.name}_std"
    meaning = f"spread of the {target.name}, sqrt(mean_m |X_m - X|^2)"
    own = Score(name, target.unit, meaning, lambda seen: seen.deviation(target), per=target.per, target=target.name)
    if target.per == "structure":
        return (own,)
    largest = Score(f"{name}_max", target.unit, "largest of an atom", largest_of=name, target=target.name)
    mean = Score(f"{name}_mean", target.unit, "mean over the atoms", mean_of=name, target=target.name)
    return own, largest, mean


def scores(*, fitted: bool | None = None) -> tuple[Score, ...]:
    """All scores of structures, in the order of their declaration.

    Args:
        fitted: of those alone that follow from what was fitted to a training set, or from predictions alone.
    """
    load_plugins()
    return tuple(one for one in _STRUCTURES.values() if fitted in (None, one.fitted))


def atom_scores(*, fitted: bool | None = None) -> tuple[Score, ...]:
    """All scores of atoms; see `scores`."""
    load_plugins()
    return tuple(one for one in _ATOMS.values() if fitted in (None, one.fitted))


def names(declared: Iterable[Score]) -> tuple[str, ...]:
    """Names of scores."""
    return tuple(one.name for one in declared)


def score_of(name: str) -> Score | None:
    """The score of structures of that name."""
    load_plugins()
    return _STRUCTURES.get(name)


def needs_no_fit(name: str) -> bool:
    """Whether the score of structures of that name follows from predictions alone."""
    found = score_of(name)
    return found is not None and not found.fitted


def largest_of(name: str) -> str | None:
    """The score of atoms that a score of structures is the largest of, if it is."""
    found = score_of(name)
    return None if found is None else found.largest_of


def mean_score(values: np.ndarray) -> float | None:
    """Mean of a score over the structures that have it: a dipole's is no number for periodic ones. None without any.

    >>> mean_score(np.array([1.0, np.nan, 3.0]))
    2.0
    """
    finite = values[np.isfinite(values)]
    return float(np.mean(finite, dtype=np.float64)) if finite.size else None


def with_atoms() -> tuple[str, ...]:
    """Names of the scores of structures that are the largest value of an atom."""
    return names(one for one in scores() if one.largest_of is not None)


def score_units() -> dict[str, str]:
    """Name -> unit, of scores of structures and of atoms."""
    load_plugins()
    return {name: one.unit for name, one in (_ATOMS | _STRUCTURES).items()}


_SORT = "known score"


def _asked() -> tuple[str, ...]:
    return names(one for one in scores() if one.fitted or one.target is not None)


def _unless_always(name: str) -> str:
    found = score_of(name)
    if found is not None and name not in _asked():
        raise ValueError(f"'{name}' is always there, without being asked for; leave it out")
    return name


ScoreName: TypeAlias = Annotated[str, Known(_SORT, lambda: names(scores(fitted=False)))]
"""A score that every committee gives each structure."""
AskedScoreName: TypeAlias = Annotated[str, BeforeValidator(_unless_always), Known(_SORT, _asked)]
"""A score that dynamics give where they are asked for it: fitted to a training set, or of a further target."""
AnyScoreName: TypeAlias = Annotated[str, Known(_SORT, lambda: names(scores(fitted=None)))]
"""Any score of structures."""

_REL_FORCE_FLOOR = 0.1  # eV/Angstrom, in force_std_rel

declare(
    Score("force_std", "eV/A", "spread s_i", lambda seen: seen.force_deviation("spread"), per="atom"),
    Score(
        "force_epistemic",
        "eV/A",
        "spread, and what the members say about their predictions",
        lambda seen: seen.force_deviation("epistemic"),
        per="atom",
        needs="epistemic",
    ),
    Score(
        "force_total",
        "eV/A",
        "epistemic, and what the members say about the noise of labels",
        lambda seen: seen.force_deviation("total"),
        per="atom",
        needs="total",
    ),
    Score(
        "latent_distance",
        "",
        "Mahalanobis distance of the features from those of the training set",
        per="atom",
        needs="training_set",
    ),
    Score(
        "extrapolation_grade",
        "",
        "grade of the atom's surroundings over the active set of the potential",
        per="atom",
        needs="training_set",
    ),
)
declare(
    Score("energy_std", "eV", "of the structure's energy", lambda seen: seen.energy_deviation("spread")),
    Score("energy_std_per_atom", "eV/atom", "the same per atom", lambda seen: seen["energy_std"] / seen.counts),
    Score("force_std_mean", "eV/A", "mean of s_i over the atoms", mean_of="force_std"),
    Score("force_std_max", "eV/A", "largest s_i", largest_of="force_std"),
    Score(
        "force_std_rel",
        "",
        "largest s_i / (|F_i| + 0.1 eV/A)",
        lambda seen: seen.largest(seen.atom("force_std") / (seen.force_length + _REL_FORCE_FLOOR)),
    ),
    Score(
        "max_disagreement",
        "eV",
        "largest |E_m - E_m'| over pairs of members",
        lambda seen: seen.prediction.energy.max(axis=0) - seen.prediction.energy.min(axis=0),
    ),
    Score(
        "energy_epistemic",
        "eV",
        "of the structure's energy",
        lambda seen: seen.energy_deviation("epistemic"),
        needs="epistemic",
    ),
    Score(
        "energy_total", "eV", "of the structure's energy", lambda seen: seen.energy_deviation("total"), needs="total"
    ),
    Score("force_epistemic_mean", "eV/A", "mean over the atoms", mean_of="force_epistemic", needs="epistemic"),
    Score("force_epistemic_max", "eV/A", "largest of an atom", largest_of="force_epistemic", needs="epistemic"),
    Score("force_total_mean", "eV/A", "mean over the atoms", mean_of="force_total", needs="total"),
    Score("force_total_max", "eV/A", "largest of an atom", largest_of="force_total", needs="total"),
    *(score for target in further_targets() for score in spreads(target)),
    Score("latent_distance", "", "largest of an atom", largest_of="latent_distance", needs="training_set"),
    Score("extrapolation_grade", "", "largest of an atom", largest_of="extrapolation_grade", needs="training_set"),
    Score("configuration_grade", "", "grade of the structure over the active set", needs="training_set"),
)
