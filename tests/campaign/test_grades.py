"""A campaign whose gate looks at extrapolation grades: each round renews the active set, also after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_campaign import Killed, KillingProgress, result_of, run_or_resume, tiny_config

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.potential import Potential
from almlip_jax.potential.spanning import rows_of
from almlip_jax.structures.io import read_structures

GRADED: dict[str, Any] = {
    "exploration": {
        "gate": {"kind": "absolute", "score": "extrapolation_grade"},
        "thresholds": {"kind": "grade", "gamma_select": 1.2, "gamma_break": 1e4},
    },
    "selection": {"selector": {"kind": "maxvol", "mode": "neighborhood"}},
    "training": {"max_steps": 60, "validate_every": 30},
}


def test_the_active_set_has_to_give_the_grade_that_is_looked_at(tmp_path: Path) -> None:
    for given, message in (
        ({"mode": "configuration"}, "set active_set.mode: neighborhood, or look at configuration_grade"),
        ({"parameters": "all"}, "set active_set.parameters: linear"),
    ):
        with pytest.raises(ValidationError, match=message):
            tiny_config(tmp_path, **GRADED, active_set=given)
    config = tiny_config(tmp_path, **GRADED)
    assert config.spanned is not None and config.spanned.mode == "neighborhood"
    assert tiny_config(tmp_path).spanned is None


@pytest.mark.slow
def test_rounds_renew_the_set_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    """Structures stay in it over trainings, everything labelled lies inside, and a round done again gives its bits."""
    assert run_or_resume(tmp_path, tmp_path / "whole", **GRADED).finished
    for stage, within in (("train", True), ("explore", False)):
        with pytest.raises(Killed):
            progress = KillingProgress(1, stage, within=within)
            run_or_resume(tmp_path, tmp_path / stage, progress, **GRADED)
        assert run_or_resume(tmp_path, tmp_path / stage, **GRADED).finished
        assert result_of(tmp_path / stage) == result_of(tmp_path / "whole")
    stood: set[bytes] = set()
    for folder in RunDirectory(tmp_path / "whole").rounds():
        potential = Potential.load(folder.potential)
        active = potential.active_set
        assert active is not None
        for stage in ("train", "explore"):
            other = RunDirectory(tmp_path / stage).round(folder.index)
            again = Potential.load(other.potential).active_set
            assert again is not None
            for name, values in active.arrays().items():
                np.testing.assert_array_equal(again.arrays()[name], values)
        frames = read_structures(folder.dataset)
        assert active.grades(rows_of(potential, frames, active.settings)).max() <= 1.002
        stands = {atoms.positions.tobytes() for atoms in active.structures}
        assert stands <= {atoms.positions.tobytes() for atoms in frames}
        assert not stood or stood & stands  # what spanned the most in the round before is still there
        stood = stands
