"""nestling generate, nestling chat: to write, and to talk with a life. Nothing of it is learned unless asked for."""

import sys
from pathlib import Path
from typing import Any

import torch
import tyro

from nestling.learner import Conversation, Learner, SavedStack, is_life
from nestling.learner.intake import as_tokens
from nestling.levels import StackedDecoder
from nestling.models import generate
from nestling.train import read_documents

from .opening import opened
from .reading import open_reader
from .shared import app, print_json


@app.command(name="generate")
def generate_command(
    directory: tyro.conf.Positional[Path],
    *,
    prompt: str,
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Go on from a prompt. Nothing is learned: levels stay as they are, the sequence state is this call's own.

    Args:
        directory: a life, or a model's folder; with a life in it, the life's levels are used.
        prompt: what comes before.
        tokens: how many tokens (bytes) to write.
        temperature: 0 takes the most likely one each time.
        seed: of the sampling.
        json: print prompt and text as JSON.
    """
    torch.set_flush_denormal(True)
    if is_life(directory):
        with opened(directory, write=False) as life:
            words = list(life.generate(prompt, tokens, temperature=temperature, seed=seed))
            text = life.tokens.decode(torch.tensor(words, dtype=torch.int64))
    else:
        text = _go_on(directory, prompt, tokens, temperature, seed)
    if json:
        print_json({"prompt": prompt, "text": text.decode("utf-8", "replace")})
        return
    _write(prompt.encode() + text + b"\n")


def _go_on(directory: Path, prompt: str, tokens: int, temperature: float, seed: int) -> bytes:
    saved, _, state = open_reader(directory, learning=False)
    weights = state.levels.weights
    if not isinstance(saved, SavedStack):
        words = generate(saved.model, prompt.encode(), tokens, weights=weights, temperature=temperature, seed=seed)
        return bytes(words)
    if not isinstance(saved.model, StackedDecoder):
        raise ValueError(f"{directory}: {saved.name} is an encoder, and does not write")
    torch.manual_seed(seed)  # transformers draws from the global generator
    choice = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    given = saved.encode(prompt.encode())[None]
    written = saved.model.generate(given, weights=weights, max_new_tokens=tokens, **choice)
    return saved.decode(written[0, given.shape[1] :]).decode(errors="replace").encode()


@app.command(name="chat")
def chat(
    directory: tyro.conf.Positional[Path],
    *,
    conversation: str = "main",
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    read: tyro.conf.UseAppendAction[tuple[Path, ...]] = (),
    tokens: int = 200,
    temperature: float = 0.8,
    stop: str | None = "\n",
    learn: bool = False,
    own_words: bool = False,
    json: bool = False,
) -> None:
    """Talk with a life. Each conversation has a sequence state of its own, and goes on where it stopped.

    Args:
        directory: a life.
        conversation: its name; it begins, where there is none.
        prompt: what to say, one turn each; if not given, lines are read from the terminal until it ends.
        read: files to be read in the conversation first, without being learned.
        tokens: the longest answer.
        temperature: 0 takes the most likely token each time.
        stop: an answer ends after this character; None for at `tokens` alone.
        learn: let the life learn at the end what was said to it in the conversation.
        own_words: and what it said itself.
        json: print the turns as JSON.
    """
    torch.set_flush_denormal(True)
    stop_token = None
    if stop == "":
        raise ValueError("stop must be at least one character, or None, got ''")
    with opened(directory, write=learn) as life, life.conversation(conversation) as talk:
        if stop is not None:
            (stop_token,) = life.tokens.encode(stop.encode()).tolist()[-1:]
        for document in read_documents(read):
            talk.hear(as_tokens(document, life.tokens), "document")
        turns = []
        for said in prompt or _lines():
            answer = _answer(life, talk, said, tokens, temperature, stop_token)
            turns.append({"user": said, "model": answer.decode("utf-8", "replace")})
            if not json:
                _write(answer if answer.endswith(b"\n") else answer + b"\n")
        told: dict[str, Any] = {"conversation": conversation, "turns": turns}
        if learn:
            told["learned"] = life.learn_conversation(talk, own_words=own_words)._asdict()
    if json:
        print_json(told)


def _answer(life: Learner, talk: Conversation, said: str, tokens: int, temperature: float, stop: int | None) -> bytes:
    talk.hear(as_tokens(said + "\n", life.tokens))
    found = list(talk.answer(tokens, temperature=temperature, stop=stop))
    return life.tokens.decode(torch.tensor(found, dtype=torch.int64))


def _lines() -> Any:
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _write(text: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
