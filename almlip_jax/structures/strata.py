"""Names of strata: groups of structures told apart by what they hold under a key, such as a temperature."""

from __future__ import annotations

from typing import Any

import numpy as np


def stratum(value: Any) -> str:
    """The name of a group, from what its structures hold under some key.

    Text as it is, numbers in their shortest form: 300, 300.0 and '300' are one stratum.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        try:
            return f"{float(value):g}"
        except ValueError:
            return value
    if isinstance(value, bool):
        return str(value).lower()
    return f"{float(value):g}"


def named_strata(shares: Any) -> Any:
    """Shares by the names of their strata, before they are validated: YAML has 300 for a number."""
    return {stratum(value): share for value, share in shares.items()} if isinstance(shares, dict) else shares


def by_size(name: str) -> tuple[bool, float, str]:
    """What names of strata are sorted by: numbers by size, then text."""
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name
