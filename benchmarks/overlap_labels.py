"""GFN2-xTB labels that take as long as they are told to, without a core being busy; for `overlap.py`."""

from __future__ import annotations

import time
from collections.abc import Callable

from ase import Atoms

from almlip_jax.oracles import Results, TBLiteSettings


def make(seconds: float) -> Callable[[Atoms], Results]:
    """A label source of so many seconds a label."""
    label = TBLiteSettings().build()

    def asleep(atoms: Atoms) -> Results:
        end = time.monotonic() + seconds
        found = label(atoms)
        time.sleep(max(0.0, end - time.monotonic()))
        return found

    return asleep
