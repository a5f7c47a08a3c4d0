"""Settings of a campaign: the system, its first labels, its test set, where candidates come from, when to stop."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from ase import Atoms
from pydantic import Field, model_validator

from almlip_jax.campaign.choice import Beginning, ExplorationChoice, ExplorationInputs
from almlip_jax.campaign.sparse import SparseSettings
from almlip_jax.campaign.starts import LabelledStarts, StartSettings
from almlip_jax.campaign.systems import check_known, check_name, group_of
from almlip_jax.campaign.teacher import FromTeacherSettings, OfSystems
from almlip_jax.dynamics import ExplorationSettings, RelaxationSettings, WalkerGroup, relaxing
from almlip_jax.dynamics.judging import (
    check_biased_atoms,
    check_cells,
    check_drift,
    check_exploration,
    check_fixed_atoms,
    check_swaps,
)
from almlip_jax.dynamics.thresholds import RelativeThresholds, ThresholdSettings
from almlip_jax.ensembles import EnsembleSettings, require_spread
from almlip_jax.errors import InputError
from almlip_jax.generation import GeneratorSettings
from almlip_jax.kinds import UserCode
from almlip_jax.names import Known
from almlip_jax.scores import ScoreName as Score
from almlip_jax.selection import BaitSettings, SelectorSettings
from almlip_jax.settings import Settings, unit
from almlip_jax.structures.carried import SYSTEM
from almlip_jax.structures.labels import FileReading
from almlip_jax.targets import Target, target_errors


class StateReading(FileReading):
    """How files are read, and the electronic state of structures that do not say."""

    charge: int = Field(default=0, ge=-1000, le=1000, json_schema_extra=unit("e"))
    """Total charge in e, where a frame does not give its own."""
    spin: int = Field(default=1, ge=1, le=1000)
    """Spin multiplicity 2S+1, where a frame does not give its own."""


class SystemSettings(StateReading):
    """What the potential is for, and how the files of the campaign are read."""

    structures: Path | tuple[Path, ...] | dict[str, Path | tuple[Path, ...]] = ()
    """File or files with the start geometries; every frame is one of them.  A fixed pool needs none.  With names for
    the files, ``{water: water.xyz, slab: [slab.xyz, step.xyz]}``, there are several systems: all errors and labels are
    told of each."""
    shares: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = {}
    """What each named system gets of the walkers, of every batch and of the first labels (``from_pool``,
    ``from_generated``, ``from_teacher``), relative to the others, as ``{water: 1, slab: 2}``; the same
    for all by default.  What a system cannot use of a batch goes to the others."""

    @model_validator(mode="after")
    def _shares_are_those_of_systems(self) -> Self:
        if not self.shares:
            return self
        if not self.named:
            raise ValueError("shares are of systems with names; give structures as {name: file}, or leave shares out.")
        if strange := sorted(set(self.shares) - set(self.named)):
            raise ValueError(f"shares name '{strange[0]}'; the systems are: {', '.join(self.named)}.")
        if left := sorted(set(self.named) - set(self.shares)):
            raise ValueError(f"shares leave '{left[0]}' out; give each system one, or leave it out of structures.")
        return self

    @model_validator(mode="after")
    def _systems_have_names_and_files(self) -> Self:
        for name, given in self.named.items():
            check_name(name)
            if not given:
                raise ValueError(f"system '{name}' of structures names no file; give one, or leave the system out.")
        return self

    @property
    def named(self) -> dict[str, tuple[Path, ...]]:
        """The files of each system, where systems have names."""
        if not isinstance(self.structures, dict):
            return {}
        return {name: (given,) if isinstance(given, Path) else given for name, given in self.structures.items()}

    @property
    def parts(self) -> dict[str, float]:
        """The share of each named system."""
        return {name: self.shares.get(name, 1.0) for name in self.named}

    @property
    def files(self) -> tuple[tuple[str | None, Path], ...]:
        """Every file with the name of its system, if it has one."""
        if isinstance(self.structures, dict):
            return tuple((name, path) for name, given in self.named.items() for path in given)
        given = (self.structures,) if isinstance(self.structures, Path) else self.structures
        return tuple((None, path) for path in given)


class RattleSettings(Settings):
    """Start geometries with every atom displaced at random."""

    count: int = Field(default=10, ge=1, le=1_000_000)
    """Number of structures, shared out evenly among the start geometries."""
    stdev: float = Field(default=0.05, gt=0, le=1.0, json_schema_extra=unit("Angstrom"))
    """Standard deviation of each Cartesian displacement, Angstrom."""


class LabelMdSettings(OfSystems):
    """Langevin dynamics with the label source: every step is a label-source call."""

    temperature: float = Field(default=300.0, gt=0, le=1e5, json_schema_extra=unit("K"))
    """Temperature, K."""
    steps: int = Field(default=10, ge=1, le=10**9)
    """Steps after the equilibration, for each start geometry."""
    every: int = Field(default=2, ge=1, le=10**9)
    """Number of steps from one kept frame to the next; steps after the last one are not made."""
    equilibration: int = Field(default=0, ge=0, le=10**9)
    """Steps before the first frame is kept."""
    timestep: float = Field(default=0.5, gt=0, le=20.0, json_schema_extra=unit("fs"))
    """Time step, fs."""
    friction: float = Field(default=0.01, gt=0, le=10.0, json_schema_extra=unit("1/fs"))
    """Langevin friction, 1/fs."""

    @model_validator(mode="after")
    def _keeps_a_frame(self) -> Self:
        if self.every > self.steps:
            raise ValueError(
                f"every {self.every} is more than steps {self.steps}, so that no frame would be kept; lower it."
            )
        return self

    @property
    def calls(self) -> int:
        """Label-source calls for each start geometry, without that of the start, up to the last frame that is kept."""
        return self.equilibration + self.steps // self.every * self.every


class InitialSettings(FileReading):
    """The first labelled set; the parts are put together in the order of the fields.

    ``keys`` and ``types`` are for ``dataset``, where they are others than those of the system; ``types`` are for an
    ``.mtp`` file in ``potential``, too.
    """

    dataset: Path | None = None
    """An existing labelled file, taken whole; its labels cost nothing."""
    from_pool: Annotated[int, Field(ge=0, le=10**8)] | SparseSettings = 0
    """Structures of the pool (with ``exploration.kind: pool``) that are labelled: a number is drawn at random; a
    section says how they are chosen.  Named systems share them, as they share batches."""
    rattle: RattleSettings | None = None
    """Displaced start geometries, labelled."""
    generated: tuple[GeneratorSettings, ...] = ()
    """Structures made from the start geometries without dynamics, labelled."""
    from_generated: SparseSettings | None = None
    """Of all generated structures, those that are labelled; all of them where not given."""
    md: tuple[LabelMdSettings, ...] = ()
    """Trajectories with the label source; each of their steps counts as a label."""
    potential: Path | None = None
    """Folder of a potential of the same label source, or an ``.mtp`` file of MLIP-2 (with ``types``, or those of the
    system), that trainings begin with, as with `almlip train --from`: elements are added, its reference energies stay,
    and what it remembers is trained on again (`training.replay`).  Later rounds begin with it again, or with
    `training.warm_start` with the potential of the round before.  With a `teacher` it is what learns from that, and
    what it remembers is trained on again all the same.  Sections `model` and `ensemble` that are not given are its
    own."""
    from_teacher: FromTeacherSettings | None = None
    """Frames of the teacher (section `teacher`), chosen by a selector and labelled."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        labelled = (self.dataset, self.rattle, self.from_teacher)
        if labelled == (None, None, None) and not (self.from_pool or self.generated or self.md):
            raise ValueError(
                "the initial set is empty; give at least one of dataset, from_pool, rattle, generated, md, "
                "from_teacher."
            )
        if self.from_generated is not None and self.from_generated.count > sum(one.count for one in self.generated):
            raise ValueError(
                f"from_generated takes {self.from_generated.count} structures of fewer that are generated; raise their "
                "count, or leave it out."
            )
        return self

    @model_validator(mode="after")
    def _reads_a_file(self) -> Self:
        typed = self.types is not None and (self.potential is None or self.potential.suffix != ".mtp")
        if self.dataset is None and (self.keys is not None or typed):
            name = "types" if self.keys is None else "keys"
            raise ValueError(f"{name} says how dataset is read, and none is given; leave it out.")
        return self

    @property
    def generated_count(self) -> int:
        """Generated structures that are labelled."""
        if self.from_generated is not None:
            return self.from_generated.count
        return sum(one.count for one in self.generated)

    @property
    def pool_count(self) -> int:
        """Structures that a pool gives."""
        return self.from_pool if isinstance(self.from_pool, int) else self.from_pool.count


