"""Nequix, a foundation model in JAX, as a label source through its own package (an optional extra)."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.geometry import complete_cell
from ase.stress import full_3x3_to_voigt_6_stress

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.base import LabelSource, Results, SourceSettings
from almlip_jax.packages import package_version
from almlip_jax.structures.electronic_state import initial_moments, multiplicity, total_charge

_LEAST_NODES, _LEAST_EDGES = 12, 64


class NequixSettings(SourceSettings):
    """Nequix, a foundation model for crystals and molecules, from a file of its weights; nothing is downloaded.

    Needs ``pip install "almlip-jax[nequix]"``.  Structures may be periodic in any directions; labels hold a stress
    where they are in three.  Sizes are rounded up, so that structures of all sizes share a few compiled programs.
    """

    kind: Literal["nequix"] = "nequix"

    version_binds: ClassVar[bool] = True

    model: Path
    """The file of the weights (``.nqx``); labels belong to its content, wherever it lies."""
    ignore_charge: bool = False
    """Labels ions and radicals too, as if they were neutral singlets: the model is told neither charge nor spin.  For a
    teacher, whose errors are made good; refused otherwise."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is; the path is not among them, the weights are (see `version`)."""
        found = super().identity()
        return {name: value for name, value in found.items() if name != "model" and (name != "ignore_charge" or value)}

    def version(self) -> str:
        """The version of the package, and a digest of the weights."""
        return f"nequix {package_version('nequix', 'nequix')} {hashlib.sha256(_content(self.model)).hexdigest()}"

    def check(self, atoms: Atoms) -> None:
        """Refuses elements that the model does not know, and charge, spin and moments, which would not reach it."""
        unknown = sorted(set(atoms.numbers.tolist()) - elements(self.model))
        if unknown:
            symbols = ", ".join(chemical_symbols[number] for number in unknown)
            raise LabelError(f"{self.model} does not know {symbols}; it was trained on other elements")
        charge, spin = total_charge(atoms), multiplicity(atoms)
        if (charge != 0 or spin != 1) and not self.ignore_charge:
            raise LabelError(
                f"the structure has charge {charge} and multiplicity {spin}, which would not reach Nequix: it labels "
                "neutral structures and knows no spin; take another label source, or ignore_charge: true for a teacher"
            )
        if initial_moments(atoms) is not None:
            raise LabelError(
                "the structure has initial magnetic moments, which would not reach Nequix; remove them if you want the "
                "energies of the states that it was trained on"
            )

    def build(self) -> LabelSource:
        """A function that labels with the model, which is loaded once."""
        package_version("nequix", "nequix")
        elements(self.model)
        try:
            predict = _predictor(self.model)
        except ImportError as error:
            raise InputError(
                f'nequix cannot be imported ({error}); install it with what it needs: pip install "almlip-jax[nequix]".'
            ) from error

        def label(atoms: Atoms) -> Results:
            self.check(atoms)
            return predict(atoms)

        return label


@functools.cache
def elements(model: Path) -> frozenset[int]:
    """Atomic numbers that a model knows, by the first line of its file.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    first = _content(model).partition(b"\n")[0]
    try:
        return frozenset(int(number) for number in json.loads(first)["atomic_numbers"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{model} does not hold the weights of a Nequix model (.nqx); correct the key 'model' of the label source."
        ) from error


def _content(model: Path) -> bytes:
    try:
        return model.read_bytes()
    except OSError as error:
        raise InputError(
            f"the weights {model} cannot be read ({error.strerror}); correct the key 'model' of the label source."
        ) from error


def _predictor(path: Path) -> Callable[[Atoms], Results]:
    """What the model gives for a structure, compiled for each of the sizes of `rooms`.

    Raises:
        ImportError: the package, or what it needs, is not there.
        InputError: the weights cannot be used.
    """
    if "jax" not in sys.modules:  # in a process of its own
        _prepare()
    import jax

    from almlip_jax.precision import full_precision

    before = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    import equinox
    import jraph
    from nequix.data import atomic_numbers_to_indices, dict_to_graphstuple, preprocess_graph
    from nequix.model import load_model

    jax.config.update("jax_default_matmul_precision", before)  # nequix sets it when it is imported
    with jax.enable_x64(False):
        try:
            model, config = load_model(str(path))
            species, cutoff = atomic_numbers_to_indices(config["atomic_numbers"]), float(config["cutoff"])
        except Exception as error:  # whatever the package stumbles over in a file that is damaged or of another version
            raise InputError(
                f"{path} cannot be read by the installed nequix ({type(error).__name__}: {error})."
            ) from error
        arrays, static = equinox.partition(model, equinox.is_array)

    @jax.jit
    @full_precision
    def compiled(arrays: Any, graph: Any) -> Any:
        return equinox.combine(arrays, static)(graph)

    def predict(atoms: Atoms) -> Results:
        """Energy, forces and, where there is one, stress of a structure, padded to a size."""
        parts = preprocess_graph(atoms, species, cutoff, False)
        # Nequix's own calculator takes a cell only where all directions are periodic, and else loses the images.
        cell = np.asarray(complete_cell(atoms.cell), np.float32)
        nodes, edges = rooms(len(atoms), len(parts["senders"]))
        graph = jraph.pad_with_graphs(dict_to_graphstuple(parts | {"cell": cell}), nodes, edges)
        with jax.enable_x64(False):
            energy, forces, stress = jax.device_get(compiled(arrays, graph))
        voigt = full_3x3_to_voigt_6_stress(stress[0]) if atoms.pbc.all() else None
        return Results(float(energy[0]), forces[: len(atoms)], voigt)

    return predict


def _prepare() -> None:
    """Has jax use as many threads as a label worker may, and no more of an accelerator's memory than labels need."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # whoever asks for the labels may use it too
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
    os.environ.setdefault("NPROC", os.environ.get("OMP_NUM_THREADS", "1"))  # threads of that device
    from almlip_jax.compilation import prepare_jax

    prepare_jax()


def rooms(atoms: int, edges: int) -> tuple[int, int]:
    """Sizes of the arrays for a structure: nodes, one of which is left for padding, and edges.

    Nodes double from one size to the next; edges, which take most of the time, grow by a third or a half.

    >>> rooms(64, 2944), rooms(64, 3080), rooms(1, 0)
    ((96, 3072), (96, 4096), (12, 64))
    """
    nodes = _LEAST_NODES
    while nodes < atoms + 1:
        nodes *= 2
    room = _LEAST_EDGES
    while room < edges:
        room *= 2
    return nodes, 3 * room // 4 if 3 * room // 4 >= max(edges, _LEAST_EDGES) else room
