"""The statements of the specification, by id: the one place where their equations stand in a form that can be typeset.

Docstrings say the same in plain text beside the code and begin with the ids that they state; tests prove them. The
texts are Markdown with LaTeX between dollars. The README's table has those of L1 to L9, word for word.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Part(NamedTuple):
    """A part of the specification: the statements whose ids begin with its letter."""

    title: str
    text: str


class Statement(NamedTuple):
    """A statement: its title, and what it says."""

    title: str
    text: str


PARTS: Mapping[str, Part] = MappingProxyType(
    {
        "L": Part(
            "Low-rank adaptation",
            r"""$W_0$ (out, in) is a frozen matrix and $x$ (..., in) its input; $A$ goes down to rank $r$ and $B$ back
            up. $g$ is the gradient of the loss by $h$. After Hu et al., 2021, section 4.""",
        ),
        "T": Part(
            "The transformer",
            r"""Each operation with its derivative. Letters: $N$ texts of $T$ tokens; $D$ the model's width; $H$ heads
            of width $K = D/H$, which share $G$ key/value heads; $F$ the feed-forward width; $V$ the vocabulary.""",
        ),
        "O": Part("Optimisation", r"""$\theta$ is what is trained, $g$ its gradient, $t$ the step, from 1."""),
        "A": Part("Analysis", "What the paper measures on trained adapters, in its section 7."),
    }
)


STATEMENTS: Mapping[str, Statement] = MappingProxyType(
    {
        "L1": Statement(
            "The update",
            r"""
$$\Delta W = s B A,$$

with $B$ of shape (out, $r$), $A$ of shape ($r$, in); $s = \alpha / r$, or $\alpha / \sqrt r$ when rank-stabilised
""",
        ),
        "L2": Statement(
            "Forward",
            r"""
$$h = x W_0^\top + b + s \thinspace ((m \odot x) A^\top) B^\top,$$

with $m$ the scaled dropout mask; $BA$ is never formed
""",
        ),
        "L3": Statement(
            "Start",
            r"""
At the start

$$B = 0 \quad \text{and} \quad A \sim U(-1/\sqrt{\mathrm{in}}, \thinspace 1/\sqrt{\mathrm{in}})$$

or $N(0, \sigma^2)$: the adapted model is the base, with no tolerance
""",
        ),
        "L4": Statement(
            "Backward",
            r"""
$$\partial B = s \thinspace g^\top ((m \odot x) A^\top),$$

$$\partial A = s \thinspace (g B)^\top (m \odot x),$$

$$\partial x = g W_0 + s \thinspace m \odot ((g B) A);$$

$\partial W_0$ is not formed
""",
        ),
        "L5": Statement(
            "Merge",
            r"""
Merged:

$$W' = \mathrm{round}(W_0 + s B A),$$

summed in float64, rounded once. The two outputs of a linear differ by at most

$$2 \gamma_{\mathrm{in} + r + 4} \left( \lvert x \rvert \lvert W_0 \rvert^\top + \lvert s \rvert \lvert x \rvert \lvert A \rvert^\top \lvert B \rvert^\top + \lvert b \rvert \right)$$

and underflow, with $\gamma_n = n u / (1 - n u)$
""",
        ),
        "L6": Statement(
            "Unmerge",
            r"""
Unmerged: $W_0$ itself, bit for bit, after any number of merges; nothing is subtracted
""",
        ),
        "L7": Statement(
            "Switch",
            r"""
Another adapter on the same base costs only its $A$ and $B$; adapters may differ for each row of a batch
""",
        ),
        "L8": Statement(
            "Count",
            r"""
Trained parameters:

$$r \thinspace (\mathrm{in} + \mathrm{out})$$

a matrix. GPT-3 175B, $q$ and $v$: 4,718,592 at $r = 1$, 37,748,736 at $r = 8$
""",
        ),
        "L9": Statement(
            "Combine",
            r"""
$$\sum_i w_i \Delta W_i$$

is one adapter:

