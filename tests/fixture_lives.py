"""A life of each release, kept in tests/fixture_lives, which every later version must open.

python tests/fixture_lives.py      writes the life of this version, once, before its release
"""

import json
from pathlib import Path

import nestling
from lives import text
from nestling.learner import Learner, LifeConfig
from nestling.levels import level
from nestling.models import Decoder, ModelConfig
from nestling.sequence import attention

FOLDER = Path(__file__).parent / "fixture_lives"
LEVELS = (level(24), level(60))
SMALL = ModelConfig(dim=8, heads=1, blocks=1, mixer=attention(window=4, convolution=2), levels=LEVELS)


def write(folder: Path) -> None:
    """A life that has read, been named, gone back, forgotten and talked; what it must be read as lies beside it."""
    with Learner.create(folder / "life", Decoder(SMALL, seed=5), config=LifeConfig(seed=3)) as life:
        life.learn(text(1), "one")
        named = life.snapshot("named")
        life.learn(text(2), "two")
        life.learn(text(3), "gone")
        life.forget("gone")
        with life.conversation("talk") as talk:
            talk.hear(life.tokens.encode(b"hello"))
            said = list(talk.answer(5))
        life.learn(text(4), "open", ends=False)
        facts = {
            "digest": life.digest,
            "named": named.digest,
            "position": int(life.state.reading.position),
            "sources": {name: about["tokens"] for name, about in life.sources().items()},
            "history": [line["action"] for line in life.history()],
            "said": said,
        }
    (folder / "facts.json").write_text(json.dumps(facts, indent=2))


if __name__ == "__main__":
    write(FOLDER / nestling.__version__)
