"""Files that a kill never damages: text, JSON, CSV and arrays, written whole or not at all, and read back.

Every file is written under a temporary name next to its final one, flushed to the disk and renamed, so that a reader
sees the old content or the new one and nothing else.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ValidationError

from almlip_jax.errors import InputError

Cell: TypeAlias = str | int | float | bool | None
"""What a CSV field may hold."""

Record = TypeVar("Record", bound=BaseModel)

PARTIAL = ".partial"
"""Part of the name of a temporary file, before the number of the process that writes it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to ``path`` that takes its place, durably, when the context ends well.

    The temporary name keeps the suffix, so that writers that choose a format by it work.  After an exception the old
    file is untouched and the temporary one removed.  A device or a pipe is written to instead: its own
    path is yielded.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    if _is_stream(path):
        try:
            yield path
        except OSError as error:
            raise cannot_write(path, error) from error
        return
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{PARTIAL}{path.suffix}")
    try:
        make_folder(path.parent)
        yield temporary
        flush_to_disk(temporary)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # the first error says more, and a leftover is removed with the next lock
            pass


def _is_stream(path: Path) -> bool:
    """A device, a pipe, or what stands for one, such as /dev/stdout."""
    named = path.is_symlink() and path.parent == Path("/dev")
    return path.exists() and not path.is_dir() and (named or not path.is_file())


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically (UTF-8)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically; numpy values become plain ones, and NaN and infinities (not JSON) null."""
    write_text(path, json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Cell]]) -> None:
    """Writes a CSV file atomically.

    Args:
        path: the file.
        rows: one mapping a line; the columns are all keys in the order they first appear.  Floats are written so that
            they read back exactly; None and absent keys become empty fields.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _field(value) for key, value in row.items()})
    write_text(path, buffer.getvalue())


def write_npz(path: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Writes arrays (numbers, booleans, strings; no objects) atomically as compressed npz.

    Raises:
        TypeError: an array holds Python objects, which could not be read back safely.
    """
    ready = {name: np.asarray(value) for name, value in arrays.items()}
    for name, array in ready.items():
        if array.dtype.hasobject:
            raise TypeError(f"array '{name}' holds Python objects and cannot go into {path.name}.")
    with replacing(path) as temporary, temporary.open("wb") as file:
        _save_arrays(file, ready)


# ---------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file is missing, unreadable, or not a JSON object.
    """
    text = _read_text(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise damaged(path, f"not valid JSON, line {error.lineno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise damaged(path, "not valid JSON") from error
    if not isinstance(data, dict):
        raise damaged(path, "not a JSON object")
    return data


def read_record(path: Path, kind: type[Record]) -> Record:
    """Reads a JSON file as a record of some kind.

    Raises:
        InputError: the file is missing, unreadable, or not such a record.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        why = f"it does not fit this version, key '{where}': {first['msg']}"
        raise damaged(path, why) from error


def read_csv(path: Path) -> list[dict[str, Cell]]:
    """Reads a CSV file with a header; integers, floats, true/false and empty fields (None) get their types back.

    Raises:
        InputError: the file is missing, unreadable, empty, or has lines longer or shorter than its header.
    """
    reader = csv.DictReader(io.StringIO(_read_text(path)))
    if not reader.fieldnames:
        raise damaged(path, "no header line")
    rows: list[dict[str, Cell]] = []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise damaged(path, f"line {reader.line_num} does not fit the header")
            rows.append({str(name): _value(text) for name, text in row.items()})
    except csv.Error as error:
        raise damaged(path, f"line {reader.line_num} is not a line of a table") from error
    return rows


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an npz file.

    Raises:
        InputError: the file is missing, unreadable or damaged, or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise _missing(path) from error
    except Exception as error:  # numpy and zipfile stumble over foreign files in many ways
        raise damaged(path, "not a readable npz file") from error


@contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turns whatever the use of a file's content runs into, where it is not what a run writes, into a sentence.

    Raises:
        InputError: names the file.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        why = f"its content is not what a run writes ({type(error).__name__}: {error})"
        raise damaged(path, " ".join(why.split())) from error


def plain(data: Any) -> Any:
    """A copy of nested data with numpy values and paths as plain Python ones and non-finite floats as None."""
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [plain(value) for value in data]
    if isinstance(data, (np.ndarray, np.generic)):
        return plain(data.tolist())
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    return data


# ---------------------------------------------------------------------------------------------------------------- inner


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it, where they do not exist yet.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def flush_to_disk(path: Path) -> None:
    """Forces what was written to a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_arrays(file: io.BufferedWriter, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes npz members one by one, so that an array may have any name (`numpy.savez` reserves ``file``)."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            # the fixed date of ZipInfo keeps equal arrays equal files
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def cannot_write(path: Path, error: OSError) -> InputError:
    """What to tell the user when a file or folder could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"cannot write {path}: the disk is full; free some space and resume the run.")
    return InputError(f"cannot write {path}: {error.strerror or error}.")


def _missing(path: Path) -> InputError:
    return InputError(f"{path} is missing; the run has not come that far, or the file was removed.")


def damaged(path: Path, why: str) -> InputError:
    """What to tell the user about a file whose content is not what a run writes."""
    return InputError(f"cannot read {path}: {why}; restore the file from a copy or delete it.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _missing(path) from error
    except UnicodeDecodeError as error:
        raise damaged(path, "not a text file") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def _field(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return repr(float(value))
    return str(value)


def _value(text: str) -> Cell:
    if text == "":
        return None
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