$$B = [w_1 s_1 B_1, w_2 s_2 B_2, \dots], \quad A = [A_1; A_2; \dots], \quad s = 1;$$

or its best approximation of a lower rank, by SVD
""",
        ),
        "T1": Statement(
            "Embedding: token, position, type",
            r"""
With a table $E$ ($V$, $D$) of tokens, and where the model has them $P$ of learned positions and $S$ of token types,
the state of token $\tau_{nt}$ at position $\pi_{nt}$ and of type $\kappa_{nt}$ is

$$x_{nt} = E_{\tau_{nt}} + P_{\pi_{nt}} + S_{\kappa_{nt}}.$$

A row's gradient sums over the places where it was looked up, and likewise for $P$ and $S$:

$$\partial E_v = \sum_{n, t \thinspace : \thinspace \tau_{nt} = v} \partial x_{nt}.$$

In post-norm models (T13) a layer norm (T3) follows. Positions count the tokens that the mask keeps, so padding on the
left changes nothing.
""",
        ),
        "T2": Statement(
            "Linear",
            r"""
$$y = x W^\top + b$$

$$\partial x = \partial y \thinspace W, \quad \partial W = \partial y^\top x, \quad \partial b = \sum \partial y,$$

the products and the sum over all rows. $\partial W$ and $\partial b$ are formed where $W$ and $b$ are trained, and
there alone.
""",
        ),
        "T3": Statement(
            "Layer norm",
            r"""
Over the last axis, of $D$ elements, with $\mu$ their mean and $\sigma^2$ their variance, the sum of squares over $D$:

$$\hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}, \quad y = w \odot \hat x + b.$$

With $g = w \odot \partial y$, and a bar for the mean over the last axis,

$$\partial x = \frac{g - \bar g - \hat x \odot \overline{g \odot \hat x}}{\sqrt{\sigma^2 + \varepsilon}},$$

$$\partial w = \sum \partial y \odot \hat x, \quad \partial b = \sum \partial y,$$

the sums over all rows.
""",
        ),
        "T4": Statement(
            "RMS norm",
            r"""
Over the last axis, a bar for the mean over it:

$$\hat x = \frac{x}{\sqrt{\overline{x^2} + \varepsilon}}, \quad y = w \odot \hat x.$$

With $g = w \odot \partial y$,

$$\partial x = \frac{g - \hat x \odot \overline{g \odot \hat x}}{\sqrt{\overline{x^2} + \varepsilon}}, \quad \partial w = \sum \partial y \odot \hat x,$$

the sum over all rows.
""",
        ),
        "T5": Statement(
            "GELU, exact",
            r"""
$$y = x \thinspace \Phi(x), \quad \Phi(x) = \frac{1}{2} \left( 1 + \operatorname{erf} \frac{x}{\sqrt 2} \right)$$

$$\partial x = \partial y \odot \left( \Phi(x) + x \thinspace \varphi(x) \right), \quad \varphi(x) = \frac{1}{\sqrt{2 \pi}} e^{-x^2 / 2}$$

$$\operatorname{erf} x = \frac{2}{\sqrt \pi} \int_0^x e^{-t^2} \thinspace dt,$$

to 2 ulp in float32, and to $10^{-15}$ in float64.
""",
        ),
        "T6": Statement(
            "GELU by tanh",
            r"""
$$y = x \thinspace P, \quad P = \frac{1}{2} (1 + \tanh u), \quad u = \sqrt{2 / \pi} \thinspace (x + 0.044715 \thinspace x^3)$$

