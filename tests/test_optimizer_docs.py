"""What docs/optimizers.md says is run, and its expressions are those of the optimizers."""

import doctest
from pathlib import Path

import pytest
import torch
from torch import nn

from nestling.optim import OPTIMIZERS, explain_all

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"


def test_the_page_runs():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried > 10
    assert failed == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("SGD", {"momentum": 0.9, "dampening": 0.1}),
        ("SGD", {"weight_decay": 0.01}),
        ("Adagrad", {}),
        ("RMSprop", {}),
        ("Adam", {}),
        ("AdamW", {}),
        ("FullMatrixAdagrad", {}),
        ("Muon", {"precision": "weight"}),
        ("DeltaGradientDescent", {}),
        ("DeltaGradientDescent", {"form": "averaged"}),
        ("PreconditionedMomentum", {}),
        ("DeltaMomentum", {}),
        ("DeltaMomentum", {"form": "literal"}),
        ("DeepMomentum", {}),
        ("GeneralizedGradientDescent", {}),
    ],
)
def test_the_table_says_what_the_optimizers_are(name, options):
    optimizer = OPTIMIZERS[name]([nn.Parameter(torch.zeros(2, 3))], **options)
    rule, _ = optimizer.express(optimizer.param_groups[0])
    assert f"`{rule!r}`" in PAGE.read_text()


def test_the_page_tells_which_optimizer_is_which_memory():
    assert explain_all() in PAGE.read_text(), "print(nestling.optim.explain_all()) again"
    assert all(f"| `{name}` | weights W |" in explain_all() for name in OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_names_its_equation_and_its_oracle(name):
    told = OPTIMIZERS[name].__doc__
    assert "Oracle" in told
    assert "quation" in told or "lgorithm" in told or name in ("Adagrad", "AdamW", "RMSprop")
