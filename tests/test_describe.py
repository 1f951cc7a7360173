"""A model told as a nested system."""

import math
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from nestling.levels import Growing, Whole, initialization, level, local, masked_tokens, spectrum, stack
from nestling.levels.describe import describe
from nestling.memory import l2, momentum
from nestling.models import PRESETS, Decoder, ModelConfig, preset
from nestling.optim import M3, AdamW
from nestling.sequence import attention, self_modifying


def model() -> Decoder:
    levels = (level(16, rule=momentum()), level(64), level(math.inf))
    return Decoder(
        ModelConfig(dim=16, heads=2, blocks=2, mixer=self_modifying(chunk=8, projection_chunk=8), levels=levels)
    )


def test_hope_is_told_level_by_level() -> None:
    made = model()
    system = describe(made)
    assert [row.period for row in system.rows] == [1, 16, 64, math.inf, math.inf]
    assert [row.copies for row in system.rows] == [2, 2, 2, 2, 1]
    told = {row.name: row for row in system.rows}
    assert sum(row.numbers for row in system.rows[1:]) == sum(p.numel() for p in made.parameters())
    assert told["weights outside of levels"].rule == "fixed"
    assert system.rows[1].rule == "momentum(), step size 0.3"
    assert "self_modifying" in system.rows[0].name
    assert "next-token loss" in str(system)
    assert "16 tokens" in str(system)


def test_an_optimizer_adds_its_memories() -> None:
    made = model()
    system = describe(made, AdamW(made.parameters()), tokens_per_step=2048)
    names = {row.name: row.period for row in system.rows}
    assert names["first moment m, unbiased"] == names["second moment v"] == 2048
    assert names["weights outside of levels"] == 2048
    slow = describe(made, M3([p for p in made.parameters() if p.dim() == 2], periods=10), tokens_per_step=100)
    assert 1000 in [row.period for row in slow.rows], str(slow)


def test_a_plain_transformer_trained_by_torchs_adamw() -> None:
    made = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3, enable_nested_tensor=False)
    system = describe(made, torch.optim.AdamW(made.parameters(), betas=(0.8, 0.9)), tokens_per_step=64)
    assert {(row.name, row.copies, row.period) for row in system.rows} == {
        ("MultiheadAttention", 3, 0),
        ("weights", 1, 64),
        ("first moment m, unbiased", 1, 64),
        ("second moment v", 1, 64),
    }
    assert system.rows[1].numbers == sum(p.numel() for p in made.parameters())
    unknown = describe(made, torch.optim.Rprop(made.parameters()))
    assert "Rprop's state" in str(unknown)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_told_whole(name: str) -> None:
    """Each level once, with its period; and every parameter in one row."""
    made = Decoder(preset(name, dim=16, heads=2, blocks=2))
    system = describe(made)
    told = [row for row in system.rows if row.name.startswith("level")]
    assert [row.period for row in told] == sorted({lvl.period for lvl in made.levels})
    assert {row.copies for row in told} == {2}
    parameters = [row for row in system.rows if row.name.startswith(("level", "weights"))]
    assert sum(row.numbers for row in parameters) == sum(p.numel() for p in made.parameters())
    assert system.rows[0].copies == 2
    assert system.rows[0].name.split(":")[0] == ("SlidingAttention" if name == "transformer" else "self_modifying")


def test_wires_and_objectives_are_those_of_the_levels() -> None:
    levels = (local(level(4), l2()), level(8, transfer=initialization(order=1)), spectrum(16, 32))
    system = describe(Decoder(ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=8), levels=levels)))
    told = {row.period: row for row in system.rows}
    assert told[4].objective == "local: l2(), the block's next input"
    assert told[4].context == "block inputs"
    assert told[8].transfer == "initialization(order=1)"
    assert told[16].objective == told[32].objective == "next-token loss"


def test_slots_and_every_other_weight_are_levels_too() -> None:
    inner = Decoder(ModelConfig(dim=16, heads=2, blocks=2, mixer=attention(window=8), levels=(level(4), level(8))))
    parameters = sum(p.numel() for p in inner.parameters())
    growing, whole = describe(Growing(inner, 3, 2)), describe(Whole(inner, level(8, rule=momentum())))
    (slots,) = [row for row in growing.rows if row.name.startswith("slots")]
    assert (slots.copies, slots.objective, slots.period) == (4, "a sleep's dreams", math.inf)
    levels = [row for row in growing.rows if row.name.startswith(("level", "weights"))]
    assert sum(row.numbers for row in levels) == parameters
    assert [row.name for row in whole.rows if "weights" in row.name] == ["all other weights"]
    assert sum(row.numbers for row in whole.rows) == parameters


@pytest.mark.parametrize("how", ["layers", "neurons", "low_rank"])
@pytest.mark.parametrize("layout", ["llama", "gpt2", "phi3", "bert, masked"])
def test_a_stacked_model_is_told_as_what_it_is(layout: str, how: str) -> None:
    """The structure is the model's own; views of a parameter are not counted beside it."""
    pretrained = pytest.importorskip("pretrained", reason="needs transformers: pip install 'nestling[hf]'")
    encoder = layout in pretrained.ENCODERS
    base = (pretrained.ENCODERS if encoder else pretrained.DECODERS)[layout]()
    made = stack(base, [4, 12], how, rank=2, loss=masked_tokens(3) if encoder else None)
    system = describe(made)
    told = [row for row in system.rows if row.name.startswith("level")]
    assert [row.period for row in told] == [4, 12]
    assert {row.name.rsplit(" ", 1)[1] for row in told} == {type(base).__name__}
    assert {row.objective for row in told} == {"masked_tokens(3)" if encoder else "next_token()"}
    assert sum(row.numbers for row in system.rows if row.period) == sum(p.numel() for p in made.parameters())
    assert system.rows[0].period == 0
    assert system.rows[0].copies == 3
    assert encoder or "the last 64 pairs" in system.rows[0].rule


def test_attention_keeps_its_context() -> None:
    config = ModelConfig(dim=16, heads=2, blocks=1, mixer=attention(window=32), levels=(level(math.inf),))
    first = describe(Decoder(config)).rows[0]
    assert first.period == 0
    assert "32" in first.rule


def test_the_drawing_is_a_picture_of_every_level() -> None:
    system = describe(model())
    picture = ElementTree.fromstring(system.draw())
    told = " ".join(element.text or "" for element in picture.iter())
    assert all(row.name in told for row in system.rows)
    assert told.count("numbers") == len(system.rows)
