"""Every derivative against complex step and central differences, and the checker against planted errors."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, device, seeds

import lora_np as ln
from lora_np import dora, gradcheck, lora, ops
from lora_np.backend import asnumpy, backend_name, xp
from lora_np.vectors import derivatives

proves = pytest.mark.proves
PRIMITIVES = {p.name: p for p in derivatives.primitives()}
small = st.integers(1, 4)


def worst(forward, backward, inputs, **how):
    return max(gradcheck.check(forward, backward, inputs, **how).values())


# --- The methods themselves ----------------------------------------------------------------------------------------


@proves("T6")
def test_complex_step_and_central_difference_of_known_functions():
    """f = sum(tanh(x) + x^3): its gradient is 1 - tanh^2 x + 3 x^2."""
    x = np.linspace(-2, 2, 9).reshape(3, 3)
    exact = 1 - np.tanh(x) ** 2 + 3 * x**2

    def f(x):
        return (xp.tanh(x) + x * x * x).sum()

    assert gradcheck.relative_error(gradcheck.complex_step(f, device(x)), exact) <= 1e-15
    assert gradcheck.relative_error(gradcheck.central_difference(f, device(x)), exact) <= 1e-9


def test_relative_error():
    assert gradcheck.relative_error(device([1.0, 2.0]), device([1.0, 4.0])) == 0.5
    assert gradcheck.relative_error(device([0.0, 0.0]), device([0.0, 0.0])) == 0
    assert gradcheck.relative_error(device([1e-3]), device([0.0]), floor=1.0) == 1e-3
    with pytest.raises(ValueError, match=r"expected shape \(1,\), got \(2,\)"):
        gradcheck.relative_error(device([0.0, 0.0]), device([0.0]))


PLANTED = {
    "a wrong sign": lambda g: -g,
    "a wrong factor": lambda g: g * 1.01,
    "one element": lambda g: g + device([[0.0, 0.0, 0.0, 0.01]] * 3),
    "a wrong order": lambda g: g[::-1],
    "nothing": lambda g: g * 0,
}


@proves("T2", "T8")
@pytest.mark.parametrize("name", ["linear", "softmax"])
@pytest.mark.parametrize("mistake", PLANTED.values(), ids=PLANTED)
@pytest.mark.parametrize("gradient", [gradcheck.complex_step, gradcheck.central_difference])
def test_planted_errors_are_caught(name, mistake, gradient):
    x = {"x": np.random.default_rng(0).standard_normal((3, 4))}
    if name == "linear":
        W = device(np.random.default_rng(1).standard_normal((5, 4)))
        forward, backward = (lambda x: ops.linear(x, W)), (lambda dy, x: ops.linear_backward(dy, W))
    else:
        forward = lambda x: ops.softmax(x)[0]  # noqa: E731
        backward = lambda dy, x: ops.softmax_backward(dy, ops.softmax(x)[1])  # noqa: E731
    assert worst(forward, lambda dy, x: {"x": backward(dy, x)}, x, gradient=gradient) < 1e-7
    assert worst(forward, lambda dy, x: {"x": mistake(backward(dy, x))}, x, gradient=gradient) > 1e-3


# --- Primitives ----------------------------------------------------------------------------------------------------


@proves(
    "T1", "T2", "T3", "T4", "T5", "T6", "T7", "T8", "T9", "T10", "T11", "T12", "T14", "T15", "T18", "T19",
    "L4", "L10", "L11",
)  # fmt: skip
@pytest.mark.parametrize(
    ("gradient", "bound"), [(gradcheck.complex_step, 1e-12), (gradcheck.central_difference, 1e-7)],
    ids=["complex step", "central difference"],
)  # fmt: skip
@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(name, gradient, bound):
    p = PRIMITIVES[name]
    assert worst(p.forward, p.backward, p.inputs, gradient=gradient) <= bound


def test_every_backward_is_checked():
    """Each function of ops, lora and dora that is a backward is called by some primitive's."""
    backwards = {name: module for module in (ops, lora, dora) for name in vars(module) if name.endswith("_backward")}
    called = set()

    def spy(name, f):
        def call(*args, **kwargs):
            called.add(name)
            return f(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, module in backwards.items():
            patch.setattr(module, name, spy(name, getattr(module, name)))
        for p in derivatives.primitives():
            inputs = {n: device(a) for n, a in p.inputs.items()}
            p.backward(xp.ones_like(p.forward(**inputs)), **inputs)
    assert called == set(backwards)


@proves("T2")
@given(seeds, small, small, small, small, st.booleans())
def test_linear_of_any_shape(seed, N, T, n_in, n_out, bias):
    normal = np.random.default_rng(seed).standard_normal
    inputs = {"x": normal((N, T, n_in)), "W": normal((n_out, n_in))} | ({"b": normal(n_out)} if bias else {})

    def backward(dy, x, W, b=None):
        grads = {"x": ops.linear_backward(dy, W), "W": ops.linear_weight_backward(dy, x)}
        return grads if b is None else grads | {"b": ops.bias_backward(dy)}

    assert worst(ops.linear, backward, inputs, seed=seed) <= 1e-12


@proves("L4")
@given(seeds, small, small, small, small, small, st.sampled_from([0.01, 2.0, 30.0]), st.booleans())
def test_lora_linear_of_any_shape(seed, N, T, n_in, n_out, r, s, dropped):
    normal = np.random.default_rng(seed).standard_normal
    mask = None
    if dropped:
        n, t = xp.arange(N * T) // T, xp.arange(N * T) % T
        mask = ops.dropout_mask(n, t, n_in, 0.4, seed=seed, stream="q", dtype="float64").reshape(N, T, n_in)
    W0, b = device(normal((n_out, n_in))), device(normal(n_out))

    def forward(x, A, B):
        return ln.lora_linear(x, W0.astype(x.dtype), b, A, B, s, dropout_mask=mask)[0]

    def backward(dh, x, A, B):
        _, saved = ln.lora_linear(x, W0, b, A, B, s, dropout_mask=mask)
        return dict(zip("xAB", ln.lora_linear_backward(dh, saved), strict=True))

    inputs = {"x": normal((N, T, n_in)), "A": normal((r, n_in)), "B": normal((n_out, r))}
    assert worst(forward, backward, inputs, seed=seed) <= 1e-12


@proves("T3", "T4")
@given(seeds, small, small, st.integers(3, 9), st.sampled_from([1e-5, 1.0]), st.booleans())
def test_norms_of_any_shape(seed, N, T, D, eps, rms):
    """From three numbers on: the norm of one or two is nearly constant, and its gradient is nothing but rounding."""
    normal = np.random.default_rng(seed).standard_normal
    inputs = {"x": normal((N, T, D)), "w": normal(D)} | ({} if rms else {"b": normal(D)})

    def run(x, w, b=None):
        return ops.rms_norm(x, w, eps) if b is None else ops.layer_norm(x, w, b, eps)

    def backward(dy, x, w, b=None):
        saved = run(x, w, b)[1]
        grads = {"x": (ops.rms_norm_backward if b is None else ops.layer_norm_backward)(dy, saved)}
        grads["w"] = ops.norm_weight_backward(dy, saved)
        return grads if b is None else grads | {"b": ops.bias_backward(dy)}

    assert worst(lambda **arrays: run(**arrays)[0], backward, inputs, seed=seed) <= 1e-12


@proves("T9", "T10")
@given(seeds, st.integers(1, 2), st.integers(2, 4), st.integers(1, 3), st.booleans(), st.booleans(), st.data())
def test_attention_with_any_mask_and_groups(seed, N, T, K, causal, masked, data):
    G, R, past = (data.draw(st.sampled_from(choice)) for choice in ([1, 2], [1, 2], [0, 2]))
    rng = np.random.default_rng(seed)
    mask = device(rng.random((N, past + T)) < 0.6) if masked else None
    inputs = {"q": (N, G * R, T, K), "k": (N, G, past + T, K), "v": (N, G, past + T, K)}
    inputs = {name: rng.standard_normal(shape) for name, shape in inputs.items()}

    def backward(dy, q, k, v):
        _, saved = ops.attention(q, k, v, causal=causal, mask=mask)
        return dict(zip("qkv", ops.attention_backward(dy, saved)[:3], strict=True))

    def forward(q, k, v):
        return ops.attention(q, k, v, causal=causal, mask=mask)[0]

    # Where each query sees one key at most, dq and dk are zero but for rounding: relative to dv, then.
    device_inputs = {name: device(a) for name, a in inputs.items()}
    dy = device(np.random.default_rng(seed).standard_normal(inputs["q"].shape))
    floor = max(float(xp.abs(g).max()) for g in backward(dy, **device_inputs).values())
    for name in inputs:

        def scalar(z, name=name):
            return (
                dy * forward(**{n: (z if n == name else a.astype(complex)) for n, a in device_inputs.items()})
            ).sum()

        expected = gradcheck.complex_step(scalar, device_inputs[name])
        got = backward(dy, **device_inputs)[name]
        assert gradcheck.relative_error(got, expected, floor=1e-2 * floor) <= 1e-12


# --- Whole models --------------------------------------------------------------------------------------------------

ARCHITECTURES = derivatives.architectures()
TRAINED = {
    "q, v": ln.LoRAConfig(r=2),
    "all targets": ln.LoRAConfig(r=2, targets=("q", "k", "v", "o", "up", "down", "embed", "head"), bias="all"),
    "DoRA": ln.LoRAConfig(r=2, targets=("q", "v", "up", "embed", "head"), dora=True),
    "qkv and the head": ln.LoRAConfig(r=2, alpha=2, targets=("qkv",), train_head=True, rslora=True, bias="lora_only"),
    "every weight": None,
}
# On the stand-in the numbers are the same, and each takes twice as long: one of each kind will do.
if backend_name == "cupy":
    ARCHITECTURES = dict(list(ARCHITECTURES.items())[::2])


@proves("L4", "L10", "T1", "T13", "T14", "T15", "T17", "T18", "T19", "T20")
@pytest.mark.parametrize("lora_config", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_gradient_of_a_model(config, lora_config):
    small = replace(config, n_layer=1, d_ff=6, vocab_size=7) if lora_config is None else replace(config, vocab_size=7)
    if lora_config is not None and config.gated and "up" in lora_config.targets:
        lora_config = replace(lora_config, targets=(*lora_config.targets, "gate"))
    assert derivatives.check_model(small, lora_config) <= 1e-11


@proves("L4")
@pytest.mark.parametrize("config", [next(iter(ARCHITECTURES.values()))])
def test_gradient_of_a_model_by_central_difference(config):
    assert derivatives.check_model(config, ln.LoRAConfig(r=1), gradient=gradcheck.central_difference) <= 1e-4


@proves("L4", "T13", "T17", "T18", "T19", "T20")
@given(st.data(), st.integers(0, 1000))
def test_gradient_of_any_architecture(data, seed):
    """One layer, LoRA on all that a layer has; with settings that no preset has."""
    config = data.draw(configs(heads=("lm", "classify", "tag"), n_layer=1, vocab_size=5))
    gate = ("gate",) if config.gated else ()
    lora_config = ln.LoRAConfig(r=1, targets=("q", "k", "v", "o", "up", "down", *gate))
    assert derivatives.check_model(config, lora_config, seed=seed) <= 1e-11


@proves("L4")
def test_a_wrong_gradient_of_a_model_is_caught(monkeypatch):
    """A branch that forgets s, on the way back alone."""
    right = lora.lora_linear_backward

    def wrong(dh, saved, **options):
        return right(dh, saved._replace(s=1.0), **options)

    monkeypatch.setattr("lora_np.transformer.lora_linear_backward", wrong)
    assert derivatives.check_model(next(iter(ARCHITECTURES.values())), ln.LoRAConfig(r=2)) > 1e-3


@proves("L3")
def test_perturbed_changes_b_alone():
    config = next(iter(derivatives.architectures().values()))
    model = ln.Model(config, ln.init_weights(config, seed=0, dtype="float64"))
    started = ln.init_adapter(model, ln.LoRAConfig(r=2, bias="all"), seed=0)
    moved = derivatives.perturbed(started, seed=0)
    changed = {n for n in started.params if not bool(xp.array_equal(started.params[n], moved.params[n]))}
    assert changed == {name for name in started.params if name.endswith(".B")}
    assert all(asnumpy(moved.params[name]).all() for name in changed)


@proves("T5", "L4", "L10", "L11", "L12", "T13")
def test_the_table_keeps_its_bounds(monkeypatch):
    """What the command line prints: each line's error within its bound. One architecture; the others are above."""
    one = dict(list(derivatives.architectures().items())[-1:])
    monkeypatch.setattr(derivatives, "architectures", lambda: one)
    rows = list(derivatives.table())
    assert {row.what for row in rows} >= set(PRIMITIVES)
    assert len(rows) == len(PRIMITIVES) + 2 + 4 + 1
    assert all(row.error <= row.bound for row in rows)


@pytest.mark.parametrize("names", [(), ("dx",), ("x", "y")])
def test_gradients_of_nothing_or_of_no_input_are_refused(names):
    """Of none at all, the largest error would be none."""
    with pytest.raises(ValueError, match="expected gradients of some of x"):
        gradcheck.check(lambda x: x, lambda dy, x: dict.fromkeys(names, dy), {"x": np.ones(3)})
