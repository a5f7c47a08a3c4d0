"""One side of `benchmarks/selection.py`: reads tasks as lines of JSON, selects, and answers with lines of JSON.

``python selection_worker.py ours|peer THREADS FOLDER``.  The folder holds ``pool.npy`` and ``train.npy``, float32.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

WHO, THREADS, FOLDER = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(THREADS)
if hasattr(os, "sched_setaffinity"):  # what the compiler of array programs goes by
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import numpy as np  # noqa: E402

SIGMA = 1e-3
STREAM = 2**30  # bytes, larger than caches


def rows(name: str, precision: str) -> np.ndarray:
    """Features in the precision asked for; the numbers are the same."""
    return np.load(FOLDER / f"{name}.npy").astype(precision)


def peak() -> float:
    """Highest resident memory so far, MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(run: Callable[[], Any], repeats: int) -> tuple[Any, list[float]]:
    """What a function returns, and seconds of each of its calls."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - began)
    return found, seconds


class Ours:
    """Compiled selectors on arrays that are there already; compilation is timed apart."""

    def __init__(self) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        import jax

        jax.config.update("jax_enable_x64", True)
        self.jax = jax
        self.loaded: dict[str, tuple[Any, Any]] = {}
        self.versions = {name: version(name) for name in ("almlip-jax", "jax", "jaxlib", "numpy") if _there(name)}

    def candidates(self, precision: str) -> tuple[Any, Any]:
        if precision not in self.loaded:
            self.loaded = {precision: (self._made("pool", precision), self._made("train", precision))}
        return self.loaded[precision]

    def _made(self, name: str, precision: str) -> Any:
        import jax.numpy as jnp

        from almlip_jax.selection import Candidates

        x = jnp.asarray(rows(name, precision))
        n = x.shape[0]
        return Candidates({"x": x}, {}, jnp.ones(n, precision), jnp.ones(n, bool), jnp.arange(n, dtype=jnp.int32))

    def select(self, task: dict[str, Any]) -> dict[str, Any]:
        from almlip_jax import selection

        pool, train = self.candidates(task["precision"])
        make, key = getattr(selection, task["selector"]), self.jax.random.key(0)
        found: dict[str, Any] = {}
        for name, k in (("setup", 1), ("select", task["k"])):
            began = time.perf_counter()
            run = self.jax.jit(make(k, "x")).lower(key, pool, train).compile()
            compiled = time.perf_counter() - began
            chosen, seconds = timed(lambda run=run: self.jax.block_until_ready(run(key, pool, train)), task["repeats"])
            found[f"{name}_seconds"] = seconds
        found["compile_seconds"] = compiled
        found["temporary_mib"] = run.memory_analysis().temp_size_in_bytes / 2**20
        found["picks"] = np.asarray(chosen.indices)[np.asarray(chosen.valid)].tolist()
        return found

    def bandwidth(self, task: dict[str, Any]) -> dict[str, Any]:
        """GB/s of matrix-vector products: with a matrix of the pool's size, and with one larger than caches."""
        import jax.numpy as jnp

        pool, _ = self.candidates(task["precision"])
        x = pool.features["x"]
        size, columns = np.dtype(task["precision"]).itemsize, x.shape[1]

        def multiply(matrix: Any, vector: Any, repeats: int) -> Any:
            # of one entry of the product alone, one row would be read
            step = lambda _, vector: vector + 1e-30 * jnp.max(matrix @ vector)  # noqa: E731
            return self.jax.lax.fori_loop(0, repeats, step, vector)

        def rate(matrix: Any, repeats: int) -> float:
            vector = jnp.ones(columns, matrix.dtype)
            run = self.jax.jit(multiply, static_argnums=2).lower(matrix, vector, repeats).compile()
            _, seconds = timed(lambda: self.jax.block_until_ready(run(matrix, vector)), 5)
            return repeats * matrix.size * size / min(seconds) / 1e9

        large = jnp.ones((STREAM // size // columns, columns), task["precision"])
        return {"pool_gb_per_s": rate(x, 20), "stream_gb_per_s": rate(large, 3)}


class Peer:
    """bmdal_reg on the same rows: linear kernel, scaled, posterior where the method needs it."""

    METHODS = {
        "max_dist": ("maxdist", False, True),
        "lcmd": ("lcmd", False, True),
        "kmeans_pp": ("kmeanspp", False, True),
        "max_det": ("maxdet", True, False),
        "bait": ("bait", True, False),
        "frank_wolfe": ("fw", True, False),
    }

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(THREADS)
        self.torch = torch
        self.versions = {name: version(name) for name in ("bmdal-reg", "torch", "numpy")}

    def select(self, task: dict[str, Any]) -> dict[str, Any]:
        from bmdal_reg.bmdal.algorithms import select_batch
        from bmdal_reg.bmdal.feature_data import TensorFeatureData

        method, posterior, with_train = self.METHODS[task["selector"]]
        tensors = {name: self.torch.from_numpy(rows(name, task["precision"])) for name in ("pool", "train")}

        def run(k: int, unit: float = 1.0) -> Any:
            kernel = [("train", [SIGMA, None])] if posterior else [("scale", [])]
            return select_batch(
                batch_size=k,
                models=[None],
                data={name: TensorFeatureData(tensor) for name, tensor in tensors.items()},
                y_train=None,
                base_kernel="linear",
                kernel_transforms=kernel if unit == 1 else [*kernel, ("scale", [1 / unit])],
                selection_method=method,
                sel_with_train=with_train,
                maxdet_sigma=SIGMA / unit,
                bait_sigma=SIGMA / unit,
                allow_float64=task["precision"] == "float64",
                verbosity=0,
            )

        found: dict[str, Any] = {}
        for name, k in (("setup", 1), ("select", task["k"])):
            (chosen, about), found[f"{name}_seconds"] = timed(lambda k=k: run(k), task["repeats"])
        found["picks"] = chosen.tolist()
        if task["selector"] == "bait":  # which adds 1e-8 to sigma^2, whatever the unit
            found |= {"picks_as_called": found["picks"], "picks": run(task["k"], unit=SIGMA)[0].tolist()}
        if about["selection_status"]:
            found["status"] = about["selection_status"]
        return found


def _there(name: str) -> bool:
    try:
        return bool(version(name))
    except Exception:
        return False


def main() -> None:
    """Answers tasks until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
    side: Any = Ours() if WHO == "ours" else Peer()
    for line in sys.stdin:
        task = json.loads(line)
        try:
            found = getattr(side, task["do"])(task)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        found |= {"versions": side.versions, "peak_mib": peak()}
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
