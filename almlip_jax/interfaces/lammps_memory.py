"""LAMMPS's own numbers as numpy arrays, not made anew in each step as by the Python module of LAMMPS.

Its wrappers cast a pointer, ask for sizes and look for errors in each call, some ten microseconds each.  Here an array
is made once for the place where it lies, and made again where LAMMPS has moved it.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from almlip_jax.errors import InputError

_KEPT = 64  # arrays; LAMMPS moves them seldom


class LammpsMemory:
    """What a step reads and writes of a running ``lammps.lammps``."""

    def __init__(self, lmp: Any) -> None:
        self._handle = lmp.lmp
        self._tag = np.dtype(lmp.c_tagint)
        # addresses, where its own type of callbacks makes objects of pointers in each call
        given = ctypes.py_object, lmp.c_bigint, ctypes.c_int, *[ctypes.c_void_p] * 3
        self.callback = ctypes.CFUNCTYPE(None, *given)
        """Makes of a function what a ``fix external`` may call: with step, number of atoms, and where these lie."""
        self._arrays: dict[tuple[int, int, int, Any], np.ndarray] = {}
        # functions of our own: the module sets the types of its functions in each call
        self._extract_atom = _function("lammps_extract_atom", lmp, ctypes.c_void_p, ctypes.c_char_p)
        self._extract_box = _function("lammps_extract_box", lmp, None, *[ctypes.c_void_p] * 7)
        self._set_energy = _function(
            "lammps_fix_external_set_energy_global", lmp, None, ctypes.c_char_p, ctypes.c_double
        )
        self._set_virial = _function("lammps_fix_external_set_virial_global", lmp, None, *[ctypes.c_char_p] * 2)
        self._set_value = _function(
            "lammps_fix_external_set_vector", lmp, None, ctypes.c_char_p, ctypes.c_int, ctypes.c_double
        )
        self._box = np.zeros(9)  # low, high, xy, yz, xz
        self._flags = np.zeros(4, np.int32)  # periodic, whether the box changes
        doubles, flags = self._box.ctypes.data, self._flags.ctypes.data
        self._box_places = [ctypes.c_void_p(doubles + 8 * n) for n in (0, 3, 6, 7, 8)]
        self._box_places += [ctypes.c_void_p(flags + 4 * n) for n in (0, 3)]

    def array(self, address: int, rows: int, columns: int, kind: Any) -> np.ndarray:
        """The array [rows, columns] that begins at an address; [rows] where there is one column."""
        key = address, rows, columns, kind
        held = self._arrays.get(key)
        if held is None:
            size = rows * columns * np.dtype(kind).itemsize
            flat = np.frombuffer((ctypes.c_char * size).from_address(address), kind) if size else np.zeros(0, kind)
            held = flat if columns == 1 else flat.reshape(rows, columns)
            if len(self._arrays) >= _KEPT:
                self._arrays.clear()
            self._arrays[key] = held
        return held

    def tags(self, address: int, count: int) -> np.ndarray:
        """IDs [count] that a callback is given."""
        return self.array(address, count, 1, self._tag) if count else np.zeros(0, self._tag)

    def vectors(self, address: int, count: int) -> np.ndarray:
        """Positions or forces [count, 3] that a callback is given, as pointers to rows that lie one after the other."""
        if count == 0:
            return np.zeros((0, 3))
        first = ctypes.c_void_p.from_address(address).value
        assert first is not None
        return self.array(first, count, 3, np.float64)

    def of_atoms(self, name: bytes, count: int) -> np.ndarray:
        """A number [count] of each atom: ``type``, ``mask`` of its groups, or a property ``d_...``.

        Raises:
            InputError: there is none of that name.
        """
        address = self._extract_atom(self._handle, name)
        if not address:
            raise InputError(f"LAMMPS has no '{name.decode()}' of its atoms (any more); keep the fix that holds it.")
        return self.array(address, count, 1, np.int32 if name in (b"type", b"mask") else np.float64)

    def box(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lower corner [3], cell vectors [3, 3] in Angstrom, and which directions are periodic [3]."""
        self._extract_box(self._handle, *self._box_places)
        x0, y0, z0, x1, y1, z1, xy, yz, xz = self._box.tolist()
        cell = np.array([[x1 - x0, 0.0, 0.0], [xy, y1 - y0, 0.0], [xz, yz, z1 - z0]])
        return self._box[:3], cell, self._flags[:3] != 0

    def set_fix(self, fix: bytes, values: list[float], virial: np.ndarray, unit: float) -> None:
        """Vector of a ``fix external``, energy first; that energy and the virial [6] in eV in units of LAMMPS (eV)."""
        self._set_energy(self._handle, fix, values[0] / unit)
        self._set_virial(self._handle, fix, (virial / unit).tobytes())
        set_value, handle = self._set_value, self._handle
        for number, value in enumerate(values, 1):
            set_value(handle, fix, number, value)


def _function(name: str, lmp: Any, result: Any, *arguments: Any) -> Any:
    """A function of the library, which is first given LAMMPS itself."""
    return ctypes.CFUNCTYPE(result, ctypes.c_void_p, *arguments)((name, lmp.lib))