class TestFileSettings(FileReading):
    """A labelled file that becomes a group of the test set.

    ``keys`` and ``types`` are for this file, where they are others than those of the system.
    """

    path: Path
    """Any file with labelled structures."""
    group: str = "test"
    """Name of the group."""


class TestMdSettings(LabelMdSettings):
    """A trajectory with the label source that becomes a group of the test set, ``<temperature>K``."""

    steps: int = Field(default=1000, ge=1, le=10**9)
    """Steps after the equilibration, for each start geometry."""
    every: int = Field(default=20, ge=1, le=10**9)
    """Number of steps from one kept frame to the next."""
    equilibration: int = Field(default=200, ge=0, le=10**9)
    """Steps before the first frame is kept."""

    @property
    def group(self) -> str:
        """Name of the group."""
        return f"{self.temperature:g}K"


class TestSettings(Settings):
    """The test set: kept out of training, its label-source calls (each step of its MD is one) counted apart."""

    md: tuple[TestMdSettings, ...] = ()
    """Trajectories with the label source, with random numbers of their own."""
    files: tuple[TestFileSettings, ...] = ()
    """Labelled files."""
    from_pool: Annotated[int, Field(ge=0, le=10**8)] | dict[str, Annotated[int, Field(ge=1, le=10**8)]] = 0
    """Structures drawn at random from the pool, taken out of it and labelled; group ``pool``.  A number is drawn from
    the whole pool, whatever is in it; ``{water: 20, slab: 30}`` draws that many of each of these systems."""

    @property
    def pool_count(self) -> int:
        """Structures that a pool gives."""
        return self.from_pool if isinstance(self.from_pool, int) else sum(self.from_pool.values())

    def groups(self, systems: Sequence[str] = ()) -> tuple[str, ...]:
        """Names that groups may have, each once.

        Of files and a pool there may be groups of every system, and one of what belongs to none.

        Args:
            systems: names of the systems, where they have any.
        """
        counted = self.from_pool if isinstance(self.from_pool, Mapping) else {}
        given = [*(file.group for file in self.files), *(["pool"] if self.from_pool and not counted else [])]
        found = [group_of(system, run.group) for run in self.md for system in run.systems or systems or (None,)]
        found += [group_of(system, group) for group in given for system in (None, *systems)]
        found += [group_of(system, "pool") for system in counted]
        return tuple(dict.fromkeys(found))


