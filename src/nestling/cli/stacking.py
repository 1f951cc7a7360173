"""nestling stack: levels in a model of transformers."""

from pathlib import Path
from typing import Literal

import tyro

from nestling.learner import save_stacked
from nestling.levels import Level, Loss, StackConfig, level

from .shared import app


@app.command(name="stack")
def stack(
    base: tyro.conf.Positional[Path],
    *,
    out: Path,
    periods: tuple[float, ...] = (128, 512, 2048),
    levels: tuple[Level, ...] = (),
    how: Literal["layers", "neurons", "low_rank"] = "layers",
    step_size: float = 0.1,
    rank: int = 8,
    context: int | None = None,
    overlap: int = 0,
    loss: Loss | None = None,
    seed: int = 0,
) -> None:
    """Put levels into a pre-trained model of transformers, to `learn` and `generate` with. The model is not copied.

    Args:
        base: the model's folder, as transformers writes it.
        out: the new folder: what is stacked, and later the life.
        periods: of the levels, in tokens, fast to slow.
        levels: in place of periods: expressions, such as "level(128, step_size=0.5)" or "spectrum(16, 2048)".
        how: layer j at level j mod K; or each MLP's neurons divided; or low-rank levels beside each MLP.
        step_size: of the levels that are given by their periods.
        rank: of each low-rank level.
        context: tokens that the attention cache holds at most.
        overlap: tokens that it keeps when it is cut.
        loss: what an encoder learns from, such as "masked_tokens(103)".
        seed: of the low-rank levels.
    """
    chosen = levels or tuple(level(period, step_size=step_size) for period in periods)
    config = StackConfig(levels=chosen, how=how, rank=rank, context=context, overlap=overlap, loss=loss, seed=seed)
    model = save_stacked(out, base, config)
    moving = sum(weight.numel() for maps in model.level_weights() for weight in maps)
    print(f"{out}: {len(model.levels)} levels of {moving:,} weights in {len(model.feedforwards)} MLPs of {base}")
