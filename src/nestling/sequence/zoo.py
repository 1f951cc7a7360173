"""Named models, each an expression of parts: `zoo["gated_deltanet"].mixer`.

A row tells the recurrence and its source, and holds the oracle that its memory is checked against: the paper's own
recurrence, one head of one row, token by token (`memory.naive*`). What a row is made of is read off its expression.
"""

from collections.abc import Iterator
from typing import Any

from torch.nn import functional as F

from nestling.memory import naive, naive_linear, naive_miras
from nestling.memory.adaptive import adam
from nestling.memory.attentional_bias import dot, l2, lp
from nestling.memory.compound import features, normed
from nestling.memory.feature import exponential, polynomial
from nestling.memory.oja import oja
from nestling.memory.orthogonal import newton_schulz
from nestling.memory.retention import decay, decay_to_anchor, kl, row_norm
from nestling.memory.rule import gradient_descent, momentum, normalize, retain, retain_first, scale, surprise
from nestling.memory.structure import gated_mlp, matrix, mlp

from . import naive_blocks, naive_layers, oracles
from .attention import attention
from .averaged_gates import averaged_gates
from .caching import caching
from .context import mac
from .gating import fixed_gates, gated_delta_gates, kda_gates, low_rank_gates, mamba2_gates
from .layer import sequence_memory
from .linear_mixer import linear_mixer
from .lstm import lstm
from .miras import memora, moneta, yaad
from .named import Model
from .oracles import (
    around,
    by_token,
    deep,
    every_channel,
    featured,
    lact,
    layer,
    linear,
    miras,
    once_a_chunk,
    squares,
    ttt,
    two_terms,
    written,
)
from .pair_gates import map_gates, unit_steps, window_gates
from .preparation import bare, silu
from .self_modifying import self_modifying
from .srwm import srwm
from .streams import comba_streams, hgrn2_streams, mesa_streams, rwkv7_streams
from .titans import mag, mal
from .tnt import tnt


def _exact(bias: Any, rule: Any, structure: Any = matrix(), **around: Any) -> sequence_memory:
    return sequence_memory(structure, bias, rule, gradient_at="token", **around)


_DECAYED = retain(decay(), gradient_descent())
_TITANS = retain(decay(), momentum())
_BOUNDED = "steps normalised, clipped and averaged, forgetting toward the start, hidden width 1 x the value's"
_TOLD = {"residual": True, "decay_to": "start", "normalized": True, "clip": 1.0, "dampened": True}  # what _BOUNDED says
_AVERAGED = retain(decay_to_anchor(), gradient_descent())