class CorrectionSettings(Settings):
    """Structures around the places where walkers left what the ensemble knows are labelled first."""

    on: tuple[Literal["stop", "leave", "departure"], ...] = Field(default=("stop", "leave"), min_length=1)
    """Which places: where the gate stopped a walker, where it left the band of trust, or where an atom first left the
    training distribution (``latent_distance``, which has to be monitored)."""
    around: int = Field(default=20, ge=0, le=10_000)
    """Displaced copies of each place that are looked at, beside the place itself; they cost no label."""
    stdev: float = Field(default=0.05, gt=0, le=2.0, json_schema_extra=unit("Angstrom"))
    """Standard deviation of each Cartesian displacement, Angstrom."""
    count: int = Field(default=2, ge=1, le=10**6)
    """Most structures of a batch that are chosen so, those with the largest spread of each place in turn; the selector
    chooses the rest."""
    go_on: bool = True
    """Whether a walker that the gate ended goes on from there in the next round, where labels around that place came
    in; else it begins anew."""


class SystemWalkers(WalkerGroup):
    """Walkers that share temperature and pressure, of all systems or of some."""

    systems: tuple[str, ...] = ()
    """Names of the systems (`system.structures`) that these walkers are dealt out to, by their shares; to all of them
    where none is named."""

    @model_validator(mode="before")
    @classmethod
    def _of_all(cls, given: Any) -> Any:
        return given.model_dump() if type(given) is WalkerGroup else given


