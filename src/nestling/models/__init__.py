"""Models: the one decoder, its configuration, presets."""

from .config import PRESETS, ModelConfig, preset
from .decoder import Decoder, ModelState
from .generate import generate

__all__ = ["PRESETS", "Decoder", "ModelConfig", "ModelState", "generate", "preset"]
