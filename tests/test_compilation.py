"""What is set once for a process: that memory is reused, and that cores are devices."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# counts the pages that the system had to provide for thirty calls of a program that needs 96 MiB each time (blocks find
# their places within the first few), and for ten blocks of 48 MiB, one after the other, to a thread
FAULTS = """
import ctypes, resource, threading
import jax, jax.numpy as jnp
from almlip_jax.compilation import prepare_jax
prepare_jax()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
x = jnp.ones(96 << 18, jnp.float32)
program = jax.jit(lambda x: jnp.cumsum(jax.lax.optimization_barrier(x + 1))[-1]).lower(x).compile()
assert program.memory_analysis().temp_size_in_bytes >= 96 << 20
def work():
    for _ in range(10):
        block = library.malloc(48 << 20)
        library.memset(block, 1, 48 << 20)
        library.free(block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(30):
    program(x).block_until_ready()
between = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(between - before, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - between)
"""


def faults(**environment: str) -> list[int]:
    without = ("MALLOC_", "GLIBC_TUNABLES", "XLA_FLAGS")  # tests compile in haste, which takes this program minutes
    own = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=own | environment, capture_output=True, text=True, check=True
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc alone")
def test_large_blocks_are_reused_unless_the_user_has_tuned_the_library():
    reused, tuned = faults(), faults(MALLOC_MMAP_THRESHOLD_="1048576")
    assert all(b > 5 * a > 0 for a, b in zip(reused, tuned, strict=True)), (reused, tuned)


def devices(cores: int, **environment: str) -> int:
    """How many devices a process has that may use so many cores."""
    program = f"""
import os
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:{cores}])
from almlip_jax.compilation import prepare_jax
prepare_jax()
import jax
found = len(jax.devices())
prepare_jax()
print(found)
"""
    own = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=own | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen on this system")
def test_each_core_is_a_device_unless_the_user_has_chosen():
    assert devices(1) == 1
    assert devices(2) == min(2, len(os.sched_getaffinity(0)))
    assert devices(1, XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3
    assert devices(1, JAX_NUM_CPU_DEVICES="3") == 3