class MdExploration(ExplorationSettings, ExplorationChoice):
    """Candidates from gated molecular dynamics with the ensemble."""

    counts_frames: ClassVar[bool] = True
    walkers: tuple[SystemWalkers, ...] = Field(
        default=(SystemWalkers(temperature=300.0, count=4), SystemWalkers(temperature=600.0, count=4)), min_length=1
    )
    """Groups of walkers."""
    thresholds: ThresholdSettings = RelativeThresholds()
    """What the gate compares its score with."""
    continue_walkers: bool = False
    """Whether a walker that ran to its end goes on from there in the next round; others, and all where this is false,
    begin anew."""
    starts: StartSettings = LabelledStarts()
    """Where walkers begin anew."""
    correct: CorrectionSettings | None = None
    """Whether structures around the places where walkers left what the ensemble knows are labelled first, and these
    walkers go on; null leaves the whole batch to the selector."""

    @model_validator(mode="before")
    @classmethod
    def _start_energy_has_moved(cls, data: Any) -> Any:
        if isinstance(data, dict) and "start_energy" in data:
            raise ValueError(
                "unknown key 'start_energy'; it is now 'energy' of starts: "
                f"{{kind: labelled, energy: {data['start_energy']}}}."
            )
        return data

    @model_validator(mode="after")
    def _no_table_of_energies(self) -> Self:
        if self.momenta != "draw":
            raise ValueError("walkers of a campaign draw their momenta at their temperature; leave 'momenta' out.")
        if self.conserved:
            raise ValueError("a campaign keeps no table of energies; leave 'conserved' out, or use almlip md.")
        return self

    @model_validator(mode="after")
    def _thresholds_suit_the_score(self) -> Self:
        self.thresholds.check(self.gate.score)
        if self.thresholds.frames_drawn and self.trajectory_every > self.steps:
            raise ValueError(
                f"{self.thresholds.kind} thresholds draw frames from trajectories; trajectory_every "
                f"{self.trajectory_every} is more than steps {self.steps}, so that there would be none."
            )
        return self

    def stage(self, given: ExplorationInputs) -> Mapping[str, Any]:
        """Walkers with gates."""
        from almlip_jax.campaign.exploration import explore

        return explore(self, given)

    @property
    def starts_file(self) -> Path | None:
        """As `starts` say."""
        return self.starts.file

    @property
    def walkers_to_deal(self) -> tuple[tuple[str, ...], ...]:
        """As their groups say."""
        return tuple(group.systems for group in self.walkers for _ in range(group.count))

    @property
    def walker_groups(self) -> tuple[SystemWalkers, ...]:
        """All of them."""
        return self.walkers

    @property
    def starts_labelled(self) -> bool:
        """As `starts` say."""
        return self.starts.at_labelled

    @property
    def species_named(self) -> Collection[str]:
        """Those of its gate."""
        return self.gate.species

    @property
    def notes(self) -> tuple[str, ...]:
        """That walkers begin again wherever a correction would be asked for."""
        if self.correct is None or self.rewind is None:
            return ()
        idle = [one for one in self.correct.on if one in self.rewind.on]
        if not idle:
            return ()
        return (
            f"exploration.correct.on '{idle[0]}' is of walkers that end by it, and exploration.rewind lets each begin "
            f"again {self.rewind.limit} times before one does; leave '{idle[0]}' out of rewind.on if places are to be "
            "corrected.",
        )

    def check_geometries(self, geometries: Sequence[Atoms]) -> None:
        """Where cells relax or move, one has to have a cell; where atoms are swapped or biased, such atoms."""
        named = {f"start geometry {n}": geometry for n, geometry in enumerate(geometries)}
        if all(group.bias > 0 and not group.systems for group in self.walkers):  # else not every walker is biased
            check_biased_atoms(self.biases, named)
        check_fixed_atoms(self.integrator, named)
        check_cells(self.integrator, geometries)
        check_swaps(self, geometries)
        check_drift(self, geometries)
        if self.relaxation is not None:
            relaxed = relaxing(self, self.relaxation)
            check_cells(relaxed.integrator, geometries, "exploration.starts.cell")
            check_fixed_atoms(relaxed.integrator, named)

    def check_systems(self, names: Collection[str]) -> None:
        """Those of walkers, and shares of the buffer."""
        for number, group in enumerate(self.walkers):
            check_known(group.systems, names, f"exploration.walkers.{number}.systems")
        self.admission.check_strata({SYSTEM: names})

    @property
    def couples_walkers(self) -> bool:
        """Where they share hills of metadynamics."""
        return any(bias.couples_walkers for bias in self.biases)

    @property
    def relaxation(self) -> RelaxationSettings | None:
        """As `starts` say."""
        return self.starts.relaxation

    @model_validator(mode="after")
    def _departures_are_looked_for(self) -> Self:
        if self.correct is not None and "departure" in self.correct.on and "latent_distance" not in self.novelty:
            raise ValueError("correct.on 'departure' needs 'latent_distance' in monitor, or as the gate's score.")
        return self

    def check(self, members: EnsembleSettings, further: Collection[str] = ()) -> None:
        """See `check_exploration`; corrections rank by the spread of the members."""
        check_exploration(self, members, further=further)
        if self.correct is not None:
            require_spread(members, "exploration.correct")

    def most_candidates(self, pool: int) -> int:
        """What the buffers of all walkers hold, and corrections."""
        return len(self.temperatures) * self.buffer + (0 if self.correct is None else self.correct.count)


