"""What sections of a config ask of each other: refused before anything is paid where one cannot serve another."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from almlip_jax.campaign.choice import ExplorationChoice
from almlip_jax.campaign.settings import (
    LabelMdSettings,
    SelectionSettings,
    ShareBelowSettings,
    StoppingSettings,
    TestSettings,
)
from almlip_jax.campaign.systems import check_known, systems_of_walkers
from almlip_jax.campaign.teacher import TeacherBath
from almlip_jax.ensembles import EnsembleSettings, require_score, require_spread, require_target
from almlip_jax.errors import InputError
from almlip_jax.features import declared
from almlip_jax.generation import GeneratorSettings
from almlip_jax.models import how_given
from almlip_jax.oracles import ExecutorSettings, SourceSettings
from almlip_jax.scores import names, needs_no_fit, scores
from almlip_jax.selection import TEACHER_SCORES, Candidates, Environments, SelectorSettings, Strata
from almlip_jax.settings import Settings, sections
from almlip_jax.targets import targets
from almlip_jax.training import TrainingSettings


def check_judges(
    exploration: ExplorationChoice,
    selection: SelectionSettings,
    stopping: StoppingSettings,
    members: EnsembleSettings,
    further: Collection[str] = (),
    *,
    teacher: bool = False,
) -> None:
    """Refuses what would judge by an uncertainty that the ensemble does not have, or by a teacher that is not there.

    ``further`` is what the model gives besides the energy, ``teacher`` whether there is one.

    Raises:
        ValueError: names the key, and says what to do.
    """
    exploration.check(members, further)
    check_selector(selection.selector, members, "selection.selector", further, teacher=teacher)
    require_target(stopping.monitor, further, "stopping.monitor")
    if stopping.plateau is not None:
        require_score(stopping.monitor, members, "stopping.plateau")


def check_labels(further: Collection[str], oracle: SourceSettings, where: str = "oracle") -> None:
    """Refuses a model that is to give what its label source, under some key, does not label; raises ValueError."""
    for target in targets(further):
        if not oracle.gives(target.name):
            flagged = [kind for kind, one in SourceSettings.kinds().items() if target.name in one.model_fields]
            raise ValueError(
                f"the model learns {target.many} ('{target.name}') from labels, which the label source does not give; "
                f"{''.join(f'take {where}.kind {kind} with {target.name}: true, or ' for kind in flagged)}let "
                f"{where}.targets name it (kinds ase and user), take kind file or external or one whose gives() says "
                "so, or take a model without."
            )


def check_executor(oracle: SourceSettings, executor: ExecutorSettings) -> None:
    """Refuses an executor for labels that are not calculated here; raises ValueError."""
    if type(oracle).delivery is not SourceSettings.delivery and not executor.may_be_idle:
        raise ValueError(
            f"executor calculates labels, but those of oracle.kind '{oracle.kind}' are made elsewhere; leave it out."
        )


def check_selector(
    selector: SelectorSettings,
    members: EnsembleSettings,
    where: str,
    further: Collection[str] = (),
    *,
    teacher: bool = False,
    labelled: bool = True,
) -> None:
    """Refuses a selector that looks at scores or features that are 0 everywhere, or for a teacher; raises ValueError.

    Args:
        selector: its settings.
        members: settings of the ensemble.
        where: the key that holds them.
        further: what the model gives besides the energy.
        teacher: whether there is one, whom filters may ask.
        labelled: whether something is labelled when it chooses.
    """
    if selector.asks_teacher and not teacher:
        raise ValueError(
            f"{where} compares candidates with a teacher (filter agreement), and there is none here; give section "
            "teacher of a campaign, or leave the filter out."
        )
    for score in selector.score_names:
        if not labelled and not needs_no_fit(score):
            raise ValueError(f"{where} looks at {score}, which compares with labelled structures; there are none yet.")
        require_target(score, further, where)
        require_score(score, members, where)
    for name in (*selector.feature_names, *selector.atom_feature_names):
        if declared(name).of_members:
            require_spread(members, f"{where}, features '{name}',")


def check_columns(selector: SelectorSettings, k: int, where: str, *, scored: bool = True) -> None:
    """Builds a selector and traces it on empty candidates, so that what it lacks is known before any label is paid for.

    A user's own function may ask for anything.

    Args:
        selector: its settings.
        k: size of the batch.
        where: the key that holds them.
        scored: whether candidates have scores; before the first label they have none.

    Raises:
        InputError: a user's function cannot be imported or built, or asks for a score or feature that does not exist.
    """
    built = selector.build(k)
    rows = max(4 * k, 64)

    def column(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    def atoms(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((2 * rows, *shape), dtype)

    shares: Any = jax.ShapeDtypeStruct((4,), jnp.float32)
    environments = Environments(
        rows={name: atoms(64) for name in selector.atom_feature_names},
        species=atoms(dtype=jnp.int32),
        members=column(2, dtype=jnp.int32),
    )
    asked = (*selector.score_names, *(TEACHER_SCORES if selector.asks_teacher else ()))
    scored_by = {*names(scores(fitted=False)), *asked} if scored else set[str]()
    blank = Candidates(
        features={name: column(64) for name in selector.feature_names},
        scores={name: column() for name in scored_by},
        cost=column(),
        valid=column(dtype=bool),
        id=column(dtype=jnp.int32),
        environments=environments if selector.atom_feature_names else None,
        strata=Strata(column(dtype=jnp.int32), shares),
    )
    try:
        jax.eval_shape(built, jax.random.key(0), blank, blank)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except KeyError as error:
        raise InputError(f"{where} looks for {error}, which candidates do not have.") from error
    except Exception:  # it may need the true shapes, and says so then
        return


def check_adaptive(selector: SelectorSettings, training: TrainingSettings, where: str) -> None:
    """Refuses to follow the validation error of a training that keeps no structures for it; raises ValueError."""
    if selector.follows_errors and training.validation_fraction == 0:
        raise ValueError(
            f"{where} '{selector.innermost.kind}' follows the error on structures kept for validation, but "
            "validation_fraction is 0; raise it."
        )


def check_plateau(stopping: StoppingSettings, selection: SelectionSettings) -> None:
    """Refuses to judge the batch against its pool where the batch is a random draw of it; raises ValueError."""
    if stopping.plateau is not None and selection.selector.draws_at_random:
        raise ValueError(
            "stopping.plateau compares the batch with its pool, from which a batch drawn at random does not differ; "
            "choose another selector, or leave plateau out."
        )


def check_share(stopping: StoppingSettings, exploration: ExplorationChoice) -> None:
    """Refuses to judge the frames of walkers where there are none; raises ValueError."""
    if stopping.share_below not in (None, ShareBelowSettings()) and not exploration.counts_frames:
        raise ValueError(
            f"stopping.share_below judges the frames of walkers, and exploration of kind '{exploration.kind}' has no "
            "walkers; leave it out."
        )


def check_walkers(exploration: ExplorationChoice, shares: Mapping[str, float]) -> None:
    """Refuses named systems, of some shares, that would get no walker, or that there are not; raises ValueError."""
    exploration.check_systems(shares)
    walkers = exploration.walkers_to_deal
    if walkers is None or not shares:
        return
    if len(shares) > 1 and exploration.couples_walkers:
        raise ValueError(
            "exploration.biases let all walkers fill one landscape, which unlike systems do not have; leave shared out."
        )
    dealt = systems_of_walkers(shares, walkers)
    for name in shares:
        if name not in dealt:
            raise ValueError(
                f"system '{name}' would get none of the {len(walkers)} walkers; raise counts of exploration.walkers, "
                "let some name it (systems), or raise its share."
            )


def check_named(config: Settings, systems: Collection[str]) -> None:
    """Refuses generators and dynamics with a label source, wherever they stand, of systems that there are not.

    Raises:
        ValueError: names the key.
    """
    families: tuple[type[Any], ...] = (GeneratorSettings, LabelMdSettings, TeacherBath)
    for family in families:
        for where, one in sections(config, family):
            check_known(one.systems, systems, f"{where}.systems")
    for where, test in sections(config, TestSettings):
        if isinstance(test.from_pool, Mapping):
            check_known(test.from_pool, systems, f"{where}.from_pool")


def check_target(
    stopping: StoppingSettings, test: TestSettings, further: Collection[str] = (), systems: Sequence[str] = ()
) -> None:
    """Refuses a target on a test set, or on a group of one, that will not be there, or of what the model does not give.

    ``further`` is what the model gives besides the energy, ``systems`` are the names of the systems, if they have any.

    Raises:
        ValueError: names the key.
    """
    groups = test.groups(systems)
    target = stopping.target_error
    if target is None:
        return
    if not target.of.basic and target.of.name not in further:
        raise ValueError(
            f"stopping.target_error.metric is {target.metric}, but the model gives no {target.of.name}; "
            f"{how_given(target.of.name)}, or name another metric."
        )
    if not groups:
        raise ValueError("stopping.target_error needs a test set; give test.md, test.files or test.from_pool.")
    if target.group is not None and target.group not in groups:
        raise ValueError(
            f"stopping.target_error.group '{target.group}' is not a group of the test set, which has: "
            f"{', '.join(groups)}."
        )
