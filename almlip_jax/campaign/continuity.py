"""What has to stay as it was when a campaign goes on: settings that its data depend on, its label source, its files.

The state of a campaign remembers the settings it began with and a digest of each file that a later stage reads, so that
neither another label source nor an edit by hand passes unseen into a dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import TypeAdapter, ValidationError

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import CampaignState, Stage
from almlip_jax.errors import InputError
from almlip_jax.files import plain
from almlip_jax.oracles import SourceSettings
from almlip_jax.yaml_text import read_yaml

if TYPE_CHECKING:
    from almlip_jax.campaign.config import ExperimentConfig, PotentialConfig

_LASTING = ("seed", "precision", "system", "initial", "test", "model", "ensemble")
"""Sections of a config that a campaign keeps."""

_ACCEPT = "begin a new run for it, or pass --accept-changes if the labels are meant to be mixed"


# ------------------------------------------------------------------------------------------------------------- settings


def with_earlier_defaults(data: dict[str, Any]) -> dict[str, Any]:
    """The config of a run directory, with keys that its version did not know set to what that version did.

    Configs of run directories hold every key, so that an absent one did not exist when the run began.
    """
    oracle = data.get("oracle")
    if not isinstance(oracle, dict):
        return data
    kind = SourceSettings.kinds().get(str(oracle.get("kind")))
    return data if kind is None else {**data, "oracle": {**kind.earlier_defaults, **oracle}}


def settled(config: ExperimentConfig) -> dict[str, Any]:
    """What a campaign remembers of its config: the sections that last, the label source and its version."""
    data = config.model_dump(mode="json")
    kept = {name: data[name] for name in (*_LASTING, "oracle")}
    return dict(plain({**kept, "oracle_version": config.oracle.version(), **_begun_with(config), **taught_by(config)}))


def _begun_with(config: ExperimentConfig) -> dict[str, str]:
    """Digest of the potential that trainings begin with, if there is one."""
    saved = config.beginning
    return {} if saved is None else {"initial_potential": saved.digest(training=True)}


_CHANGEABLE = {"source", "driver", "executor", "tuning", "replay", "replay_share"}
"""Keys of a teacher that a campaign may change; of its sources, what changes no label."""


def taught_by(config: ExperimentConfig) -> dict[str, Any]:
    """What a campaign remembers of its teacher, if there is one: what its labels and frames depend on."""
    if config.teacher is None:
        return {}
    source = config.teacher.source
    kept = config.teacher.model_dump(mode="json", exclude=_CHANGEABLE)
    drives = {} if (driver := config.teacher.driver) is None else {"driver": [driver.identity(), driver.bound_to()]}
    return {"teacher": plain({**kept, **drives, "source": source.identity(), "version": source.bound_to()})}


def check_settings(config: ExperimentConfig, run: RunDirectory, state: CampaignState, *, accept: bool) -> str | None:
    """Refuses a config that does not fit the rounds so far.

    Args:
        config: of the campaign from now on.
        run: its directory.
        state: of the campaign; runs of earlier versions remember nothing in it, and are compared with their config.
        accept: whether another label source is meant.

    Returns:
        what the user should know, or None.

    Raises:
        InputError: a section that lasts, or the label source, has changed.
    """
    remembered = with_earlier_defaults(state.settled or _written(run))
    new = plain(config.model_dump(mode="json"))
    where = "what the campaign began with" if state.settled else f"that of {run.config}"
    for name in _LASTING:
        was = as_read_now(config, name, remembered.get(name, new[name]))
        if _without_shares(name, was) != _without_shares(name, new[name]):
            raise InputError(
                f"'{name}' differs from {where}, on which the rounds so far depend; begin a new run for it."
            )
    was_begun, begun = remembered.get("initial_potential"), _begun_with(config).get("initial_potential")
    if was_begun is not None and begun != was_begun:
        raise InputError(
            f"the potential {config.initial.potential} (initial.potential) is not the one that the campaign began "
            "with; restore it from a copy, or begin a new run."
        )
    was_taught, taught = state.settled.get("teacher", {}), taught_by(config).get("teacher", {})
    replaced = bool(was_taught and taught) and state.stage is Stage.TEACHER  # nothing has been learned from it yet
    if was_taught != taught and not replaced:
        raise InputError(
            f"the teacher differs from {where} ({_differing('teacher', was_taught, taught)}), on which the rounds so "
            "far depend; begin a new run for it."
        )
    source, now = _identity_of(config, remembered.get("oracle")), plain(config.oracle.identity())
    if source != now and not accept:
        raise InputError(
            f"the label source differs from {where} ({_differing('oracle', source, now)}), and its labels "
            f"would not match those that are there; {_ACCEPT}."
        )
    was_version, version = remembered.get("oracle_version"), config.oracle.version()
    if was_version in (None, version):
        return None
    if config.oracle.bound_to() is not None and not accept:
        raise InputError(
            f"the label source is now version {_short(version)}, but the labels so far are of version "
            f"{_short(str(was_version))}; {_ACCEPT}."
        )
    return (
        f"the label source is now {_short(version)}, earlier labels are of {_short(str(was_version))}; make sure that "
        "they agree."
    )


def exploration_of(config: ExperimentConfig) -> dict[str, Any]:
    """What the state remembers of the settings of an exploration."""
    return dict(plain(config.exploration.model_dump(mode="json")))


def explores_otherwise(config: ExperimentConfig, state: CampaignState) -> bool:
    """Whether the config asks for another exploration than the last one; not known of runs of earlier versions."""
    known = state.explored_with
    return known is not None and as_read_now(config, "exploration", known) != exploration_of(config)


def _without_shares(name: str, section: Any) -> Any:
    """A section without what may change in it: what systems get of walkers and batches to come."""
    if name != "system" or not isinstance(section, dict):
        return section
    return {key: value for key, value in section.items() if key != "shares"}


def _differing(section: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Keys of a section that are not the same."""
    return ", ".join(f"{section}.{key}" for key in sorted({*was, *now}) if was.get(key) != now.get(key))