zoo: dict[str, Model] = {
    "lstm": Model(
        lstm(),
        "c_t = f_t c_{t-1} + i_t g_t;  y_t = o_t tanh(c_t), gates of x_t and y_{t-1}",
        "Hochreiter and Schmidhuber 1997",
        layer(naive_layers.lstm),
        note="as wide as the model; it has no heads",
    ),
    "transformer": Model(
        attention(window=None, convolution=1),
        "softmax_attention without a convolution, then x + MLP(norm x), a level that never learns: preset transformer",
        "Vaswani et al. 2017, with rotary positions (Su et al. 2021)",
        layer(naive_layers.attention),
        note="the state grows by 2 d numbers a token",
    ),
    "softmax_attention": Model(
        attention(window=None),
        "y_t = sum_i exp(q_t.k_i / sqrt d) v_i / sum_i exp(q_t.k_i / sqrt d), all i <= t",
        "Miras 3; Nested Learning 62, 63",
        layer(naive_layers.attention),
        note="the state grows by 2 d numbers a token",
    ),
    "sliding_window_attention": Model(
        attention(),
        "y_t = sum_i exp(q_t.k_i / sqrt d) v_i / sum_i exp(q_t.k_i / sqrt d), the last `window` i",
        "Miras 3; Nested Learning 62, 63",
        lambda mixer, *given: naive_layers.windowed(mixer.window, *given),
    ),
    "linear_attention": Model(
        _exact(dot(), gradient_descent()),
        "S_t = S_{t-1} + eta_t v_t k_t^T",
        "Katharopoulos et al. 2020; Nested Learning 64",
        linear(lambda f, s: naive_linear.naive_linear_attention(f.queries, f.keys, f.step_size[:, None] * f.values, s)),
    ),
    "retnet": Model(
        _exact(dot(), _DECAYED, gating=fixed_gates(), preparation=bare()),
        "S_t = a_h S_{t-1} + v_t k_t^T,  a_h = 1 - 2^(-5-h) of head h",
        "Sun et al. 2023 (arXiv 2307.08621)",
        linear(lambda f, s: naive_linear.naive_gla(f.queries, f.keys, written(f), every_channel(f), s)),
        note="without the rotation of queries and keys, with a convolution of width 4",
    ),
    "mamba2": Model(
        _exact(dot(), _DECAYED, gating=mamba2_gates(), preparation=silu()),
        "S_t = a_t S_{t-1} + D_t v_t k_t^T,  log a_t = -exp(A) D_t,  D_t = softplus(w.x_t + b)",
        "Dao and Gu 2024 (arXiv 2405.21060)",
        linear(lambda f, s: naive_linear.naive_gla(f.queries, f.keys, written(f), every_channel(f), s)),
        note="keys and queries of their own for every head; gates against their formulas in tests/test_gating.py",
    ),
    "gla": Model(
        _exact(dot(), _DECAYED, gating=low_rank_gates(), preparation=bare()),
        "S_t = S_{t-1} Diag(a_t) + v_t k_t^T,  log a_t = logsigmoid(W_2 W_1 x_t + b) / 16",
        "Yang et al. 2024 (arXiv 2312.06635)",
        linear(lambda f, s: naive_linear.naive_gla(f.queries, f.keys, written(f), f.retention, s)),
        note="with a convolution of width 4",
    ),
    "hgrn2": Model(
        linear_mixer(hgrn2_streams()),
        "S_t = S_{t-1} Diag(a_t) + v_t (1 - a_t)^T,  a_t = g + (1 - g) sigmoid(W x_t)",
        "Qin et al. 2024 (arXiv 2404.07904)",
        layer(naive_layers.hgrn2),
        note="g is learned in every layer alone; the paper's rise with depth",
    ),
    "delta_product": Model(
        _exact(l2(), retain_first(decay(), gradient_descent()), gating=gated_delta_gates(reach=2.0), steps=2, chunk=32),
        "S_t = a_t S_{t-1} prod_j (I - eta_tj k_tj k_tj^T), each with its write eta_tj v_tj k_tj^T",
        "Siems et al. 2025 (arXiv 2502.10297)",
        linear(
            lambda f, s: naive_linear.naive_delta_product(
                f.queries, by_token(f, f.keys), by_token(f, f.values), by_token(f, f.step_size), f.retention, s
            )
        ),
    ),
    "rwkv7": Model(
        linear_mixer(rwkv7_streams(), convolution=2),
        "S_t = S_{t-1} (Diag(w_t) - r_t (eta_t * r_t)^T) + v_t k_t^T, r_t of length one",
        "Peng et al. 2025 (arXiv 2503.14456)",
        layer(naive_layers.rwkv7),
        note="tokens are shifted by the convolution; no values from the first layer; this library's output gate",
    ),
    "comba": Model(
        linear_mixer(comba_streams()),
        "S_t = a_t S_{t-1} - eta_t (S_{t-1} p_t) k_t^T + eta_t v_t k_t^T, p_t = sigmoid(d) k_t, read for q_t - D p_t",
        "Hu et al. 2025 (arXiv 2506.02475)",
        layer(naive_layers.comba),
        note="the erase reads the memory before it has decayed, as the paper's kernels do",
    ),
    "mesa": Model(
        linear_mixer(mesa_streams()),
        "y_t = argmin_W sum_i w_ti |W k_i - v_i|^2 + |W sqrt r|^2, at q_t: solved at every token",
        "von Oswald et al. 2025 (arXiv 2506.05233)",
        layer(naive_layers.mesa),
        note="by 30 conjugate gradient steps",
    ),
    "srwm": Model(
        srwm(),
        "y_t, q, k, b = W_{t-1} phi(x_t);  W_t = W_{t-1} + s(b) * (W_{t-1} phi(q) - W_{t-1} phi(k)) phi(k)^T",
        "Irie et al. 2022 (arXiv 2202.05780)",
        layer(naive_layers.srwm),
        note="this library's convolution before it, and its norm, gate and projection behind it",
    ),
    "kda": Model(
        _exact(l2(), retain_first(decay(), gradient_descent()), gating=kda_gates()),
        "S_t = S_{t-1} Diag(a_t) (I - eta_t k_t k_t^T) + eta_t v_t k_t^T",
        "Kimi Linear 2025 (arXiv 2510.26692)",
        linear(
            lambda f, s: naive_linear.naive_gated_delta_rule(f.queries, f.keys, f.values, f.step_size, f.retention, s)
        ),
    ),
    "longhorn": Model(
        _exact(l2(), normalize(gradient_descent())),
        "S_t = argmin |S - S_{t-1}|^2 + eta_t |S k_t - v_t|^2",
        "Liu et al. 2024 (arXiv 2407.14207), exact where its kernel is diagonal",
        linear(
            lambda f, s: naive_linear.naive_longhorn(
                f.queries, f.keys, f.values, f.step_size[:, None].expand_as(f.values), s
            )
        ),
        note="one eta a head; the paper has one a channel",
    ),
    "oja": Model(
        sequence_memory(matrix(), dot(), oja(), 1, "token", way="recurrent"),
        "S_t = S_{t-1} + eta_t v_t (k_t - S_{t-1}^T v_t)^T",
        "Oja 1982; Irie et al. 2022",
        oracles.oja,
    ),
    "deep_transformer": Model(
        _exact(dot(), gradient_descent(), structure=features(matrix(), exponential(2))),
        "S_t = S_{t-1} + eta_t v_t phi(k_t)^T,  <phi(q), phi(k)> = 1 + q.k + (q.k)^2 / 2, the first terms of exp(q.k)",
        "ATLAS, section 4",
        featured(linear(lambda f, s: naive_linear.naive_linear_attention(f.queries, f.keys, written(f), s)), two_terms),
        note="a matrix: softmax attention without its norm; features to the second degree",
    ),
    "dot": Model(
        sequence_memory(
            features(matrix(), exponential(2)), l2(), gradient_descent(), 16, gating=window_gates(), window=4
        ),
        "S_t = S_{t-1} - eta_t sum_{t-c<i<=t} g_ti (S phi(k_i) - v_i) phi(k_i)^T at the chunk's first weights",
        "ATLAS, section 4",
        featured(deep(), two_terms),
    ),
    "deltanet": Model(
        _exact(l2(), gradient_descent()),
        "S_t = S_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T",
        "Schlag et al. 2021; Yang et al. 2024; Nested Learning 65",
        linear(lambda f, s: naive_linear.naive_delta_rule(f.queries, f.keys, f.values, f.step_size, s)),
    ),
    "gated_deltanet": Model(
        _exact(l2(), retain_first(decay(), gradient_descent()), gating=gated_delta_gates()),
        "S_t = a_t S_{t-1} (I - eta_t k_t k_t^T) + eta_t v_t k_t^T",
        "Yang et al. 2025 (arXiv 2412.06464)",
        linear(
            lambda f, s: naive_linear.naive_gated_delta_rule(f.queries, f.keys, f.values, f.step_size, f.retention, s)
        ),
    ),
    "dla": Model(
        sequence_memory(mlp(), dot(), retain(decay(), gradient_descent()), 16),
        "W_t = a_t W_{t-1} + eta_t d<M(k_t), v_t>/dW at the chunk's first weights",
        "ATLAS (arXiv 2505.23735)",
        deep(objective="dot", residual=True),
        note="hidden width 1 x the value's",
    ),
    "swla": Model(
        sequence_memory(matrix(), dot(), retain(decay(), gradient_descent()), 16, gating=window_gates(), window=4),
        "S_t = a_t S_{t-1} + eta_t sum_{t-c<i<=t} g_ti v_i k_i^T",
        "ATLAS, table 1",
        deep(objective="dot"),
    ),
    "omeganet": Model(
        sequence_memory(mlp(), l2(), retain(decay(), gradient_descent()), 16, gating=window_gates(), window=4),
        "W_t = a_t W_{t-1} - eta_t sum_{t-c<i<=t} g_ti d|M(k_i) - v_i|^2/2 /dW at the chunk's first weights",
        "ATLAS, equations 10, 11",
        deep(residual=True),
        note="hidden width 1 x the value's; keys without polynomial features, whose degree the paper does not tell",
    ),
    "titans": Model(
        sequence_memory(mlp(), l2(), _TITANS, 16),
        "S_t = m_t S_{t-1} - eta_t d|M(k_t) - v_t|^2/2 /dW;  W_t = a_t W_{t-1} + S_t",
        "Behrouz et al. 2025 (arXiv 2501.00663), equations 9 to 14",
        deep(residual=True),
        note="M(k) = k + f(k), hidden width 1 x the value's; the paper's k + LN(f(k)), 4 x",
    ),
    "titans_mac": Model(
        mac(),
        "y_t = attention of x_t over [persistent | h_j | x_j], h_j = norm(M(q_j)), j <= t in the segment, M as "
        "that opened;  o_t = norm(y_t) * SiLU(norm(M_t(y_t))), M written with y",
        "Titans 21 to 25",
        around(naive_blocks.mac, **_TOLD),
        note=_BOUNDED,
    ),
    "titans_mag": Model(
        mag(),
        "o_t = norm(y_t) * SiLU(norm(m_t)),  m = memory(x),  y = attention(x) over [persistent | the last `window`]",
        "Titans 26 to 28",
        around(naive_blocks.mag, **_TOLD),
        note=_BOUNDED,
    ),
    "titans_mal": Model(
        mal(),
        "o = attention(norm(m)) over [persistent | the last `window`],  m = memory(x)",
        "Titans 29 to 31",
        around(naive_blocks.mal, **_TOLD),
        note=_BOUNDED,
    ),
    "moneta": Model(
        moneta(),
        "A_t = a_t A_{t-1} - eta_t d|M(k_t) - v_t|_3^3/dW;  W = A / |A|_4^2",
        "Miras (arXiv 2504.13173), equations 24, 25",
        miras(naive_miras.naive_moneta, p=3.0, q=4.0, sharpness=10.0),
        note="read at the chunk's first weights; gates are one a head; the paper's one a channel",
    ),
    "yaad": Model(
        yaad(),
        "W_t = a_t W_{t-1} - eta_t (dl_2/dW where |M(k_t) - v_t| <= b_t, else b_t dl_1/dW)",
        "Miras, equation 26",
        miras(naive_miras.naive_yaad, names=("bound",), sharpness=10.0),
        note="gates and bounds are one a head; the paper's one a channel",
    ),
    "memora": Model(
        memora(),
        "W_t = softmax(a_t log W_{t-1} - eta_t dl_2/dW), row by row",
        "Miras, equation 27",
        miras(naive_miras.naive_memora, scale=1.0),
        note="read at the chunk's first weights; gates are one a head; the learned starts are the logits",
    ),
    "ttt_linear": Model(
        sequence_memory(normed(matrix()), l2(), _AVERAGED, 16, gating=averaged_gates()),
        "W_i = W_c - 1/i sum_{j<=i} eta_j d|LN(W k_j) - (v_j - k_j)|^2/2 /dW at W_c, the chunk's first weights",
        "Sun et al. 2024 (arXiv 2407.04620)",
        ttt(lambda w, k: w[0] @ k),
        note="LN without a scale, no bias; 1/i, times a learned exp(s_i), in tests/test_averaged_gates.py",
    ),
    "ttt_mlp": Model(
        sequence_memory(normed(mlp(residual=False, expansion=4.0)), l2(), _AVERAGED, 16, gating=averaged_gates()),
        "as ttt_linear, W k replaced by W_2 GELU(W_1 k)",
        "Sun et al. 2024",
        ttt(lambda w, k: w[1] @ F.gelu(w[0] @ k)),
        note="as ttt_linear",
    ),
    "atlas": Model(
        sequence_memory(
            mlp(),
            l2(),
            retain(decay(), scale(newton_schulz(momentum(surprise())))),
            16,
            gating=window_gates(),
            window=4,
            read="boundary",
            way="stepped",
        ),
        "S <- m S - sum_t sum_{t-c<i<=t} g_ti dl_2(k_i, v_i)/dW over a chunk;  W <- a W + eta NS_5(S)",
        "ATLAS, equations 32, 33; once a chunk as LaCT does",
        once_a_chunk(readout=naive.naive_newton_schulz),
        note="hidden width 1 x the value's; keys without polynomial features, whose degree the paper does not tell",
    ),
    "lact": Model(
        sequence_memory(
            gated_mlp(),
            dot(),
            retain(row_norm(), momentum()),
            64,
            gating=map_gates(unit_steps()),
            read="boundary",
            way="stepped",
        ),
        "U <- m U + sum_chunk eta_ti d<M(k_t), v_t>/dW_i;  W <- rownorm(W + U), once a chunk; rows keep their length",
        "Zhang et al. 2025 (arXiv 2505.23884)",
        lact,
        note="without the paper's window attention beside it, and without Newton-Schulz on U",
    ),
    "tnt": Model(
        tnt(),
        "y_t = M(q_t; V) + sum_i M(C_t q_t; W_t^i),  C_t = C_{t-1} + k_t k_t^T,  V as the large chunk opened, W^i of "
        "small chunks; W^i and C begin anew every shard",
        "TNT (arXiv 2511.07343), equations 6, 7",
        around(naive_blocks.tnt, residual=True, normalized=True, clip=1.0),
        note="steps normalised and clipped",
    ),
    "titans_cached": Model(
        caching(sequence_memory(mlp(), l2(), _TITANS, 16)),
        "y_t = g_s M_t(q_t) + sum_{i<s} g_i M_i(q_t),  g = softmax_{i<=s}(u_t.p_i / sqrt k),  p_i the mean of x in i",
        "Memory Caching (arXiv 2602.24281)",
        around(naive_blocks.caching, residual=True),
    ),
    "self_modifying_titans": Model(
        self_modifying(),
        "k, v, eta, a from memories that write their own targets; each one step of DGD with momentum and retention",
        "Nested Learning, equations 83 to 93",
        lambda mixer, *given: naive_layers.self_modifying(
            mixer.chunk, mixer.projection_chunk, mixer.step_bound, *given
        ),
    ),
    "polynomial_delta": Model(
        sequence_memory(features(matrix(), polynomial(2)), l2(), gradient_descent(), gradient_at="token"),
        "S_t = S_{t-1} - eta_t (S phi(k_t) - v_t) phi(k_t)^T, <phi(q), phi(k)> = (1 + q.k)^2",
        "ATLAS, section 3: the delta rule with features of a higher capacity",
        featured(
            linear(lambda f, s: naive_linear.naive_delta_rule(f.queries, f.keys, f.values, f.step_size, s)), squares
        ),
    ),
    "unnamed": Model(
        sequence_memory(mlp(), lp(3.0), retain(kl(), scale(adam())), 16, read="boundary", way="stepped"),
        "nobody's: an l_3 objective with KL retention, learned by Adam, once a chunk",
        "docs/architecture.md",
        miras(naive_miras.naive_adam, p=3.0, sharpness=10.0),
        note="what the tutorial derives",
    ),
}


def rows() -> Iterator[tuple[str, Model]]:
    """The zoo by name."""
    yield from sorted(zoo.items())
