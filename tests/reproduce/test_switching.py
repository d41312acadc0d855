"""Task switching: verdicts on planted figures, and checks that notice when something is lost on the way."""

import numpy as np
import pytest
from strategies import random_model, trained_adapter

import lora_np as ln
from lora_np.reproduce import switching
from lora_np.reproduce.switching import Task

proves = pytest.mark.proves
CONFIG = ln.Config(256, 8, 2, 2, 8, 12)


@pytest.fixture(scope="module")
def base():
    return random_model(CONFIG, seed=0, dtype="float32")


@pytest.fixture(scope="module")
def tasks(base):
    def task(i):
        tokens = np.random.default_rng(i).integers(0, 256, (2, 9))
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        return Task(f"task {i}", trained_adapter(base, ln.LoRAConfig(r=2), seed=i), [batch])

    return [task(i) for i in range(3)]


@proves("L6", "L7")
def test_switching_round_and_back_gives_the_same_bits(base, tasks):
    assert switching.switched(base, tasks)


def test_what_is_lost_in_switching_is_noticed(base, tasks, monkeypatch):
    """As if unmerging subtracted, and left what it left."""
    left = ln.Model(CONFIG, {name: w * np.float32(1 + 1e-6) for name, w in base.weights.items()})
    monkeypatch.setattr(switching, "unmerge", lambda merged, adapter: left)
    assert not switching.switched(base, tasks)


@proves("L7")
def test_mixed_rows_are_as_each_alone(base, tasks, monkeypatch):
    assert switching.mixed(base, tasks) <= 1e-12
    forward = switching.forward
    swapped = lambda model, tokens, adapter: forward(  # noqa: E731
        model, tokens, adapter[::-1] if isinstance(adapter, list) else adapter
    )
    monkeypatch.setattr(switching, "forward", swapped)
    assert switching.mixed(base, tasks) > 1e-6


def test_losses_are_of_each_task_with_each_adapter(base, tasks):
    losses = switching.task_losses(base, tasks)
    assert list(losses) == [task.name for task in tasks]
    for task in tasks:
        batch = task.held_out[0]
        assert losses[task.name]["base"] == pytest.approx(ln.loss(base, **batch), rel=1e-6)
        for other in tasks:
            assert losses[task.name][other.name] == pytest.approx(
                ln.loss(base, **batch, adapter=other.adapter), rel=1e-6
            )


def test_texts_that_come_with_python():
    names = switching.unicode_names()
    assert "\nLATIN SMALL LETTER A\n" in names
    assert len(names) == 200_000
    assert "LATIN SMALL LETTER A" in switching.byte_tables(100_000)


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ({"base": 3, "a": 1, "b": 2}, {"base": 3, "a": 2, "b": 1}, "holds"),
        ({"base": 3, "a": 1, "b": 2}, {"base": 1, "a": 2, "b": 2}, "holds in part"),
        ({"base": 3, "a": 2, "b": 1}, {"base": 3, "a": 1, "b": 2}, "does not hold"),
    ],
)
def test_the_verdict_on_tasks(one, other, verdict):
    assert switching.own_task_claim({"a": one, "b": other}).verdict == verdict


def test_the_verdict_on_switching():
    assert switching.switch_claim(True, True, 1, 2).verdict == "holds"
    assert switching.switch_claim(False, True, 1, 2).verdict == "holds in part"
    assert switching.switch_claim(True, False, 1, 2).verdict == "does not hold"


@pytest.mark.parametrize(("apart", "verdict"), [(1e-15, "holds"), (1e-6, "does not hold"), (np.nan, "does not hold")])
def test_the_verdict_on_mixed_rows(apart, verdict):
    assert switching.mixed_claim(apart).verdict == verdict


@pytest.mark.parametrize(("update", "verdict"), [(3, "holds"), (30, "holds in part"), (80, "does not hold")])
def test_the_verdict_on_storage(update, verdict):
    """Of a base of 100: 3 copies are 300, the base and 3 updates 109, 190 and 340."""
    assert switching.storage_claim(3, 100, update).verdict == verdict
