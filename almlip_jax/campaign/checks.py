"""What is refused before a campaign pays for its first label: inputs with which it could not work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from almlip_jax.campaign.beginning import check_beginning
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.consistency import check_columns
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.making import starts_for
from almlip_jax.campaign.preparation import Say, check_target_labels, grouped, planned_calls, test_file, unknown_systems
from almlip_jax.campaign.systems import concerns, deal, name_systems, quoted, short_of_shares, systems_of_walkers
from almlip_jax.campaign.teaching import frame_keys
from almlip_jax.delta_learning import check_correction
from almlip_jax.ensembles import MixedEnsemble, build_ensemble
from almlip_jax.errors import InputError, LabelError
from almlip_jax.generation import GeneratorSettings
from almlip_jax.kinds import check_user_code
from almlip_jax.oracles import SourceSettings
from almlip_jax.potential.spanning import check_spannable
from almlip_jax.selection import Stratification
from almlip_jax.structures.carried import SYSTEM, system_of
from almlip_jax.structures.neighbors import largest_neighbor_count
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.targets import has_target
from almlip_jax.training import TrainingSettings, check_two_sources
from almlip_jax.training.dataset import refuse_mixed_states
from almlip_jax.training.reference import is_isolated_atom


def check_campaign(config: ExperimentConfig, say: Say = lambda text: None) -> None:
    """Refuses, before any label is paid, what could not work.

    Args:
        config: of the campaign.
        say: is told which start geometries generators leave out, and what else would not be as it seems.

    Raises:
        InputError: names it, and says what to do.
    """
    inputs = Inputs(config)
    starts = inputs.geometries
    geometries = len(starts)
    initial, budget = config.initial, config.stopping.max_labels
    check_beginning(config, inputs.start)
    check_user_code(config)
    check_columns(config.selection.selector, config.selection.batch, "selection.selector")
    _check_labels(config.oracle, starts)
    _check_teacher(config, inputs, say)
    explores = not inputs.listed and not config.exploration.pool_files and config.exploration.needs_starts
    dynamics = bool(initial.md or config.test.md or explores)
    if geometries == 0 and (initial.rattle is not None or dynamics):
        raise InputError("system.structures names no start geometry, which rattling and molecular dynamics need.")
    if (initial.from_pool or config.test.from_pool) and not config.exploration.pool_files:
        raise InputError("from_pool takes structures of a fixed pool, which only exploration.kind 'pool' has.")
    if not isinstance(initial.from_pool, int):
        check_columns(initial.from_pool.selector, initial.from_pool.count, "initial.from_pool.selector", scored=False)
    _check_listed(config, inputs)
    _check_generated(config, inputs)
    for left_out in inputs.left_out(_generators(config)):
        say(left_out)
    _tell_of_short_test(config, inputs, say)
    _tell_of_short_shares(config, inputs, say)
    _tell_of_other_orders(config, inputs, say)
    _check_first_of_each(config, inputs)
    config.exploration.check_geometries(inputs.listed or starts)
    _check_pressures(config, inputs)
    for note in config.exploration.notes:
        say(note)
    _check_strata(config, inputs)
    if initial.rattle is not None or dynamics:
        _check_atoms(starts)
    _check_cutoff(config.model.cutoff, starts)
    _check_learning(config, inputs)
    _check_target(config, inputs)
    calls = planned_calls(initial, starts)
    if budget is not None and calls > budget:
        raise InputError(
            f"the initial set needs {calls} label-source calls, more than stopping.max_labels {budget} allows; every "
            "step of the initial MD counts."
        )


def _tell_of_short_test(config: ExperimentConfig, inputs: Inputs, say: Say) -> None:
    """Says of which systems the pool gives the test set nothing, or all that it has."""
    if not (config.test.from_pool and config.system.named):
        return
    of_pool = Counter(map(system_of, inputs.pool))
    of_test = Counter(map(system_of, inputs.of_pool(inputs.test_of_pool)))
    for name in filter(of_pool.__getitem__, config.system.named):
        if not of_test[name] and isinstance(config.test.from_pool, int):
            say(
                f"test.from_pool {config.test.from_pool} draws no structure of system '{name}', of which the pool has "
                f"{of_pool[name]}; counts by system hold some of each ({{{name}: 10, ...}})."
            )
        if of_test[name] == of_pool[name]:
            say(
                f"test.from_pool takes all {of_pool[name]} structures of system '{name}' that the pool has, and leaves "
                "none to be chosen."
            )


def _tell_of_short_shares(config: ExperimentConfig, inputs: Inputs, say: Say) -> None:
    """Says of which systems there are fewer structures than they should have of the initial set."""
    initial, shares, asked = config.initial, config.system.parts, list[tuple[str, str, int, list[Atoms]]]()
    if not shares:
        return
    if initial.pool_count:
        asked.append(("the pool", "from_pool", initial.pool_count, inputs.of_pool(inputs.free_of_pool)))
    if initial.from_generated is not None:
        made = [one.frame for one in inputs.generated]
        asked.append(("what is generated", "from_generated", initial.from_generated.count, made))
    for what, key, count, frames in asked:
        room = Counter(name for frame in frames if (name := system_of(frame)) is not None)
        for name, (there, owed) in short_of_shares(shares, count, room).items():
            say(
                f"{what} has {there} structures of system '{name}', fewer than the {owed} of initial.{key} {count} "
                "that are its share; others take their places."
            )


def _tell_of_other_orders(config: ExperimentConfig, inputs: Inputs, say: Say) -> None:
    """Says of labelled structures at which no walker starts, since their atoms stand in another order."""
    if not config.exploration.starts_labelled:
        return
    by_kind: dict[bytes, list[Atoms]] = {}
    for one in inputs.known:
        by_kind.setdefault(_kind_of(one), []).append(one)
    for number, start in enumerate(inputs.geometries):
        alike = by_kind.get(_kind_of(start), [])
        other = sum(one.numbers.tolist() != start.numbers.tolist() for one in alike)
        if other:
            say(
                f"{other} of {len(alike)} structures of initial.dataset with the composition of start geometry "
                f"{number} have their atoms in another order, so that no walker starts at them; give both the same "
                "order."
            )


def _kind_of(frame: Atoms) -> bytes:
    """Its composition, and in which directions it repeats."""
    return np.sort(frame.numbers).tobytes() + frame.pbc.tobytes()


def needed_first(config: ExperimentConfig) -> tuple[str, ...]:
    """Systems of which the initial set has to hold structures: else their walkers would be lost at once."""
    if config.exploration.walkers_to_deal is None or config.initial.potential is not None:
        return ()
    return tuple(name for name in config.system.named if not _is_taught(config, name))


def _is_taught(config: ExperimentConfig, system: str) -> bool:
    """Whether a teacher has dynamics of a system."""
    baths = () if config.teacher is None else config.teacher.baths
    return any(concerns(bath.systems, system) for bath in baths)


def _check_first_of_each(config: ExperimentConfig, inputs: Inputs) -> None:
    """Refuses an initial set that will hold nothing of a system whose walkers need it."""
    initial, starts = config.initial, inputs.geometries
    needed = needed_first(config)
    if not needed:
        return
    known = [frame.copy() for frame in inputs.known]
    planned = name_systems(known, starts, str(initial.dataset))
    planned += [one for one in starts if any(concerns(run.systems, system_of(one)) for run in initial.md)]
    planned += starts[: 0 if initial.rattle is None else initial.rattle.count]
    made = [one.frame for one in inputs.generated]
    if initial.from_generated is not None:
        room = Counter(map(system_of, made))
        taken = deal(config.system.parts, initial.from_generated.count, {n: room[n] for n in config.system.parts})
        made = [frame for frame in made if system_of(frame) in taken]
    unknown = [name for name in unknown_systems([*planned, *made], starts) if name in needed]
    if not unknown:
        return
    short = initial.rattle is not None and initial.rattle.count < len(starts)
    raised = f"raise initial.rattle.count to at least the {len(starts)} start geometries, " if short else ""
    raise InputError(
        f"the initial set would hold no structure of system {quoted(unknown)}, and walkers of what the first potential "
        f"knows nothing of end before a frame can be labelled; {raised}add {{kind: rattled, count: 5, systems: "
        f"[{', '.join(unknown)}]}} to initial.generated, or labelled structures to initial.dataset that say their "
        "system in their info."
    )


def _check_pressures(config: ExperimentConfig, inputs: Inputs) -> None:
    """Refuses a pressure on walkers whose cell it could not act on."""
    exploration, shares = config.exploration, config.system.parts
    groups = [(number, group) for number, group in enumerate(exploration.walker_groups) for _ in range(group.count)]
    dealt = exploration.walkers_to_deal
    if not groups or dealt is None:
        return
    starts = [*inputs.geometries, *inputs.listed]
    keep = dict.fromkeys(system_of(start) for start in starts if not start.pbc.all())
    move = [name for name in shares if name not in keep]
    for owner, (number, group) in zip(systems_of_walkers(shares, dealt), groups, strict=True):
        if group.pressures == (0.0, 0.0) or owner not in keep:
            continue
        if owner is None:
            raise InputError(
                f"exploration.walkers.{number} are under a pressure, and not every start structure is periodic in all "
                "three directions; give the systems names (system.structures: {name: file}) and the pressure to those "
                "walkers whose systems are (systems: [name]), or leave it out."
            )
        others = f"name the systems that are (systems: [{', '.join(move)}])" if move else "leave it out"
        raise InputError(
            f"exploration.walkers.{number} are under a pressure, and some are of system '{owner}', which is not "
            f"periodic in all three directions; {others}, and give '{owner}' walkers without a pressure."
        )


def _check_atoms(geometries: Sequence[Atoms]) -> None:
    """Refuses isolated atoms, of whose displacements and dynamics nothing could be learned."""
    for number, start in enumerate(geometries):
        if is_isolated_atom(start):
            raise InputError(
                f"start geometry {number} of system.structures is an isolated atom ({start.symbols}), of which there "
                "is nothing to learn but its energy; leave it out, and give that in training.reference_energies or "
                "with initial.dataset."
            )


def _check_cutoff(cutoff: float, geometries: Sequence[Atoms]) -> None:
    """Refuses a cutoff so short that no atom of any start geometry has a neighbour."""
    if geometries and largest_neighbor_count(geometries, cutoff) == 0:
        raise InputError(
            f"no two atoms of any start geometry are within model.cutoff {cutoff:g} Angstrom; give a larger one."
        )


def _check_learning(config: ExperimentConfig, inputs: Inputs) -> None:
    """Refuses what its trainings, and what follows each of them, would refuse once labels are paid."""
    structures = [*inputs.geometries, *inputs.known, *inputs.pool, *(made.frame for made in inputs.generated)]
    if not structures:
        return
    ensemble = build_ensemble(config.model, config.ensemble, inputs.species)
    if not ensemble.sees_state:
        refuse_mixed_states(structures, " of start geometries, initial.dataset, pool and generated ones, in turn,")
    if config.spanned is not None:
        check_spannable(ensemble, config.spanned)
    if strange := sorted(set(config.exploration.species_named) - set(inputs.species.symbols)):
        raise InputError(
            f"exploration.gate.species names {strange[0]}, which is in no structure of the campaign; it holds "
            f"{', '.join(inputs.species.symbols)}."
        )


def _check_labels(source: SourceSettings, geometries: Sequence[Atoms | None], by: str = "") -> None:
    """Refuses start geometries that a label source would get wrong, their charge for instance; None it never meets."""
    for number, start in enumerate(geometries):
        try:
            if start is not None:
                source.check(start)
        except LabelError as error:
            raise InputError(
                f"start geometry {number} of system.structures cannot be labelled{by}: {error}."
            ) from error


def _check_teacher(config: ExperimentConfig, inputs: Inputs, say: Say) -> None:
    """Refuses a teacher that has nothing to begin at, or would get a start geometry wrong."""
    teacher, chosen, geometries = config.teacher, config.initial.from_teacher, inputs.geometries
    if teacher is None:
        return
    if not geometries:
        raise InputError("system.structures names no start geometry, which the dynamics of a teacher need.")
    if config.training.max_steps not in (
        TrainingSettings().max_steps,
        teacher.training.max_steps,
        teacher.tuning.max_steps,
    ):
        say(
            f"training.max_steps {config.training.max_steps} counts for nothing with a teacher: the first training has "
            f"teacher.training.max_steps {teacher.training.max_steps}, those of rounds have teacher.tuning.max_steps "
            f"{teacher.tuning.max_steps}."
        )
    if untaught := [name for name in config.system.named if not _is_taught(config, name)]:
        say(f"teacher.temperatures name none for system {quoted(untaught)}, of which the teacher teaches nothing.")
    taught = [start if runs else None for start, runs in zip(geometries, teacher.runs(geometries), strict=True)]
    _check_labels(teacher.source, taught, " by the teacher")
    if teacher.driver is not None:
        _check_labels(teacher.driver, taught, " by teacher.driver")
    if teacher.replay:
        members = build_ensemble(config.model, config.ensemble, SpeciesTable.of(geometries))
        for group in members.groups if isinstance(members, MixedEnsemble) else (members,):
            check_two_sources(group)
    check_correction_of(config, inputs)
    met = {int(z) for start in taught if start is not None for z in start.numbers}
    met |= set() if inputs.start is None else {*inputs.start.species.numbers}
    if teacher.correction is not None and (strange := [z for z in inputs.species.numbers if z not in met]):
        raise InputError(
            f"teacher.correction corrects what the teacher taught, which holds no {chemical_symbols[strange[0]]}; give "
            "it dynamics of a start geometry with this element, or leave the correction out."
        )
    if chosen is not None:
        if chosen.count > teacher.frames:
            raise InputError(f"initial.from_teacher.count {chosen.count} is more than teacher.frames {teacher.frames}.")
        check_columns(chosen.selector, chosen.count, "initial.from_teacher.selector")


def check_correction_of(config: ExperimentConfig, inputs: Inputs) -> None:
    """Refuses a correction of what a teacher teaches by a model that could not begin at zero; raises InputError."""
    if config.teacher is not None and config.teacher.correction is not None:
        try:
            check_correction(config.teacher.correction, inputs.species)
        except InputError as error:
            raise InputError(f"teacher.correction: {error}") from error


def _check_listed(config: ExperimentConfig, inputs: Inputs) -> None:
    """Refuses a file of starts that has none for a named system, or some of no system."""
    if not (config.system.named and inputs.listed):
        return
    found = [system_of(frame) for frame in inputs.listed]
    path = config.exploration.starts_file
    if None in found:
        raise InputError(
            f"{path}, frame {found.index(None)} belongs to none of the systems; name one in its info (system=...), "
            "or leave it out."
        )
    for name in config.system.named:
        if name not in found:
            raise InputError(f"{path} holds no structure of system '{name}', whose walkers start there; add some.")


def _check_generated(config: ExperimentConfig, inputs: Inputs) -> None:
    """Refuses generators that can make nothing of the start geometries, and what the label source would get wrong."""
    for number, made in enumerate(inputs.generated):
        try:
            config.oracle.check(made.frame)
        except LabelError as error:
            raise InputError(
                f"generated structure {number} of the initial set ('{made.kind}') cannot be labelled: {error}."
            ) from error
    for one in config.exploration.generators:
        starts_for(one, inputs.geometries)
        if strange := sorted(one.elements - set(inputs.species.numbers)):
            raise InputError(
                f"exploration '{one.kind}' makes structures with {chemical_symbols[strange[0]]}, which nothing in the "
                "initial set holds; put some into initial.generated, or leave it out."
            )


def _generators(config: ExperimentConfig) -> tuple[GeneratorSettings, ...]:
    """The generators of a campaign: of its initial set and of its exploration."""
    return (*config.initial.generated, *config.exploration.generators)


def _check_target(config: ExperimentConfig, inputs: Inputs) -> None:
    """Refuses a wanted error of stresses, dipoles and the like where structures of the test set will not have any."""
    target = config.stopping.target_error
    if target is None or target.of_all:
        return
    given, to_label = _test_groups(config, inputs)
    for group in [*given, *to_label] if target.group is None else (target.group,):
        if not any(has_target(frame, target.of) for frame in to_label.get(group, [])):  # their labels will say
            check_target_labels(target, given.get(group) or [_marked(Atoms(), group)])


def _test_groups(config: ExperimentConfig, inputs: Inputs) -> tuple[dict[str, list[Atoms]], dict[str, list[Atoms]]]:
    """Structures of the groups of the test set: those with labels, and those whose like will be labelled."""
    systems = tuple(config.system.named)
    given: dict[str, list[Atoms]] = {}
    to_label: dict[str, list[Atoms]] = {}
    for file in config.test.files:
        for group, frames in grouped(file.group, test_file(file, config.system, inputs.geometries), systems):
            given.setdefault(group, []).extend(_marked(frame, group) for frame in frames)
    for run in config.test.md:
        starts = [one for one in inputs.geometries if concerns(run.systems, system_of(one))]
        to_label.update(grouped(run.group, starts, systems))
    if config.test.from_pool:
        to_label.update(grouped("pool", inputs.of_pool(inputs.test_of_pool), systems))
    return given, to_label


def _marked(frame: Atoms, group: str) -> Atoms:
    frame.info["group"] = group
    return frame


def _check_strata(config: ExperimentConfig, inputs: Inputs) -> None:
    """Refuses selectors that give shares to strata which none of their candidates, as far as these are known, has."""
    initial = config.initial
    taught, of_pool, made = initial.from_teacher, initial.from_pool, initial.from_generated
    if taught is not None and config.teacher is not None:
        strata, carried = taught.selector.stratification, frame_keys(config.teacher, inputs.geometries)
        if strata is not None and strata.by not in carried:
            raise InputError(
                f"initial.from_teacher.selector: no frame of a teacher has '{strata.by}', by which the selector is "
                f"stratified; frames have {', '.join(carried)}."
            )
    if not isinstance(of_pool, int) and of_pool.selector.stratification is not None:
        candidates = inputs.of_pool(inputs.free_of_pool)
        _check_shares(of_pool.selector.stratification, candidates, inputs.known, "initial.from_pool.selector")
    if made is not None and made.selector.stratification is not None:
        candidates = [one.frame for one in inputs.generated]
        _check_shares(made.selector.stratification, candidates, inputs.known, "initial.from_generated.selector")
    strata = config.selection.selector.stratification
    if strata is not None and strata.by == SYSTEM:
        _check_systems(strata, config.system.named)
    if strata is not None and inputs.pool and all(frame.info.get(strata.by) is None for frame in inputs.pool):
        raise InputError(
            f"selection.selector: no structure of the pool has '{strata.by}', by which the selector is stratified; "
            "name another key."
        )


def _check_systems(strata: Stratification, systems: Collection[str]) -> None:
    """Refuses strata that are systems where these have no names, or others."""
    if not systems:
        raise InputError(
            "selection.selector is stratified by 'system', but the systems have no names; give system.structures as "
            "{name: file}, or name another key."
        )
    strange = sorted(set(strata.shares) - set(systems)) if isinstance(strata.shares, dict) else []
    if strange:
        raise InputError(f"selection.selector: shares name '{strange[0]}'; the systems are: {', '.join(systems)}.")


def _check_shares(strata: Stratification, among: Sequence[Atoms], known: Sequence[Atoms], where: str) -> None:
    """Refuses candidates of which none has a share, next to known structures."""
    values, others = ([frame.info.get(strata.by) for frame in frames] for frames in (among, known))
    try:
        strata.strata(values, others, (len(values), len(others)))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
