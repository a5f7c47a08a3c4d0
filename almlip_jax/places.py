"""Places to write to, looked at before the work begins whose results they are for."""

from __future__ import annotations

import os
from pathlib import Path

from almlip_jax.errors import InputError


def file_to_write(path: Path | None) -> Path | None:
    """A file that can be written, or none.

    Raises:
        InputError: it is a folder, or its folder cannot be made or written to.
    """
    if path is not None and path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file to write.")
    return _reachable(path)


def folder_to_write(path: Path | None) -> Path | None:
    """A folder that is there or can be made, or none.

    Raises:
        InputError: it is a file, or it cannot be made or written to.
    """
    if path is not None and path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder to write into.")
    return _reachable(path)


def _reachable(path: Path | None) -> Path | None:
    """A path whose nearest part that is there can be written to."""
    if path is None:
        return None
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if there != path and not there.is_dir():
        raise InputError(f"{path} cannot be written, since {there} is not a folder.")
    if not os.access(there, os.W_OK):
        raise InputError(f"{path} cannot be written (no permission to write {there}).")
    return path
