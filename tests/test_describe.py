"""A model told as a nested system."""

import math
from xml.etree import ElementTree

import torch
from torch import nn

from nestling.levels import level
from nestling.levels.describe import describe
from nestling.memory import momentum
from nestling.models import Decoder, ModelConfig
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
