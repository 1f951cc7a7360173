"""The command line of nestling.

Models: train, stack, learn, generate, info, check, zoo, demo. Lives: new, learn, chat, generate, status, history,
snapshot, keep, rollback, fork, forget, release, sleep, why, verify.
"""

import os

# Threads that spin for long while they wait are many times slower on a machine that does anything else; those
# that sleep at once are a fifth slower than those that spin for less than a millisecond.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import sys

from . import life, models, reading, resting, stacking, talking, zoo
from .shared import app, registry
from .training import train_command


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0 when all went well, 2 with one line on stderr for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["train"]:
            train_command(arguments[1:])
        else:
            with registry:
                app.cli(prog="nestling", description=__doc__, args=arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"nestling: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nestling: stopped; the last checkpoint stands", file=sys.stderr)
        return 130
    return 0


__all__ = ["life", "main", "models", "reading", "resting", "stacking", "talking", "zoo"]
