"""What Hope is without each of its parts: the rows of Nested Learning's Table 6, as expressions."""

from dataclasses import replace
from math import inf

from nestling.memory.retention import decay_to_start
from nestling.memory.rule import clip, dampen, delta_gradient_descent, momentum, retain
from nestling.sequence import self_modifying
from nestling.sequence.self_modifying import PROJECTIONS

from .config import ModelConfig

RULES = {
    "hope": retain(decay_to_start(), delta_gradient_descent(momentum(dampen(clip())))),
    "no delta gradient descent": retain(decay_to_start(), momentum(dampen(clip()))),
    "no momentum": retain(decay_to_start(), delta_gradient_descent(clip())),
    "no retention": delta_gradient_descent(momentum(dampen(clip()))),
}
"""The learning rule of the memories, whole and without each of its terms."""


def table_6(base: ModelConfig = ModelConfig()) -> dict[str, ModelConfig]:
    """A model for each row of Table 6, by its name there, from a model with self-modifying memories.

    "hope" has an adaptive query, as the row that takes it away implies; a projection without a memory is learned at
    the lowest frequency; without the continuum there is one MLP that no clock ever updates. Raises ValueError when
    the mixer is of another kind.
    """
    mixer = base.mixer
    if not isinstance(mixer, self_modifying):
        raise ValueError(f"table_6 takes self_modifying(...) apart, but the mixer is {mixer}")
    whole = replace(mixer, rule=RULES["hope"], generators=PROJECTIONS)
    rows = {name: replace(base, mixer=replace(whole, rule=rule)) for name, rule in RULES.items()}
    rows["no continuum"] = replace(base, mixer=whole, levels=(replace(base.levels[0].levels[0], period=inf),))
    for name in ("key", "value", "query"):
        rest = tuple(other for other in PROJECTIONS if other != name)
        rows[f"no adaptive {name}"] = replace(base, mixer=replace(whole, generators=rest))
    return rows
