"""The start of the program ``almlip``: signals are heard before anything that is slow to import is imported."""

from __future__ import annotations

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
        cli.main()


if __name__ == "__main__":
    main()
