"""What a campaign builds once and uses round after round, so that nothing compiles again.

Trainer, explorer and selector are made when first needed, with capacities for the largest dataset that the label
budget allows.  What was chosen by measurement (`Workshop.measured`) moves with the state of the campaign, so that a
resumed run computes with the same shapes, and therefore the same bits, as one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.preparation import Source, geometry_key
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import MdExploration
from almlip_jax.campaign.state import CampaignState
from almlip_jax.dynamics import ExplorationSettings, Explorer, relaxing
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.features import FeatureRequest
from almlip_jax.files import understood
from almlip_jax.learner import Learner
from almlip_jax.oracles import Labeller, LabelStore
from almlip_jax.potential import Evaluated, Potential
from almlip_jax.progress import Advance, Progress
from almlip_jax.selection import Selector
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.packing import BatchShape
from almlip_jax.structures.walkers import Room
from almlip_jax.training import (
    Capacity,
)


class Workshop(Inputs):
    """The tools of one campaign; `close` ends the workers of the label source and lets go of the store.

    Args:
        config: of the campaign.
        run: its directory.
        state: where it stands.
        progress: tells the user.
    """

    def __init__(self, config: ExperimentConfig, run: RunDirectory, state: CampaignState, progress: Progress) -> None:
        super().__init__(config)
        self.config = config
        self.run = run
        self.progress = progress
        self._noted: dict[str, Any] = dict(state.measured)
        self._explorers: dict[str, tuple[EnsembleSettings, Explorer]] = {}
        self.lost_calls = state.lost_calls
        self.lost_test_calls = state.lost_test_calls
        self.store = LabelStore(run.labels)
        try:
            self.labeller = Labeller(config.oracle, self.store, config.executor)
        except BaseException:  # for example, the label source is not installed: whoever tries again needs the store
            self.store.close()
            raise

    def close(self) -> None:
        """Ends the workers of the label source and closes the store."""
        self.labeller.close()
        self.store.close()

    @property
    def labels(self) -> int:
        """Label-source calls so far, without those of the test set."""
        return self.store.count_calls() + self.lost_calls

    @property
    def test_calls(self) -> int:
        """Label-source calls for the test set so far."""
        return self.store.count_test_calls() + self.lost_test_calls

    # -- inputs -------------------------------------------------------------------------------------------------------

    def source(self, advance: Advance) -> Source:
        """What labelled sets are made with.

        Args:
            advance: of the stage.
        """
        return Source(
            geometries=self.geometries,
            system=self.config.system,
            labeller=self.labeller,
            seed=self.config.seed,
            provenance={"campaign": self.config.name},
            say=self.progress.message,
            advance=advance,
        )

    # -- sets ---------------------------------------------------------------------------------------------------------

    def dataset(self, round_index: int) -> list[Atoms]:
        """The structures trained on in a round."""
        return read_structures(self.run.round(round_index).dataset, require_labels=True)

    @cached_property
    def test(self) -> list[Atoms]:
        """The test set; none where the config asks for none."""
        return read_structures(self.run.test, require_labels=True) if self.run.test.exists() else []

    @cached_property
    def test_keys(self) -> frozenset[bytes]:
        """What identifies the structures of the test set."""
        return frozenset(geometry_key(atoms) for atoms in self.test)

    # -- exploration and selection ------------------------------------------------------------------------------------

    def explorer(self, settings: MdExploration, potential: Potential) -> Explorer:
        """Runs walkers with a potential; with the neighbour capacity that was needed before."""
        return self._explorer("explorer", settings, potential)

    def relaxer(self, settings: MdExploration, potential: Potential) -> Explorer:
        """Relaxes their starts, likewise."""
        assert settings.relaxation is not None
        return self._explorer("relaxer", relaxing(settings, settings.relaxation), potential)

    def _explorer(self, name: str, settings: ExplorationSettings, potential: Potential) -> Explorer:
        """One is kept as long as potentials have the same members; a committee may have lost one in a training."""
        members, held = self._explorers.get(name, (None, None))
        if held is None or members != potential.member_settings:
            self.note_explorers()
            held = self._new_explorer(name, settings, potential)
            self._explorers[name] = potential.member_settings, held
        return held

    def _new_explorer(self, name: str, settings: ExplorationSettings, potential: Potential) -> Explorer:
        known = self._noted.get(name)
        return Explorer(
            potential.ensemble.predict,
            self.species,
            potential.cutoff,
            settings,
            room=None if known is None else Room.of(known),
            atoms=max((len(frame) for frame in self.listed), default=0),
            dtype=np.dtype(self.config.precision),
        )

    def note_explorers(self) -> None:
        """Remembers the capacities that explorer and relaxer have come to."""
        for name, (_, used) in self._explorers.items():
            if used.room is not None:
                self._noted[name] = used.room.as_dict()

    @cached_property
    def selector(self) -> Selector:
        """Chooses a batch."""
        return self.config.selection.selector.build(self.config.selection.batch)

    @cached_property
    def pool_capacity(self) -> int:
        """Candidates that there can be at most."""
        return self.config.exploration.most_candidates(len(self.pool_split.rest))

    # -- training -----------------------------------------------------------------------------------------------------

    @cached_property
    def learner(self) -> Learner:
        """Trains, with arrays sized for the label budget."""
        config = self.config
        with understood(self.run.state):
            known = _capacity_from(self._noted.get("training"))
        return Learner(
            self.largest_dataset,
            typical=[*self.dataset(0), *self.geometries, *self.pool, *self.listed],
            model=config.model,
            ensemble=config.ensemble,
            training=config.training,
            seed=config.seed,
            isolated=self.isolated,
            species=self.species,
            precision=config.precision,
            capacity=known,
            say=self.progress.message,
        )

    @property
    def measured(self) -> dict[str, Any]:
        """Sizes that arrays have come to, by what holds them."""
        learner: Learner | None = self.__dict__.get("learner")
        capacity = None if learner is None else learner.capacity
        return self._noted if capacity is None else self._noted | {"training": asdict(capacity)}

    @cached_property
    def largest_dataset(self) -> int:
        """Structures that a dataset can have at most: the initial ones and what rounds and budget allow."""
        stopping = self.config.stopping
        more = stopping.max_rounds * self.config.selection.batch
        if stopping.max_labels is not None:
            more = min(more, stopping.max_labels)
        return len(self.dataset(0)) + more

    def potential(self, round_index: int) -> Potential:
        """The potential of a round, from memory or from its checkpoint.

        Raises:
            InputError: the checkpoint is missing or damaged.
        """
        held = self._potentials.get(round_index)
        if held is None:
            held = self.keep(round_index, Potential.load(self.run.round(round_index).potential))
        return held

    def keep(self, round_index: int, potential: Potential) -> Potential:
        """Remembers a potential, and forgets those that are no longer needed."""
        self._potentials = {index: p for index, p in self._potentials.items() if index >= round_index - 1}
        self._potentials[round_index] = potential
        return potential

    def evaluated_once(
        self, round_index: int, name: str, structures: Sequence[Atoms], potential: Potential, advance: Advance | None
    ) -> Evaluated:
        """The evaluation of a set of structures with the potential of a round, and the features that the selector uses.

        Stages of a round that ask for the same set share one evaluation; a resumed one evaluates again, to the same
        bits.

        Args:
            round_index: of the potential.
            name: of the set.
            structures: the set.
            potential: of the round.
            advance: is told how many structures are done.
        """
        if (round_index, name) not in self._evaluations:
            self._evaluations = {key: kept for key, kept in self._evaluations.items() if key[0] == round_index}
            evaluated = potential.evaluate(structures, features=self.features, on_batch=advance)
            self._evaluations[round_index, name] = evaluated
        return self._evaluations[round_index, name]

    @cached_property
    def features(self) -> FeatureRequest:
        """What the selector looks at."""
        return FeatureRequest.of(self.config.selection.selector.feature_names, self.config.seed)

    @cached_property
    def _evaluations(self) -> dict[tuple[int, str], Evaluated]:
        return {}

    @cached_property
    def _potentials(self) -> dict[int, Potential]:
        return {}


def _capacity_from(measured: Mapping[str, Any] | None) -> Capacity | None:
    if measured is None:
        return None
    return Capacity(**{**measured, "batch": BatchShape(**measured["batch"])})
