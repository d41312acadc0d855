"""The whole command in its quick form: every verdict is computed, and both files are written, or neither."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import lora_np as ln
from lora_np import cli
from lora_np.backend import asnumpy
from lora_np.reproduce import latency, run
from lora_np.reproduce import study as study_module
from lora_np.reproduce.page import WITHOUT
from lora_np.reproduce.rank import rank
from lora_np.reproduce.study import FULL, QV, Setting, adapter_of, train_all
from lora_np.reproduce.switching import unicode_names
from lora_np.training.loop import evaluate
from lora_np.training.text import ByteTokenizer

STUDY = ["rank-embedded", "subspaces-embedded", "amplification-embedded"]
SECTIONS = ["counts", "cost", *STUDY, "latency", "switching", "orthogonality"]


def command(capsys, *argv):
    capsys.readouterr()
    status = cli.main(["reproduce", *map(str, argv)])
    return status, *capsys.readouterr()


def on_a_still_clock(functions, *, rounds):
    """Each is called, and takes a second: what others do on the machine must decide nothing here."""
    return {name: [1.0] * rounds for name, function in functions.items() if function() is not None}


def test_the_quick_form_checks_every_claim_and_writes_both_files(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures are tested apart
    monkeypatch.setattr(run, "standard_library", unicode_names)  # which so small a base learns in so few steps
    monkeypatch.setattr(latency, "in_turn", on_a_still_clock)
    status, out, _ = command(capsys, "--quick", "--out", tmp_path / "report")
    assert status == 0
    result = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [section["id"] for section in result["sections"]] == SECTIONS
    claims = [claim for section in result["sections"] for claim in section["claims"]]
    unchecked = [claim["claim"] for claim in claims if claim["verdict"] == "not checked"]
    assert unchecked == ([] if ln.backend_name == "numpy" else [c["claim"] for c in claims if "GPU" in c["figure"]])
    assert WITHOUT in out
    html = (tmp_path / "report" / "index.html").read_text()
    assert "pip install matplotlib (the extra plot)" in html
    for claim in claims:
        assert claim["verdict"].upper() in out
        assert claim["claim"] in out
        assert claim["figure"] in out
    status, _, err = command(capsys, "--quick", "--out", tmp_path / "report")
    assert status == 2
    assert "exists already" in err


@pytest.mark.parametrize(
    "more", [["--full"], ["--full", "--base", "b"], ["--base", "b", "--data", "d"], ["--data", "d"]]
)
def test_half_a_real_base_is_refused_before_any_work(capsys, tmp_path, more):
    status, out, err = command(capsys, *more, "--out", tmp_path / "report")
    assert (status, out) == (2, "")
    assert err == "lora-np: --full, --base and --data: expected all three, or none of them\n"
    assert not (tmp_path / "report").exists()


TEXTS = "".join(f"{'good and fine' if i % 2 else 'bad and dull'} {i}\t{i % 2}\n" for i in range(64))


@pytest.fixture
def labelled(tmp_path):
    """A small base of bytes on texts with labels."""
    config = ln.Config(256, 32, n_layer=1, n_head=2, d_model=16, d_ff=16)
    ln.save_model(tmp_path / "base", ln.Model(config, ln.init_weights(config, seed=0)))
    (tmp_path / "data").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "data" / name).write_text(TEXTS)
    return run.labelled_study(tmp_path / "base", tmp_path / "data", lambda path, config: ByteTokenizer())


def test_a_real_base_learns_labels_with_a_classifier_of_its_own(labelled):
    """An epoch of 2 steps; the classifier is trained too, and the table of accuracies is there."""
    study = replace(labelled, settings=replace(labelled.settings, steps=4, lr=0.05, warmup=0))
    trainings = train_all(study, run.for_rank((1, 2), (0,)), lambda _: None)
    assert labelled.settings.steps == 2
    adapter = adapter_of(trainings[Setting(QV, 8, 0)])
    assert "head.weight" in adapter.whole
    section = rank(study, trainings, (1, 2), evaluate(study.model, None, study.held_out))
    assert section.id == "rank-real"
    assert [table.caption for table in section.tables][-1].startswith("Accuracy")
    assert "accuracy" in section.about


def test_a_setting_is_trained_once_and_by_its_seed_alone(labelled):
    steps = []
    wanted = [Setting(QV, 2, 0), Setting(QV, 2, 1), Setting(QV, 2, 0), Setting(FULL, 0, 0)]
    trainings = train_all(labelled, wanted, lambda progress: steps.append((progress.step, progress.steps)))
    assert steps == [(i, 6) for i in range(1, 7)]
    assert trainings[Setting(FULL, 0, 0)].adapter is None
    again = train_all(labelled, [Setting(QV, 2, 0)], lambda _: None)[Setting(QV, 2, 0)]
    one, other = (trainings[Setting(QV, 2, seed)] for seed in (0, 1))
    assert again.score == one.score != other.score
    with pytest.raises(ValueError, match="expected a trained adapter"):
        adapter_of(trainings[Setting(FULL, 0, 0)])


def test_a_seed_is_of_as_start_of_the_batches_and_of_dropout(labelled, monkeypatch):
    """After one step A is still what it started as: its gradient is zero where B is."""
    seeds, settings = [], []
    study = replace(
        labelled, settings=replace(labelled.settings, steps=1, warmup=0),
        batch=lambda step, seed: seeds.append(seed) or labelled.batch(step, seed),
    )  # fmt: skip
    real = study_module.train
    monkeypatch.setattr(study_module, "train", lambda *a, **k: settings.append(a[3]) or real(*a, **k))
    adapter = adapter_of(train_all(study, [Setting(QV, 2, 7)], lambda _: None)[Setting(QV, 2, 7)])
    assert (seeds, [s.seed for s in settings]) == ([7], [7])
    expected = ln.init_adapter(study.model, adapter.config, seed=7)
    assert all((asnumpy(adapter.params[n]) == asnumpy(p)).all() for n, p in expected.params.items() if n.endswith(".A"))


def test_the_embedded_bases_held_out_text_is_never_trained_on():
    base = ln.Model(config := run.QUICK.base.config, ln.init_weights(config, seed=0))
    study = run.text_study(run.QUICK, base, "a text", "x" * 900 + "y" * 100)
    assert all((study.batch(step, 0)["tokens"] == ord("x")).all() for step in range(50))
    assert np.unique(np.concatenate([b["tokens"] for b in study.held_out])).tolist() == [ord("y")]
