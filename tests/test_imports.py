"""Starting up imports no more than it needs, and leaves other packages as they are."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "program",
    [
        "import almlip_jax, jax_md, e3nn_jax",
        pytest.param("import jax_md, e3nn_jax; import almlip_jax", marks=pytest.mark.slow),
    ],
    ids=["first", "last"],
)
def test_whole_packages_are_what_they_always_are(program):
    run(
        f"{program}\n"
        "import almlip_jax.dynamics, almlip_jax.models.bilinear\n"
        "import jax_md.quantity, jax_md.energy\n"
        "assert jax_md.quantity.kinetic_energy and jax_md.energy.soft_sphere and jax_md.simulate.nve\n"
        "assert e3nn_jax.clebsch_gordan(1, 1, 2).shape == (3, 3, 5) and e3nn_jax.Irreps('0e')"
    )


def test_slow_parts_stay_outside():
    loaded = run(
        "import sys, almlip_jax.dynamics, almlip_jax.potential, almlip_jax.fitting\n"
        "print(*[name for name in ('sympy', 'jax_md', 'e3nn_jax', 'matplotlib', 'pyscf') if name in sys.modules])"
    )
    assert loaded.split() == []
