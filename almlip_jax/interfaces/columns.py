"""What other programs are told of a committee: the energy, every score of the structure, and each member's energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from almlip_jax.potential import Potential
from almlip_jax.potential.following import given_scores
from almlip_jax.scores import scores


def columns(potential: Potential) -> list[str]:
    """Names of the values: the energy, scores, and the energies of the members, ``energy_1`` and so on."""
    members = [f"energy_{member}" for member in range(1, potential.ensemble.members + 1)]
    return ["energy", *given_scores(scores(), potential), *members]


def column_values(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Their values by name, in eV and Angstrom, from the results that a `Following` gives with scores."""
    members = {f"energy_{number}": value for number, value in enumerate(results["member_energy"], 1)}
    return {name: float(members[name] if name in members else results[name]) for name in names}
