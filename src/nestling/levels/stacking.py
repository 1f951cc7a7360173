"""Levels for a model that somebody else trained: its MLPs learn at periods of their own, all else is constant."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestling.memory.structure import Weights

from .attention_cache import CacheState, keep, place
from .beside import read_beside
from .continuum import Level, Taps, level
from .layouts import Feedforward, LinearMap, find_feedforwards, fuse, unfuse
from .local import local
from .losses import Loss, next_token
from .neurons import join_neurons, share_taps, split_neurons
from .slots import Slots

T = TypeVar("T")
_CONTEXT = 1024  # tokens in the cache, where the model can take as many and nothing else is said


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """How levels are put into a pre-trained model. The levels' structure is the model's own, whatever they name.

    how: "layers", layer j of the model learns as level j mod K; "neurons", each MLP's neurons are divided into runs,
    one a level; "low_rank", beside each MLP stand K new levels B A x, of `rank` each, with B = 0 at the start. Biases
    stay as they are. context, overlap: the attention cache holds at most `context` tokens; when one more comes it is
    cut down to its last `overlap` tokens. overlap=0: each window is read afresh, at positions from 0; else positions
    go on, which takes a model whose positions are rotary (and documents in which float32 angles are exact enough).
    """

    levels: tuple[Level, ...]  # in the order of the layers, or of the neurons
    how: Literal["layers", "neurons", "low_rank"] = "layers"
    rank: int = 8  # of each extra level
    context: int | None = None  # tokens; None: as many as the model takes, at most 1,024
    overlap: int = 0  # tokens
    loss: Loss | None = None  # None: the next token, for decoders
    seed: int = 0  # of the extra levels' first maps

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("periods must name at least one period or level, such as [128, 512]")
        if any(isinstance(block, local) for block in self.levels):
            raise ValueError("local levels know their own inputs and answers, in a Continuum; a stack learns the task")
        divided = [block for block in self.levels if not isinstance(block, level)]
        if divided and (self.how != "neurons" or len(self.levels) > 1):
            raise ValueError(f"{divided[0]} divides neurons: give it alone, as periods, with how='neurons'")
        if self.how not in ("layers", "neurons", "low_rank"):
            raise ValueError(f"how must be 'layers', 'neurons' or 'low_rank', got {self.how!r}")
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context must be >= 1 token, got {self.context}")
        if not 0 <= self.overlap < (self.context or math.inf):
            raise ValueError(f"overlap must be >= 0 and less than context = {self.context}, got {self.overlap}")

    @property
    def each(self) -> tuple[level, ...]:
        """Every level, those of divided blocks too."""
        return tuple(lvl for block in self.levels for lvl in block.levels)


def stack(
    model: nn.Module,
    periods: Sequence[float | Level] | Level = (),
    how: str = "layers",
    *,
    step_size: float = 0.1,
    config: StackConfig | None = None,
    **options: Any,
) -> "Stacked":
    """A model of `transformers` whose MLPs are levels with these periods (tokens), in any order.

    periods: numbers, or levels with rules and step sizes of their own, or one `spectrum(...)` for how="neurons". The
    other options are the fields of `StackConfig`. The model is shared, not copied, and stays as it is: what is learned
    is in the state of a life. It is put into evaluation mode (no dropout: a life is deterministic). A `config` says it
    all at once.

    Raises ValueError where the model's layout is not known, naming what was looked for. Nested Learning 7.3. Oracle:
    the model itself (logits are equal, bit for bit, as long as nothing is learned).
    """
    given = (periods,) if isinstance(periods, Level) else tuple(periods)
    levels = tuple(p if isinstance(p, Level) else level(p, step_size=step_size) for p in given)
    config = config or StackConfig(levels=levels, how=how, **options)  # type: ignore[arg-type]
    decodes = bool(getattr(model, "can_generate", lambda: False)())
    return StackedDecoder(model, config) if decodes else StackedEncoder(model, config)


class Stacked(nn.Module):
    """A pre-trained model with levels: the weights of a life are put into it for the length of a call."""

    def __init__(self, base: nn.Module, config: StackConfig) -> None:
        super().__init__()
        if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{type(base).__name__} has an encoder and a decoder; levels are stacked in one or the other"
            )
        self.base = base.eval()
        self.config = config
        self.feedforwards = find_feedforwards(base)
        self.extra = nn.ModuleList()
        if config.how == "low_rank":
            generator = torch.Generator().manual_seed(config.seed)
            for feedforward in self.feedforwards:
                for _ in config.each:
                    self.extra.append(nn.ParameterList(_low_rank(feedforward, config.rank, base, generator)))

    def train(self, mode: bool = True) -> "Stacked":
        """Stays in evaluation mode: dropout in a life would make it random. Levels learn in any mode."""
        return super().train(False)

    @property
    def levels(self) -> tuple[level, ...]:
        """Layer by layer; in a layer fast to slow."""
        each = self.config.each
        if self.config.how == "layers":
            return tuple(each[index % len(each)] for index in range(len(self.feedforwards)))
        return each * len(self.feedforwards)

    def level_weights(self) -> tuple[Weights, ...]:
        """The model's own, as [out, in]: views of its parameters, in float32 where it computes in less."""
        if self.config.how == "low_rank":
            return tuple(tuple(maps) for maps in self.extra)  # type: ignore[arg-type]
        found = [tuple(_exact(w) for w in feedforward.read(self.base)) for feedforward in self.feedforwards]
        if self.config.how == "layers":
            return tuple(found)
        return tuple(group for maps in found for group in split_neurons(maps, len(self.config.each)))

    def _of_layer(self, index: int, weights: tuple[T, ...]) -> tuple[T, ...]:
        count = len(weights) // len(self.feedforwards)
        return weights[index * count : (index + 1) * count]

    def placed(self, weights: tuple[Weights, ...]) -> dict[str, Tensor]:
        """Levels' weights as parameters of the pre-trained model, by name."""
        named: dict[str, Tensor] = {}
        for index, feedforward in enumerate(self.feedforwards):
            joined = join_neurons(self._of_layer(index, weights))
            named |= feedforward.place(joined, self.base)
        return named

    @contextmanager
    def _with(
        self, weights: tuple[Weights, ...] | None, taps: list[Taps] | None, slots: tuple[Slots, ...] = ()
    ) -> Iterator[dict[str, Tensor]]:
        """The parameters to call the pre-trained model with; while inside, its MLPs are listened to, and slots (one
        bank for each level, none by default) are read beside them."""
        if slots and len(slots) != len(self.levels):
            raise ValueError(f"slots must have one entry for each of {len(self.levels)} levels, got {len(slots)}")
        extra = self.config.how == "low_rank"
        named = {} if weights is None or extra else self.placed(weights)
        own = self.level_weights() if weights is None and (extra or taps is not None) else weights
        heard: dict[Any, tuple[Tensor, Tensor]] = {}
        handles = []
        for index, feedforward in enumerate(self.feedforwards):
            if extra:
                assert own is not None
                beside = join_neurons(self._of_layer(index, own))
                handles += _listen(self.base, feedforward, heard, beside)
            elif taps is not None:
                handles += _listen(self.base, feedforward, heard, None)
            if slots:
                handles += read_beside(self.base, feedforward, self._of_layer(index, slots))
        try:
            yield named
        finally:
            for handle in handles:
                handle.remove()
        if taps is None:
            return
        assert own is not None
        for index, feedforward in enumerate(self.feedforwards):
            maps = [(feedforward.last, name) for name in "AB"] if extra else feedforward.maps
            pairs = [heard[each] for each in maps]
            inputs, outputs = tuple(x for x, _ in pairs), tuple(y for _, y in pairs)
            groups = self._of_layer(index, own)
            taps.extend(share_taps(groups, inputs, outputs) if len(groups) > 1 else [Taps(inputs, outputs)])

    def _call(self, named: dict[str, Tensor], method: str, *given: Any, **options: Any) -> Any:
        parameters = {f"base.{name}": tensor for name, tensor in named.items()}
        caller = _Caller(self.base)
        return torch.func.functional_call(caller, parameters, (method, *given), options, tie_weights=False)


