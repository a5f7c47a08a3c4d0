"""The start of the program ``almlip``: signals are heard before anything that is slow to import is imported."""

from __future__ import annotations

import gc
import sys

from almlip_jax.interrupts import exit_status, listening


def main() -> None:
    """Entry point of the program ``almlip``, also as ``python -m almlip_jax``."""
    with listening():
        try:
            from almlip_jax import cli
        except KeyboardInterrupt as stop:
            print("almlip: interrupted", file=sys.stderr)
            sys.exit(exit_status(stop))
        # what is imported stays, and tracing makes objects by the million: to collect garbage as often as usual took an
        # eighth of the time of tests that trace and compile
        gc.freeze()
        gc.set_threshold(50_000, 10, 10)
        cli.main()


if __name__ == "__main__":
    main()
