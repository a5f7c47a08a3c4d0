"""The installed jax computes rightly what a withdrawn version got wrong, and the withdrawn ones are refused."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.parametrize("n", [16_384, 16_385, 17_000, 20_000, 40_001])
def test_vmapped_matrix_vector_product_with_a_reduction(n):
    """jax 0.10.2 gives wrong last entries on the CPU for n > 16,384 (jax issue 39103)."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(n, 6)).astype(np.float32)
    matrix = rng.normal(size=(6, 6)).astype(np.float32)
    found = jax.jit(jax.vmap(lambda x, m: jnp.sum(x * (m @ x)), in_axes=(0, None)))(rows, matrix)
    np.testing.assert_allclose(found, np.einsum("ni,ij,nj->n", rows, matrix, rows), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("version", ["0.10.2", "0.11.1"])
def test_withdrawn_versions_are_refused(version):
    script = (
        "import importlib.metadata as m; true = m.version; "
        f"m.version = lambda name: '{version}' if name == 'jax' else true(name); import almlip_jax"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0 and f"jax {version} cannot be used" in done.stderr


def test_the_installed_version_is_allowed():
    assert importlib.metadata.version("jax") not in ("0.10.2", "0.11.1")
