"""The file of a label store: made whole or not at all, and distinguished from one whose making was cut off."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from almlip_jax.files import flush_to_disk

_TABLES = {"systems", "species", "keys", "text_key_values", "number_key_values", "information"}


def make_database(path: Path) -> None:
    """Makes an empty ASE database at a path where there is none, or one that was cut off before its first row.

    Raises:
        sqlite3.Error, OSError: it cannot be made; then there is none.
    """
    if not is_unfinished(path):
        return
    from ase.db import connect  # brings half a second of SciPy, for which a label worker need not wait

    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        new.unlink(missing_ok=True)
        with connect(new, type="db", use_lock_file=False).managed_connection():
            pass  # ASE makes its tables with the first connection
        flush_to_disk(new)
        # What SQLite had noted for a file that was cut off must not be played back into the new one.
        for suffix in ("-journal", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        os.replace(new, path)
        flush_to_disk(path.parent)
    finally:
        for leftover in (new, new.with_name(f"{new.name}-journal")):
            leftover.unlink(missing_ok=True)


def is_unfinished(path: Path) -> bool:
    """Whether there is no database at a path, or one that lacks tables and holds no row.

    Raises:
        sqlite3.Error: there is something else.
    """
    if not path.exists() or path.stat().st_size == 0:
        return True
    with contextlib.closing(sqlite3.connect(path, timeout=20)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
        if "systems" in tables and connection.execute("SELECT COUNT(*) FROM systems").fetchone()[0] > 0:
            return False
        if not tables >= _TABLES:
            # Tables of something else are not ours to replace.
            return not tables - _TABLES - {"sqlite_sequence"}
        return connection.execute("SELECT COUNT(*) FROM information WHERE name='version'").fetchone()[0] == 0
