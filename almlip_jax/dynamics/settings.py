"""Settings of exploration: walkers, what moves them, gate, sanity, rewinding, what is recorded."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from almlip_jax.dynamics.admission import AdmissionSettings, FirstAdmission
from almlip_jax.dynamics.biases import BiasSettings
from almlip_jax.dynamics.gates import AbsoluteGate, GateSettings
from almlip_jax.dynamics.integrators import Integrator, IntegratorSettings, LangevinSettings, SwapSettings
from almlip_jax.dynamics.sanity import SanitySettings
from almlip_jax.dynamics.seen import MOST_STEPS
from almlip_jax.scores import AskedScoreName, names, scores
from almlip_jax.settings import Settings, unit
from almlip_jax.structures.carried import BATH_TEMPERATURE

Kelvin = Annotated[float, Field(gt=0, le=1e5)]
"""A temperature, K."""

Gigapascal = Annotated[float, Field(ge=-1000.0, le=1e4)]
"""A pressure, GPa."""


class WalkerGroup(Settings):
    """Walkers that share temperature and pressure."""

    temperature: Kelvin | tuple[Kelvin, Kelvin] = Field(json_schema_extra=unit("K"))
    """Temperature, K; two values are a ramp over the run."""
    count: int = Field(default=1, ge=1, le=100_000)
    """Number of walkers."""
    pressure: Gigapascal | tuple[Gigapascal, Gigapascal] = Field(default=0.0, json_schema_extra=unit("GPa"))
    """Pressure, GPa, where the cell moves; two values are a ramp."""
    bias: float = Field(default=1.0, ge=0, le=1000.0)
    """Factor on every bias of these walkers."""

    @property
    def temperatures(self) -> tuple[float, float]:
        """At the first and at the last step, K."""
        return self.temperature if isinstance(self.temperature, tuple) else (self.temperature, self.temperature)

    @property
    def pressures(self) -> tuple[float, float]:
        """At the first and at the last step, GPa."""
        return self.pressure if isinstance(self.pressure, tuple) else (self.pressure, self.pressure)


class RewindSettings(Settings):
    """A walker in trouble begins again, at an earlier frame of its own or at another start, with fresh momenta."""

    on: tuple[Literal["stop", "leave", "unphysical"], ...] = ("stop", "leave", "unphysical")
    """Which endings are undone."""
    to: Literal["safe", "starts"] = "safe"
    """Where it begins again: at one of its last ``safe`` frames or its start, drawn at random; or at the next of
    further ``starts``, which were drawn as its first one was, in turn and round again."""
    every: int = Field(default=100, ge=1, le=MOST_STEPS)
    """Steps between two frames that are kept to begin again from; has no meaning with further starts."""
    keep: int = Field(default=4, ge=1, le=10_000)
    """How many of them, or of the further starts; the first start does not count."""
    limit: int = Field(default=20, ge=1, le=10**6)
    """Times that a walker begins again; after that it ends."""

    @property
    def further(self) -> int:
        """Further starts for each walker."""
        return self.keep if self.to == "starts" else 0

    @model_validator(mode="after")
    def _nothing_without_a_meaning(self) -> Self:
        if self.to == "starts" and self.every != type(self).model_fields["every"].default:
            raise ValueError("walkers that begin again at further starts keep no frames: leave rewind.every out.")
        return self


class ExplorationSettings(Settings):
    """Gated dynamics, relaxation or ascent of several walkers in one compiled loop."""

    kind: Literal["md"] = "md"
    walkers: tuple[WalkerGroup, ...] = Field(
        default=(WalkerGroup(temperature=300.0, count=4), WalkerGroup(temperature=600.0, count=4)), min_length=1
    )
    """Groups of walkers."""
    steps: int = Field(default=2000, ge=1, le=MOST_STEPS)
    """Steps of each walker."""
    timestep: float = Field(default=0.5, gt=0, le=20.0, json_schema_extra=unit("fs"))
    """Time step, fs."""
    integrator: IntegratorSettings = LangevinSettings()
    """How walkers move."""
    swaps: SwapSettings | None = None
    """Monte Carlo swaps of unlike atoms."""
    biases: tuple[BiasSettings, ...] = ()
    """Forces on walkers in addition to those of the ensemble; gates look at the ensemble alone."""
    remove_drift: bool = False
    """Whether the centre of mass is brought to rest at every step; where atoms are held fixed there is no drift."""
    gate: GateSettings = AbsoluteGate()
    """What decides on each frame."""
    sanity: SanitySettings = SanitySettings()
    """Limits beyond which a frame is unphysical, whatever its score."""
    rewind: RewindSettings | None = None
    """Whether walkers in trouble begin again; null ends them."""
    monitor: tuple[AskedScoreName, ...] = ()
    """Novelty scores, and those of what not every model gives (``dipole_std``), to compute besides the committee's;
    what the gate looks at is computed anyway."""
    admission: AdmissionSettings = FirstAdmission()
    """Which of the frames that the gate records keep a place in the buffer."""
    record_every: int = Field(default=20, ge=1, le=MOST_STEPS)
    """Least number of steps between two frames of a walker offered to the buffer."""
    buffer: int = Field(default=64, ge=1, le=10**6, json_schema_extra=unit("frames"))
    """Frames in the buffer for each walker."""
    when_full: Literal["end_walker", "end_all", "go_on"] = "end_walker"
    """What happens when a walker has no place left for a frame."""
    pressure: bool = False
    """Whether the traces hold the internal pressure, which costs the virial; they do wherever the cell moves."""
    conserved: bool = False
    """Whether the traces hold the conserved energy, which costs a second look at the biases in every step; cells that
    move, biases together with swaps, relaxation and ascent have none."""
    trace_every: int = Field(default=10, ge=1, le=MOST_STEPS)
    """Steps between two entries of the traces of scores and temperature."""
    trajectory_every: int = Field(default=100, ge=1, le=MOST_STEPS)
    """Steps between two frames of a walker's trajectory."""
    chunk: int = Field(default=500, ge=1, le=MOST_STEPS)
    """Steps that the device runs on its own between two looks of the host; changes no result."""
    momenta: Literal["draw", "start"] = "draw"
    """Whether walkers begin with momenta drawn at their temperature, or with those of their start structures, without
    the drift where no bath acts on the centre of mass (``nve``, ``csvr``, ``nose_hoover``)."""
    skin: float = Field(default=0.5, ge=0, le=10.0, json_schema_extra=unit("Angstrom"))
    """Distance by which neighbour lists reach beyond the cutoff, Angstrom."""

    @field_validator("pressure", mode="before")
    @classmethod
    def _no_pressure_of_walkers(cls, given: Any) -> Any:
        if isinstance(given, int | float) and not isinstance(given, bool):  # 1 would be taken for true
            raise ValueError(
                "this says whether traces hold the internal pressure (true or false); that which walkers are under "
                f"stands with them, in GPa: walkers: [{{temperature: 300, pressure: {given:g}}}]."
            )
        return given

    @model_validator(mode="after")
    def _whole_strides(self) -> Self:
        for name in ("trace_every", "trajectory_every"):
            stride = getattr(self, name)
            if self.chunk % stride:
                raise ValueError(f"chunk {self.chunk} is not a multiple of {name} {stride}.")
        return self

    @model_validator(mode="after")
    def _what_is_said_has_something_to_act_on(self) -> Self:
        if self.when_full == "end_all" and self.admission.never_full:
            raise ValueError(
                f"when_full 'end_all' counts with admission 'first' only: a buffer of kind '{self.admission.kind}' is "
                "never full; leave when_full out."
            )
        if not self.biases and any(group.bias != 1.0 for group in self.walkers):
            raise ValueError("walkers have a factor 'bias', and there are no biases; leave it out, or give some.")
        return self

    @model_validator(mode="after")
    def _momenta_are_those_of_dynamics(self) -> Self:
        if self.momenta == "start" and not self.thermal:
            raise ValueError(f"integrator '{self.integrator.kind}' has no momenta: leave 'momenta' out.")
        return self

    @model_validator(mode="after")
    def _the_integrator_takes_up_what_is_given(self) -> Self:
        kind = self.integrator.kind
        ramped = any(first != last for first, last in (group.temperatures for group in self.walkers))
        # hills of a metadynamics have a temperature; a user's integrator is made only where something depends on it
        if ramped and not self.biases and not self.moves().bathed:
            raise ValueError(f"integrator '{kind}' has no bath whose temperature could change: give walkers one each.")
        if self.remove_drift and not self.thermal:
            raise ValueError(f"integrator '{kind}' has no momenta and no drift: leave remove_drift out.")
        if self.biases and not self.moves().biased:
            raise ValueError(f"integrator '{kind}' follows the members alone, biases do not act: leave biases out.")
        return self

    @model_validator(mode="after")
    def _biases_have_numbers_for_all_walkers(self) -> Self:
        walkers = len(self.temperatures)
        for n, bias in enumerate(self.biases):
            for key, values in bias.lists().items():
                if len(values) != walkers:
                    raise ValueError(
                        f"biases.{n}.{key} has {len(values)} values for {walkers} walkers; give one, or one for each."
                    )
        return self

    @model_validator(mode="after")
    def _pressure_needs_a_cell_that_moves(self) -> Self:
        given = any(group.pressures != (0.0, 0.0) for group in self.walkers)
        if given and not self.integrator.moves_cell:
            raise ValueError(f"integrator '{self.integrator.kind}' keeps the cell: leave the pressure out.")
        return self

    @model_validator(mode="after")
    def _buffer_is_shared_by_walkers_there_are(self) -> Self:
        if not self.admission.tells_apart:
            return self
        steady = self.thermal and all(len(set(group.temperatures)) == 1 for group in self.walkers)
        known = {"walker": range(len(self.temperatures)), BATH_TEMPERATURE: self.temperatures if steady else ()}
        self.admission.check_strata(known)
        return self

    @model_validator(mode="after")
    def _happens_within_the_run(self) -> Self:
        paces = {f"biases.{n}.{key}": pace for n, bias in enumerate(self.biases) for key, pace in bias.paces.items()}
        late = [name for name, pace in paces.items() if pace >= self.steps]  # it acts in the step after that many
        paces["gate.persistence"] = self.gate.persistence
        if self.swaps is not None:
            paces["swaps.every"] = self.swaps.every
        late += [name for name, pace in paces.items() if pace > self.steps]
        for name in late:
            what = "all of" if paces[name] == self.steps else "more than"
            raise ValueError(f"{name} {paces[name]} is {what} the run's steps {self.steps}, so that it does nothing.")
        return self

    @model_validator(mode="after")
    def _strides_fit_into_the_run(self) -> Self:
        for name in ("trace_every", "trajectory_every"):
            stride = getattr(self, name)
            if stride > self.steps and stride != type(self).model_fields[name].default:  # defaults allow short runs
                raise ValueError(
                    f"{name} {stride} is more than the run's steps {self.steps}, so that nothing would be kept; lower "
                    "it, or leave it out."
                )
        return self

    @model_validator(mode="after")
    def _steps_are_shorter_than_what_they_resolve(self) -> Self:
        for name, period in self.integrator.periods.items():
            if period < 2 * self.timestep:
                raise ValueError(
                    f"integrator.{name} {period:g} fs should be at least two steps of {self.timestep:g} fs."
                )
        return self

    @property
    def temperatures(self) -> tuple[float, ...]:
        """First temperature of every walker, K, in order."""
        return tuple(group.temperatures[0] for group in self.walkers for _ in range(group.count))

    @property
    def counts_supplied(self) -> bool:
        """Whether there is a conserved energy, and it is asked for."""
        return self.conserved and self.thermal and not self.integrator.moves_cell and not (self.swaps and self.biases)

    @property
    def thermal(self) -> bool:
        """Whether walkers have momenta whose temperature means something."""
        return self.integrator.thermal

    @property
    def further_starts(self) -> int:
        """How many further starts each walker has, to begin again at."""
        return 0 if self.rewind is None else self.rewind.further

    def moves(self) -> Integrator:
        """What moves walkers, with Monte Carlo swaps in between where asked for."""
        dynamics = self.integrator.build()
        return dynamics if self.swaps is None else self.swaps.around(dynamics)

    def numbers(self) -> dict[str, float]:
        """The parameters of what moves walkers by name."""
        return self.integrator.numbers() | ({} if self.swaps is None else self.swaps.numbers())

    def bath_temperature(self, walker: int, step: int) -> float:
        """Of a walker's bath at a step, K."""
        first, last = [group.temperatures for group in self.walkers for _ in range(group.count)][walker]
        return first + (last - first) * min(step / self.steps, 1.0)

    @property
    def follows_progress(self) -> str | None:
        """What depends on how much of the run is over, in words; None where nothing does."""
        for group in self.walkers:
            if group.temperatures[0] != group.temperatures[1]:
                return "a temperature ramp"
            if group.pressures[0] != group.pressures[1]:
                return "a pressure ramp"
        for bias in self.biases:
            if bias.follows_progress is not None:
                return bias.follows_progress
        return None

    @property
    def novelty(self) -> tuple[str, ...]:
        """Novelty scores that are computed."""
        return tuple(name for name in names(scores(fitted=True)) if self._asks_for(name))

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of all scores that are computed and traced."""
        predicted = (one for one in scores(fitted=False) if one.target is None or self._asks_for(one.name))
        return names(predicted) + self.novelty

    def _asks_for(self, score: str) -> bool:
        return score in self.monitor or score == self.gate.score
