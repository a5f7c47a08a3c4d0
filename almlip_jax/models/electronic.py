"""Total charge and spin of a structure among the features of its atoms: nothing where it is neutral and a singlet.

A structure with the charge q and the multiplicity 2S+1 hands out three amounts: of positive charge, of negative charge
and of unpaired electrons 2S.  Each is shared out among its atoms by learned weights of their species, so that what an
atom is given is inversely proportional to the size of the structure, as the change of the energy of a large molecule is
where it loses an electron; and each is told as a learned vector of the species, in proportion to the atom's share.
Where all three amounts are 0 so are the vectors, exactly.  Source: Unke et al., SpookyNet, Nature Communications 12,
7273 (2021).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from almlip_jax.models.base import Params, Survey
from almlip_jax.models.constants import CONSTANTS, constant, with_constants
from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms

_AMOUNTS = 3
_SCALE, _WEIGHTS, _VECTORS = "state_scale", "state_weights", "state_vectors"

BY_SPECIES = {_WEIGHTS: 1, _VECTORS: 1}
"""Parameters whose first axis runs over the species; see `species_code.with_more_species`."""


def state_features(module: nn.Module, graph: Graph, exact: jax.Array, width: int) -> jax.Array:
    """What the atoms are told of charge and spin, [A, width]; 0 where both say nothing.

    Args:
        module: whose parameters are used, each under one name: for one place in a model.
        graph: the structures.
        exact: [A, number of species], one-hot.
        width: of what is told.
    """
    species = exact.shape[-1]
    scale = constant(module, _SCALE, (_AMOUNTS,))
    weights = nn.softplus(exact @ module.param(_WEIGHTS, nn.initializers.zeros, (species, _AMOUNTS)))
    whole = jnp.where(graph.structure_mask[:, None], sum_over_atoms(weights, graph), 1)
    shares = (amounts(graph) / whole)[graph.structure] * weights * scale
    vectors = module.param(_VECTORS, nn.initializers.normal(1.0), (species, _AMOUNTS * width))
    told = (exact @ vectors).reshape(-1, _AMOUNTS, width)
    return jnp.einsum("an,anw->aw", shares, told)


def amounts(graph: Graph) -> jax.Array:
    """Positive charge and negative charge in e, and unpaired electrons of each structure, [S, 3]; none is negative."""
    charge = graph.charge
    return jnp.stack([jnp.maximum(charge, 0), jnp.maximum(-charge, 0), graph.spin - 1], axis=-1)


def survey_states(graph: Graph) -> Survey:
    """Sums over atoms from which `scaled_states` follows: squares of equal shares, and how many atoms have one, [3]."""
    shares = (amounts(graph) / atom_counts(graph)[:, None])[graph.structure]
    shares = jnp.where(graph.atom_mask[:, None], shares, 0)
    return {"shares": jnp.sum(shares**2, axis=0), "sharing": jnp.sum((shares > 0).astype(shares.dtype), axis=0)}


def scaled_states(params: Params, survey: Survey) -> Params:
    """Parameters with shares scaled to order one on the structures of a survey; those of what none has stay."""
    root = jnp.sqrt(survey["sharing"] / jnp.where(survey["shares"] > 0, survey["shares"], 1))
    return with_constants(params, **{_SCALE: jnp.where(survey["shares"] > 0, root, params[CONSTANTS][_SCALE])})


def knows_states(params: Params) -> bool:
    """Whether parameters, with a member axis or without, hold any for charge and spin."""
    return any(path[-1] == _SCALE for path in flatten_dict(params))


def taught_states(params: Params, fresh: Params) -> Params:
    """Parameters of as many models as ``params``, with those for charge and spin, which these lack, from fresh ones."""
    known = flatten_dict(params)
    models = next(iter(known.values())).shape[0]
    return unflatten_dict({path: known.get(path, new[:models]) for path, new in flatten_dict(fresh).items()})
