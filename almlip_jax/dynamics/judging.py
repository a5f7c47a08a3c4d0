"""Whether an exploration can be: one member has no spread to judge or to follow, a molecule no cell that moves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from ase import Atoms

from almlip_jax.dynamics.biases import BiasSettings
from almlip_jax.dynamics.integrators import IntegratorSettings
from almlip_jax.dynamics.settings import ExplorationSettings
from almlip_jax.ensembles import Prediction, Speaking, Speaks, require_score, require_spread, require_target
from almlip_jax.errors import InputError


def check_exploration(
    settings: ExplorationSettings, members: Speaks, *, gated: bool = True, further: Collection[str] = ()
) -> None:
    """Refuses a gate, a bias or an ascent that would see no uncertainty anywhere, and scores that will not exist.

    Args:
        settings: of the exploration.
        members: what they can tell; settings of the ensemble say it.
        gated: whether the gate compares its score with anything.
        further: what the model gives besides the energy.

    Raises:
        ValueError: names the key, and says what to do.
    """
    for score in settings.scores:
        require_target(score, further, "exploration")
    if gated:
        novelty = " (latent_distance and extrapolation_grade need no spread)"
        try:
            require_score(settings.gate.score, members, "exploration.gate")
        except ValueError as error:
            raise ValueError(str(error).removesuffix(".") + novelty + ".") from error
    if settings.integrator.needs_spread:
        require_spread(members, f"exploration.integrator '{settings.integrator.kind}'")
    for bias in settings.biases:
        if bias.needs_spread:
            require_spread(members, f"exploration.biases '{bias.kind}'")


def speaks_as(prediction: Prediction) -> Speaking:
    """What an ensemble with this prediction tells of its errors; shapes are enough."""
    noise = prediction.noise
    return Speaking(prediction.energy.shape[0], frozenset() if noise is None else noise.forces.gives())


def check_cells(integrator: IntegratorSettings, starts: Sequence[Atoms], moved_by: str = "") -> None:
    """Refuses to move cells where no structure has one; of several kinds the others keep theirs.

    Args:
        integrator: that may move cells.
        starts: start structures.
        moved_by: what moves them, for the message; the integrator by default.

    Raises:
        InputError: none is periodic in three directions.
    """
    if integrator.moves_cell and not any(start.pbc.all() for start in starts):
        what = moved_by or f"integrator '{integrator.kind}'"
        raise InputError(
            f"{what} moves cells, but no start structure is periodic in all three directions; keep the cell."
        )


def check_biased_atoms(biases: Sequence[BiasSettings], starts: Mapping[str, Atoms]) -> None:
    """Refuses biases on atoms that a walker does not have.

    Args:
        biases: of a run.
        starts: structures that they act on, by what they are called.

    Raises:
        InputError: names the bias and the structure.
    """
    for n, bias in enumerate(biases):
        for name, start in starts.items():
            if bias.last_atom >= len(start):
                raise InputError(
                    f"biases.{n} looks at atom {bias.last_atom}, and {name} has {len(start)} atoms (from 0); "
                    "correct the index, or give walkers that biases shall not act on the factor 'bias: 0'."
                )


def check_fixed_atoms(integrator: IntegratorSettings, starts: Mapping[str, Atoms]) -> None:
    """Refuses fixed atoms in cells that move.

    Args:
        integrator: that may move cells.
        starts: structures by what they are called.

    Raises:
        InputError: names the first of them.
    """
    if not integrator.moves_cell:
        return
    for name, start in starts.items():
        if start.constraints and start.pbc.all():
            raise InputError(
                f"{name} holds atoms fixed, which a moving cell does not allow; release them, or keep the cell."
            )


def check_drift(settings: ExplorationSettings, starts: Sequence[Atoms]) -> None:
    """Refuses to remove a drift where there is none.

    Args:
        settings: of the exploration.
        starts: start structures.

    Raises:
        InputError: all structures have fixed atoms.
    """
    if settings.remove_drift and starts and all(start.constraints for start in starts):
        raise InputError("every start structure has fixed atoms, beside which nothing drifts; leave remove_drift out.")


def check_swaps(settings: ExplorationSettings, starts: Sequence[Atoms]) -> None:
    """Refuses Monte Carlo swaps where no structure holds two unlike atoms that take part; fixed ones do not.

    Args:
        settings: of the exploration.
        starts: start structures.

    Raises:
        InputError: there would never be a trial.
    """
    if settings.swaps is None or not starts:
        return
    named = set(settings.swaps.elements)
    taking_part = [{symbol for symbol in _mobile(start) if not named or symbol in named} for start in starts]
    if not any(len(elements) > 1 for elements in taking_part):
        among = f" among {', '.join(settings.swaps.elements)}" if named else ""
        raise InputError(
            f"swaps exchange unlike atoms, and no start structure holds two elements{among} that may move; leave swaps "
            f"out{', or name others in swaps.elements' if named else ''}."
        )


def _mobile(start: Atoms) -> list[str]:
    """Elements of the atoms that are not held fixed."""
    fixed = np.zeros(len(start), bool)
    for constraint in start.constraints:
        fixed[constraint.get_indices()] = True
    return [symbol for symbol, held in zip(start.symbols, fixed, strict=True) if not held]
