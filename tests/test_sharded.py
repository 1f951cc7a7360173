"""Parameters sharded by FSDP2 over two processes: the same steps as in one."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "sharded_steps.py"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this build of torch has no gloo, by which processes talk on a CPU",
)
@pytest.mark.slow
def test_sharded_is_unsharded():
    """Newton-Schulz, Gram matrices and eigenvalues of whole matrices; each optimizer saved and loaded on the way."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, error) in zip(ranks, told, strict=True):
        assert rank.returncode == 0, error
        found = dict(line.split() for line in out.splitlines())
        assert set(found) >= {"AdamW", "Muon", "M3", "DeltaGradientDescent", "for_model"}
        for name, difference in found.items():
            assert float(difference) < 1e-11, name