def _written(run: RunDirectory) -> dict[str, Any]:
    try:
        data = read_yaml(run.config).value
    except InputError as error:
        raise InputError(f"{run.config} cannot be read ({error}); restore it from a copy.") from error
    if not isinstance(data, dict):
        raise InputError(f"{run.config} holds no config; restore it from a copy.")
    return data


def as_read_now(config: PotentialConfig, name: str, section: Any) -> Any:
    """A remembered section as this version reads it, which may know more keys; as it is where it cannot be read."""
    try:
        return plain(_section(config, name).dump_python(_read(config, name, section), mode="json"))
    except ValidationError:
        return section


def _identity_of(config: ExperimentConfig, section: Any) -> dict[str, Any]:
    """The settings of a remembered label source that decide what its labels are."""
    try:
        return dict(plain(_read(config, "oracle", section).identity()))
    except ValidationError:
        return section if isinstance(section, dict) else {}


def _read(config: PotentialConfig, name: str, section: Any) -> Any:
    """A remembered section; earlier versions remembered paths as they were given, from the working directory."""
    return _section(config, name).validate_python(section, context={"folder": Path.cwd()})


def _section(config: PotentialConfig, name: str) -> TypeAdapter[Any]:
    field = type(config).model_fields[name]
    kind: Any = Annotated[field.annotation, field]
    return TypeAdapter(kind)


def _short(version: str) -> str:
    return version if len(version) < 40 else f"{version[:12]}..."


# ---------------------------------------------------------------------------------------------------------------- files


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_after(stage: Stage, round_index: int, run: RunDirectory, known: Mapping[str, str]) -> dict[str, str]:
    """Digests of the files that later stages read, once a stage is done; by their places in the run directory.

    Args:
        stage: that has just been done.
        round_index: its round.
        run: the run directory.
        known: the digests before.
    """
    here, following = run.round(round_index), run.round(round_index + 1)
    made = {
        Stage.TEACHER: [run.teacher.frames],
        Stage.INITIAL: [here.dataset],
        Stage.TEST: [run.test],
        Stage.EXPLORE: [here.pool, here.drawn],
        Stage.SELECT: [here.batch],
        Stage.LABEL: [following.dataset, here.calibration],
    }.get(stage, [])
    found = dict(known)
    if stage is Stage.LABEL:  # of the round before too, where its labels were under way
        calibrations = [run.round(index).calibration for index in range(round_index)]
        made += [path for path in calibrations if _place(run, path) not in known]
    if stage is Stage.LABEL:
        found.pop(_place(run, here.pool), None)  # nobody reads it again
    for path in made:
        found.pop(_place(run, path), None)
        if path.exists():
            found[_place(run, path)] = digest(path)
    return found


def without_batch(run: RunDirectory, round_index: int, known: Mapping[str, str]) -> dict[str, str]:
    """Digests without that of the batch of a round, which will not be labelled."""
    return {place: one for place, one in known.items() if place != _place(run, run.round(round_index).batch)}


def check_files(run: RunDirectory, state: CampaignState) -> None:
    """Refuses to go on from files that are not as the campaign wrote them.

    Raises:
        InputError: names them.
    """
    needless = {_place(run, run.round(index).dataset) for index in range(1, state.round)}
    changed, missing = [], []
    for place, wanted in state.files.items():
        path = run.path / place
        if place == _place(run, run.config):
            continue
        if not path.is_file():
            missing += [] if place in needless else [place]
        elif digest(path) != wanted:
            changed.append(place)
    if missing:
        raise InputError(
            f"{', '.join(missing)} is missing in {run.path}, and the campaign goes on from it; restore it from a copy."
        )
    if changed:
        raise InputError(
            f"{', '.join(changed)} in {run.path} has changed since the campaign wrote it; restore it from a copy, or "
            "pass --accept-changes to go on with it as it is."
        )


def fresh_digests(run: RunDirectory, state: CampaignState) -> dict[str, str]:
    """The digests of the same files as they are now; those that are gone are left out."""
    return {place: digest(run.path / place) for place in state.files if (run.path / place).is_file()}


def config_edited(run: RunDirectory, state: CampaignState) -> bool:
    """Whether the config in the run directory is not the one that the campaign last ran with."""
    known = state.files.get(_place(run, run.config))
    return known is not None and run.config.is_file() and digest(run.config) != known


def with_config(run: RunDirectory, state: CampaignState) -> CampaignState:
    """The state, with the digest of the config in the run directory."""
    return state.model_copy(update={"files": {**state.files, _place(run, run.config): digest(run.config)}})


def _place(run: RunDirectory, path: Path) -> str:
    return path.relative_to(run.path).as_posix()
