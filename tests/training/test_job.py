"""What a job is known by: each setting that its bits depend on, told by its own name where a checkpoint has another."""

import json
from dataclasses import replace

import pytest
from hostile import hostile_texts, is_safe
from hypothesis import given
from hypothesis import strategies as st
from strategies import random_model, trained_adapter

import lora_np as ln
from lora_np.formats.adapters.task import Task
from lora_np.training.job import Job, differences, identity
from lora_np.training.loop import Settings
from lora_np.training.tasks import Data

CONFIG = ln.Config(16, 8, 1, 1, 4, 4)
MODEL = random_model(CONFIG, seed=0)
JOB = Job(Task("classify", ("a", "b"), 64), ln.LoRAConfig(), Settings(steps=60, lr=1e-3, warmup=20), every=20)
ABOUT = {"N": 16, "held_out": 0.1, "seed": 0, "data": "d" * 64, "dev": "e" * 64}


def about(job=JOB, model=MODEL, start=None, **data):
    return identity(model, Data(lambda step: {}, [], None, ABOUT | data), job, start)


def settings(**fields):
    return replace(JOB, settings=replace(JOB.settings, **fields))


def lora(**fields):
    return replace(JOB, lora=replace(JOB.lora, **fields))


def task(**fields):
    return replace(JOB, task=replace(JOB.task, **fields))


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"job": settings(steps=30)}, "steps: 60 -> 30"),
        ({"job": settings(lr=0.1)}, "lr: 0.001 -> 0.1"),
        ({"job": settings(clip=2.0)}, "clip: 1.0 -> 2.0"),
        ({"job": settings(shards=4)}, "shards: none -> 4"),
        ({"job": settings(warmup=10)}, "warmup: 20 -> 10"),
        ({"job": lora(r=4)}, "r: 8 -> 4"),
        ({"job": lora(targets=("q", "k"))}, "targets: q v -> q k"),
        ({"job": lora(rank_pattern={"q": 2})}, "q: none -> 2"),
        ({"job": task(longest=32)}, "window: 64 -> 32"),
        ({"job": task(labels=("a", "c"))}, "labels: a b -> a c"),
        ({"job": task(name="tag")}, "task: classify -> tag"),
        ({"job": replace(JOB, every=7)}, "every: 20 -> 7"),
        ({"N": 8}, "batch: 16 -> 8"),
        ({"data": "f" * 64}, "data: dddd ... ddd -> ffff ... fff"),
    ],
)
def test_what_differs_is_told_by_its_own_name(other, line):
    assert differences(about(), about()) == []
    assert differences(about(), about(**other)) == [line]


def test_all_that_differs_is_told_each_once():
    """The seed is the draws' and the data's, and said once."""
    found = differences(about(), about(settings(seed=5, lr=1.0), seed=5))
    assert sorted(found) == ["lr: 0.001 -> 1.0", "seed: 0 -> 5"]


def test_another_base_or_start_is_another_job():
    """With the same configuration: by the hash of what is in it."""
    one, other = (trained_adapter(MODEL, ln.LoRAConfig(r=2), seed=seed) for seed in (0, 1))
    pairs = [
        ("base", about(), about(model=random_model(CONFIG, seed=1))),
        ("start", about(), about(start=one)),
        ("start", about(start=one), about(start=other)),
    ]
    for name, found, due in pairs:
        (line,) = differences(found, due)
        assert line.startswith(f"{name}: ")
    assert differences(about(start=one), about(start=one)) == []


def test_memory_may_be_saved_on_the_way():
    assert differences(about(), about(settings(recompute=True))) == []


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 100))
def test_steps_may_grow_and_with_them_a_warm_up_that_they_cut(few, many, warmup):
    def with_steps(steps):
        return about(settings(steps=steps, warmup=min(warmup, steps)))

    names = [line.split(":")[0] for line in differences(with_steps(few), with_steps(many))]
    expected = [] if many >= few else ["steps", *(["warmup"] if warmup > many else [])]
    assert names == expected


def test_more_steps_excuse_no_other_warm_up():
    assert differences(about(), about(settings(steps=90, warmup=30))) == ["warmup: 20 -> 30"]


@given(hostile_texts(), st.one_of(st.integers(), st.none(), st.lists(st.integers(), max_size=2), hostile_texts()))
def test_what_a_hostile_checkpoint_says_is_shown_safely(name, value):
    for found in (
        json.loads(json.dumps(about())) | {"settings": value},
        json.loads(json.dumps(about())) | {"settings": {**about()["settings"], "steps": value, name: value}},
        json.loads(json.dumps(about())) | {"task": {name: {name: value}}},
    ):
        lines = differences(found, about(settings(steps=61)))
        assert all(is_safe(line) and len(line) < 4000 for line in lines)
