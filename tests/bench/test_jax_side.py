"""The side in JAX does the same work: the same loss and gradients from the same weights, factors and batch."""

import numpy as np
import pytest

import lora_np as ln
from bench import step
from bench.models import work

jax = pytest.importorskip("jax", reason="a peer of the benchmarks: the extra peers")
from bench import jax_side  # noqa: E402

SIDES = ["gpt2", "smollm2"]


@pytest.mark.parametrize("name", SIDES)
def test_loss_and_gradients_are_ours(name):
    """With a trained adapter, so that A has a gradient too."""
    w = work(name, quick=True)
    model, batch = w.model(), w.batch()
    adapter = w.trained_adapter(model, 1)
    loss, grads = ln.loss_and_grads(model, adapter, *batch)
    scale = w.lora.alpha / w.lora.r
    of_params = jax.value_and_grad(jax_side.loss)
    theirs, their_grads = of_params(dict(adapter.params), dict(model.weights), w.config, scale, *batch)
    assert float(theirs) == pytest.approx(loss, rel=1e-5)
    assert their_grads.keys() == grads.keys()
    for key, grad in grads.items():
        np.testing.assert_allclose(their_grads[key], grad, rtol=0, atol=1e-4 * abs(grad).max(), err_msg=key)


@pytest.mark.parametrize("name", SIDES)
def test_a_step_has_the_same_loss_and_says_how_long_it_compiled(name):
    cases = jax_side.step(name, quick=True)
    assert cases["step"]() == pytest.approx(step.ours(name, full=False, quick=True)[step.LORA](), rel=1e-5)
    assert cases["compile"]() > 0


def test_with_adamw_the_second_loss_is_ours():
    cases, mine = jax_side.step("gpt2", quick=True, optimizer=True), work("gpt2", quick=True)
    training = step.Training(mine, mine.model(), full=False)
    for _ in range(3):
        assert cases["step"]() == pytest.approx(training.step(), rel=1e-6)
