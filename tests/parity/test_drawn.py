"""What is drawn at random: the numbers of PyTorch's dropout, and the choices of transformers' samplers."""

import numpy as np
import peers
import pytest
from peers import torch, transformers

from lora_np.backend import asnumpy, xp
from lora_np.decode import choose
from lora_np.ops import dropout_mask

pytestmark = peers.FILTERS


@pytest.mark.proves("T12")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.9])
def test_what_dropout_keeps_is_multiplied_by_what_pytorch_multiplies_it_by(p, dtype):
    """Within a rounding. PyTorch's own masks are other ones: of as many zeros, within six deviations of both."""
    torch.manual_seed(0)
    M, D = 200, 50
    theirs = torch.nn.functional.dropout(torch.ones(M, D, dtype=getattr(torch, dtype)), p).numpy()
    rows = xp.arange(M)
    ours = asnumpy(dropout_mask(rows, rows, D, p, seed=0, stream="layers.0.attn.q", dtype=dtype))
    (kept,), (their_kept,) = np.unique(ours[ours != 0]), np.unique(theirs[theirs != 0])
    assert kept.dtype == their_kept.dtype
    assert abs(kept - their_kept) <= np.spacing(their_kept)
    assert abs((ours != 0).mean() - (theirs != 0).mean()) <= 6 * (2 * p * (1 - p) / ours.size) ** 0.5


class Given:
    """A source of random numbers that are given."""

    def __init__(self, numbers):
        self.numbers = numbers

    def random(self, shape):
        return self.numbers.reshape(shape)


def assert_drawn_as(logits, scores, options, step):
    """Our choices have the probabilities of their scores, which are -inf where nothing is drawn.

    logits, scores (V,). `step` on either side of each place where the sum of the probabilities, the likeliest first,
    passes to the next token, ours passes too; and nothing that they leave out is drawn with the largest number.
    """
    order = np.argsort(-scores)[: np.isfinite(scores).sum()]
    p = np.exp(scores[order] - scores.max())
    edges = np.cumsum(p / p.sum())[:-1]
    u = np.concatenate([[0.0], edges - step, edges + step, [np.nextafter(1.0, 0.0)]])
    expected = np.concatenate([order[:1], order[:-1], order[1:], order[-1:]])
    assert (np.diff(edges, prepend=0, append=1) > 2 * step).all()  # else a number would pass two tokens
    got = choose(np.tile(logits, (len(u), 1)), Given(u), **options)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.proves("T16")
@pytest.mark.parametrize("top_p", [None, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("top_k", [None, 1, 3, 40])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_choices_have_the_probabilities_of_transformers_samplers(temperature, top_k, top_p):
    """In float64, in the order in which its generate applies them. 40 is more than there are tokens."""
    samplers = [transformers.TemperatureLogitsWarper(temperature)]
    samplers += [] if top_k is None else [transformers.TopKLogitsWarper(top_k)]
    samplers += [] if top_p is None else [transformers.TopPLogitsWarper(top_p)]
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for seed in range(10):
        logits = np.random.default_rng(seed).uniform(-3, 3, 20)
        scores = torch.tensor(logits[None])
        for sampler in samplers:
            scores = sampler(None, scores)
        assert_drawn_as(logits, scores[0].numpy(), options, 1e-12)


@pytest.mark.proves("T16")
@pytest.mark.parametrize(("top_k", "top_p"), [(7, 0.6), (None, 0.3), (5, None)])
def test_choices_have_the_probabilities_of_transformers_generate(top_k, top_p):
    """Of the scores that it draws from, in float32; top_k = 0 is its none."""
    pair = peers.make("gpt2", peers.GPT2, seed=0)
    torch.manual_seed(0)
    made = pair.module.generate(
        torch.tensor([[3, 5, 7]]), do_sample=True, temperature=0.3, top_k=top_k or 0, top_p=top_p or 1.0,
        max_new_tokens=4, output_scores=True, output_logits=True, return_dict_in_generate=True, pad_token_id=peers.PAD,
    )  # fmt: skip
    for logits, scores in zip(made.logits, made.scores, strict=True):
        raw, drawn_from = logits[0].double().numpy(), scores[0].double().numpy()
        assert_drawn_as(raw, drawn_from, {"temperature": 0.3, "top_k": top_k, "top_p": top_p}, 1e-5)
