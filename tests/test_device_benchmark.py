"""The benchmark for a card runs, at a tiny size, on any machine."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ["--batch", "1", "--length", "64", "--width", "16", "--heads", "2", "--repeats", "1", "--lengths", "8"]


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import device

    return device.main


def test_every_block_is_timed_and_its_products_counted(main, tmp_path):
    main(["--device", "cpu", "--out", str(tmp_path), *TINY])
    (file,) = tmp_path.iterdir()
    assert file.name == "device_cpu_bfloat16.json"
    rows = json.loads(file.read_text())["forward+backward"]
    assert list(rows) == ["transformer block", "titans mixer", "self-modifying mixer", "hope block"]
    assert rows["transformer block"]["times_transformer"] == 1.0
    # of a forward pass two operations a token and weight, of a backward pass four, of attention less
    linear = 6 * 64 * 12 * 16**2
    assert linear - 2 * 64 * 3 * 16**2 <= rows["transformer block"]["operations"] < 1.5 * linear
    assert all(row["tokens_per_s"] > 0 for row in rows.values())
    (family,) = json.loads(file.read_text())["linear family, forward+backward"].values()
    assert len(family) == 14
    assert all(row["ms"] > 0 for name, row in family.items() if name.endswith("chunked"))
    for name in (name for name in family if name.endswith("kernels")):  # says why not, where there is no card
        assert "on a GPU, got some on a CPU" in family[name]


def test_a_device_that_is_not_there_is_refused_in_one_line(main, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match=r"^--device cuda: .*--device cpu"):
        main(["--out", str(tmp_path), *TINY])
    assert not list(tmp_path.iterdir())
