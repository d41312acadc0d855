"""Latency: verdicts on planted ratios; what is timed; no assertion on a time."""

import sys

import numpy as np
import pytest
from strategies import random_model, trained_adapter

import lora_np as ln
from lora_np.backend import asnumpy
from lora_np.reproduce import latency, timing
from lora_np.reproduce.latency import ADAPTERS, AGAIN, BASE, MERGED, SMALL, UNMERGED, Shape
from lora_np.reproduce.timing import Ratio

CONFIG = ln.Config(256, 16, 1, 2, 36, 8, head="none", tie_head=False)
LARGE, ONE = Shape(32, 512), Shape(1, 128)


def ratios(*, merged=(1.0, 1.0), again=(1.0, 1.0), adapters=(1.03, 1.25)):
    """At (32, 512) and (1, 128)."""
    of = {MERGED: merged, AGAIN: again, UNMERGED: (1.1, 1.1)} | ({ADAPTERS: adapters} if adapters else {})
    return {
        shape: {name: Ratio(values[i], values[i], values[i]) for name, values in of.items()}
        for i, shape in enumerate((LARGE, ONE))
    }


def test_a_ratio_is_taken_round_by_round():
    seconds = {"one": [2.0, 4.0, 9.0], "base": [1.0, 4.0, 3.0]}
    assert timing.ratio(seconds, "one", "base") == (2.0, 1.0, 3.0)


def test_functions_are_called_in_turn_after_one_call_each_that_is_not_counted():
    calls = []
    seconds = timing.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, at_least=0)
    assert calls == list("ababab")
    assert {name: len(of) for name, of in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("found", "same", "verdict"),
    [
        (ratios(), True, "holds"),
        (ratios(merged=(1.04, 0.9)), True, "holds"),
        (ratios(merged=(1.08, 1.0), again=(1.0, 0.9)), True, "not decided"),
        (ratios(merged=(1.03, 1.0), again=(1.0, 0.9)), True, "not decided"),
        (ratios(merged=(1.2, 1.0), again=(1.0, 0.9)), True, "holds in part"),
        (ratios(merged=(1.0, 1.2)), True, "holds in part"),
        (ratios(), False, "does not hold"),
    ],
)
def test_the_verdict_on_merged_models(found, same, verdict):
    assert latency.merged_claim(found, same).verdict == verdict


def test_short_calls_are_repeated_until_they_fill_a_while(monkeypatch):
    """On a clock that each call moves on by a second: ten of them fill ten."""
    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        calls.append(now[0])
        now[0] += 1.0

    assert timing.in_turn({"a": call}, rounds=2, at_least=10.0) == {"a": [1.0, 1.0]}
    assert len(calls) == 1 + 2 * 10


def test_on_a_busy_machine_nothing_is_said_of_adapter_layers_that_cost_less_than_its_noise():
    """The base takes a third longer than itself, adapter layers a quarter; then half as long again."""
    claim = latency.adapters_claim(ratios(again=(1.3, 1.0)))
    assert claim.verdict == "not decided"
    assert "30.0%" in claim.figure
    assert latency.adapters_claim(ratios(again=(1.3, 1.0), adapters=(1.03, 1.5))).verdict == "holds"


@pytest.mark.parametrize(
    ("adapters", "verdict"),
    [
        ((1.03, 1.25), "holds"),
        ((1.25, 1.03), "holds in part"),
        ((1.25, 1.2), "holds in part"),
        ((1.01, 0.9), "does not hold"),
        (None, "not checked"),
    ],
)
def test_the_verdict_on_adapter_layers(adapters, verdict):
    assert latency.adapters_claim(ratios(adapters=adapters)).verdict == verdict


def test_a_merged_model_does_the_same_work_and_another_does_not():
    base = random_model(CONFIG, seed=0)
    assert latency.same_work(base, ln.merge(base, trained_adapter(base, ln.LoRAConfig(r=2), seed=0)))
    deeper = ln.Config(256, 16, 2, 2, 36, 8, head="none", tie_head=False)
    assert not latency.same_work(base, random_model(deeper, seed=0))


def test_what_is_timed_is_what_it_is_called():
    """Merged and beside its adapter, a model gives the adapted states; bottlenecks change the base's a little."""
    base = random_model(CONFIG, seed=0)
    tokens = np.arange(8).reshape(2, 4)
    y = {name: asnumpy(run(tokens)) for name, run in latency._variants(base).items()}
    assert list(y) == [BASE, AGAIN, MERGED, UNMERGED, ADAPTERS, SMALL]
    np.testing.assert_array_equal(y[BASE], asnumpy(ln.forward(base, tokens)))
    for name in (AGAIN, MERGED, UNMERGED):
        np.testing.assert_allclose(y[name], y[BASE], atol=1e-12)  # an adapter at its start: B = 0
    for name in (ADAPTERS, SMALL):
        assert 0 < np.abs(y[name] - y[BASE]).max() < 0.5 * np.abs(y[BASE]).max()


def test_without_a_clone_adapter_layers_are_left_out_and_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "bench.houlsby", None)
    section = latency.latency(CONFIG, (Shape(2, 4), Shape(1, 4)), 1)
    assert list(section.data["2x4"]) == [AGAIN, MERGED, UNMERGED]
    assert [claim.verdict for claim in section.claims][1] == "not checked"
    assert "needs a clone" in section.claims[1].figure
