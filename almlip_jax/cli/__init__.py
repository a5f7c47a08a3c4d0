"""The command line ``almlip``: every command reads files, does one thing, prints a short table, and says so in JSON.

Heavy rooms are imported inside the commands, so that ``almlip --help`` is quick.  The modules of commands add these to
`app` in the order in which they are imported here, which is that of ``almlip --help``.
"""

from __future__ import annotations

# isort: off
from almlip_jax.cli.program import app, main
from almlip_jax.cli import campaigns  # noqa: F401
from almlip_jax.cli import potentials  # noqa: F401
from almlip_jax.cli import pools  # noqa: F401
from almlip_jax.cli import labels  # noqa: F401
from almlip_jax.cli import conversion  # noqa: F401
from almlip_jax.cli import simulations  # noqa: F401
from almlip_jax.cli import studies  # noqa: F401
from almlip_jax.cli import configs  # noqa: F401
# isort: on

__all__ = ["app", "main"]
