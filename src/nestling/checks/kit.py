"""The correctness kit: does a sequence model do what it says? Each check is a function from a model to a finding.

The model is copied, never run itself: neither its parameters nor torch's random state move. Where exactness is
asserted, the copy is in float64 and every parameter is moved a little from its start, since a zero hides what is
behind it. Each check exists because a published implementation fails it.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.memory import known
from nestling.models import Decoder

from .bench import (
    EXACT,
    SAME,
    SequenceModel,
    apart,
    bench,
    fresh,
    sealed,
    sequence_model,
    snapshot,
    span_of,
    vocabulary_of,
)
from .learning import reading_invariance, reading_surprise_falls, surprise_falls
from .options import options_live
from .report import Finding, Report, skip
from .special import named_model


def check(model: SequenceModel, *, seed: int = 0, only: Collection[str] | None = None, steps: int = 300) -> Report:
    """Run every check, or those named in `only`, on a model; `steps`: of training for `entropy_floor`.

    Any causal module will do that maps token ids [b, t] to logits [b, t, V], alone, in an object with `logits`, or in
    a tuple with a state that the next call takes. Nearly all of the time is training. Raises ValueError for a name in
    `only` that is no check; what a model raises when it is called is not caught.
    """
    chosen = {name: known(name, CHECKS, "check") for name in (CHECKS if only is None else only)}
    if not isinstance(model, Decoder):
        with sealed():
            model = sequence_model(model)
    findings = []
    for name, run in chosen.items():
        more = {"steps": steps} if name == "entropy_floor" else {}
        findings.append(run(model, seed=seed, **more))
    return Report(tuple(findings))


@sealed()
def causality(model: SequenceModel, *, seed: int = 0) -> Finding:
    """No logits depend on a later token; some at or after a token depend on it. Tokens at several positions, on
    both sides of the chunks' edges, are changed one at a time; measured: the largest change before one."""
    on = bench(model, seed)
    length = 2 * on.span + 3
    tokens = on.tokens(2, length)
    before = on.model(tokens)[0]
    leak, unfelt = (0.0, -1), []
    for t in sorted({0, 1, on.span // 2, on.span - 1, on.span, on.span + 1, 2 * on.span, length - 1}):
        changed = tokens.clone()
        changed[:, t] = on.other(tokens[:, t])
        after = on.model(changed)[0]
        leak = max(leak, (apart(before[:, :t], after[:, :t]), t))
        if apart(before[:, t:], after[:, t:]) <= 1e-9:
            unfelt.append(t)
    faults = [f"token {leak[1]} is felt before it"] if leak[0] > EXACT else []
    faults += [f"nothing at or after token {t} depends on it" for t in unfelt]
    return Finding("causality", not faults, leak[0], f"<= {EXACT:g}", "; ".join(faults))


@sealed()
def entropy_floor(model: SequenceModel, *, seed: int = 0, steps: int = 300, learning_rate: float = 3e-3) -> Finding:
    """Random tokens cannot be predicted. A fresh model (any other than a Decoder: a copy) is trained by AdamW for
    `steps` steps on uniform random tokens, new ones each step; the mean loss of the last 100 steps (half of all,
    if they are fewer than 200) is at least ln V less four standard errors. A leak of the future that can be
    learned shows as a loss below the floor; one that `causality` sees and this does not is not yet exploited."""
    learner, vocabulary = fresh(model, seed), vocabulary_of(model)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(vocabulary, (4, 2 * span_of(model) + 2), generator=generator).to(parameters[0].device)
        with torch.enable_grad():
            loss = _loss(learner, tokens)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    last = torch.tensor(losses[-min(100, max(2, steps // 2)) :], dtype=torch.float64)
    mean, error = float(last.mean()), float(last.std()) / math.sqrt(last.numel())
    floor = math.log(vocabulary) - 4 * error
    detail = f"nats after {steps} steps; ln V is {math.log(vocabulary):.4f}, a standard error {error:.2g}"
    return Finding("entropy_floor", mean >= floor, mean, f">= {floor:.4f}", detail)


@sealed()
def gradient_coverage(model: SequenceModel, *, seed: int = 0) -> Finding:
    """Every parameter gets an outer gradient, finite and not zero, from the next-token loss over more than three
    chunks; of a matrix (or a stack of them) every row does, since keys, values and queries may share one, but of
    tables with a row a token only some. Zero is: below 1e-12 of the largest, root mean square. Measured: how many
    parameters lack some."""
    on = bench(model, seed)
    names, gradients, _ = _outer_gradient(on.model, on.tokens(2, 3 * on.span + 2))
    largest = max((_size(g) for g in gradients if g.isfinite().all()), default=0.0)
    without = []
    for name, gradient in zip(names, gradients, strict=True):
        by_row = gradient.dim() > 1 and gradient.shape[0] != on.vocabulary
        rows = [_size(row) for row in (gradient if by_row else gradient[None])]
        missing = sum(not 1e-12 * largest < size < math.inf for size in rows)
        if missing:
            without.append(name if missing == len(rows) else f"{name} ({missing} of {len(rows)} rows)")
    detail = f"without: {_some(without)}" if without else f"all {len(names)} parameters"
    return Finding("gradient_coverage", not without and bool(names), len(without), "0", detail)


@sealed()
def gradient_exactness(model: SequenceModel, *, seed: int = 0) -> Finding:
    """The outer gradient is the derivative of the loss: along a random direction through all parameters it equals
    the central difference. A write outside of the graph, or a state that is detached between chunks, is a
    gradient that `gradient_coverage` may see but that is wrong; `detail` names the parameters whose is. A model
    that truncates on purpose fails. Measured: the difference relative to the size of the derivatives."""
    on = bench(model, seed)
    tokens = on.tokens(2, 3 * on.span + 2)
    names, gradients, parameters = _outer_gradient(on.model, tokens)
    noise = [torch.randn(p.shape, dtype=p.dtype, generator=on.generator).to(p.device) for p in parameters]
    directions = [n * (float(p.square().mean().sqrt()) or 0.1) for n, p in zip(noise, parameters, strict=True)]
    slopes = [float((g * d).sum()) for g, d in zip(gradients, directions, strict=True)]
    scale = math.sqrt(sum(slope**2 for slope in slopes)) + 1e-9

    def wrong(chosen: list[int], width: float) -> float:
        losses = []
        for sign in (1.0, -2.0, 1.0):  # there, past the start, and back
            for i in chosen:
                parameters[i].data += sign * width * directions[i]
            losses.append(float(_loss(on.model, tokens)))
        return abs((losses[0] - losses[1]) / (2 * width) - sum(slopes[i] for i in chosen)) / scale

    every, allowed = list(range(len(parameters))), 1e-5
    measured = wrong(every, 1e-6)
    if measured > allowed:  # a model that rounds to float32 somewhere takes a wider difference
        measured = min(measured, wrong(every, 1e-4), wrong(every, 1e-3))
    passed = measured <= allowed
    named = [] if passed else [name for i, name in enumerate(names) if wrong([i], 1e-6) > allowed / 10]
    detail = f"wrong: {_some(named)}" if named else ""
    return Finding("gradient_exactness", passed, measured, f"<= {allowed:g}", detail)


@sealed()
def split_invariance(model: SequenceModel, *, seed: int = 0) -> Finding:
    """One pass = two = several of odd sizes = token by token: the logits, the last state, and what follows from
    it. Where the model takes `reset`, also with documents that begin at different places in each row; and each
    document reads as if it stood alone."""
    on = bench(model, seed)
    length = 2 * on.span + 5
    tokens, following = on.tokens(2, length), on.tokens(2, 3)
    begins = torch.zeros(2, length, dtype=torch.bool, device=tokens.device)
    begins[0, on.span // 2 + 1], begins[1, on.span + 1], begins[1, on.span + 3] = True, True, True
    splits = {
        "in two": [on.span + 1],
        "in odd pieces": [1, max(1, on.span // 2), 3, on.span],
        "token by token": [1] * length,
    }
    apart_by = {}
    for words, reset in (("", None), (", with resets", begins))[: 1 + on.takes_reset]:
        whole, state = on.in_pieces(tokens, [], reset)
        if state is None:
            return skip("split_invariance", "the model returns no state")
        expected = (whole, state, on.model(following, state)[0])
        for name, sizes in splits.items():
            logits, state = on.in_pieces(tokens, sizes, reset)
            apart_by[name + words] = apart(expected, (logits, state, on.model(following, state)[0]))
        if reset is not None:
            documents = [(0, 0, on.span // 2 + 1), (0, on.span // 2 + 1, length), (1, on.span + 3, length)]
            alone = [(whole[row, a:b], on.model(tokens[row : row + 1, a:b])[0][0]) for row, a, b in documents]
            apart_by["each document alone"] = max(apart(one, two) for one, two in alone)
    measured = max(apart_by.values())
    faults = [f"{name}: {value:.1e}" for name, value in apart_by.items() if value > SAME]
    return Finding("split_invariance", not faults, measured, f"<= {SAME:g}", "; ".join(faults))


@sealed()
def rows_independent(model: SequenceModel, *, seed: int = 0) -> Finding:
    """A row's logits do not change when the other rows do: their tokens, whether they are there at all and, where
    the model takes `reset`, where their documents begin."""
    on = bench(model, seed)
    length = 2 * on.span + 3
    tokens = on.tokens(3, length)
    others = torch.cat([tokens[:1], on.other(tokens[1:])])
    begins = torch.zeros(3, length, dtype=torch.bool, device=tokens.device)
    begins[0, on.span // 2 + 1] = True
    elsewhere = begins.clone()
    elsewhere[1, 2], elsewhere[1, on.span], elsewhere[2, on.span - 1] = True, True, True
    apart_by = {}
    cases: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {"": ({}, {})}
    if on.takes_reset:
        cases[", with resets"] = ({"reset": begins}, {"reset": elsewhere})
    for words, resets in cases.items():
        one = on.model(tokens, None, **resets[0])[0][:1]
        alone = on.model(tokens[:1], None, **{name: value[:1] for name, value in resets[0].items()})[0]
        apart_by[f"changed{words}"] = apart(one, on.model(others, None, **resets[1])[0][:1])
        apart_by[f"taken away{words}"] = apart(one, alone)
    measured = max(apart_by.values())
    faults = [f"others {name}: {value:.1e}" for name, value in apart_by.items() if value > EXACT]
    detail = "; ".join(faults) or ("" if on.takes_reset else "the model takes no reset")
    return Finding("rows_independent", not faults, measured, f"<= {EXACT:g}", detail)


@sealed()
def purity(model: SequenceModel, *, seed: int = 0) -> Finding:
    """The same input and state give the same output, bitwise, whatever was asked in between; a call changes no
    parameter, buffer or state that it was given; training and gradient mode make no difference (to 1e-12)."""
    on = bench(model, seed)
    first, second = on.tokens(2, on.span + 3), on.tokens(2, on.span + 2)
    told, kept, weights = first.clone(), second.clone(), snapshot(on.model)
    logits, state = on.model(first)
    given = snapshot(state)
    follow = on.model(second, state)
    apart_by = {
        "a call changed the state it was given": apart(given, snapshot(state)),
        "the state given was changed and changes the next answer": apart(follow, on.model(second, state)),
        "the same input gave another output": apart(logits, on.model(first)[0]),
        "a call changed the model": apart(weights, snapshot(on.model)),
        "a call changed its tokens": apart((told, kept), (first, second)),
    }
    modes = {}
    with torch.enable_grad():
        modes["gradient mode changes the output"] = apart(logits, on.model(first)[0].detach())
    if isinstance(on.model, torch.nn.Module):
        on.model.train()
        modes["train() changes the output"] = apart(logits, on.model(first)[0])
        apart_by["a call changed the model"] = max(
            apart_by["a call changed the model"], apart(weights, snapshot(on.model))
        )
    faults = [words for words, value in apart_by.items() if value > 0]
    faults += [words for words, value in modes.items() if value > EXACT]
    measured = max(*apart_by.values(), *modes.values())
    return Finding("purity", not faults, measured, f"0; modes <= {EXACT:g}", "; ".join(faults))


@sealed()
def initial_loss(model: SequenceModel, *, seed: int = 0, build: Callable[[], SequenceModel] | None = None) -> Finding:
    """The mean loss of an untrained model on random tokens is within 5% of ln V. A Decoder is built anew from its
    configuration; for any other model `build` makes an untrained one. Measured: the relative difference."""
    if build is None and not isinstance(model, Decoder):
        return skip("initial_loss", "no configuration to build an untrained model from; give build=")
    untrained = fresh(model, seed) if build is None else build()
    vocabulary = vocabulary_of(untrained)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (8, 2 * span_of(untrained) + 2), generator=generator)
    loss = float(_loss(untrained, tokens.to(next(iter(untrained.parameters())).device)))
    measured = abs(loss / math.log(vocabulary) - 1.0)
    detail = f"{loss:.4f} nats, ln V is {math.log(vocabulary):.4f}"
    return Finding("initial_loss", measured <= 0.05, measured, "<= 0.05", detail)


def _some(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _size(gradient: Tensor) -> float:
    return float(gradient.square().mean().sqrt())


def _loss(model: Any, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])[0]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _outer_gradient(model: Any, tokens: Tensor) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Names, gradients of the next-token loss and values of all parameters that learn."""
    if isinstance(model, torch.nn.Module):
        named = dict(model.named_parameters())
    else:
        named = {f"parameter {index}": parameter for index, parameter in enumerate(model.parameters())}
    named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    with torch.enable_grad():
        found = torch.autograd.grad(_loss(model, tokens), list(named.values()), allow_unused=True)
    values = [parameter.detach() for parameter in named.values()]
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, values, strict=True)]
    return list(named), gradients, values


_ALL: tuple[Callable[..., Finding], ...] = (
    causality,
    rows_independent,
    purity,
    split_invariance,
    gradient_coverage,
    gradient_exactness,
    initial_loss,
    reading_invariance,
    surprise_falls,
    reading_surprise_falls,
    named_model,
    options_live,
    entropy_floor,
)
CHECKS = {function.__name__: function for function in _ALL}
