"""The installed jax computes rightly what a withdrawn version got wrong, and the withdrawn ones are refused."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.parametrize(("dtype", "n"), [(np.float64, 20_000), (np.float32, 40_000)])
def test_vmapped_matrix_vector_product_with_a_reduction(dtype, n):
    """jax 0.10.2 gives wrong last entries on the CPU, beyond 16,384 in float64 and 32,768 in float32 (issue 39103)."""
    rng = np.random.default_rng(0)
    rows, matrix = rng.normal(size=(n, 3)).astype(dtype), rng.normal(size=(3, 3)).astype(dtype)
    with jax.enable_x64(dtype is np.float64):
        function = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))
        # as users compile it, whatever the tests do
        found = function.lower(rows).compile(compiler_options={"xla_backend_optimization_level": 3})(rows)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, np.sum((rows @ matrix.T) ** 2, axis=1), rtol=1e-4, atol=1e-5)


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