class StackedDecoder(Stacked):
    """Tokens [b, t] -> logits [b, t, V] and the cache after them: what `Reader` reads with (a `LevelledModel`)."""

    def __init__(self, base: nn.Module, config: StackConfig) -> None:
        super().__init__(base, config)
        if not isinstance(config.loss, next_token | None):
            raise ValueError(
                f"{type(base).__name__} predicts the next token, and learns from that; got loss={config.loss}"
            )
        self.context, self.overlap = _context(base, config), config.overlap
        with torch.no_grad():  # what its cache is made of
            cache = base(_one_token(base), use_cache=True).past_key_values
        if not hasattr(cache, "layers") or not all(isinstance(layer.keys, Tensor) for layer in cache.layers):
            raise ValueError(f"{type(base).__name__}: needs an attention cache with keys and values in every layer")
        self._empty = [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in cache.layers]

    def init_state(self, batch: int) -> CacheState:
        """An empty cache."""

        def room(like: Tensor) -> Tensor:
            return like.new_zeros(batch, like.shape[1], 0, like.shape[3])

        device = self._empty[0][0].device
        none = torch.zeros(batch, dtype=torch.int64, device=device)
        valid = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        keys, values = zip(*((room(key), room(value)) for key, value in self._empty), strict=True)
        return CacheState(keys, values, valid, none, none)

    def forward(
        self,
        tokens: Tensor,
        state: CacheState | None = None,
        *,
        weights: tuple[Weights, ...] | None = None,
        taps: list[Taps] | None = None,
        slots: tuple[Slots, ...] = (),
        valid: Tensor | None = None,
    ) -> tuple[Tensor, CacheState]:
        from transformers import DynamicCache

        state = self.init_state(tokens.shape[0]) if state is None else state
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        window, held = place(state, valid, self.context, self.overlap, self._empty[0][0].dtype)
        cache, used = DynamicCache(), int(state.used[0])
        for index, (keys, values) in enumerate(zip(state.keys, state.values, strict=True)):
            if used:  # what is held goes in as it is: `update` would copy it, and the call copies it once more
                cache.update(keys[:, :, :0], values[:, :, :0], index)
                layer = cache.layers[index]
                layer.keys, layer.values = keys[:, :, :used], values[:, :, :used]
        options = {"position_ids": window.positions, "attention_mask": window.mask, "past_key_values": cache}
        with self._with(weights, taps, slots) as named:
            out = self._call(named, "__call__", tokens, **options, use_cache=True)
        whole = [(layer.keys, layer.values) for layer in cache.layers]
        return _exact(out.logits), keep(whole, held, state, window.first, self.overlap)

    def generate(self, tokens: Tensor, *, weights: tuple[Weights, ...] | None = None, **options: Any) -> Any:
        """`generate` of transformers, with the levels' weights of a life (the model's own by default). Nothing is
        learned, and the cache is the call's own, as transformers keeps it."""
        with self._with(weights, None) as named:
            return self._call(named, "generate", tokens, **options)


