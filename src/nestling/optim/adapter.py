"""Any learning rule as a torch optimizer: one step of the rule on every weight matrix."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nestling.memory.part import known as require_known
from nestling.memory.rule import Gates, Gradient, Pairs, Rule, Summed, every, retain_first
from nestling.memory.state import clone, flatten, map_tensors, unflatten

from .capture import Captured, as_the_gradient_is, captured_into
from .finite import finite, with_names
from .sharded import Deal, averaged, deal, is_sharded, like, local
from .states import apart, joined, leaves, renamed, stack, unstack

PIECE = {"cpu": 1 << 17, "other": 1 << 24}
"""Entries stepped together: on a CPU what its cache holds, with all that a rule computes of them; else so many that
launches do not count."""


NOTES = {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
"""What a group may hold beside options: its parameters, a name, and what torch's schedulers note down."""


class RuleOptimizer(torch.optim.Optimizer):
    """Steps parameters by a `Rule`: weight, state <- rule.step(weight, gradient, state, gates).

    Each group holds its gates: lr (the step size), momentum, retention (the fraction kept); tokens: how many tokens
    (or steps) one gradient sums; and period: the group's rule is every(period, rule), which counts them. A parameter
    [..., out, in] of more than two dims is as many matrices; where the group is `flat`, or a convolution was seen by
    `capture`, it is one, [out, in * kernel]; of fewer dims, a column. Parameters of one shape are stepped together, up
    to PIECE entries at once: small ones in one go, on a CPU large ones one by one, and those of rules that act entry by
    entry in pieces that fit the cache. Parameters in float16 are stepped, and their states kept, in float32; all others
    in their own dtype. Rules that need the inputs of a layer (delta_gradient_descent, normalize) learn them from
    `capture(module)`.

    nonfinite: a gradient that is not finite "raise"s FloatingPointError with the parameter's name before anything
    has changed, or the whole step is "skip"ped and counted in `skipped`. differentiable: steps are recorded by
    autograd. Raises ValueError for complex parameters and sparse gradients. Oracles: a sequence memory with the same
    rule (tests/test_one_rule.py), torch.optim (tests/test_optim_torch.py).
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule,
        *,
        step_size: float | Tensor = 1e-2,
        momentum: float = 0.9,
        retention: float = 1.0,
        tokens: int = 1,
        period: int = 1,
        flat: bool = False,
        nonfinite: Literal["raise", "skip"] = "raise",
        differentiable: bool = False,
    ) -> None:
        if not step_size >= 0:
            raise ValueError(f"step_size must be >= 0, got {step_size}")
        if rule.exposes:
            raise ValueError(f"{rule} steps an accumulator, and a parameter is the weight itself; use decay() for it")
        if rule.reopens:
            raise ValueError(f"{rule} acts where a chunk opens, and an optimizer has no chunks")
        if isinstance(rule, retain_first):
            raise ValueError(f"{rule} takes its gradient at decayed weights, torch took it before; use retain(...)")
        self.rule = rule
        gates = {"lr": step_size, "momentum": momentum, "retention": retention}
        own = {"tokens": tokens, "period": period, "flat": flat}
        self._begin(params, gates | own | {"nonfinite": nonfinite, "differentiable": differentiable})

    def _begin(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self.captured: dict[Tensor, Captured] = {}
        self.forms: dict[Any, Any] = {}
        self.compiled: dict[Rule, Callable[..., tuple[Tensor, Any]]] = {}
        self.skipped = 0
        self._check(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name in ("rule", "skipped")}
        return super().__getstate__() | own | {"captured": {}, "forms": {}, "compiled": {}}

    def express(self, group: dict[str, Any]) -> tuple[Rule, Gates]:
        """The rule of a group, and its gates at this step."""
        kept = group["retention"]
        for name in ("momentum", "retention"):
            if not 0 <= group[name] <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {group[name]}")
        return self.rule, Gates(group["lr"], group["momentum"], math.log(kept) if kept > 0 else -math.inf)

    def clocked(self, group: dict[str, Any]) -> tuple[Rule, Gates]:
        """What `express` says, on the group's own clock."""
        rule, gates = self.express(group)
        return (rule if group["period"] == 1 else every(group["period"], rule)), gates

    def without_inputs(self, rule: Rule) -> Rule:
        """The rule for a parameter whose layer's inputs were not captured."""
        return rule

    def gram(self, group: dict[str, Any], captured: Captured) -> Tensor:
        """The Gram matrix that stands for what was captured."""
        return captured.gram

    def _check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a value out of bounds."""
        if group["tokens"] < 1:
            raise ValueError(f"tokens must be >= 1, got {group['tokens']}")
        if group["nonfinite"] not in ("raise", "skip"):
            raise ValueError(f"nonfinite must be 'raise' or 'skip', got {group['nonfinite']!r}")
        if not group["lr"] >= 0:
            raise ValueError(f"lr must be >= 0, got {group['lr']}")
        self.clocked(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name in param_group.keys() - NOTES:
            require_known(name, self.defaults, f"option of a group of {type(self).__name__}")
        self._check(self.defaults | param_group)
        super().add_param_group(param_group)
        try:
            for name, parameter in with_names(self.param_groups[-1]):
                self._check_parameter(name, parameter)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_parameter(self, name: str, parameter: Tensor) -> None:
        """Raises ValueError for one that the rule cannot step."""
        if parameter.is_complex():
            raise ValueError(f"{name} is complex, a rule acts on real ones: optimize torch.view_as_real of it")

    @contextmanager
    def capture(self, module: nn.Module) -> Iterator[None]:
        """While open, sums x x^T over the inputs of every nn.Linear of the module, and over the patches of every
        nn.Conv1d to 3d that has one group, as backward() passes them, until the next step or `zero_grad`; for rules
        that need every pair it keeps the inputs, and the errors that backward() brings to the outputs."""
        rules = [self.clocked(group)[0] for group in self.param_groups]
        if any(rule.needs_inputs or rule.needs_pairs for rule in rules):
            with captured_into(self.captured, module, pairs=any(rule.needs_pairs for rule in rules)):
                yield
        else:
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what was captured with those gradients goes too."""
        super().zero_grad(set_to_none)
        self.captured.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the rule on every parameter that has a gradient; the closure's loss, where one is given. Under
        torch.compile the rule is compiled, and the bookkeeping around it is not."""
        return self._step(closure, torch.compiler.is_compiling())

    @torch._disable_dynamo  # as torch.compiler.disable, but without importing the compiler here
    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None, compiling: bool) -> Any:
        loss, self.compiling = None, compiling
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if finite(self.param_groups):
            self._fit_pairs()
            for group in self.param_groups:
                with torch.set_grad_enabled(group["differentiable"]):
                    self._step_group(group)
        else:
            self.skipped += 1
        self.captured.clear()
        return loss

    def _fit_pairs(self) -> None:
        """Pairs are what backward() saw; what was done to their sum since, in `.grad`, is done to them."""
        if not any(known.errors for known in self.captured.values()):
            return
        for name, parameter in (named for group in self.param_groups for named in with_names(group)):
            if parameter in self.captured and parameter.grad is not None and not is_sharded(parameter):
                self.captured[parameter] = as_the_gradient_is(name, self.captured[parameter], parameter.grad)

    def _is_flat(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Is a parameter of more than two dims one matrix?"""
        return parameter.dim() > 2 and (group["flat"] or parameter in self.captured)

    def _matrix(self, rule: Rule, parameter: Tensor, part: Tensor, group: dict[str, Any]) -> Tensor:
        """A parameter as what the rule steps."""
        if parameter.dim() < 2:
            return part.reshape(-1, 1)
        if part.dim() > 2 and rule.elementwise:
            return part.reshape(-1, part.shape[-1])  # one count for all of it, as where it is stepped in pieces
        return part.flatten(1) if self._is_flat(parameter, group) else part

    def _step_group(self, group: dict[str, Any]) -> None:
        rule, gates = self.clocked(group)
        alike: dict[Any, list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.numel():
                known = not (rule.needs_inputs or rule.needs_pairs) or parameter in self.captured
                cut = (parameter.placements, bool(self.state.get(parameter))) if is_sharded(parameter) else None
                pairs = self.captured[parameter].rows if rule.needs_pairs and known else 0
                key = (parameter.shape, parameter.dtype, pairs, cut, parameter.device, known)
                alike.setdefault(key, []).append(parameter)
        for (*_, cut, _, known), members in alike.items():
            own = rule if known else self.without_inputs(rule)
            if cut is None or own.elementwise:
                self._begin_states(own, members, group)
        for (*_, cut, device, known), members in alike.items():
            own = rule if known else self.without_inputs(rule)
            size = PIECE["cpu" if device.type == "cpu" else "other"]
            numel = max(1, local(members[0]).numel())
            if cut is not None and not own.elementwise:
                self._step_sharded(own, members, gates, group)
            elif own.elementwise and numel > size and not group["differentiable"]:
                for parameter in members:
                    self._step_pieces(own, parameter, gates, group, size)
            else:
                each = max(1, size // numel)
                for first in range(0, len(members), each):
                    self._step_stack(own, members[first : first + each], gates, group)

    def _begin_states(self, rule: Rule, members: list[Tensor], group: dict[str, Any]) -> None:
        """All that have none yet, before any step is made: what steps need meanwhile would leave holes between them, of
        which M3's peak was a quarter."""
        for parameter in members:
            if not self.state[parameter]:
                self._start(rule, _computed(self._matrix(rule, parameter, local(parameter), group)), parameter)

    def _compiled(self, rule: Rule) -> Callable[..., tuple[Tensor, Any]]:
        """The rule's step, compiled where the step of the optimizer is."""
        if not self.compiling:
            return rule.step
        if rule not in self.compiled:
            self.compiled[rule] = torch.compile(rule.step, dynamic=False)
        return self.compiled[rule]

    def _start(self, rule: Rule, weight: Tensor, parameter: Tensor) -> Any:
        """The rule's state for one parameter seen as `weight`, begun or as it was left."""
        if not self.state[parameter]:  # begun whole, before any work is done between its tensors
            self._keep(parameter, weight, apart(rule.init(weight.detach())))
        form, shapes = self._form(rule, weight)
        stored = self._renamed(rule, parameter, shapes)
        flat = {name: local(tensor).reshape(shapes[name]) for name, tensor in stored.items()}
        if missing := shapes.keys() - flat.keys():
            begun = flatten(apart(rule.init(weight.detach())))
            flat |= {name: begun[name] for name in missing}
        return unflatten(form, flat)

    def _renamed(self, rule: Rule, parameter: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
        """The parameter's state by the names of this rule, whatever another expression of it has begun."""
        stored = self.state[parameter]
        if stored.keys() == shapes.keys():
            return stored
        names = renamed(stored, shapes)
        if names is None:
            raise ValueError(
                f"the state of a parameter of shape {list(parameter.shape)} has {sorted(stored)}, and {rule} has "
                f"{sorted(shapes)}: an option that changes which memories there are is set before the first step"
            )
        return {new: stored[name] for name, new in names.items()}

    def _form(self, rule: Rule, weight: Tensor) -> tuple[Any, dict[str, torch.Size]]:
        """The state of a weight of this shape, of tensors that hold nothing; and the shapes by their flat names."""
        key = (rule, weight.shape, weight.dtype, weight.device)
        if key not in self.forms:
            like = rule.init(weight.detach().to("meta"))
            made = map_tensors(lambda t: torch.empty((), dtype=t.dtype, device=weight.device).expand(t.shape), like)
            if len(self.forms) >= 64:  # options that a schedule changes make a new rule each step
                self.forms.clear()
            self.forms[key] = made, {name: tensor.shape for name, tensor in flatten(made).items()}
        return self.forms[key]

    def _keep(self, parameter: Tensor, weight: Tensor, state: Any, *, in_place: bool = True) -> None:
        """The state under flat names; what has the weight's shape takes the parameter's. Written into the tensors that
        are there: fresh ones at every step leave the heap in holes. What is one of those, or the parameter itself,
        which is about to be written over, is copied first."""
        kept, part, before = {}, local(parameter), self.state[parameter]
        taken = {local(tensor).data_ptr() for tensor in before.values()} | {part.data_ptr()}
        for name, tensor in flatten(state).items():
            shape, old = part.shape if tensor.shape == weight.shape else tensor.shape, before.get(name)
            if old is not None and local(old).data_ptr() == tensor.data_ptr():
                kept[name] = old
                continue
            own = (tensor.clone() if tensor.data_ptr() in taken else tensor).view(shape)
            kept[name] = like(own, parameter) if tensor.shape == weight.shape else own
        for name, old in before.items():
            if in_place and name in kept and kept[name] is not old and kept[name].dtype == old.dtype:
                local(old).copy_(local(kept[name]))
                kept[name] = old
        self.state[parameter] = kept

    def _gradient(self, parameter: Tensor, weight: Tensor, group: dict[str, Any]) -> Gradient:
        assert parameter.grad is not None
        total = local(parameter.grad).reshape(weight.shape).to(weight.dtype)
        known = self.captured.get(parameter)
        if known is not None and known.errors:
            return Pairs(known.errors[0].to(weight.dtype), known.inputs[0].to(weight.dtype))
        return Summed(total, None if known is None else self.gram(group, known), group["tokens"])

    def _step_stack(self, rule: Rule, members: list[Tensor], gates: Gates, group: dict[str, Any]) -> None:
        """Parameters of one shape at once, along a leading dim that is theirs."""
        parts = [local(p) for p in members]
        weights = [_computed(self._matrix(rule, p, part, group)) for p, part in zip(members, parts, strict=True)]
        if group["differentiable"]:  # what autograd keeps of them is not written over
            weights = [weight.clone() for weight in weights]
        states = [self._start(rule, weight, p) for weight, p in zip(weights, members, strict=True)]
        gradients = [self._gradient(p, weight, group) for weight, p in zip(weights, members, strict=True)]
        if len(members) == 1:
            stepped, state = self._compiled(rule)(weights[0], gradients[0], rule.anchor(states[0]), gates)
            after, left = [stepped], [state]
        else:
            gradient = stack(gradients)
            if isinstance(gradient, Summed):
                gradient = gradient._replace(tokens=group["tokens"])
            before = rule.anchor(stack(states))
            stepped, state = self._compiled(rule)(torch.stack(weights), gradient, before, gates)
            after, left = list(stepped.unbind(0)), unstack(state, len(members))
        for parameter, part, weight, new, kept in zip(members, parts, weights, after, left, strict=True):
            self._keep(parameter, weight, kept, in_place=not group["differentiable"])
            part.copy_(new.view_as(part))

    def _step_sharded(self, rule: Rule, members: list[Tensor], gates: Gates, group: dict[str, Any]) -> None:
        """Matrices of one shape, each cut over the ranks: dealt out whole, stepped once, and cut again."""
        if rule.needs_pairs:
            raise ValueError(f"{rule} needs every pair, and those of a sharded parameter lie on several ranks")
        dealing = deal(members)
        weights = _computed(dealing.whole([local(p) for p in members]))
        columns = weights.unsqueeze(-1) if weights.dim() < 3 else weights
        columns = columns.flatten(2) if self._is_flat(members[0], group) else columns
        total = dealing.whole([local(p.grad) for p in members if p.grad is not None]).to(weights.dtype)
        known = [self.captured[p] for p in members if p in self.captured]
        grams = [averaged(self.gram(group, own), p) for own, p in zip(known, members, strict=False)]
        gradient = Summed(total.view_as(columns), dealing.share(grams) if known else None, group["tokens"])
        state = self._dealt_state(rule, members, columns, dealing)
        if len(columns):
            columns, state = self._compiled(rule)(columns, gradient, rule.anchor(state), gates)
        for parameter, part in zip(members, dealing.parts(columns.view_as(weights)), strict=True):
            local(parameter).copy_(part)
            self.state[parameter] = {}
        for name, tensor in flatten(state).items():
            if tensor.shape == columns.shape:
                kept = [like(p, own) for p, own in zip(dealing.parts(tensor.view_as(weights)), members, strict=True)]
            else:
                kept = dealing.copies(tensor)
            for parameter, own in zip(members, kept, strict=True):
                self.state[parameter][name] = own

    def _dealt_state(self, rule: Rule, members: list[Tensor], weights: Tensor, dealing: Deal) -> Any:
        """The rule's state for this rank's share of the members, begun or as it was left."""
        if not self.state[members[0]]:
            return clone(rule.init(weights))
        form, shapes = self._form(rule, weights)
        known, flat = [self._renamed(rule, p, shapes) for p in members], {}
        begun = flatten(clone(rule.init(weights))) if shapes.keys() - known[0].keys() else {}
        for name, shape in shapes.items():
            if name not in known[0]:
                flat[name] = begun[name]
                continue
            stored = [states[name] for states in known]
            share = dealing.whole([local(s) for s in stored]) if is_sharded(stored[0]) else dealing.share(stored)
            flat[name] = share.reshape(shape)
        return unflatten(form, flat)

    def _step_pieces(self, rule: Rule, parameter: Tensor, gates: Gates, group: dict[str, Any], size: int) -> None:
        """One large parameter, as a row that is cut in pieces, in place."""
        part = local(parameter)
        row = part.reshape(1, -1)
        state = rule.anchor(self._start(rule, _computed(row), parameter))
        totals = self._gradient(parameter, row, group).dense().split(size, 1)
        cut = [leaf.split(size, 1) if leaf.dim() == 2 else [leaf] * len(totals) for leaf in leaves(state)]
        after, step = state, self._compiled(rule)
        for weight, total, *before in zip(row.split(size, 1), totals, *cut, strict=True):
            rest = iter(before)
            piece = map_tensors(lambda _, rest=rest: next(rest), state)
            stepped, after = step(_computed(weight), Summed(_computed(total), None, group["tokens"]), piece, gates)
            for old, new in zip(before, leaves(after), strict=True):
                if new.dim() == 2:
                    old.copy_(new)
            weight.copy_(stepped)  # last: a state may hold the weight that was
        if row.data_ptr() != part.data_ptr():
            part.copy_(row.view_as(part))
        self._keep(parameter, row, joined(state, after, 2))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; but counters stay whole numbers, where torch casts them to the parameter's dtype, and what is
        loaded is not shared with the optimizer that it came from, whose steps would write into it. An option that was
        not yet there when a group was saved takes its default. Raises ValueError, before anything has changed, for
        options out of bounds and for the state of another rule."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            self._check_saved(self.defaults | saved, state_dict["state"], group["params"])
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                dtype = _computed(parameter[:0]).dtype if value.is_floating_point() else value.dtype
                own = value.detach().to(parameter.device, dtype)
                self.state[parameter][name] = own.clone() if local(own).data_ptr() == local(value).data_ptr() else own

    def _check_saved(self, saved: dict[str, Any], states: dict[Any, Any], parameters: list[Tensor]) -> None:
        self._check(saved)
        rule = self.clocked(saved)[0]
        for number, parameter in zip(saved["params"], parameters, strict=False):
            found = {name: value.shape for name, value in states.get(number, {}).items()}
            meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            told = [shapes for own in {rule, self.without_inputs(rule)} for shapes in self._stored(own, meta, saved)]
            if found and found.keys() not in [own.keys() for own in told]:
                raise ValueError(
                    f"the saved state of parameter {number} has {sorted(found)}, and {rule} has {sorted(told[0])}: "
                    "it is of another optimizer, torch's own of the same name included"
                )
            if found and found not in told:
                raise ValueError(
                    f"the saved state of parameter {number} is not of one of shape {list(parameter.shape)}: it has "
                    f"{ {name: list(shape) for name, shape in found.items()} }"
                )

    def _stored(self, rule: Rule, parameter: Tensor, group: dict[str, Any]) -> list[dict[str, torch.Size]]:
        """The shapes in which the state of a parameter may be stored, by flat names: see `_keep` and `_matrix`."""
        stored = []
        flat = [parameter.flatten(1)] if parameter.dim() > 2 else []
        for weight in (self._matrix(rule, parameter, parameter, group), *flat):
            shapes = self._form(rule, weight)[1]
            stored.append({name: parameter.shape if shape == weight.shape else shape for name, shape in shapes.items()})
        return stored


def _computed(tensor: Tensor) -> Tensor:
    """What a rule steps. float16 has no eps of 1e-8, and no square of 1e-4: an Adam in it divides by zero."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def to_optimizer(rule: Rule, params: Iterable[Any], **gates: Any) -> RuleOptimizer:
    """The rule as a torch optimizer over `params`: `to_optimizer(retain(decay(), momentum()), model.parameters())`."""
    return RuleOptimizer(params, rule, **gates)
