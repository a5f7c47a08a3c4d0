"""What a campaign begins with: start geometries, a pool of candidates, the first labelled set and the test set.

Random draws come from streams named after what they are for, so that campaigns that differ only in how they explore or
select share initial set, test set and pool under the same seed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.data import chemical_symbols

from almlip_jax.campaign.batch import choose_for_systems
from almlip_jax.campaign.choice import ExplorationChoice
from almlip_jax.campaign.settings import (
    InitialSettings,
    LabelMdSettings,
    StateReading,
    SystemSettings,
    TargetErrorSettings,
    TestFileSettings,
    TestSettings,
)
from almlip_jax.campaign.systems import by_system, concerns, group_of, name_systems, names_of, quoted
from almlip_jax.errors import InputError, LabelError
from almlip_jax.evaluation.metrics import labels_of
from almlip_jax.keys import numpy_generator
from almlip_jax.oracles import Labeller, MDRun, rattle, run_label_md
from almlip_jax.structures.carried import SYSTEM, carried, named, system_of
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.labels import LABEL_ERROR, FileReading, label_difference
from almlip_jax.structures.likeness import Likeness
from almlip_jax.structures.repeats import geometry_key, without_repeats
from almlip_jax.structures.weights import weight_names
from almlip_jax.training import is_isolated_atom, isolated_atom_energies, without_isolated_atoms

Say = Callable[[str], None]


# ------------------------------------------------------------------------------------------------------------ inputs


def start_geometries(system: SystemSettings) -> list[Atoms]:
    """The start geometries without labels, each with charge, spin and the system's name; none without a file.

    Raises:
        InputError: a file cannot be used, or a geometry has constraints that walkers do not know.
    """
    geometries = []
    for name, path in system.files:
        found = _movable(path, bare_frames(path, system))
        for frame in found:
            frame.info = {**frame.info, **({} if name is None else {SYSTEM: name})}
        geometries += found
        if name is not None and not found:
            raise InputError(f"{path} of system '{name}' holds no structure; give a file with start geometries.")
    return geometries


def pool_frames(
    exploration: ExplorationChoice, system: SystemSettings, geometries: Sequence[Atoms], remarks: Sequence[str] = ()
) -> list[Atoms]:
    """The candidates of a fixed pool without labels, if there is one; ``info["pool_index"]`` is their place in it.

    Of what else their `info` holds they keep the keys that are asked for.
    """
    if not exploration.pool_files:
        return []
    types = system.arguments["type_numbers"]
    read = read_structures(exploration.pool_files, ignore_labels=True, type_numbers=types)
    frames = [_bare(frame, system, remarks) for frame in read if not is_isolated_atom(frame)]
    for index, frame in enumerate(frames):
        frame.set_constraint()  # nothing of a fixed pool ever moves
        frame.info["pool_index"] = index
    return name_systems(frames, geometries, "the pool")


def bare_frames(path: Path, system: SystemSettings) -> list[Atoms]:
    """The structures of a file with charge and spin and what else they carry (see `carried`), without remarks."""
    frames = read_structures(path, ignore_labels=True, type_numbers=system.arguments["type_numbers"])
    return [_bare(frame, system) for frame in frames]


def start_list(path: Path, system: SystemSettings, known: Sequence[Atoms], *, sees_state: bool = False) -> list[Atoms]:
    """The structures of a file that walkers start at, with charge and spin, without their labels.

    Args:
        path: the file.
        system: charge and spin of structures that do not say.
        known: start geometries and structures that are labelled whatever happens.
        sees_state: whether the potential tells structures apart that differ in charge and spin alone.

    Raises:
        InputError: a structure holds an element that no known one holds, or is in another electronic state: than one of
            its composition, or than all known ones where the potential sees these.
    """
    elements = {int(number) for frame in known for number in frame.numbers}
    frames = _movable(path, bare_frames(path, system))
    for number, frame in enumerate(frames):
        strange = sorted({int(z) for z in frame.numbers} - elements)
        if strange:
            raise InputError(
                f"{path}, frame {number} holds {', '.join(chemical_symbols[z] for z in strange)}, which no start "
                "geometry and no structure of initial.dataset holds; leave it out, or give labels with this element."
            )
    check_states(frames, str(path), known, sees_state=sees_state)
    return frames


def check_states(frames: Sequence[Atoms], source: str, known: Sequence[Atoms], *, sees_state: bool) -> None:
    """Refuses structures whose charge and spin the potential does not know, or cannot tell from those that it knows.

    Args:
        frames: the structures.
        source: where they are from.
        known: start geometries and labelled structures.
        sees_state: whether the potential tells structures apart that differ in charge and spin alone.

    Raises:
        InputError: a structure is in another electronic state than a known one of its composition, or than all known
            ones where the potential sees these.
    """
    states: dict[str, tuple[int, int]] = {}
    met = {electronic_state(frame) for frame in known}
    for frame in known:
        states.setdefault(frame.get_chemical_formula(), electronic_state(frame))
    for number, frame in enumerate(frames):
        formula, state = frame.get_chemical_formula(), electronic_state(frame)
        if sees_state and state not in met:
            raise InputError(
                f"{source}, frame {number} ({formula}) has charge and spin {state}, which no start geometry and no "
                "labelled structure has; leave it out, or give labels of that state."
            )
        if not sees_state and states.setdefault(formula, state) != state:
            raise InputError(
                f"{source}, frame {number} ({formula}) has charge and spin {state}, but others of its composition have "
                f"{states[formula]}, which this model cannot tell apart; leave it out, set model.electronic_state, or "
                "begin a campaign for it."
            )


def requested_frames(path: Path, system: StateReading) -> list[Atoms]:
    """The structures of a file as they are, remarks and all, with charge and spin, without labels."""
    frames = read_structures(path, ignore_labels=True, type_numbers=system.arguments["type_numbers"])
    for frame in frames:
        frame.calc = None
        frame.info |= state_of(frame, system)
        frame.info.pop(LABEL_ERROR, None)  # of an earlier try
    return frames


def _movable(path: Path, frames: list[Atoms]) -> list[Atoms]:
    """The frames, if walkers can hold still what their constraints do.

    Raises:
        InputError: a constraint is not a ``FixAtoms``.
    """
    for number, frame in enumerate(frames):
        for constraint in frame.constraints:
            if not isinstance(constraint, FixAtoms):
                raise InputError(
                    f"{path}, frame {number} has the constraint {type(constraint).__name__}, which walkers do not "
                    "know; fix whole atoms (FixAtoms), or use a restraint among the biases."
                )
    return frames


def labelled_frames(
    path: Path | Sequence[Path],
    system: SystemSettings,
    reading: FileReading | None = None,
    remarks: Sequence[str] = (),
) -> list[Atoms]:
    """The structures of a file, or of several that make up one set; arguments and errors as for `frames_and_atoms`."""
    return frames_and_atoms(path, system, reading, remarks)[0]


def frames_and_atoms(
    path: Path | Sequence[Path],
    system: SystemSettings,
    reading: FileReading | None = None,
    remarks: Sequence[str] = (),
) -> tuple[list[Atoms], dict[int, float]]:
    """What a file, or several that make up one set, hold.

    Args:
        path: the file, or files.
        system: charge and spin of structures that do not say, and how files are read.
        reading: how these files are read, where that is another way.
        remarks: keys of `info` that structures keep.

    Returns:
        the structures with charge, spin, labels and weights, without isolated atoms; and the energies of these, eV by
        atomic number.

    Raises:
        InputError: a structure has no energy or no forces, or isolated atoms contradict each other.
    """
    frames = []
    how = system if reading is None else reading.otherwise(system)
    read = read_structures(path, require_labels=True, **how.arguments)
    for frame in without_isolated_atoms(read):
        clean = _bare(frame, system, remarks)
        clean.set_constraint()  # walkers hold what their start geometry holds
        clean.calc = frame.calc
        clean.info |= {name: frame.info[name] for name in weight_names() if name in frame.info}
        frames.append(clean)
    return frames, isolated_atom_energies(read)


def paths(given: Path | Sequence[Path]) -> tuple[Path, ...]:
    """One path or several, as several."""
    return (given,) if isinstance(given, Path) else tuple(given)


def _bare(frame: Atoms, system: SystemSettings, remarks: Sequence[str] = ()) -> Atoms:
    clean = carried(frame)
    kept = {key: frame.info[key] for key in remarks if key in frame.info}
    clean.info = kept | state_of(frame, system) | (named(frame) if system.named else {})
    return clean


def state_of(frame: Atoms, system: StateReading) -> dict[str, int]:
    """Charge and spin of a structure; where only initial magnetic moments say its spin, they are left to do so."""
    state = {"charge": frame.info.get("charge", system.charge), "spin": frame.info.get("spin", system.spin)}
    if "spin" not in frame.info and np.any(frame.get_initial_magnetic_moments()):
        del state["spin"]
    return state


def in_their_states(frames: Sequence[Atoms], system: StateReading) -> list[Atoms]:
    """The frames, with charge and spin where they do not say; isolated atoms are left as they are."""
    for frame in frames:
        if not is_isolated_atom(frame):
            frame.info |= state_of(frame, system)
    return list(frames)


@dataclass(frozen=True)
class PoolSplit:
    """Who gets which structures of a fixed pool.

    Attributes:
        test: indices for the test set.
        initial: indices for the initial set.
        rest: indices of the candidates, in their order.
    """

    test: tuple[int, ...]
    initial: tuple[int, ...]
    rest: tuple[int, ...]

    @property
    def outside_test(self) -> tuple[int, ...]:
        """All indices but those of the test set, in their order."""
        return tuple(sorted((*self.initial, *self.rest)))

    def with_initial(self, chosen: Sequence[int]) -> PoolSplit:
        """The same with other structures in the initial set, in the order given."""
        taken = set(chosen)
        return PoolSplit(self.test, tuple(chosen), tuple(one for one in self.outside_test if one not in taken))


def split_pool(
    size: int,
    initial: int,
    test: int | Mapping[str, int],
    seed: int,
    owners: Sequence[str | None] = (),
    shares: Mapping[str, float] | None = None,
) -> PoolSplit:
    """Shares out a pool: test structures first, so that they stay the same when the initial set changes.

    Args:
        size: structures in the pool.
        initial: how many of them are for the initial set; named systems share these, see `choose_for_systems`.
        test: how many are for the test set, of all or of each of some systems.
        seed: of the campaign.
        owners: the systems of the structures.
        shares: of named systems, where there are any.

    Raises:
        InputError: the pool is too small.
    """
    count = test if isinstance(test, int) else sum(test.values())
    if initial + count > size:
        raise InputError(
            f"the pool has {size} structures, too few for test.from_pool {count} and initial.from_pool {initial}."
        )
    order = numpy_generator(seed, "pool").permutation(size).tolist()
    held_out = order[:count] if isinstance(test, int) else _drawn_of_each(order, test, owners)
    taken = set(held_out)
    left = [place for place in order if place not in taken]
    split = PoolSplit(tuple(held_out), tuple(left[:initial]), tuple(sorted(left[initial:])))
    if not shares:
        return split

    def drawn(_: str | None, mine: np.ndarray) -> list[tuple[int, float]]:
        return [(place, 0.0) for place in left if mine[place]]

    return split.with_initial([place for place, _ in choose_for_systems(drawn, owners, shares, initial)])


def _drawn_of_each(order: Sequence[int], counts: Mapping[str, int], owners: Sequence[str | None]) -> list[int]:
    """The given number of structures of each of some systems, the first ones in an order."""
    found = []
    for name, count in counts.items():
        own = [place for place in order if owners[place] == name]
        if len(own) < count:
            raise InputError(
                f"the pool has {len(own)} structures of system '{name}', fewer than test.from_pool.{name} {count}; "
                "ask for fewer, or add some that say their system in their info."
            )
        found += own[:count]
    return found


# ------------------------------------------------------------------------------------------------------- labelled sets


def planned_calls(settings: InitialSettings | TestSettings, geometries: Sequence[Atoms]) -> int:
    """Label-source calls that a labelled set needs, where dynamics begin at some start geometries."""
    of_each = [[run.calls for run in settings.md if concerns(run.systems, system_of(start))] for start in geometries]
    dynamics = sum(sum(own) + bool(own) for own in of_each)  # the start is labelled once
    if isinstance(settings, TestSettings):
        return settings.pool_count + dynamics
    rattled = 0 if settings.rattle is None else settings.rattle.count
    taught = 0 if settings.from_teacher is None else settings.from_teacher.count
    return settings.pool_count + rattled + settings.generated_count + dynamics + taught


@dataclass(frozen=True)
class Source:
    """Where labelled sets come from.

    Attributes:
        geometries: start geometries.
        system: charge and spin of structures that do not say.
        labeller: the label source with its store.
        seed: of the campaign.
        provenance: what is stored with every label.
        say: tells the user.
        advance: is told how many label-source calls were made.
        remarks: keys of `info` that structures of datasets keep.
    """

    geometries: Sequence[Atoms]
    system: SystemSettings
    labeller: Labeller
    seed: int
    provenance: Mapping[str, Any]
    say: Say
    advance: Callable[[int], None] = lambda calls: None
    remarks: Sequence[str] = ()

    def label(self, frames: Sequence[Atoms], origin: str, purpose: str) -> list[Atoms]:
        """Labelled copies with ``info["origin"]`` and ``info["label_id"]``; failed labels are left out and reported."""
        if not frames:
            return []
        provenance = {**self.provenance, "purpose": purpose, "origin": origin}
        results = self.labeller.label(
            frames, [provenance | named(frame) for frame in frames], on_label=lambda _: self.advance(1)
        )
        failed = [result.error for result in results if result.atoms is None]
        if failed:
            self.say(f"{len(failed)} of {len(frames)} labels ({origin}) failed, the first because: {failed[0]}")
        return [
            _marked(result.atoms, origin=origin, label_id=result.identity)
            for result in results
            if result.atoms is not None
        ]

    def dynamics(self, runs: Sequence[LabelMdSettings], purpose: str) -> list[tuple[LabelMdSettings, list[Atoms]]]:
        """The frames that each trajectory keeps, all start geometries together."""
        kept: list[tuple[LabelMdSettings, list[Atoms]]] = [(run, []) for run in runs]
        owns = [
            [(n, run) for n, run in enumerate(runs) if concerns(run.systems, system_of(start))]
            for start in self.geometries
        ]
        planned = [[_md_run(run, f"{n}-{number}") for n, run in own] for number, own in enumerate(owns)]
        dynamics = list(zip(self.geometries, planned, strict=True))
        for own, (start, plans) in zip(owns, dynamics, strict=True):
            if not own:
                continue
            trajectories = run_label_md(
                start,
                self.labeller,
                plans,
                seed=self.seed,
                purpose=purpose,
                provenance={**self.provenance, **named(start)},
                on_run=lambda plan: self.advance(plan.total_steps),
                dynamics=dynamics,
            )
            for (n, run), trajectory in zip(own, trajectories, strict=True):
                if trajectory.error is not None:
                    of = "" if (system := system_of(start)) is None else f" of '{system}'"
                    self.say(f"label-source MD{of} at {run.temperature:g} K ended early: {trajectory.error}")
                for frame in trajectory.frames:
                    name = self.labeller.identity(frame)
                    kept[n][1].append(_marked(frame, origin=f"md-{run.temperature:g}K", label_id=name))
        return kept


def initial_set(
    settings: InitialSettings,
    source: Source,
    pool: Sequence[Atoms],
    generated: Mapping[str, Sequence[Atoms]] | None = None,
    chosen: Sequence[Atoms] = (),
    *,
    needed: Collection[str] = (),
) -> list[Atoms]:
    """The first labelled structures; ``info["round"]`` is 0.

    Args:
        settings: what it is made of.
        source: start geometries and label source.
        pool: the structures that a fixed pool gives to it.
        generated: structures that are made for it, by the kind of their generator.
        chosen: those that were chosen from a teacher's frames.
        needed: named systems of which there have to be some; of others without any the user is told.

    Raises:
        LabelError: nothing could be labelled, or nothing of a system that has to be there.
    """
    frames: list[Atoms] = []
    if settings.dataset is not None:
        given = labelled_frames(settings.dataset, source.system, settings, source.remarks)
        given = name_systems(given, source.geometries, str(settings.dataset))
        frames += [_marked(frame, origin="dataset") for frame in given]
    frames += source.label(pool, "pool", "initial")
    if settings.rattle is not None:
        frames += source.label(_rattled(settings, source), "rattle", "initial")
    for kind, made in (generated or {}).items():
        frames += source.label(made, kind, "initial")
    for _, kept in source.dynamics(settings.md, "initial"):
        frames += kept
    frames += source.label(chosen, "teacher", "initial")
    frames = without_repeats(frames, geometry_key, "the initial set", source.say)
    if not frames:
        raise LabelError(
            "no structure of the initial set could be labelled. Correct the cause and resume: they are tried again."
        )
    unknown = unknown_systems(frames, source.geometries)
    if missing := [name for name in unknown if name in needed]:
        raise LabelError(
            f"no structure of system {quoted(missing)} in the initial set could be labelled, and walkers need some. "
            "Correct the cause and resume: they are tried again."
        )
    if unknown:
        absent = quoted(unknown)
        source.say(f"the initial set holds no structure of system {absent}: the first potential sees no label of it.")
    return [_marked(frame, round=0) for frame in frames]


def unknown_systems(frames: Iterable[Atoms], geometries: Iterable[Atoms]) -> list[str]:
    """The named systems of start geometries that none of some structures is of."""
    there = {system_of(frame) for frame in frames}
    return [name for name in names_of(geometries) if name not in there]


def held_out_set(
    settings: TestSettings, source: Source, pool: Sequence[Atoms], training: Iterable[Atoms]
) -> list[Atoms]:
    """The test set; ``info["group"]`` names the group of each frame.

    Structures that are also in the training set (such as the start geometry), turned or shifted ones too, are left out
    and reported.

    Args:
        settings: what it is made of.
        source: start geometries and label source.
        pool: the structures that a fixed pool gives to it.
        training: structures that must not be in it.

    Raises:
        LabelError: nothing of a group could be labelled.
        InputError: every structure of a group is trained on.
    """
    parts: list[tuple[str, list[Atoms]]] = []
    systems = names_of(source.geometries)
    for run, (_, frames) in zip(settings.md, source.dynamics(settings.md, "test"), strict=True):
        of_each = by_system(frames, systems)
        parts += [
            (group_of(system, run.group), of_each.get(system, [])) for system in run.systems or systems or (None,)
        ]
    for file in settings.files:
        given = [_marked(frame, origin="file") for frame in test_file(file, source.system, source.geometries)]
        parts += grouped(file.group, given, systems)
    if settings.from_pool:
        parts += grouped("pool", source.label(pool, "pool", "test"), systems)
    trained = {geometry_key(atoms): atoms for atoms in training}
    likeness = Likeness(trained.values())
    held_out: list[Atoms] = []
    for group, frames in parts:
        if not frames:
            raise LabelError(
                f"no structure of test group {group} could be labelled. Correct the cause and resume: they are tried "
                "again."
            )
        _tell_contradictions(frames, trained, group, source.say)
        once = without_repeats(frames, geometry_key, f"test group {group}", source.say, untold=trained)
        fresh = [frame for frame in once if geometry_key(frame) not in trained and frame not in likeness]
        if len(fresh) < len(frames):
            lost = len(frames) - len(fresh)
            source.say(f"{lost} structures of test group {group} are trained on or come twice; they were left out.")
        if not fresh:
            raise InputError(
                f"nothing is left of test group {group}, since its structures are all trained on; change the test "
                "section of the config."
            )
        held_out += [_marked(frame, group=group) for frame in fresh]
    return held_out


def test_file(file: TestFileSettings, system: SystemSettings, geometries: Sequence[Atoms]) -> list[Atoms]:
    """The structures of a file of the test set, each with the name of its system, if it has one."""
    return name_systems(labelled_frames(file.path, system, file), geometries, str(file.path))


def grouped(group: str, frames: Sequence[Atoms], systems: Sequence[str]) -> list[tuple[str, list[Atoms]]]:
    """The groups of the test set that structures make up, with these: one for each system; at least one."""
    found = by_system(frames, systems) or {None: []}
    return [(group_of(system, group), some) for system, some in found.items()]


def check_target_labels(target: TargetErrorSettings | None, test: Sequence[Atoms]) -> None:
    """Refuses a wanted error of stresses, dipoles and the like on a group of the test set that has no such label.

    Args:
        target: the stopping rule, if there is one.
        test: labelled structures of groups ``info["group"]``.

    Raises:
        InputError: names the group.
    """
    if target is None or target.of_all:
        return
    label, owners = target.of.label, target.of.owners
    groups = {str(frame.info["group"]) for frame in test}
    able = {str(frame.info["group"]) for frame in test if label in labels_of(frame)}
    for group in sorted(groups if target.group is None else groups & {target.group}):
        if group not in able:
            raise InputError(
                f"stopping.target_error.metric '{target.metric}' needs the {label} of {owners}, and test group "
                f"'{group}' has none; name another metric or group."
            )


def _rattled(settings: InitialSettings, source: Source) -> list[Atoms]:
    assert settings.rattle is not None
    share, more = divmod(settings.rattle.count, len(source.geometries))
    frames = []
    for number, start in enumerate(source.geometries):
        generator = numpy_generator(source.seed, "rattle", number)
        frames += rattle(start, share + (number < more), generator, stdev=settings.rattle.stdev)
    return frames


def _md_run(settings: LabelMdSettings, name: str) -> MDRun:
    return MDRun(
        temperature=settings.temperature,
        steps=settings.steps,
        timestep=settings.timestep,
        friction=settings.friction,
        every=settings.every,
        equilibration=settings.equilibration,
        name=name,
    )


def _marked(atoms: Atoms, **info: str | int) -> Atoms:
    atoms.info.update(info)
    return atoms


def _tell_contradictions(frames: Sequence[Atoms], trained: Mapping[bytes, Atoms], group: str, say: Say) -> None:
    """Tells of test structures that are trained on with a label other than their own."""
    apart = [
        (number, difference)
        for number, frame in enumerate(frames)
        if (same := trained.get(geometry_key(frame))) is not None
        and (difference := label_difference(same, frame)) is not None
    ]
    if apart:
        say(
            f"test group {group}: {len(apart)} structures are trained on with another label, the first of them number "
            f"{apart[0][0]} ({apart[0][1]}); do training and test set come from the same method?"
        )
