"""The peer's side of ``descriptors.py``: SOAP power spectra from dscribe, run with a Python that has it.

Reads ``structures.json`` and ``request.json`` of a folder, writes ``rows.npy`` and ``seconds.json`` there.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ase import Atoms
from dscribe.descriptors import SOAP


def main(folder: Path) -> None:
    """Describes the structures several times over."""
    request = json.loads((folder / "request.json").read_text())
    frames = [Atoms(**one) for one in json.loads((folder / "structures.json").read_text())]
    soap = SOAP(
        species=request["species"],
        periodic=bool(frames[0].pbc.any()),
        r_cut=request["cutoff"],
        n_max=request["radial"],
        l_max=request["l_max"],
        average="outer",
    )
    seconds, rows = [], np.zeros(0)
    for _ in range(request["repeats"]):
        began = time.perf_counter()
        rows = soap.create(frames, n_jobs=1)
        seconds.append(time.perf_counter() - began)
    np.save(folder / "rows.npy", rows)
    (folder / "seconds.json").write_text(json.dumps({"seconds": seconds, "version": version("dscribe")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