$$\partial x = \partial y \odot (P + x \thinspace P'), \quad P' = 2 P (1 - P) \sqrt{2 / \pi} \thinspace (1 + 0.134145 \thinspace x^2)$$
""",
        ),
        "T7": Statement(
            "SiLU, and the gated MLP",
            r"""
$$y = x \thinspace S, \quad S = \frac{1}{1 + e^{-x}}, \quad \partial x = \partial y \odot (S + x S (1 - S))$$

The feed-forward half of a layer (T13) is gated or plain. Plain, with an activation $a$ (T5, T6):

$$y = a(x W_{\mathrm{up}}^\top) \thinspace W_{\mathrm{down}}^\top.$$

Gated, with $a$ SiLU:

$$h = a(x W_{\mathrm{gate}}^\top) \odot x W_{\mathrm{up}}^\top, \quad y = h \thinspace W_{\mathrm{down}}^\top,$$

where the gradient $\partial h$ reaches each factor multiplied by the other.
""",
        ),
        "T8": Statement(
            "Softmax",
            r"""
Over the last axis:

$$p_i = \frac{e^{x_i}}{\sum_j e^{x_j}}$$

$$\partial x_i = p_i \Big( \partial p_i - \sum_j p_j \thinspace \partial p_j \Big)$$

A row of $-\infty$ alone gives zeros.
""",
        ),
        "T9": Statement(
            "Attention",
            r"""
For each head, with softmax (T8) over the $S$ keys, and $M$ zero where a query sees a key and $-\infty$ where not:

$$p = \mathrm{softmax} \left( \frac{q k^\top}{\sqrt K} + M \right), \quad y = p \thinspace v.$$

A query sees the keys that the mask keeps; where attention is causal, those up to its own place among them. A query that
sees none gives zeros, and its gradient is zero. With $\partial z$ the gradient by the softmax's input,

$$\partial v = p^\top \partial y, \quad \partial p = \partial y \thinspace v^\top,$$

$$\partial q = \frac{1}{\sqrt K} \partial z \thinspace k, \quad \partial k = \frac{1}{\sqrt K} \partial z^\top q.$$
""",
        ),
        "T10": Statement(
            "Grouped-query heads",
            r"""
$H$ query heads share $G$ key/value heads, $H / G$ to one: in T9, query head $i$ reads keys and values of head

$$j(i) = \left\lfloor \frac{i \thinspace G}{H} \right\rfloor ,$$

whose gradients sum over the query heads that share it:

$$\partial k_j = \sum_{i \thinspace : \thinspace j(i) = j} \partial k^{(i)}, \quad \partial v_j = \sum_{i \thinspace : \thinspace j(i) = j} \partial v^{(i)}.$$
""",
        ),
        "T11": Statement(
            "Rotary positions",
            r"""
Before attention (T9), queries and keys at position $t$ are turned, a pair $(x_i, x_{i + K/2})$ at a time, for
$i = 0, \dots, K/2 - 1$:

$$\omega_i = t \thinspace \theta^{-2i/K}$$

$$y_i = x_i \cos \omega_i - x_{i + K/2} \sin \omega_i$$

$$y_{i + K/2} = x_{i + K/2} \cos \omega_i + x_i \sin \omega_i$$

The gradient is turned back: by $-\omega_i$.
""",
        ),
        "T12": Statement(
            "Dropout",
            r"""
$$y = m \odot x, \quad \partial x = m \odot \partial y$$

Each element of $m$ is $0$ with probability $p$, else $1 / (1 - p)$. It depends on the seed, on what the mask is for, on
its text's index in the whole batch and on its place there: never on how the batch is cut.
""",
        ),
        "T13": Statement(
            "The block",
            r"""
A layer is attention (T9 to T11) and then a feed-forward network (T5 to T7), each of them an $f$ in a half-block of one
form. Pre-norm, and post-norm:

$$y = x + f(\mathrm{norm}(x)), \quad y = \mathrm{norm}(x + f(x)).$$

Writing $f^\ast$ for the map from the gradient of what $f$ gives to that of what it takes, pre-norm and post-norm,

$$\partial x = \partial y + \mathrm{norm}^\ast (f^\ast (\partial y)),$$

$$\partial x = d + f^\ast (d), \quad d = \mathrm{norm}^\ast (\partial y).$$

A pre-norm model has one norm more, after the last layer. Nothing below the lowest trained parameter is differentiated.
""",
        ),
        "T14": Statement(
            "The heads",
            r"""
$$z = u \thinspace W_{\mathrm{head}}^\top + b_{\mathrm{head}}$$

Language model: $u$ is the state of each token; tied, $W_{\mathrm{head}}$ is the token table $E$ (T1), and its gradient
the sum of both uses. Tagger: $u$ is the state of each token. Classifier: $u$ comes from one token of each text, the last
that the mask keeps where attention is causal; else the first, through the pooler:

$$u = \tanh(x W_{\mathrm{pool}}^\top + b_{\mathrm{pool}}), \quad \partial \tanh = 1 - \tanh^2.$$
""",
        ),
        "T15": Statement(
            "Cross-entropy",
            r"""
Over the $C$ targets of the whole batch that count (those of $-100$ do not), in nats:

$$\ell = -\frac{1}{C} \sum_{n, t} \log \mathrm{softmax}(z_{nt})_{\tau_{nt}}$$

$$\partial z_{nt} = \frac{1}{C} \left( \mathrm{softmax}(z_{nt}) - e_{\tau_{nt}} \right),$$

with $\tau_{nt}$ the target that $z_{nt}$ is scored against (nothing is shifted) and $e_\tau$ the unit vector of $\tau$.
""",
        ),
        "T16": Statement(
            "Decoding with a cache",
            r"""
The keys and values of all tokens so far are kept. The logits $z$ after a new token are those of forward on the whole text
(T14). The next token, greedy, or drawn at temperature $c$:

$$\tau = \operatorname{argmax}_v z_v, \quad \tau \sim \mathrm{softmax}(z / c),$$

the latter cut to the $k$ likeliest tokens, and then to the fewest of the likeliest that together reach the probability
top_p.
""",
        ),
        "O1": Statement(
            "AdamW",
            r"""
$$m_t = \beta_1 m_{t-1} + (1 - \beta_1) \thinspace g, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) \thinspace g^2$$

