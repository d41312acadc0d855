"""From a file to an adapter: each task learns what is there to learn, and what is held out is not learned from."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hostile import contents

import lora_np as ln
from lora_np.backend import asnumpy
from lora_np.formats.adapters.task import Task, load_task, save_task
from lora_np.formats.files.lock import LOCK
from lora_np.training import finetune, tasks
from lora_np.training.job import Job
from lora_np.training.loop import Settings, TrainingError, evaluate, train
from lora_np.training.text import ByteTokenizer

SMALL = {"n_positions": 24, "n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 32}
RNG = np.random.default_rng(0)


def word(letters):
    return "".join(RNG.choice(list(letters), 4))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Texts of the letters abc and xyz; the letters say the label, the tag, and what follows."""
    folder = tmp_path_factory.mktemp("files")
    kinds = {"low": "abc", "high": "xyz"}
    labelled = [(word(kinds[k]), k) for k in RNG.choice(list(kinds), 120)]
    (folder / "classify").write_text("".join(f"{text} {text}\t{label}\n" for text, label in labelled))
    (folder / "tag").write_text(
        "".join(f"{text} _ {label}\n" + "\n" * (i % 3 == 2) for i, (text, label) in enumerate(labelled))
    )
    (folder / "lm").write_text("".join(f"{text}||{label[0]}\n" for text, label in labelled))
    return folder


def learn(
    files, name, out, *, steps=60, resume=False, report=lambda seen: None, dev=None, lr=3e-2, start=None,
    note=lambda line: None, fields=None, **settings,
):  # fmt: skip
    task = tasks.task_of(name, files / name, 24)
    fields = {"causal": name != "tag"} | (fields or {}) | ({} if name == "lm" else {"n_labels": len(task.labels)})
    config = ln.Config(256, **SMALL, head=name, **fields)
    weights = ln.init_weights(config, seed=0)
    weights["embed.tokens"] *= 20  # letters that lie apart, as in a model that has learned to read
    model = ln.Model(config, weights)
    data = tasks.learn_from(files / name, dev, task, ByteTokenizer(), N=16, held_out=0.2, seed=0)
    targets = ("q", "v", "up", "down", *(["embed", "head"] if name == "lm" else []))
    lora = ln.LoRAConfig(r=4, targets=targets, train_head=name != "lm")
    job = Job(task, lora, Settings(steps=steps, lr=lr, **settings), every=20)
    done = finetune.finetune(model, data, out, job, resume=resume, report=report, start=start, note=note)
    return model, data, done


@pytest.mark.parametrize("name", ["classify", "tag", "lm"])
def test_each_task_learns_what_its_file_has_to_teach(files, tmp_path, name):
    """The labels follow from the letters: what is held out is right in the end, about half of it at the start."""
    model, data, done = learn(files, name, tmp_path / "out")
    assert list(done.curve) == [0, 20, 40, 60]
    assert done.curve[0].accuracy < 0.8
    assert done.curve[60].accuracy > 0.95
    assert done.curve[60].loss < 0.3 * done.curve[0].loss
    assert load_task(tmp_path / "out") == tasks.task_of(name, files / name, 24)
    again = ln.load_adapter(tmp_path / "out", model)
    assert evaluate(model, again, data.held_out) == done.curve[60]


