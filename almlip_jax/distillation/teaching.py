"""What the teacher says: structures made as the config asks, labelled, and parted into those to train on and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ase import Atoms

from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.continuity import as_read_now
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.preparation import (
    Say,
    Source,
    bare_frames,
    initial_set,
    labelled_frames,
    planned_calls,
    start_geometries,
)
from almlip_jax.distillation.folder import DistilDirectory
from almlip_jax.distillation.settings import DistilConfig
from almlip_jax.errors import InputError, LabelError
from almlip_jax.files import plain, read_json, write_json
from almlip_jax.keys import numpy_generator
from almlip_jax.oracles import Labeller, LabelStore
from almlip_jax.progress import Progress
from almlip_jax.structures.io import write_structures
from almlip_jax.structures.likeness import Likeness
from almlip_jax.structures.repeats import geometry_key, without_repeats
from almlip_jax.training import is_isolated_atom

_FREE = ("rounds", "executor", "name")
"""Sections that may change when a distillation goes on."""


def check_distillation(config: DistilConfig, say: Say = lambda text: None) -> list[Atoms]:
    """Refuses, before any label is made, what could not work; gives the structures of the files.

    Args:
        config: what to make.
        say: is told which start geometries generators leave out, and what counts for nothing.

    Raises:
        InputError: names it, and says what to do.
    """
    check_campaign(config.before_teaching(), say)
    idle = [name for name in ("exploration", "selection") if name in config.model_fields_set and not config.rounds]
    if idle:
        say(f"rounds is 0: {' and '.join(idle)}, which only rounds look at, will not be used; raise rounds for that.")
    for file in config.test:
        labelled_frames(file.path, config.system, file)
    given = []
    for path in config.initial.files:
        for number, frame in enumerate(bare_frames(path, config.system)):
            try:
                config.teacher.check(frame)
            except LabelError as error:
                raise InputError(f"{path}, frame {number} cannot be labelled: {error}.") from error
            given.append(frame)
    return given


def teach(
    config: DistilConfig, given: Sequence[Atoms], place: DistilDirectory, store: LabelStore, progress: Progress
) -> None:
    """Has the teacher label what the student begins with, and parts it; what is there already stays.

    Args:
        config: what to make.
        given: structures of the files, as `check_distillation` gives them.
        place: the folder, which this process has locked.
        store: its label store.
        progress: tells the user.

    Raises:
        InputError: the folder holds what was made otherwise, or nothing would be held out.
        LabelError: nothing could be labelled.
    """
    made_with = _made_with(config)
    if place.taught.exists():
        before = _as_read_now(config, read_json(place.taught).get("made_with", {}))
        changed = sorted(name for name in {*made_with, *before} if made_with.get(name) != before.get(name))
        if changed:
            raise InputError(
                f"{place.path} holds a distillation with another {', '.join(changed)}; choose another folder with "
                "--out, or delete this one."
            )
        return
    starts, made = start_geometries(config.starts), config.initial.made
    calls = len(given) + (0 if made is None else planned_calls(made, starts))
    with (
        Labeller(config.teacher, store, config.executor) as labeller,
        progress.stage("teach", calls, unit="labels") as advance,
    ):
        about = {"campaign": config.name}
        source = Source(starts, config.system, labeller, config.seed, about, progress.message, advance)
        frames = source.label(given, "structures", "initial")
        frames += (
            [] if made is None else initial_set(made, source, [], Inputs(config.before_teaching()).generated_to_label)
        )
    if not frames:
        raise LabelError("the teacher could not label a single structure. Correct the cause and run the command again.")
    frames = without_repeats(frames, geometry_key, "the structures of the teacher", progress.message)
    train, held_out = parted(frames, config.held_out, config.seed)
    held_out = not_trained_on(held_out, train, progress.message)
    write_structures(place.train, train)
    write_structures(place.held_out, held_out)
    write_json(place.taught, {"made_with": made_with, "train": len(train), "held_out": len(held_out)})


def _made_with(config: DistilConfig) -> dict[str, Any]:
    content = {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}
    return dict(plain({**content, "teacher": [config.teacher.identity(), config.teacher.bound_to()]}))


def _as_read_now(config: DistilConfig, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier version may have written, which did not know every key."""
    read = {*type(config).model_fields} - {"teacher"}
    return {name: as_read_now(config, name, one) if name in read else one for name, one in made_with.items()}


def parted(frames: Sequence[Atoms], share: float, seed: int) -> tuple[list[Atoms], list[Atoms]]:
    """Structures to train on, and those that are held out.

    Of a trajectory (frames that follow each other, with a rising ``info["step"]``) the end is held out, since frames
    next to each other are alike; of others, structures drawn at random.  Isolated atoms are trained on.

    Args:
        frames: labelled.
        share: of them to hold out.
        seed: of the draws.

    Raises:
        InputError: the share of so few is none.
    """
    generator = numpy_generator(seed, "held_out")
    chosen: set[int] = set()
    owed = 0.0  # shares of a structure add up over the groups
    for members, is_trajectory in _groups(frames):
        owed += share * len(members)
        number = int(owed + 1e-9)
        owed -= number
        order = members if is_trajectory else generator.permutation(members).tolist()
        chosen.update(order[len(order) - number :])
    if not chosen:
        raise InputError(
            f"the share held_out {share:g} of {len(frames)} structures is not a single one; raise it, or have the "
            "teacher label more."
        )
    train = [frame for n, frame in enumerate(frames) if n not in chosen]
    return train, [frame for n, frame in enumerate(frames) if n in chosen]


def not_trained_on(held_out: Sequence[Atoms], train: Sequence[Atoms], say: Say) -> list[Atoms]:
    """Held out structures without those that are trained on in other words: turned, shifted, atoms in another order.

    Args:
        held_out: structures that errors are measured on.
        train: structures that are trained on.
        say: is told how many are left out.

    Raises:
        InputError: none would be left.
    """
    likeness = Likeness(train)
    left = [frame for frame in held_out if frame not in likeness]
    if not left:
        raise InputError(
            f"all {len(held_out)} structures held out are trained on too, turned, shifted or with atoms in another "
            "order; raise held_out, or have the teacher label other ones."
        )
    if len(left) < len(held_out):
        say(
            f"{len(held_out) - len(left)} of {len(held_out)} structures held out are trained on too, turned, shifted "
            "or with atoms in another order; they are left out."
        )
    return left


def _groups(frames: Sequence[Atoms]) -> list[tuple[list[int], bool]]:
    """Numbers of the frames of each trajectory, and of all others together."""
    others: list[int] = []
    trajectories: list[list[int]] = []
    before: tuple[str, int] | None = None
    for n, frame in enumerate(frames):
        if "step" not in frame.info:
            before = None
            if not is_isolated_atom(frame):
                others.append(n)
            continue
        here = (str(frame.info.get("origin", "")), int(frame.info["step"]))
        if before is None or before[0] != here[0] or here[1] <= before[1]:
            trajectories.append([])
        trajectories[-1].append(n)
        before = here
    return [(others, False), *((members, True) for members in trajectories)]
