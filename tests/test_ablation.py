"""The rows of Table 6: each takes away its own term and nothing else."""

from dataclasses import fields, replace
from math import inf

import pytest
import torch
from torch import Tensor

from nestling.memory import Gates, Pairs
from nestling.models import Decoder, ModelConfig, preset
from nestling.models.ablation import RULES, table_6
from nestling.sequence import self_modifying, sequence_memory

F64 = torch.float64
ROWS = table_6(preset("tiny"))


def by_hand(row: str, weight: Tensor, pairs: list[tuple[Tensor, Tensor]], gates: Gates) -> Tensor:
    """Every term of Hope's rule on its own line, each of which a row of the table strikes out."""
    start, buffer = weight, torch.zeros_like(weight)
    eta, m, a = float(gates.step_size), float(gates.momentum), torch.as_tensor(gates.log_retention).exp()
    for error, x in pairs:
        step, erase = eta, 0.0 * weight
        if row != "no delta gradient descent":
            step = eta / (1 + eta * (x @ x))
            erase = step * torch.outer(weight @ x, x)
        write = -step * torch.outer(error / max(1.0, error.norm().item()), x)
        if row != "no momentum":
            write = buffer = m * buffer + (1 - m) * write
        kept = weight if row == "no retention" else start + a * (weight - start)
        weight = kept - erase + write
    return weight


@pytest.mark.parametrize("row", RULES)
def test_a_rule_lacks_its_own_term(row):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, dtype=F64, generator=generator)
    pairs = [
        (scale * torch.randn(3, dtype=F64, generator=generator), torch.randn(4, dtype=F64, generator=generator))
        for scale in (0.1, 3.0, 1.0)
    ]
    gates, rule = Gates(0.4, 0.6, -0.3), RULES[row]
    found, state = weight, rule.init(weight)
    for error, x in pairs:
        found, state = rule.step(found, Pairs(error[None], x[None]), state, gates)
    torch.testing.assert_close(found, by_hand(row, weight, pairs, gates))
    assert row == "hope" or (found - by_hand("hope", weight, pairs, gates)).abs().max() > 1e-3


CHANGED = {
    "no delta gradient descent": {"mixer.rule"},
    "no momentum": {"mixer.rule"},
    "no retention": {"mixer.rule"},
    "no continuum": {"levels"},
    "no adaptive key": {"mixer.generators"},
    "no adaptive value": {"mixer.generators"},
    "no adaptive query": {"mixer.generators"},
}


def differences(a: ModelConfig, b: ModelConfig) -> set[str]:
    own = {f.name for f in fields(a) if f.name != "mixer" and getattr(a, f.name) != getattr(b, f.name)}
    assert type(a.mixer) is type(b.mixer)
    return own | {f"mixer.{f.name}" for f in fields(a.mixer) if getattr(a.mixer, f.name) != getattr(b.mixer, f.name)}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_changes_one_choice_and_the_numbers(row):
    assert differences(ROWS[row], ROWS["hope"]) == CHANGED.get(row, set())
    tokens = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, base = (Decoder(config)(tokens)[0] for config in (ROWS[row], ROWS["hope"]))
    assert logits.isfinite().all()
    assert torch.equal(logits, base) == (row == "hope")


def test_the_rows_are_those_of_the_table():
    assert set(ROWS) == {"hope", *CHANGED}
    assert ROWS["hope"].mixer.generators == ("key", "value", "query", "step_size", "retention")
    assert [lvl.period for lvl in ROWS["no continuum"].levels] == [inf]
    assert preset("hope").mixer == replace(ROWS["hope"].mixer, chunk=64, projection_chunk=64, generators=DEFAULT)


DEFAULT = self_modifying().generators


def test_a_model_without_self_modifying_memories_has_no_such_rows():
    with pytest.raises(
        ValueError, match=r"table_6 takes self_modifying\(...\) apart, but the mixer is sequence_memory"
    ):
        table_6(ModelConfig(mixer=sequence_memory()))
