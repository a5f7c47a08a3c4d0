"""Labels of Nequix for files of crystals or molecules, many at a time.

``python experiments/nequix_labels/run.py FILE ... --weights nequix-omat-1.nqx --out DIR`` writes files of the same
names with energies and forces, and stresses of crystals.  Structures share batches of one size and so one program; the
label source ``kind: nequix`` labels one after the other.  Labels that files have are not looked at; files that are
there stay.  The model knows no charge: an ion is labelled as its atoms alone say.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox
import jax
import jraph
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from nequix.model import load_model

from almlip_jax.compilation import prepare_jax
from almlip_jax.precision import full_precision
from almlip_jax.structures.carried import carried
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.neighbors import find_edges


def graph_of(atoms: Atoms, species: dict[int, int], cutoff: float) -> jraph.GraphsTuple:
    """A structure as the model takes it, which wants a cell of molecules too."""
    cell = atoms.cell.array if atoms.pbc.all() else np.eye(3)
    edges = find_edges(atoms, cutoff)
    return jraph.GraphsTuple(
        n_node=np.array([len(atoms)], np.int32),
        n_edge=np.array([len(edges.neighbors)], np.int32),
        nodes={
            "species": np.array([species[z] for z in atoms.numbers.tolist()], np.int32),
            "positions": atoms.positions.astype(np.float32),
        },
        edges={"shifts": edges.shifts.astype(np.float32)},
        senders=edges.neighbors,
        receivers=edges.centers.astype(np.int32),
        globals={"cell": cell.astype(np.float32)[None]},
    )


def batches(graphs: Sequence[jraph.GraphsTuple], room: tuple[int, int, int]) -> Iterator[tuple[int, int]]:
    """First and end of runs of graphs that fit into so many nodes, edges and graphs, one of each to spare."""
    first = nodes = edges = 0
    for n, graph in enumerate(graphs):
        own = int(graph.n_node[0]), int(graph.n_edge[0])
        if n - first + 2 > room[2] or nodes + own[0] + 1 > room[0] or edges + own[1] > room[1]:
            yield first, n
            first, nodes, edges = n, 0, 0
        nodes, edges = nodes + own[0], edges + own[1]
    yield first, len(graphs)


def labelled(frames: Sequence[Atoms], model: Callable[[Any], Any], graphs: Sequence[Any], room: Any) -> list[Atoms]:
    """Copies of structures with energy (eV) and forces (eV/Angstrom), and of crystals stress (eV/Angstrom^3)."""
    found: list[Atoms] = []
    began = time.monotonic()
    for first, end in batches(graphs, room):
        energies, forces, stresses = jax.device_get(
            model(jraph.pad_with_graphs(jraph.batch_np(list(graphs[first:end])), *room))
        )
        offset = 0
        for n, frame in enumerate(frames[first:end]):
            copy = carried(frame)
            stress = full_3x3_to_voigt_6_stress(np.asarray(stresses[n], np.float64))
            copy.calc = SinglePointCalculator(
                copy,
                energy=float(energies[n]),
                forces=np.asarray(forces[offset : offset + len(frame)], np.float64),
                **({"stress": stress} if frame.pbc.all() else {}),
            )
            offset += len(frame)
            found.append(copy)
        print(f"{end} of {len(frames)} labelled, {time.monotonic() - began:.1f} s", flush=True)
    return found


def main() -> None:
    """Labels what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--weights", type=Path, required=True, help="of Nequix (.nqx)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--room", type=int, nargs=3, default=[384, 16384, 64], help="nodes, edges, graphs of a batch")
    options = parser.parse_args()
    prepare_jax()
    model, config = load_model(str(options.weights))
    species = {z: n for n, z in enumerate(sorted(config["atomic_numbers"]))}
    arrays, static = equinox.partition(model, equinox.is_array)

    @jax.jit
    @full_precision
    def compiled(arrays: Any, graph: Any) -> Any:
        return equinox.combine(arrays, static)(graph)

    options.out.mkdir(parents=True, exist_ok=True)
    for file in options.files:
        if (options.out / file.name).exists():
            continue
        frames = read_structures(file, ignore_labels=True)
        if any(frame.pbc.any() and not frame.pbc.all() for frame in frames):
            raise SystemExit(f"{file}: every structure must be periodic in three directions or in none.")
        graphs = [graph_of(frame, species, float(config["cutoff"])) for frame in frames]
        largest = max(int(graph.n_node[0]) + 1 for graph in graphs), max(int(graph.n_edge[0]) for graph in graphs)
        room = max(options.room[0], largest[0]), max(options.room[1], largest[1]), options.room[2]
        write_structures(options.out / file.name, labelled(frames, lambda g: compiled(arrays, g), graphs, room))


if __name__ == "__main__":
    main()
