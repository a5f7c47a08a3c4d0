"""What energies are about before anything is learned, besides reference energies, and where parameters hold it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from almlip_jax.models import Params
from almlip_jax.models.anchored import with_binding
from almlip_jax.models.charge_energy import with_charge_energy


class Levels(NamedTuple):
    """Energies that a training takes as known.

    Attributes:
        binding: [S] eV, what binds an atom of each species that is counted from the isolated one; 0 for the others.
        costs: [2] eV, of a positive and of a negative elementary charge.
    """

    binding: np.ndarray
    costs: np.ndarray


def with_levels(params: Params, levels: Levels | None) -> Params:
    """Parameters with these energies among their constants, where they have a place for them."""
    return params if levels is None else with_charge_energy(with_binding(params, levels.binding), levels.costs)
