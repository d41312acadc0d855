"""What training costs: measured bytes against those that the arrays have, and the verdicts on planted figures."""

import tracemalloc
from dataclasses import replace

import pytest

import lora_np as ln
from lora_np.reproduce import cost
from lora_np.reproduce.cost import Bytes, Measured, Memory
from lora_np.reproduce.counts import size
from lora_np.reproduce.timing import Ratio

CONFIG = ln.Config(256, 16, 2, 2, 128, 512)
WHAT = Measured("a model", CONFIG, 1, 8)
SLACK = 100_000  # bytes of Python's own objects


def test_what_is_held_between_steps_is_weights_and_moments():
    """Full: 3 x 4 bytes a parameter; LoRA: 4 a parameter, 12 a trained one. Nothing else stays."""
    memory = cost.measure_memory(WHAT)
    n, trained = size(CONFIG), ln.count_parameters(CONFIG, cost.LORA)
    assert 0 <= memory.full.held - 12 * n <= SLACK
    assert 0 <= memory.lora.held - (4 * n + 12 * trained) <= SLACK
    assert memory.held == memory.full.held / memory.lora.held


def test_the_peak_has_gradients_and_the_new_parameters_too():
    """Full: old and new parameters and moments, gradients: 28 bytes each at least; LoRA: a short text's activations."""
    memory = cost.measure_memory(WHAT)
    n = size(CONFIG)
    assert memory.full.peak >= 28 * n
    assert 4 * n <= memory.lora.peak < 4 * n + 8 * 512 * 128  # less than building the weights takes: it does not count
    wider = cost.measure_memory(replace(WHAT, N=16, T=16))
    assert wider.peak < memory.peak  # activations are needed either way


def test_measuring_leaves_tracing_as_it_was():
    assert not tracemalloc.is_tracing()
    cost.measure_memory(replace(WHAT, config=ln.Config(256, 16, 1, 1, 8, 8)))
    assert not tracemalloc.is_tracing()


def planted(full, lora):
    return Memory(WHAT, Bytes(*full), Bytes(*lora))


@pytest.mark.parametrize(
    ("arithmetic", "measured", "verdict"),
    [
        (3.0, planted((300, 700), (100, 110)), "holds"),
        (3.0, planted((300, 200), (100, 110)), "holds in part"),
        (3.0, planted((100, 100), (100, 100)), "holds in part"),
        (1.0, planted((100, 100), (100, 100)), "does not hold"),
        (3.0, None, "not checked"),
    ],
)
def test_the_verdict_on_memory(arithmetic, measured, verdict):
    assert cost.memory_claim(arithmetic, 4.0, measured).verdict == verdict


@pytest.mark.parametrize(("measured", "verdict"), [(800, "holds"), (808, "does not hold"), (8000, "does not hold")])
def test_the_verdict_on_the_optimizers_state(measured, verdict):
    assert cost.state_claim(10**6, 100, measured, 800).verdict == verdict


@pytest.mark.parametrize(
    ("median", "verdict"), [(1.4, "holds"), (1.13, "holds"), (1.05, "holds in part"), (0.9, "does not hold")]
)
def test_the_verdict_on_speed(median, verdict):
    assert cost.speed_claim(Ratio(median, median, median)).verdict == verdict


def test_a_speed_up_within_the_rounds_spread_is_not_decided():
    assert cost.speed_claim(Ratio(1.4, 1.1, 1.5)).verdict == "holds"
    assert cost.speed_claim(Ratio(1.4, 0.9, 1.5)).verdict == "not decided"
    assert cost.speed_claim(Ratio(1.1, 1.05, 1.3)).verdict == "not decided"
    assert cost.speed_claim(Ratio(0.7, 0.65, 0.8)).verdict == "does not hold"
