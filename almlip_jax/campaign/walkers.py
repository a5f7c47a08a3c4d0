"""Walkers of an exploration for people: their baths, and what ended them, from the arrays of ``walkers.npz``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def of_walker(arrays: Mapping[str, np.ndarray], walker: int) -> dict[str, Any]:
    """``walker``, its ``system`` where it has a name, ``temperature`` of its bath (K), ``final_temperature`` of a ramp.

    Explorations of earlier versions know the first temperature only.
    """
    first = float(arrays["walker_temperature"][walker])
    last = float(arrays.get("walker_final_temperature", arrays["walker_temperature"])[walker])
    system = {"system": str(arrays["walker_system"][walker])} if "walker_system" in arrays else {}
    return {"walker": walker, **system, "temperature": first, **({"final_temperature": last} if last != first else {})}


def called(walker: Mapping[str, Any]) -> str:
    """The number of a walker, and its system: ``3``, or ``3 (slab)``."""
    return f"{walker['walker']} ({walker['system']})" if "system" in walker else str(walker["walker"])


def bath(walker: Mapping[str, Any]) -> str:
    """The temperature of a bath, K: ``300``, or ``300 to 600``."""
    first = f"{walker['temperature']:g}"
    return f"{first} to {walker['final_temperature']:g}" if "final_temperature" in walker else first


def ended_by(walker: Mapping[str, Any]) -> str:
    """The check that ended a walker, and the member that gave no finite numbers where it was one."""
    return f"{walker['check']} (member {walker['member']})" if "member" in walker else str(walker["check"])