class StackedEncoder(Stacked):
    """An encoder with levels: it has no next token, so that what it learns from has to be said (`loss`)."""

    def __init__(self, base: nn.Module, config: StackConfig) -> None:
        super().__init__(base, config)
        if isinstance(config.loss, next_token):
            raise ValueError(f"{type(base).__name__} is an encoder and predicts no next token; {_SAY_LOSS}")
        with torch.no_grad():  # what it answers with
            logits = getattr(base(_one_token(base)), "logits", None)
        self.classes = logits.shape[-1] if logits is not None and logits.dim() == 2 else 0  # 0: it is no classifier

    def init_state(self, batch: int) -> Any:
        """Encoders have no sequence state. Raises ValueError: they are not read with `Reader`."""
        name, loss = type(self.base).__name__, self.config.loss
        if loss is None:
            raise ValueError(f"{name} is an encoder, and nothing says what it learns from; {_SAY_LOSS}")
        raise ValueError(f"{name} is an encoder with loss={loss}: read with {loss.reads}, not with Reader")

    def forward(
        self,
        tokens: Tensor,
        state: None = None,
        *,
        weights: tuple[Weights, ...] | None = None,
        taps: list[Taps] | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Tokens [b, t] -> logits ([b, t, V], or [b, classes] of a classifier); hidden states where there are none."""
        mask = None if valid is None else valid.long()
        with self._with(weights, taps) as named:
            out = self._call(named, "__call__", tokens, attention_mask=mask)
        return _exact(out.logits if hasattr(out, "logits") else out.last_hidden_state), None


_SAY_LOSS = (
    "stack it with loss=masked_tokens(mask_token=...), to read with MaskedReader, "
    "or with loss=seen_classes(), to read with ExampleReader"
)


class _Caller(nn.Module):
    """Any method of a module, as the call of one: what functional_call asks for."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, method: str, *given: Any, **options: Any) -> Any:
        return getattr(self.base, method)(*given, **options)


def _listen(
    base: nn.Module, feedforward: Feedforward, heard: dict[Any, tuple[Tensor, Tensor]], beside: Weights | None
) -> list[Any]:
    """Keep what the maps of an MLP receive and give; or, with maps beside it, add what those give and keep theirs.
    Hooks, for one call: the model is somebody else's code."""

    def keep_as(maps: tuple[LinearMap, ...]) -> Any:
        def keep(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            parts = unfuse(maps, output) if len(maps) > 1 else (output,)
            heard.update((each, (given[0], part)) for each, part in zip(maps, parts, strict=True))
            return fuse(maps, parts, -1) if len(maps) > 1 else None  # made of the parts, that errors reach them

        return keep

    if beside is None:
        return [base.get_submodule(m[0].path).register_forward_hook(keep_as(m)) for m in feedforward.modules]
    down, up = beside
    came: list[Tensor] = []
    last = feedforward.last

    def arrive(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        came.append(given[0])

    def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = came.pop()
        low = F.linear(x, down.to(x.dtype))
        more = F.linear(low, up.to(x.dtype))
        heard[last, "A"], heard[last, "B"] = (x, low), (low, more)
        return output + more

    first = base.get_submodule(feedforward.first[0].path)
    return [first.register_forward_pre_hook(arrive), base.get_submodule(last.path).register_forward_hook(add)]


def _low_rank(feedforward: Feedforward, rank: int, base: nn.Module, generator: torch.Generator) -> Weights:
    """A [rank, d], normal of deviation 1/sqrt(d); B [d, rank], zero."""
    down, up = feedforward.first[0], feedforward.last
    like = _exact(down.read(base))
    drawn = torch.randn(rank, down.columns, generator=generator) / math.sqrt(down.columns)
    return drawn.to(like), like.new_zeros(up.rows, rank)


def _one_token(base: nn.Module) -> Tensor:
    return torch.zeros(1, 1, dtype=torch.int64, device=next(base.parameters()).device)


def _exact(tensor: Tensor) -> Tensor:
    """In float32 where it has less."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _context(base: nn.Module, config: StackConfig) -> int:
    """Tokens in the cache: as asked for, or as many as the model takes."""
    about = base.config.get_text_config()  # type: ignore[union-attr, operator]
    longest = getattr(about, "max_position_embeddings", None)
    sliding = getattr(about, "sliding_window", None)
    limits = [bound for bound in (longest, sliding) if bound]
    context = config.context or min([_CONTEXT, *limits])
    if limits and context > min(limits):
        raise ValueError(f"context must be <= {min(limits)} tokens, which {type(base).__name__} takes, got {context}")
    if not config.overlap < context:
        raise ValueError(f"overlap must be less than context = {context}, got {config.overlap}")
    table = base.get_input_embeddings()  # type: ignore[operator]
    learned = [m for m in base.modules() if isinstance(m, nn.Embedding) and m is not table]
    if config.overlap and any(longest and m.num_embeddings >= longest for m in learned):
        raise ValueError(
            f"{type(base).__name__} has a table of {longest} positions, which cannot go on over cuts; use overlap=0"
        )
    return context