class PoolExploration(ExplorationChoice):
    """Candidates from a file: each round scores all that have not been selected yet."""

    kind: Literal["pool"] = "pool"
    files: Path | tuple[Path, ...]
    """Labelled or unlabelled structures; labels in the file are ignored (the label source ``file`` reads them)."""

    def stage(self, given: ExplorationInputs) -> Mapping[str, Any]:
        """Scores what is left."""
        from almlip_jax.campaign.offers import score_pool

        return score_pool(given)

    @property
    def pool_files(self) -> tuple[Path, ...]:
        """Those."""
        return (self.files,) if isinstance(self.files, Path) else self.files

    def most_candidates(self, pool: int) -> int:
        """The pool."""
        return pool


class GeneratedExploration(ExplorationChoice):
    """Candidates that are made without dynamics, new ones in each round; random crystals relaxed with the ensemble."""

    kind: Literal["generated"] = "generated"
    of: tuple[GeneratorSettings, ...] = Field(min_length=1)
    """What makes them."""

    def stage(self, given: ExplorationInputs) -> Mapping[str, Any]:
        """Generates, relaxes and scores."""
        from almlip_jax.campaign.generated import explore

        return explore(self, given)

    @property
    def needs_starts(self) -> bool:
        """Where a generator does."""
        return any(one.needs_starts for one in self.of)

    @property
    def generators(self) -> tuple[GeneratorSettings, ...]:
        """Those."""
        return self.of

    def most_candidates(self, pool: int) -> int:
        """All that are made."""
        return sum(one.count for one in self.of)


class UserExploration(UserCode, ExplorationChoice):
    """A user's own factory ``(**parameters)`` of a function of a `Beginning`, which gives structures.

    What it draws at random follows from ``given.key``.
    """

    kind: Literal["user"] = "user"
    bound: ClassVar[str] = "exploration.candidates"
    candidates: int = Field(ge=1, le=10**7)
    """Most structures that it may give in a round; the arrays of the selector have room for that many."""

    def check_code(self) -> None:
        """Makes the function."""
        self.call_for_function("given")

    def explore(self, given: Beginning) -> Iterable[Atoms]:
        """What the function gives."""
        found: Iterable[Atoms] = self.call_for_function("given")(given)
        if not isinstance(found, Iterable) or isinstance(found, Atoms):
            raise InputError(f"'{self.function}' must find a list of structures, but finds a {type(found).__name__}.")
        return found

    def most_candidates(self, pool: int) -> int:
        """As given."""
        return self.candidates


class SelectionSettings(Settings):
    """The batch of each round."""

    batch: int = Field(default=10, ge=1, le=100_000)
    """Structures in a batch; fewer where fewer candidates were recorded, or the label budget allows fewer."""
    selector: SelectorSettings = BaitSettings()
    """How they are chosen; the default did best over three test sets (experiments/which_selector)."""


