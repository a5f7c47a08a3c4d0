"""Writing files that are either complete or as they were before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from almlip_jax.errors import InputError


@contextmanager
def replaced(path: Path) -> Iterator[TextIO]:
    """Opens a temporary text file beside `path` that takes its place, durably, when the context ends well.

    After an exception the old file is untouched and the temporary one removed.

    Raises:
        InputError: the folder does not exist or cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); make room or choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)
