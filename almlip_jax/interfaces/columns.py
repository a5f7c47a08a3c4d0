"""What other programs are told of a committee: the energy, every score of the structure, and each member's energy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from almlip_jax.potential import Potential
from almlip_jax.scores import Score, scores


def given_scores(declared: Iterable[Score], potential: Potential) -> list[str]:
    """Names of the scores that a potential gives."""
    known = [one for one in declared if one.target is None or one.target in potential.ensemble.targets]
    fitted = set(potential.novelty) | ({active.settings.score} if (active := potential.active_set) else set())
    return [one.name for one in known if not one.fitted or one.name in fitted]


def columns(potential: Potential) -> list[str]:
    """Names of the values: the energy, scores, and the energies of the members, ``energy_1`` and so on."""
    members = [f"energy_{member}" for member in range(1, potential.ensemble.members + 1)]
    return ["energy", *given_scores(scores(), potential), *members]


def column_values(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Their values by name, in eV and Angstrom, from the results that a `Following` gives with scores."""
    members = {f"energy_{number}": value for number, value in enumerate(results["member_energy"], 1)}
    return {name: float(members[name] if name in members else results[name]) for name in names}
