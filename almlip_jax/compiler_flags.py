"""Flags of XLA, which ends the process at those that it does not know."""

from __future__ import annotations

import mmap
from importlib.util import find_spec
from pathlib import Path

OLDER_EMITTER = "xla_cpu_use_fusion_emitters=false"
"""Has loops of fused operations written by the emitter that XLA had before: programs for CPUs compile in two thirds of
the time and run as fast."""


def known(flag: str) -> bool:
    """Whether the jaxlib that is installed has a flag, ``name=value``."""
    name = flag.partition("=")[0].encode()
    package = find_spec("jaxlib")
    for folder in package.submodule_search_locations or () if package else ():
        for path in Path(folder).glob("*.so"):
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
                if library.find(name) >= 0:
                    return True
    return False


def with_flag(flags: str, flag: str) -> str:
    """Flags as in ``XLA_FLAGS``, and another one if XLA knows it and they do not say anything of it."""
    if flag.partition("=")[0] in flags or not known(flag):
        return flags
    return f"{flags} --{flag}".strip()