$$\theta_t = \theta_{t-1} - \eta \left( \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \varepsilon} + \lambda \thinspace \theta_{t-1} \right)$$

The decay $\lambda$ is decoupled: no part of $g$, $m$ or $v$.
""",
        ),
        "O2": Statement(
            "Warm-up and cosine",
            r"""
The factor on the learning rate at step $k$ (from 0) of $n$, the first $w$ of them warm-up:

$$\frac{k + 1}{w} \quad \text{for } k < w,$$

$$\frac{1}{2} \left( 1 + \cos \pi \frac{k - w}{n - w} \right) \quad \text{for } w \le k < n, \quad \text{then } 0.$$
""",
        ),
        "O3": Statement(
            "Clipping by the global norm",
            r"""
$$g \leftarrow g \thinspace \frac{c}{\max(c, \lVert g \rVert)},$$

with $\lVert g \rVert$ the 2-norm of all gradients together.
""",
        ),
        "O4": Statement(
            "The sum over shards, micro-batches and ranks",
            r"""
A batch cut by rows into parts has the loss and the gradients

$$\ell = \sum_k \ell_k, \quad \partial \theta = \sum_k \partial \theta_k,$$

where each part divides by the count $C$ of the whole batch (T15). The sum runs along one fixed tree: it depends on the
parts, never on who computed them or who was done first.
""",
        ),
        "A1": Statement(
            "Subspace similarity",
            r"""
$$\phi(i, j) = \frac{\lVert U_i^\top V_j \rVert_F^2}{\min(i, j)},$$

with $U_i$ (in, $i$) and $V_j$ (in, $j$) the leading right-singular directions of the $A$ of two adapters (not of their
$BA$): $1$ where one space lies in the other, $0$ where they are orthogonal. Paper, section 7.2.
""",
        ),
        "A2": Statement(
            "Amplification",
            r"""
$$\frac{\lVert \Delta W \rVert_F}{\lVert U^\top W_0 V \rVert_F},$$

with $U$ (out, $r$) and $V$ (in, $r$) the $r$ leading singular directions of $\Delta W$: how much an update stresses
directions that the base has. Paper, section 7.3.
""",
        ),
    }
)
