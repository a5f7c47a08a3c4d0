"""An exploration that another package adds runs in a campaign like ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from tiny_campaign import run_or_resume, tiny_config

from almlip_jax import kinds
from almlip_jax.campaign.choice import ExplorationChoice
from almlip_jax.campaign.report import write_report
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import read_state
from almlip_jax.structures.io import read_structures

PACKAGE = '''
from typing import Literal

import jax
from almlip_jax.campaign.choice import ExplorationChoice


class Shaken(ExplorationChoice):
    """The structures trained on, shaken."""

    kind: Literal["shaken"] = "shaken"
    count: int = 12

    def explore(self, given):
        seed = int(jax.random.randint(given.key, (), 0, 10**9))
        frames = [given.labelled[n % len(given.labelled)].copy() for n in range(self.count)]
        for n, frame in enumerate(frames):
            frame.rattle(0.05, seed=seed + n)
        return [*frames, frames[0], given.labelled[1]]

    def most_candidates(self, pool):
        return self.count
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_package: Callable[[str], object]) -> Iterator[None]:
    with_package(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    kinds.load_plugins.cache_clear()
    yield
    ExplorationChoice._below.pop("shaken", None)
    kinds._union.cache_clear()
    kinds.load_plugins.cache_clear()


def test_a_kind_that_cannot_explore_is_refused_when_it_is_defined() -> None:
    with pytest.raises(TypeError, match="Idle has neither explore"):

        class Idle(ExplorationChoice):
            kind: Literal["idle"] = "idle"

    ExplorationChoice._below.pop("idle", None)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once", "package")
def test_a_campaign_explores_as_another_package_does(tmp_path: Path) -> None:
    """Structures that are known or come twice are left out; the rest is scored, selected from and labelled."""
    outcome = run_or_resume(tmp_path, tmp_path / "run", exploration={"kind": "shaken"})
    run = RunDirectory(tmp_path / "run")
    first, second, last = read_state(run).history
    assert outcome.rule == "max_rounds" and last.selected is None
    assert (first.candidates, first.selected, second.candidates, second.selected) == (12, 3, 12, 3)
    assert first.sigma_batch is not None and first.sigma_pool is not None and first.sigma_pool > 0
    pools = [read_structures(run.round(n).pool) for n in range(2)]
    assert all(frame.info["force_std_max"] == pytest.approx(frame.arrays["force_std"].max()) for frame in pools[0])
    assert not np.allclose(pools[0][0].positions, pools[1][0].positions), "each round has random numbers of its own"
    assert len(read_structures(run.round(2).dataset)) == len(read_structures(run.round(0).dataset)) + 6
    assert write_report(run.path).exists()


@pytest.mark.usefixtures("package")
def test_its_settings_are_those_of_a_config(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, exploration={"kind": "shaken", "count": 7})
    assert config.exploration.model_dump() == {"kind": "shaken", "count": 7}
    with pytest.raises(ValueError, match="unknown key 'number'"):
        tiny_config(tmp_path, exploration={"kind": "shaken", "number": 7})
