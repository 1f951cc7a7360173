"""What a model is, as data: the expression from which it is built, saved and explained."""

from dataclasses import dataclass

from nestling.levels.continuum import level
from nestling.sequence import Mixer, self_modifying


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and the parts of a `Decoder`."""

    vocabulary: int = 256  # bytes
    dim: int = 128
    heads: int = 4
    blocks: int = 3
    mixer: Mixer = self_modifying()
    levels: tuple[level, ...] = (level(128), level(512), level(2048))  # fast to slow

    def __post_init__(self) -> None:
        for name in ("vocabulary", "dim", "heads", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads = {self.heads}, got {self.dim}")
        if not self.levels:
            raise ValueError("levels must name at least one level, such as level(period=inf)")
        periods = [lvl.period for lvl in self.levels]
        if periods != sorted(periods):
            raise ValueError(f"levels must be listed fast to slow, got periods {periods}")
