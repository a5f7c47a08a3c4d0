"""Admission to the candidate buffer: which recorded frames keep a slot, decided inside the loop.

The gate says which frames are worth a look; a rule of admission says which of them the buffer keeps.  Rules that look
at features know the training set and every frame that any walker has recorded, so that ten walkers in one place record
one frame.  Walkers of one step are taken one after the other.
"""

from almlip_jax.dynamics.admission.base import (
    Admission,
    AdmissionSettings,
    Context,
    Offer,
    Shared,
    SharedAdmission,
    UserAdmission,
)
from almlip_jax.dynamics.admission.features import Farthest, FarthestAdmission, LogDet, LogDetAdmission
from almlip_jax.dynamics.admission.scores import (
    First,
    FirstAdmission,
    Reservoir,
    ReservoirAdmission,
    TopAdmission,
    TopK,
)

__all__ = [
    "Admission",
    "AdmissionSettings",
    "Context",
    "Farthest",
    "FarthestAdmission",
    "First",
    "FirstAdmission",
    "LogDet",
    "LogDetAdmission",
    "Offer",
    "Reservoir",
    "ReservoirAdmission",
    "Shared",
    "SharedAdmission",
    "TopAdmission",
    "TopK",
    "UserAdmission",
]
