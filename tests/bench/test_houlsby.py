"""Adapter layers, the baseline of the latency claim: by hand, at their start, and every derivative by complex steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, device, random_model, seeds

import lora_np as ln
from bench import houlsby
from lora_np import gradcheck, ops
from lora_np.backend import asnumpy


def gpt2(seed, **fields):
    """A model without a head, whose weights are all random."""
    config = ln.Config(7, 8, 2, 2, 8, 6, head="none", tie_head=False, **fields)
    return random_model(config, seed=seed)


def trained(model, m, seed):
    """Bottlenecks as after training: every one of their numbers is random."""
    rng = np.random.default_rng(seed)
    start = houlsby.init_bottlenecks(model, m, seed=seed)
    return {name: device(0.3 * rng.standard_normal(p.shape), p.dtype) for name, p in start.items()}


def test_a_bottleneck_is_houlsbys():
    """x + W_up gelu(W_down x + b_down) + b_up, written out."""
    rng = np.random.default_rng(0)
    shapes = {"0.down": (2, 4), "0.down.bias": (2,), "0.up": (4, 2), "0.up.bias": (4,)}
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x = rng.standard_normal((3, 4))
    u = params["0.down"] @ x.T + params["0.down.bias"][:, None]
    h = 0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    expected = x + (params["0.up"] @ h).T + params["0.up.bias"]
    y, _ = houlsby.bottleneck(device(x), {name: device(p) for name, p in params.items()}, 0)
    np.testing.assert_allclose(asnumpy(y), expected, rtol=1e-13)


@given(configs(heads=("none",), kinds=("usual",), norm_first=True, n_types=0), st.integers(1, 3), seeds)
def test_bottlenecks_of_zero_leave_the_base_as_it_is(config, m, seed):
    model = random_model(config, seed=seed)
    zero = {name: 0 * p for name, p in houlsby.init_bottlenecks(model, m, seed=seed).items()}
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 5))
    np.testing.assert_array_equal(asnumpy(houlsby.forward(model, zero, tokens)), asnumpy(ln.forward(model, tokens)))


def test_bottlenecks_stand_after_each_half_of_each_layer():
    """Each changes what comes out: none is left out."""
    model = gpt2(0)
    params, tokens = trained(model, 2, 0), np.array([[1, 2, 3]])
    y = asnumpy(houlsby.forward(model, params, tokens))
    assert len(params) == 2 * model.config.n_layer * 4
    for name, p in params.items():
        without = asnumpy(houlsby.forward(model, {**params, name: 0 * p}, tokens))
        assert np.abs(without - y).max() > 1e-3


@settings(max_examples=min(6, settings().max_examples))
@given(
    seeds, st.integers(1, 2), st.sampled_from([{}, {"norm": "rms", "positions": "rotary", "activation": "silu_gated"}])
)
def test_every_gradient_by_complex_step(seed, m, fields):
    model, tokens = gpt2(seed, **fields), np.random.default_rng(seed).integers(0, 7, (1, 3))
    wide = ln.Model(model.config, {name: w.astype(complex) for name, w in model.weights.items()})

    def forward(**params):
        base = wide if any(p.dtype.kind == "c" for p in params.values()) else model
        return houlsby.forward(base, params, tokens)

    def backward(dy, **params):
        _, at, stack = houlsby.states(model, params, tokens, keep=True)
        return houlsby.states_backward(model, at, params, dy, stack)

    errors = gradcheck.check(forward, backward, {n: asnumpy(p) for n, p in trained(model, m, seed).items()}, seed=seed)
    assert len(errors) == 16
    assert max(errors.values()) <= 1e-11


def test_a_wrong_gradient_is_caught():
    """As if the bottleneck's own way past it were forgotten in backward."""
    model, tokens = gpt2(0), np.array([[1, 2, 3]])
    wide = ln.Model(model.config, {name: w.astype(complex) for name, w in model.weights.items()})

    def backward(dy, **params):
        _, at, stack = houlsby.states(model, params, tokens, keep=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(houlsby, "linear_backward", lambda dy, W: 0 * ops.linear_backward(dy, W))
            return houlsby.states_backward(model, at, params, dy, stack)

    inputs = {name: asnumpy(p) for name, p in trained(model, 2, 0).items()}
    errors = gradcheck.check(lambda **p: houlsby.forward(wide, p, tokens), backward, inputs)
    assert max(errors.values()) > 1e-3


def test_a_post_norm_model_is_refused():
    model = gpt2(0, norm_first=False)
    with pytest.raises(ValueError, match="expected a pre-norm model"):
        houlsby.init_bottlenecks(model, 2, seed=0)
