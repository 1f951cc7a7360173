"""The toy of Nested Learning's equation 53: is delta momentum faster than momentum, and if so, why?

    python studies/optimizers/toy/toy.py [--quick] [--out DIR]

psi(r, theta) = r^2 + k (r - theta + alpha sin(omega r))^2 has one stationary point, (0, 0): a valley that winds. The
paper gives neither k, alpha and omega nor a step size. So landscapes are drawn; on one half of them every method is
tuned on the same grid of step sizes and decays, and on the other half, from other starts, it is reported. Methods are
expressions of the library's rules, all trajectories are stepped as one batch. Writes toy.json and paths.svg.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestling.memory import (
    Gates,
    Rule,
    Summed,
    decay,
    delta_gradient_descent,
    delta_momentum,
    gradient_descent,
    gradient_keys,
    momentum,
    nesterov,
    normalize,
    remember,
    retain,
)
from nestling.tasks.record import write_result

F64 = torch.float64
TOLERANCE, HELD = 1e-6, 10  # converged: psi below it for so many steps


class Method(NamedTuple):
    """rule: on the point as a row [1, 2], or as a column [2, 1], where g^T g is the number |g|^2. clip: of |g|."""

    rule: Rule
    column: bool = False
    clip: float = math.inf


def bounded(rule: Rule) -> Rule:
    """A momentum learned by `rule` on gradients as keys: step eta / (1 + eta |g|^2)."""
    return remember(gradient_keys(retain(decay(), rule)))


METHODS = {
    "momentum": Method(momentum()),
    "Nesterov": Method(nesterov(gradient_descent())),
    "momentum, |g| clipped at 1": Method(momentum(), clip=1.0),
    "delta, as derived": Method(delta_momentum()),
    "delta, as derived, a number": Method(delta_momentum(), column=True),
    "delta, erase bounded": Method(delta_momentum(bounded_erase=True)),
    "delta, erase bounded, a number": Method(delta_momentum(bounded_erase=True), column=True),
    "delta, bounded": Method(bounded(delta_gradient_descent())),
    "delta, bounded, a number": Method(bounded(delta_gradient_descent()), column=True),
    "momentum, step bounded alike": Method(bounded(normalize())),
}
"""Of each delta the control "a number" damps the whole momentum by as much as its erase damps the part along the
gradient; the last one bounds its steps as "delta, bounded" does, and erases nothing."""


class Plan(NamedTuple):
    landscapes: int  # to tune on; as many to report on
    starts: int
    steps: int
    step_sizes: tuple[float, ...]
    decays: tuple[float, ...]


FULL = Plan(10, 200, 800, tuple(round(10 ** (-4 + 0.4 * i), 6) for i in range(11)), (0.0, 0.5, 0.8, 0.9, 0.95))
QUICK = Plan(2, 6, 200, (0.001, 0.01, 0.1), (0.5, 0.9))


def draw(plan: Plan, seed: int) -> tuple[Tensor, Tensor]:
    """Landscapes (k, alpha, omega) [n, 3] and starts [n, starts, 2]."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(plan.landscapes, 3, generator=generator, dtype=F64)
    k, alpha, omega = 2.0 * 15.0 ** u[:, 0], 0.3 + 1.2 * u[:, 1], 1.0 + 2.0 * u[:, 2]
    starts = 8.0 * torch.rand(plan.landscapes, plan.starts, 2, generator=generator, dtype=F64) - 4.0
    return torch.stack([k, alpha, omega], -1), starts


