"""Models: the one decoder, its configuration, presets."""

from .config import ModelConfig
from .decoder import Decoder, ModelState

__all__ = ["Decoder", "ModelConfig", "ModelState"]
