"""The benchmark of long reading compares every byte with itself."""

import runpy
from pathlib import Path

import torch

from lives import text
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention

LONG_READING = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "long_reading.py"))


def test_what_looks_back_less_than_the_training_length_reads_alike_far_beyond_it():
    model = Decoder(ModelConfig(dim=8, heads=1, blocks=1, mixer=attention(window=8)), seed=1)
    pieces = [text(number, 1024) for number in range(3)]
    far = LONG_READING["bits"](model, pieces)[:, LONG_READING["LENGTH"] - 1 :]
    near = LONG_READING["at_training_length"](model, pieces)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
    assert float(far.std()) > 0.05
    difference, error = LONG_READING["compared"](far + torch.tensor([[0.1], [0.2], [0.3]]), near)
    assert abs(difference - 0.2) < 1e-3
    assert abs(error - 0.1 / 3**0.5) < 1e-3
