"""What the tests of interfaces share: models of silicon and oxygen, which are drawn once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from almlip_jax.potential import Potential


@pytest.fixture(scope="session")
def oxide() -> Potential:
    """Three models that were drawn and not trained, with repulsion."""
    import jax
    import numpy as np

    from almlip_jax.ensembles import Ensemble
    from almlip_jax.models import SharedDensitySettings, build_model
    from almlip_jax.models.constants import with_constants
    from almlip_jax.potential import Potential
    from almlip_jax.structures.species import SpeciesTable

    settings = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,), repulsion=True)
    species = SpeciesTable((8, 14))
    params = with_constants(
        jax.jit(Ensemble(build_model(settings, species), 3).init)(jax.random.key(3)), density_scale=0.2
    )
    return Potential(settings, species, jax.tree.map(np.asarray, params), {8: -2040.0, 14: -7900.0})
