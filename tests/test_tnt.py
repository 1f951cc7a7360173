"""TNT: shards by memory.naive, one after the other; the whole as the sum of its parts."""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nestling.memory import Gates, clip, decay, matrix, mlp, momentum, normalize, parse, retain
from nestling.models import ModelConfig
from nestling.models.data import from_data, to_data, to_json
from nestling.sequence import (
    Mixer,
    attention,
    beside,
    caching,
    mac,
    mag,
    mal,
    naive_blocks,
    self_modifying,
    sequence_memory,
    shards,
    tnt,
)
from nestling.sequence.scan import Writes
from oracles import DEEP, EXACT, assert_is, assert_same, gradients, moved, normal

DIM, HEADS = 8, 2
deep = sequence_memory(mlp(), chunk=4)
exact = sequence_memory(matrix(), rule=retain(decay(), momentum()), chunk=4, gradient_at="token")
MEMORIES = {"deep": (deep, DEEP), "exact": (exact, EXACT)}


def build(expression: Mixer):
    return moved(expression.build(DIM, HEADS, torch.Generator().manual_seed(1)))


def inputs(length: int) -> Tensor:
    return normal(length, DIM, seed=length).requires_grad_()


CASES = [("deep", "projected"), ("exact", "projected"), ("deep", "raw")]


@pytest.mark.parametrize("length", [1, 7, 63])
@pytest.mark.parametrize(("kind", "queries"), CASES)
def test_shards_are_memories_that_start_anew(kind: str, queries: str, length: int) -> None:
    memory, choices = MEMORIES[kind]
    expression = shards(memory, shard=12 if length == 63 else 4, queries=queries)
    assert_is(naive_blocks.shards(choices), build(expression), expression, inputs(length), HEADS)


def test_nothing_but_the_convolution_crosses_a_shards_edge() -> None:
    layer = build(shards(replace(deep, convolution=1), shard=8))
    x = inputs(20).detach()
    torch.testing.assert_close(layer(x[None])[0][:, 8:16], layer(x[None, 8:16])[0], rtol=1e-12, atol=1e-12)
    whole = build(replace(deep, convolution=1))
    assert (whole(x[None])[0][:, 8:16] - whole(x[None, 8:16])[0]).abs().max() > 1e-3


def test_a_long_shard_with_raw_queries_is_the_memory_itself() -> None:
    layer, x = build(shards(deep, shard=32, queries="raw")), inputs(30)[None]
    torch.testing.assert_close(layer(x)[0], layer.memory(x)[0], rtol=1e-12, atol=1e-12)


def test_a_projected_query_lies_where_keys_have_been() -> None:
    """A query at a right angle to all keys of the shard is taken to zero, as a memory without a residual reads it."""
    layer = build(shards(exact, shard=8))
    keys = torch.zeros(1, HEADS, 4, DIM // HEADS, dtype=torch.float64)
    keys[..., 0] = 1.0
    queries = torch.zeros_like(keys)
    queries[..., 1], queries[:, :, 3, 0] = 2.0, 0.5
    state = layer._packed(layer.init_state(1))[1:]
    found, _ = layer._project(Writes(keys, keys, Gates(1.0)), queries, state)
    assert not found[:, :, :3].any()
    torch.testing.assert_close(found[:, :, 3], keys[:, :, 0] * 2.0, rtol=0, atol=1e-12)


def test_tnt_is_the_sum_of_its_parts() -> None:
    expression = tnt(chunk=16, local=(2, 4), shard=8)
    layer, x = build(expression), inputs(37)[None]
    y, state = layer(x)
    whole, *local = layer.mixers
    total = whole(x)[0] + local[0](x)[0] + local[1](x)[0]
    torch.testing.assert_close(y, total, rtol=1e-12, atol=1e-12)
    assert [part.expression.memory.chunk for part in local] == [2, 4]
    assert whole.memory.read == "boundary"
    assert len(state.mixers) == 3
    assert [part.queries for part in tnt(queries="raw").parts().mixers[1:]] == ["raw", "raw"]


def test_the_whole_documents_memory_is_read_where_its_chunk_opened() -> None:
    """Inside its first chunk it reads the learned start: what a token reads depends on no other token's write."""
    layer = build(replace(tnt(chunk=16, local=(2,), shard=8).parts().mixers[0], convolution=1))
    x = inputs(20).detach()
    y = layer(x[None])[0]
    torch.testing.assert_close(y[:, 15], layer(x[None, 15:16])[0][:, 0], rtol=1e-12, atol=1e-12)
    assert (y[:, 16] - layer(x[None, 16:17])[0][:, 0]).abs().max() > 1e-3


def test_a_second_stage_takes_the_first_ones_parameters() -> None:
    first, second = (build(tnt(chunk=16, local=local, shard=8)) for local in ((8, 8), (1, 2)))
    second.load_state_dict(first.state_dict())
    x = inputs(20)[None]
    assert (first(x)[0] - second(x)[0]).abs().max() > 1e-4


def test_outer_gradients_by_finite_differences() -> None:
    layer, x = build(tnt(rule=normalize(clip()), chunk=8, local=(2,), shard=4)), inputs(10)
    names = [name for name, _ in layer.named_parameters() if "start" in name]

    def run(x: Tensor, *some: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, some, strict=True)), (x[None],))[0]

    some = [dict(layer.named_parameters())[name] for name in names]
    assert torch.autograd.gradcheck(run, (x, *some), atol=1e-6, fast_mode=True)


def test_checkpointing_changes_nothing() -> None:
    x = inputs(19)
    kept, again = (build(shards(replace(deep, checkpoint=way), shard=8)) for way in (False, True))
    y, z = kept(x[None])[0][0], again(x[None])[0][0]
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)
    assert_same(gradients(y, kept, x), gradients(z, again, x))


@pytest.mark.parametrize(
    "expression",
    [tnt(), tnt(matrix(), local=(4,), queries="raw"), tnt().parts(), beside((attention(8), shards(deep, 8)))],
    ids=["default", "matrix", "parts", "beside"],
)
def test_expressions_read_back(expression: Mixer) -> None:
    assert parse(repr(expression), Mixer) == expression


BLOCKS = [tnt(), mag(attention()), mal(deep), mac(self_modifying()), caching(exact), beside((attention(), mag()))]


@pytest.mark.parametrize("mixer", BLOCKS, ids=lambda mixer: type(mixer).__name__)
def test_a_model_is_saved_and_read_back(mixer: Mixer) -> None:
    config = ModelConfig(mixer=mixer)
    assert from_data(ModelConfig, json.loads(to_json(config))) == config
    assert from_data(ModelConfig, to_data(config) | {"mixer": repr(mixer)}) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shards(attention())", r"what starts anew is a sequence_memory\(\), not attention\(\)"),
        ("shards(shard=40)", "shard must be a multiple of the memory's chunk 16, got 40"),
        ("shards(queries='keys')", "queries must be 'projected' or 'raw', got 'keys'"),
        ("tnt(local=())", "local must name the chunk of at least one local memory"),
        ("tnt(local=(8, 3))", "shard must be a multiple of the memory's chunk 3, got 2048"),
        ("tnt(chunk=0)", "chunk must be at least 1 token, got 0"),
        ("beside(())", "mixers must name at least one mixer"),
        ("beside((matrix(),))", r"mixers must name at least one mixer, and nothing else, got \(matrix\(\),\)"),
    ],
)
def test_what_cannot_be_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(text)
