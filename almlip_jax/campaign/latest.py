"""The link ``potential`` in a run directory, by which programs and people find the newest potential of a campaign."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.errors import InputError
from almlip_jax.files import PARTIAL, write_text


def point_to(run: RunDirectory, potential: Path) -> None:
    """Makes the link lead to a potential; at any moment it leads to the old one or to the new one.

    Where links cannot be made, ``potential.txt`` holds the path instead.  A folder of this name is left alone unless it
    is a copy of one of the potentials, and so is everything where nothing can be written.

    Args:
        run: the run directory.
        potential: a folder in it.
    """
    link, target = run.latest_potential, os.path.relpath(potential, run.path)
    building = link.with_name(f".{link.name}.{os.getpid()}{PARTIAL}")
    try:
        if link.is_symlink() and os.readlink(link) == target:
            return
        if link.is_dir() and not link.is_symlink() and _is_copy(run, link):
            shutil.rmtree(link)  # of a run directory that was copied with links followed
        os.symlink(target, building, target_is_directory=True)
        os.replace(building, link)
    except OSError:
        with contextlib.suppress(OSError):
            building.unlink(missing_ok=True)
        with contextlib.suppress(InputError):
            write_text(link.with_suffix(".txt"), f"{target}\n")


def _is_copy(run: RunDirectory, folder: Path) -> bool:
    """Whether a folder holds what some potential of the run is described by."""
    name = "potential.json"
    if not (folder / name).is_file():
        return False
    places = [*(entry.potential for entry in run.rounds()), run.final.potential]
    content = (folder / name).read_bytes()
    return any((place / name).is_file() and (place / name).read_bytes() == content for place in places)
