"""Moment tensor potentials: basis, contractions, moments, and the model."""

from __future__ import annotations

from almlip_jax.models.mtp.basis import Basis, basis
from almlip_jax.models.mtp.contractions import contract, contract_atoms
from almlip_jax.models.mtp.model import Coefficients, Mtp, MtpSettings
from almlip_jax.models.mtp.moments import RadialBasis, basic_moments

__all__ = [
    "Basis",
    "Coefficients",
    "Mtp",
    "MtpSettings",
    "RadialBasis",
    "basic_moments",
    "basis",
    "contract",
    "contract_atoms",
]
