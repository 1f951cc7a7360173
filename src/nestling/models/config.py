"""What a model is, as data: the expression from which it is built, saved and explained."""

import math
from dataclasses import dataclass, replace
from typing import Any

from nestling.levels.continuum import Level, Wiring, chain, level
from nestling.memory import known, mlp
from nestling.sequence import Mixer, attention, self_modifying


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the parts of a `Decoder`."""

    vocabulary: int = 256  # bytes
    dim: int = 128
    heads: int = 4
    blocks: int = 2
    mixer: Mixer = self_modifying()
    levels: tuple[Level, ...] = (  # a chain, fast to slow
        level(128, step_size=0.5),
        level(512, step_size=1.0),
        level(2048, step_size=2.0),
    )
    wiring: Wiring = chain()  # of the levels in a block

    def __post_init__(self) -> None:
        for name in ("vocabulary", "dim", "heads", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads = {self.heads}, got {self.dim}")
        if not self.levels:
            raise ValueError("levels must name at least one level, such as level(inf)")
        periods = [block.levels[0].period for block in self.levels]
        if periods != sorted(periods):
            raise ValueError(f"levels must be listed fast to slow, got periods {periods}")


def hope(**changes: Any) -> ModelConfig:
    """Hope: self-modifying Titans followed by a continuum of levels at 128, 512 and 2,048 tokens."""
    return replace(ModelConfig(), **changes)


def small(**changes: Any) -> ModelConfig:
    """Hope, narrower: for a first look on a slow machine."""
    return replace(ModelConfig(dim=64, heads=2), **changes)


def tiny(**changes: Any) -> ModelConfig:
    """Hope at the size of a test: one block of width 32."""
    mixer = self_modifying(chunk=16, projection_chunk=16)
    levels = (level(32), level(64))
    return replace(ModelConfig(dim=32, heads=2, blocks=1, mixer=mixer, levels=levels), **changes)


def twin(**changes: Any) -> ModelConfig:
    """Hope with memories from one token to a life's length: levels at 1, 128, 2,048 and 100,000 tokens. The fastest
    one learns token by token, so that reading with learning is a backward pass a token."""
    levels = (
        level(1, step_size=0.05),
        level(128, step_size=0.5),
        level(2048, step_size=2.0),
        level(100_000, step_size=4.0),
    )
    return replace(ModelConfig(levels=levels), **changes)


def transformer(**changes: Any) -> ModelConfig:
    """The baseline: softmax attention over the whole document, and an MLP that nothing moves but training."""
    levels = (level(math.inf, structure=mlp(expansion=4.0, residual=False)),)
    return replace(ModelConfig(mixer=attention(window=None, convolution=1), levels=levels), **changes)


PRESETS = {"hope": hope, "small": small, "tiny": tiny, "twin": twin, "transformer": transformer}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The configuration of a preset with some fields changed. An unknown name lists the known ones."""
    return known(name, PRESETS, "preset")(**changes)