class ShareBelowSettings(Settings):
    """Converged when nearly all explored frames lie below the record threshold."""

    share: float = Field(default=0.95, gt=0, le=1)
    """Least share of the frames, by scores and the record threshold of the run whatever the gate makes of them; frames
    lost because a walker ended early count as above."""
    rounds: int = Field(default=2, ge=1, le=100_000)
    """Least number of rounds in the window."""
    picoseconds: float = Field(default=0.0, ge=0, le=1e9, json_schema_extra=unit("ps"))
    """Least simulated time in the window, of all walkers together, ps."""


class PlateauSettings(Settings):
    """Converged when another batch would teach little more: the batch's uncertainty has flattened near the pool's.

    Both have to hold.  Flattened: over the last ``rounds`` rounds, the mean score of the batch and that of the pool
    have fallen by ``fall`` a round at most.  Near: of the largest excess of the batch over the pool in any round so
    far, ``batch / pool - 1``, at most the share ``approach`` is left.
    """

    rounds: int = Field(default=3, ge=1, le=100_000)
    """Rounds over which the fall is averaged (geometrically); the rule needs one more than these."""
    fall: float = Field(default=0.06, ge=0, lt=1)
    """Largest share that batch and pool may have lost a round."""
    approach: float = Field(default=0.5, gt=0, le=1)
    """Largest share of the excess of the batch over the pool that may be left."""

    @model_validator(mode="before")
    @classmethod
    def _means_something_else_now(cls, given: Any) -> Any:
        old = [key for key in ("ratio", "patience") if isinstance(given, dict) and key in given]
        if old:
            raise ValueError(
                f"unknown key '{old[0]}'; plateau now looks at how batch and pool change: rounds, fall and approach."
            )
        return given


class TargetErrorSettings(Settings):
    """Converged when the error on the test set is small enough."""

    metric: Annotated[str, Known("known error", lambda: tuple(target_errors()))] = "forces_rmse"
    """Which error: eV/atom for energies, eV/Angstrom for forces, eV/Angstrom^3 for stresses of periodic structures,
    e*Angstrom for dipoles of molecules, of models that give them."""
    value: float = Field(gt=0, le=1000.0)
    """Error at or below which the campaign has converged."""
    group: str | None = None
    """Group of the test set; all groups where not given."""

    @property
    def of(self) -> Target:
        """What it is the error of."""
        return target_errors()[self.metric]

    @property
    def of_all(self) -> bool:
        """Whether every labelled structure has what it is the error of."""
        return self.of.basic and self.of.structures == "all"


class UserRuleSettings(UserCode):
    """A user's own factory ``(**parameters)`` of a rule ``(history) -> reason``: a sentence with its numbers, or None.

    ``history`` holds one `almlip_jax.campaign.state.RoundRecord` a round, the last of which may be unfinished.
    """

    converged: bool = True
    """Whether the rule says that the potential is good enough, rather than that something ran out."""

    def check_code(self) -> None:
        """Makes the rule."""
        self.call_for_function("history")


class CampaignSettings(Settings):
    """How the stages of a campaign follow each other."""

    overlap: bool = False
    """Whether the campaign goes on while a batch is labelled: the next round trains, explores and selects without these
    labels, and the round after trains on them.  The last batch is waited for."""


class StoppingSettings(Settings):
    """When a campaign ends; the first rule that holds decides."""

    max_rounds: int = Field(default=15, ge=0, le=100_000)
    """Batches to label at most."""
    max_labels: int | None = Field(default=None, ge=1, le=10**9)
    """Label-source calls at most, failed ones and every step of the initial MD included, those of the test set not;
    the last batch is cut to fit."""
    share_below: ShareBelowSettings | None = ShareBelowSettings()
    """Share of frames of walkers below the record threshold; null switches the rule off."""
    plateau: PlateauSettings | None = None
    """Uncertainty of batch and pool that has flattened, the one near the other; needs a selector that is not random."""
    target_error: TargetErrorSettings | None = None
    """Error on the test set."""
    user: UserRuleSettings | None = None
    """A rule of your own."""
    monitor: Score = "force_std_mean"
    """Score whose means over pool and batch are written to ``metrics.csv`` and judged by ``plateau``."""