ENCODERS = {
    "BERT": {"norm_first": False, "n_types": 2},
    "DistilBERT": {"norm_first": False, "pooler": "relu", "pooler_in_head": True},
    "DeBERTa": {
        "norm_first": False, "positions": "none", "disentangled": True, "score_buckets": 8, "score_distance": 16,
        "pooler": "gelu", "pooler_in_head": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", ["classify", "tag"])
def test_an_encoder_learns_labels_through_its_own_head(files, tmp_path, name, encoder):
    """Whatever its pooler's activation, its positions and its scores; a trained pooler comes back with its head."""
    fields = {"causal": False, **ENCODERS[encoder]}
    model, data, done = learn(files, name, tmp_path / "out", steps=40, fields=fields)
    assert done.curve[40].accuracy > 0.95
    assert ("pooler.weight" in done.adapter.params) == (name == "classify" and fields.get("pooler_in_head", False))
    again = ln.load_adapter(tmp_path / "out", model)
    assert again.params.keys() == done.adapter.params.keys()
    assert evaluate(model, again, data.held_out) == done.curve[40]


def test_stopped_and_resumed_it_ends_in_the_same_bits(files, tmp_path):
    with pytest.raises(Stopped):
        learn(files, "classify", tmp_path / "stopped", report=at(43))
    assert not (tmp_path / "stopped" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match=r"of another job \(the checkpoint's -> this one's\): seed: 0 -> 5$"):
        learn(files, "classify", tmp_path / "stopped", resume=True, seed=5)
    _, _, resumed = learn(files, "classify", tmp_path / "stopped", resume=True, recompute=True)  # on less memory
    _, _, straight = learn(files, "classify", tmp_path / "straight")
    assert resumed.curve == straight.curve
    for key, p in straight.adapter.params.items():
        assert asnumpy(resumed.adapter.params[key]).tobytes() == asnumpy(p).tobytes()


class Stopped(Exception):
    pass


def at(step, error=Stopped):
    """A report that stops a run."""

    def stop(seen):
        if seen.step == step:
            raise error

    return stop


def stopped(files, out, **more):
    """A folder whose run was stopped after its first checkpoint, at step 20. -> the checkpoint"""
    with pytest.raises(Stopped):
        learn(files, "lm", out, report=at(21), **more)
    return out / "checkpoint.npz"


def same_params(one, other):
    return one.keys() == other.keys() and all(asnumpy(one[k]).tobytes() == asnumpy(other[k]).tobytes() for k in one)


# --- On from an adapter, and on for longer ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["classify", "lm"])
def test_training_goes_on_from_an_adapter_with_a_fresh_optimizer(files, tmp_path, name):
    """As `train` does from that adapter; and the curve begins with what it is worth."""
    model, data, first = learn(files, name, tmp_path / "first", steps=20)
    before = contents(tmp_path / "first")
    start = ln.load_adapter(tmp_path / "first", model)
    _, _, done = learn(files, name, tmp_path / "on", steps=30, start=start)
    expected = train(model, start, data.batch, Settings(steps=30, lr=3e-2)).params
    assert same_params(done.adapter.params, expected)
    assert done.curve[0] == first.curve[20]
    assert done.adapter.config == first.adapter.config
    assert contents(tmp_path / "first") == before


def test_a_run_from_an_adapter_goes_on_from_that_adapter_alone(files, tmp_path):
    _, _, one = learn(files, "lm", tmp_path / "one", steps=2)
    _, _, other = learn(files, "lm", tmp_path / "other", steps=3)
    stopped(files, tmp_path / "out", start=one.adapter)
    for start in (other.adapter, None):
        with pytest.raises(ValueError, match=r"checkpoint\.npz: of another job .*\): start: \w{4} \.\.\. \w{3} -> \w+"):
            learn(files, "lm", tmp_path / "out", resume=True, start=start)
    _, _, resumed = learn(files, "lm", tmp_path / "out", resume=True, start=one.adapter)
    _, _, straight = learn(files, "lm", tmp_path / "straight", start=one.adapter)
    assert same_params(resumed.adapter.params, straight.adapter.params)


def test_an_adapter_of_another_configuration_is_no_start(files, tmp_path):
    _, _, done = learn(files, "lm", tmp_path / "one", steps=1)
    start = ln.Adapter(replace(done.adapter.config, alpha=3), done.adapter.params)
    with pytest.raises(ValueError, match=r"start: expected an adapter of job\.lora, .*alpha=16.* got one of .*alpha=3"):
        learn(files, "lm", tmp_path / "out", start=start)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [60, 90])
def test_steps_may_grow_and_the_rate_is_then_the_longer_schedule_s(files, tmp_path, steps):
    """Of 60 steps 20 by their own schedule, and what is left by that of `steps`."""
    notes = []
    stopped(files, tmp_path / "out")
    model, data, done = learn(files, "lm", tmp_path / "out", resume=True, steps=steps, note=notes.append)
    adapter = ln.init_adapter(model, done.adapter.config, seed=0)
    states = {}
    train(
        model, adapter, data.batch, Settings(steps=60, lr=3e-2),
        report=lambda seen: states.update({seen.step: seen.state}),
    )  # fmt: skip
    expected = train(model, adapter, data.batch, Settings(steps=steps, lr=3e-2), state=states[20])
    assert same_params(done.adapter.params, expected.params)
    assert list(done.curve) == [0, 20, 40, 60] + ([80, 90] if steps == 90 else [])
    more = "" if steps == 60 else f" of 60; the learning rate is the one for {steps} steps from here"
    assert notes == [f"{tmp_path / 'out'}: goes on from its checkpoint, of step 20{more}"]


def test_steps_may_not_shrink(files, tmp_path):
    stopped(files, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"of another job \(the checkpoint's -> this one's\): steps: 60 -> 50$"):
        learn(files, "lm", tmp_path / "out", resume=True, steps=50)
    assert contents(tmp_path / "out") == before


# --- What a run that is stopped says ---------------------------------------------------------------------------------


def test_an_interrupted_run_says_of_which_step_its_checkpoint_is_and_how_to_go_on(files, tmp_path):
    def interrupted(step, **more):
        with pytest.raises(KeyboardInterrupt) as caught:
            learn(files, "lm", tmp_path / "out", report=at(step, KeyboardInterrupt), **more)
        return str(caught.value)

    none_yet = "there is no checkpoint yet, as the first is of step 20: the same line starts anew"
    assert interrupted(13) == f"interrupted at step 13; {none_yet}"
    assert not (tmp_path / "out").exists()
    go_on = "go on with the same line and --resume"
    assert interrupted(37) == f"interrupted at step 37; the checkpoint is of step 20: {go_on}"
    assert interrupted(39, resume=True) == f"interrupted at step 39; the checkpoint is of step 20: {go_on}"
    assert interrupted(40, resume=True) == f"interrupted at step 40; the checkpoint is of step 40: {go_on}"


def test_a_run_that_is_interrupted_right_after_a_checkpoint_was_written_knows_of_it(files, tmp_path, monkeypatch):
    save = finetune.save_checkpoint

    def saving(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "save_checkpoint", saving)
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 20; the checkpoint is of step 20: go on"):
        learn(files, "lm", tmp_path / "out")


def test_a_run_that_diverges_says_which_checkpoint_is_left(files, tmp_path):
    error = TrainingError("step 33: too high")
    with pytest.raises(TrainingError) as caught:
        learn(files, "lm", tmp_path / "out", report=at(33, error))
    assert str(caught.value) == (
        f"step 33: too high; {tmp_path / 'out'} keeps the checkpoint of step 20, from which the same line would end "
        "here again: take a lower --lr, and another --out"
    )
    with pytest.raises(TrainingError, match=r"^step 3: too high$"):
        learn(files, "lm", tmp_path / "early", report=at(3, TrainingError("step 3: too high")))


# --- Checkpoints that are damaged ------------------------------------------------------------------------------------


def rewrite(path, *, header=lambda text: text, arrays=None):
    """A checkpoint with another header, as text, or other arrays."""
    with np.load(path) as file:
        found = dict(file)
    text = header(found.pop("header").tobytes().decode())
    np.savez(path, header=np.frombuffer(text.encode(), np.uint8), **{**found, **(arrays or {})})


@pytest.mark.parametrize(
    ("step", "curve", "key"),
    [
        (20, '"curve": [[0, 1.0, 0.5], [20, 1e999, 0.5]]', "curve"),
        (20, '"curve": [[0, 1.0, 0.5], [1%s, 1, 1]]' % (400 * "0"), "curve"),
        (10**400, '"curve": [[0, 1.0, 0.5], [20, 1.0, 0.5]]', "step"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_checkpoint_with_numbers_that_no_float_holds_is_refused(files, tmp_path, step, curve, key):
    path = stopped(files, tmp_path / "out")

    def header(text):
        found = json.loads(text)
        del found["about"]["curve"]
        return f'{{"format": 1, "step": {step}, "about": {json.dumps(found["about"])[:-1]}, {curve}}}}}'

    rewrite(path, header=header)
    with pytest.raises(ValueError, match=rf"checkpoint\.npz: header: not valid JSON: '{key}'"):
        learn(files, "lm", tmp_path / "out", resume=True)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", ["param", "m", "v"])
def test_a_checkpoint_with_numbers_that_are_none_is_refused(files, tmp_path, group, value):
    path = stopped(files, tmp_path / "out")
    name = f"{group}/layers.1.attn.q.B"
    with np.load(path) as file:
        array = file[name]
    array[1, 1] = value
    rewrite(path, arrays={name: array})
    with pytest.raises(ValueError, match=rf"checkpoint\.npz: {name}: holds NaN or infinite"):
        learn(files, "lm", tmp_path / "out", resume=True)


def test_a_checkpoint_with_a_negative_second_moment_is_refused(files, tmp_path):
    path = stopped(files, tmp_path / "out")
    name = "v/layers.1.attn.q.B"
    with np.load(path) as file:
        array = file[name]
    array[1, 1] = -2.5
    rewrite(path, arrays={name: array})
    with pytest.raises(ValueError, match=rf"checkpoint\.npz: {name}: expected at least 0, got -2\.5$"):
        learn(files, "lm", tmp_path / "out", resume=True)


def test_a_finished_folder_says_so_and_stays_as_it_is(files, tmp_path):
    """A kill after the checkpoint is gone, the last step, leaves the lock behind."""
    learn(files, "lm", tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / LOCK).touch()
    on = f"; to go on from its adapter: finetune --adapter {tmp_path / 'out'} --out OTHER$"
    for resume, what in (
        (True, "training is finished: there is no checkpoint to go on from"),
        (False, "the folder is not empty; name another"),
    ):
        with pytest.raises(FileExistsError, match=f"out: {what}{on}"):
            learn(files, "lm", tmp_path / "out", resume=resume)
        with pytest.raises(FileExistsError, match=f"out: {what}{on}"):
            finetune.check_out(tmp_path / "out", resume=resume)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "adapter_config.json").unlink()
    with pytest.raises(FileExistsError, match="out: the folder is not empty; name another"):
        learn(files, "lm", tmp_path / "out", resume=True)


def test_training_that_diverges_leaves_no_adapter(files, tmp_path):
    with np.errstate(all="ignore"), pytest.raises(TrainingError, match="too high"):
        learn(files, "lm", tmp_path / "out", lr=1e38)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


# --- task.json -------------------------------------------------------------------------------------------------------


def test_a_task_survives_its_file(tmp_path):
    task = Task("tag", ("O", "B-ÄÖ"), 100)
    assert load_task(tmp_path) is None
    save_task(tmp_path, task)
    assert load_task(tmp_path) == task
    assert [path.name for path in tmp_path.iterdir()] == ["task.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "sort"}, "Task.name: expected lm, translate, classify or tag, got 'sort'"),
        ({"labels": ["a", "a"]}, r"Task.labels: expected two different names at least, got \('a', 'a'\)"),
        ({"labels": []}, r"Task.labels: expected two different names at least, got \(\)"),
        ({"longest": 0}, "Task.longest: expected at least 1, got 0"),
        ({"labels": "ab"}, "Task.labels: a value of the wrong type: 'ab'"),
        ({"more": 1}, "Task has no field 'more'"),
        ({"name": 3}, "Task.name: a value of the wrong type: 3"),
    ],
)
def test_a_wrong_task_file_is_refused(tmp_path, change, message):
    good = {"name": "classify", "labels": ["a", "b"], "longest": 64}
    (tmp_path / "task.json").write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match=rf"task\.json: {message}$") as caught:
        load_task(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_task_file_without_a_name_is_refused(tmp_path):
    (tmp_path / "task.json").write_text('{"labels": ["a", "b"]}')
    with pytest.raises(ValueError, match=r"task\.json: Task\.name is missing$"):
        load_task(tmp_path)
