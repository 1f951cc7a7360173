"""Tiny models of transformers with random weights, one of each layout."""

import math
from collections.abc import Callable

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'nestling[hf]'")

_SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
_GPT2 |= {"bos_token_id": None, "eos_token_id": None}


def _make(name: str, kind: str, **more) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        torch.manual_seed(3)
        shape = _GPT2 if name == "GPT2" else _SHAPE | more
        model = getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}Config")(**shape))
        with torch.no_grad():  # biases start at zero, which would hide one that is lost
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter) / math.sqrt(parameter.shape[-1])
        return model.eval()

    return build


DECODERS = {
    "llama": _make("Llama", "ForCausalLM", num_key_value_heads=1),
    "mistral": _make("Mistral", "ForCausalLM", num_key_value_heads=1),
    "qwen2": _make("Qwen2", "ForCausalLM", num_key_value_heads=1),
    "qwen3": _make("Qwen3", "ForCausalLM", num_key_value_heads=1, head_dim=12),
    "gpt2": _make("GPT2", "LMHeadModel"),
    "gpt_neox": _make("GPTNeoX", "ForCausalLM"),
    "phi3": _make("Phi3", "ForCausalLM", num_key_value_heads=1),  # gate and up fused
}
LEARNED_POSITIONS = {"gpt2"}
MIXTURES = {  # experts: alone in a layer, beside a shared one, after dense layers
    "mixtral": _make("Mixtral", "ForCausalLM", num_key_value_heads=1, num_local_experts=4),
    "qwen2_moe": _make("Qwen2Moe", "ForCausalLM", num_experts=4, moe_intermediate_size=8),
    "gpt_oss": _make("GptOss", "ForCausalLM", num_local_experts=4, head_dim=8),
}
ENCODERS = {  # MiniLM's are Bert's
    "bert": _make("Bert", "Model"),
    "bert, masked": _make("Bert", "ForMaskedLM"),
    "bert, classes": _make("Bert", "ForSequenceClassification", num_labels=5),
}


def in_turn() -> torch.nn.Module:
    """Phi3 with gate and up neuron by neuron: the same function of a weight in another order."""
    model = DECODERS["phi3"]()
    for layer in model.model.layers:
        layer.mlp.__class__ = type("InTurn", (type(layer.mlp),), {"forward": _alternating})
        with torch.no_grad():
            gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
            layer.mlp.gate_up_proj.weight.copy_(torch.stack([gate, up], 1).flatten(0, 1))
    return model


def _alternating(self, x: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_up_proj(x).unflatten(-1, (-1, 2)).unbind(-1)
    return self.down_proj(up * self.activation_fn(gate))