def psi(where: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """The height [...] and the gradient [..., 2] at points [..., 2] of landscapes [..., 3]."""
    (k, alpha, omega), (r, theta) = where.unbind(-1), point.unbind(-1)
    off = r - theta + alpha * (omega * r).sin()
    slope = 2.0 * k * off
    down = 2.0 * r + slope * (1.0 + alpha * omega * (omega * r).cos())
    return r.square() + k * off.square(), torch.stack([down, -slope], -1)


class Run(NamedTuple):
    """Of every trajectory [...]: steps to convergence (the horizon, if none), length of the path, share of the squared
    updates along the gradient; and, if asked, the points on the way [steps + 1, ..., 2]."""

    steps: Tensor
    length: Tensor
    along: Tensor
    path: list[Tensor]


def shaped(point: Tensor, column: bool) -> Tensor:
    return point[..., :, None] if column else point[..., None, :]


def gradient_at(method: Method, where: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    height, g = psi(where, point)
    if method.clip < math.inf:
        g = g * (method.clip / g.norm(dim=-1, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)
    return height, g


@torch.no_grad()
def run(method: Method, where: Tensor, start: Tensor, gates: Gates, horizon: int, keep: bool = False) -> Run:
    point, state = start, method.rule.init(shaped(start, method.column))
    below = torch.zeros(start.shape[:-1], dtype=torch.int64)
    found, length = torch.full_like(below, horizon), torch.zeros(below.shape, dtype=F64)
    along, total, path = length.clone(), length.clone(), [start] if keep else []
    for step in range(1, horizon + 1):
        height, g = gradient_at(method, where, point)
        below = torch.where(height < TOLERANCE, below + 1, 0)
        found = torch.where((below == HELD) & (found == horizon), step - HELD, found)
        weight = shaped(point, method.column)
        stepped, state = method.rule.step(weight, Summed(shaped(g, method.column)), state, gates)
        moved = (stepped - weight).flatten(-2)
        going = (found == horizon) & moved.isfinite().all(-1)
        size = moved.square().sum(-1)
        on = (moved * g).sum(-1).square() / g.square().sum(-1).clamp(min=1e-300)
        length = length + torch.where(going, size.sqrt(), 0.0)
        along, total = along + torch.where(going, on, 0.0), total + torch.where(going, size, 0.0)
        point = point + moved
        path += [point] if keep else []
    return Run(found, length, along / total.clamp(min=1e-300), path)


def tune(method: Method, plan: Plan, where: Tensor, starts: Tensor) -> tuple[float, float, float]:
    """The (step size, decay) of fewest mean steps, those that did not converge counted at the horizon."""
    best = (math.inf, 0.0, 0.0)
    for kept in plan.decays:
        shape = (len(plan.step_sizes), *starts.shape[:-1])
        sizes = torch.tensor(plan.step_sizes, dtype=F64).view(-1, 1, 1).expand(shape)
        gates = Gates(sizes, torch.full_like(sizes, kept), torch.full_like(sizes, math.log(max(kept, 1e-300))))
        begun = starts.expand(*shape, 2)
        steps = run(method, where[:, None].expand(*shape, 3), begun, gates, plan.steps).steps
        for size, mean in zip(plan.step_sizes, steps.double().mean((1, 2)).tolist(), strict=True):
            best = min(best, (mean, size, kept))
    return best


def turning(method: Method, where: Tensor, path: list[Tensor], gates: Gates) -> Tensor:
    """|J - J^T| / |J + J^T| over a path's first steps, J the derivative of the update by the point with
    the memory held: zero for the gradient of anything."""
    state, found = method.rule.init(shaped(path[0], method.column)), []
    for point in path[:60]:
        if not bool(point.isfinite().all()):
            break

        def update(at: Tensor, state: Any = state) -> Tensor:
            g = gradient_at(method, where, at)[1]
            weight = shaped(at, method.column)
            return (method.rule.step(weight, Summed(shaped(g, method.column)), state, gates)[0] - weight).flatten()

        jacobian = torch.autograd.functional.jacobian(update, point)
        found.append(float((jacobian - jacobian.T).norm() / (jacobian + jacobian.T).norm().clamp(min=1e-300)))
        weight, g = shaped(point, method.column), shaped(gradient_at(method, where, point)[1], method.column)
        state = method.rule.step(weight, Summed(g), state, gates)[1]
    return torch.tensor(found)


def middle(values: Tensor) -> float | None:
    """The median of the finite ones; None of none."""
    values = values[values.isfinite()]
    return round(float(values.median()), 4) if len(values) else None


def ratio(own: Tensor, other: Tensor, seed: int = 0) -> list[float]:
    """Geometric mean over landscapes and starts of steps by steps, and its 95% interval, landscapes resampled."""
    logs = (own.double() / other.double()).log().mean(-1)
    picked = torch.randint(len(logs), (2000, len(logs)), generator=torch.Generator().manual_seed(seed))
    low, high = logs[picked].mean(-1).quantile(torch.tensor([0.025, 0.975], dtype=F64)).exp().tolist()
    return [round(x, 3) for x in (float(logs.mean().exp()), low, high)]


def study(plan: Plan) -> tuple[list[dict[str, Any]], dict[str, list[Tensor]]]:
    tuned_on, reported_on = draw(plan, 1), draw(plan, 2)
    paper, at = torch.tensor([10.0, 1.0, 2.0], dtype=F64), torch.tensor([-3.5, 2.0], dtype=F64)
    rows, runs, paths = [], {}, {}
    for name, method in METHODS.items():
        mean, size, kept = tune(method, plan, *tuned_on)
        gates = Gates(size, kept, math.log(max(kept, 1e-300)))
        where, starts = reported_on
        own = runs[name] = run(method, where[:, None].expand(*starts.shape[:-1], 3), starts, gates, plan.steps)
        shown = run(method, paper, at, gates, plan.steps, keep=True)
        alike = run(method, paper, at, Gates(0.004, 0.9, math.log(0.9)), plan.steps)
        paths[name] = shown.path
        base = runs["momentum"].steps
        rows.append(
            {
                "method": name,
                "rule": repr(method.rule),
                "step_size": round(size, 6),
                "decay": kept,
                "tuning_mean_steps": round(mean, 1),
                "mean_steps": round(float(own.steps.double().mean()), 1),
                "median_steps": float(own.steps.double().median()),
                "converged": round(float((own.steps < plan.steps).double().mean()), 4),
                "beside_momentum": ratio(own.steps, base),
                "beside_its_number": None,
                "faster_than_momentum": round(float((own.steps < base).double().mean()), 3),
                "path_by_distance": middle((own.length / starts.norm(dim=-1))[own.steps < plan.steps]),
                "share_along_gradient": middle(own.along[own.steps < plan.steps]),
                "turning": middle(turning(method, paper, shown.path, gates)),
                "paper_start_steps": int(shown.steps),
                "paper_start_steps_at_0.004_and_0.9": int(alike.steps),
            }
        )
        print(rows[-1], flush=True)
    for row in rows:
        if (control := f"{row['method']}, a number") in runs:
            row["beside_its_number"] = ratio(runs[row["method"]].steps, runs[control].steps)
            print(row["method"], row["beside_its_number"], flush=True)
    return rows, paths


def draw_paths(paths: dict[str, list[Tensor]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "nestling", "svg.fonttype": "none"}
    figure, axes = pyplot.subplots(figsize=(7.0, 4.5), layout="constrained")
    r, theta = torch.meshgrid(torch.linspace(-4, 4, 61), torch.linspace(-5, 5, 61), indexing="xy")
    height = psi(torch.tensor([10.0, 1.0, 2.0]), torch.stack([r, theta], -1))[0]
    axes.contour(r, theta, height.log1p(), 12, colors="0.8", linewidths=0.6)
    for name in ("momentum", "Nesterov", "delta, as derived", "delta, erase bounded", "momentum, step bounded alike"):
        points = torch.stack(paths[name][:150])
        axes.plot(points[:, 0], points[:, 1], ".-", linewidth=0.8, markersize=2, label=name)
    axes.plot(0, 0, "k*")
    axes.set(xlim=(-4, 4), ylim=(-5, 5), xlabel="r", ylabel="theta", title="Tuned elsewhere; k 10, alpha 1, omega 2")
    axes.legend(fontsize=8)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two landscapes and a small grid: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    plan = QUICK if asked.quick else FULL
    rows, paths = study(plan)
    asked.out.mkdir(parents=True, exist_ok=True)
    draw_paths(paths, asked.out / "paths.svg")
    about = {"what": "studies/optimizers/toy/toy.py", "quick": asked.quick, "plan": plan._asdict(), "rows": rows}
    write_result(asked.out, "toy", about)


if __name__ == "__main__":
    main()
