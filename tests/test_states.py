"""States as objects: saved apart from the weights, moved, split into rows and joined again, compared."""

import pytest
import torch
from safetensors.torch import save_file

from nestling import Decoder, ModelConfig, attention, load_state, mlp, save_state, self_modifying, sequence_memory
from nestling.learner import fingerprint
from nestling.memory.state import clone, difference, flatten, rows, stack, to

MIXERS = {
    "sequence_memory": sequence_memory(mlp(), chunk=4),
    "one step a chunk": sequence_memory(mlp(), chunk=4, read="boundary", way="stepped"),
    "self_modifying": self_modifying(chunk=4, projection_chunk=4),
    "attention": attention(window=5),
}


@pytest.fixture(params=MIXERS)
def layer(request):
    return MIXERS[request.param].build(8, 2, torch.Generator().manual_seed(0))


def tokens(length: int, rows_: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows_, length, 8, generator=torch.Generator().manual_seed(seed))


def equal(state, other) -> bool:
    return max(difference(state, other).values()) == 0.0


class TestState:
    def test_a_saved_state_goes_on_as_the_one_in_memory(self, layer, tmp_path):
        _, state = layer(tokens(6))
        save_state(tmp_path / "state", state, layer)
        loaded = load_state(tmp_path / "state", layer)
        assert equal(state, loaded)
        assert torch.equal(layer(tokens(5, seed=2), state)[0], layer(tokens(5, seed=2), loaded)[0])

    def test_rows_are_states_of_their_own(self, layer):
        _, state = layer(tokens(6))
        parts = [rows(state, row) for row in range(3)]
        assert equal(stack(parts), state)
        assert equal(rows(state, -1), parts[2])
        assert equal(rows(state, torch.tensor([2, 0])), stack([parts[2], parts[0]]))
        y, _ = layer(tokens(5, seed=2), state)
        alone, _ = layer(tokens(5, seed=2)[1:2], parts[1])
        torch.testing.assert_close(alone, y[1:2])

    def test_a_fork_does_not_change_what_it_came_from(self, layer):
        _, state = layer(tokens(6))
        fork = clone(state)
        _, after = layer(tokens(6, seed=3), fork)
        assert equal(state, fork)
        assert max(difference(state, after).values()) > 0

    def test_whole_numbers_keep_their_kind(self, layer):
        _, state = layer(tokens(6))
        moved = to(state, torch.float64, "cpu")
        for name, tensor in flatten(state).items():
            wanted = torch.float64 if tensor.is_floating_point() else tensor.dtype
            assert flatten(moved)[name].dtype == wanted
        assert equal(moved, state)
        assert equal(to(state), state)


def test_a_decoders_state_is_saved_too(tmp_path):
    model = Decoder(ModelConfig(dim=8, heads=2, blocks=2, vocabulary=7, mixer=MIXERS["sequence_memory"]))
    _, state = model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    save_state(tmp_path / "state", state, model)
    assert equal(load_state(tmp_path / "state", model), state)


def test_weights_of_any_dtype_have_a_fingerprint():
    layer = torch.nn.Linear(3, 2)
    assert len({fingerprint(layer), fingerprint(layer.bfloat16()), fingerprint(layer.double())}) == 3


def test_what_does_not_fit_is_said(tmp_path):
    layer = MIXERS["sequence_memory"].build(8, 2, torch.Generator().manual_seed(0))
    other = MIXERS["sequence_memory"].build(8, 2, torch.Generator().manual_seed(1))
    _, state = layer(tokens(6))
    file = tmp_path / "state"
    save_state(file, state, layer)
    with pytest.raises(ValueError, match=r"state: state of a model \(\w+\), but this model is \w+"):
        load_state(file, other)
    save_file({"a": torch.zeros(1)}, file, metadata={"format": "9", "fits": fingerprint(layer)})
    with pytest.raises(ValueError, match="state: format '9'; this version reads '1'"):
        load_state(file, layer)
    save_state(file, state, layer)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a file of state, or damaged"):
        load_state(file, layer)
    with pytest.raises(ValueError, match="missing: not a file of state"):
        load_state(tmp_path / "missing", layer)
    with pytest.raises(ValueError, match="at least one state"):
        stack([])
    with pytest.raises(ValueError, match="states of different shapes"):
        stack([torch.zeros(1, 2), torch.zeros(1, 3)])
