"""The whole command in its quick form: every verdict is computed, and a run that is stopped goes on where it was."""

import json
import platform
import re
import shutil
import sys
from dataclasses import replace
from datetime import date

import numpy as np
import pytest

import lora_np as ln
from lora_np import cli
from lora_np.backend import asnumpy, xp
from lora_np.reproduce import latency, report, run
from lora_np.reproduce import study as study_module
from lora_np.reproduce.kept import Done, Kept
from lora_np.reproduce.page import QUICK_FORM, WITHOUT, page
from lora_np.reproduce.rank import rank
from lora_np.reproduce.study import FULL, QV, Setting, adapter_of, train_all
from lora_np.reproduce.switching import unicode_names
from lora_np.training.loop import Score, evaluate
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


def stopped(*_):
    raise KeyboardInterrupt


def done(out):
    """The sections on the page, and whether it is whole."""
    page = (out / "index.html").read_text()
    return re.findall(r'<h2 id="([^"]+)">', page), page.endswith("</html>\n")


def test_a_run_that_is_stopped_goes_on_and_what_is_done_is_done_once(capsys, tmp_path, monkeypatch):
    """Stopped within the trainings, and after them; then to the end, and once more."""
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures are tested apart
    monkeypatch.setattr(run, "standard_library", unicode_names)  # which so small a base learns in so few steps
    monkeypatch.setattr(latency, "in_turn", on_a_still_clock)
    out = tmp_path / "report"
    wanted = len(set(run.wanted(run.QUICK)))
    trained, real = [], study_module._train

    def train_some(study, setting, report):
        if len(trained) == 5:
            stopped()
        trained.append(setting)
        return real(study, setting, report)

    monkeypatch.setattr(study_module, "_train", train_some)
    status, text, err = command(capsys, "--quick", "--out", out)
    assert (status, text, len(trained)) == (130, "", 5)
    assert done(out) == (SECTIONS[:2], True)
    assert "2 of 8 sections are done; the same command goes on from there" in err
    first = {path.name: path.read_bytes() for path in out.glob("parts/*/*.json")}

    trained += [None]  # so that it does not stop there again
    monkeypatch.setattr(run, "latency", stopped)
    status, _, err = command(capsys, "--quick", "--out", out)
    assert (status, len(trained) - 1) == (130, wanted + len(run.OTHER_TEXTS))
    assert done(out) == (SECTIONS[:5], True)
    assert "2 of 8 sections are there" in err
    assert "6 sections to measure, about" in err
    assert "Still to be measured" in (out / "index.html").read_text()
    assert {path.name: path.read_bytes() for path in out.glob("parts/*/*.json") if path.name in first} == first

    monkeypatch.setattr(run, "latency", latency.latency)
    monkeypatch.setattr(study_module, "_train", lambda *_: pytest.fail("it is trained already"))
    status, text, _ = command(capsys, "--quick", "--out", out)
    assert status == 0
    assert done(out) == (SECTIONS, True)
    assert not list(out.glob("parts/*/trainings"))
    check_the_report(out, text)

    monkeypatch.setattr(run, "parts", unmade(run.parts))
    before = (out / "index.html").read_bytes(), (out / "results.json").read_bytes()
    assert command(capsys, "--quick", "--out", out)[:2] == (0, text)
    assert ((out / "index.html").read_bytes(), (out / "results.json").read_bytes()) == before


def unmade(parts):
    """The sections to be, none of which may be made."""
    return lambda *args: [part._replace(make=lambda: pytest.fail("it is there already")) for part in parts(*args)]


def check_the_report(out, text):
    """Every claim has a verdict, in both files and on the console, and in the quick form only what is exact decides."""
    result = json.loads((out / "results.json").read_text())
    assert [section["id"] for section in result["sections"]] == SECTIONS
    claims = [claim for section in result["sections"] for claim in section["claims"]]
    assert {claim["verdict"] for claim in claims if not claim["exact"]} == {"not decided"}
    assert {claim["verdict"] for claim in claims if claim["exact"]} <= {"holds", "holds in part"}
    assert sum(claim["exact"] for claim in claims) == 6
    html = (out / "index.html").read_text()
    tables = [table for section in result["sections"] for table in section["tables"]]
    assert all(table["caption"].startswith("Quick form. ") for table in tables)
    assert html.count("<p>Quick form. ") == len(tables) > 8
    words = re.sub(r"<(style|code|dl)>.*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL)
    assert not re.findall(r"[`$^\\]|\b[A-Za-z]_[A-Za-z]\b|\de[+-]\d|->", words)  # marks that are not set
    assert QUICK_FORM in text
    assert WITHOUT in text
    assert "pip install matplotlib (the extra plot)" in html
    for claim in claims:
        assert claim["verdict"].upper() in text
        assert claim["claim"] in text
        assert claim["figure"] in text
    for fact in (ln.__version__, np.__version__, platform.python_version(), date.today().isoformat(), "quick"):
        assert fact in result["environment"].values()
        assert f"<dd>{fact}</dd>" in html


def test_a_folder_that_holds_no_report_is_refused_before_any_work(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "parts", lambda *_: pytest.fail("it works for nothing"))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    status, out, err = command(capsys, "--quick", "--out", tmp_path / "there")
    assert (status, out) == (2, "")
    assert err == (f"lora-np: {tmp_path / 'there'}: exists already, and holds no report to go on with; "
                   "it is not written over\n")  # fmt: skip
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]


def test_without_a_folder_it_is_called_report(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "parts", lambda *_: [run.Part("counts", "Counts", 1, run.counts)])
    assert command(capsys, "--quick")[0] == 0
    names = ["index.html", "parts", "results.json"]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == names
    shutil.rmtree(tmp_path / "report" / "parts")  # as in a repository, which keeps the pages alone
    assert command(capsys, "--quick")[0] == 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == names
    (tmp_path / "report" / "results.json").write_text('{"mine": 1}')
    shutil.rmtree(tmp_path / "report" / "parts")
    assert command(capsys, "--quick")[0] == 2


@pytest.mark.parametrize("plan", [run.QUICK, run.STANDARD, run.FULL], ids=lambda plan: plan.name)
def test_each_section_but_those_of_a_real_base_says_how_long_it_takes(tmp_path, plan, labelled):
    """So many are made as are said to be; those of a base and data of one's own depend on these."""
    parts = run.parts(plan, lambda _: None, Kept(tmp_path, "key"), labelled)
    assert [part.id for part in parts if part.seconds is None] == ["rank-real", "subspaces-real", "amplification-real"]
    assert [part.id for part in parts if part.id in SECTIONS] == SECTIONS


def test_another_version_another_plan_and_other_data_have_other_keys(monkeypatch):
    keys = [report.key(run.QUICK), report.key(run.STANDARD), report.key(replace(run.QUICK, rounds=2)),
            report.key(run.QUICK, ["a", "b"])]  # fmt: skip
    monkeypatch.setattr(report, "__version__", "another")
    keys.append(report.key(run.QUICK))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert report.key(run.QUICK) == keys[0] == report.key(replace(run.QUICK, seconds={}))


def test_other_lines_of_data_have_another_hash(tmp_path):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("a\t0\n")
    hashes = [run.data_hash(tmp_path)]
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("b\t0\n")
        hashes.append(run.data_hash(tmp_path))
    assert len(set(hashes)) == 3


def test_another_source_has_another_key_but_how_the_page_looks_is_no_part_of_it(tmp_path, monkeypatch):
    shutil.copytree(report.PACKAGE, tmp_path / "lora_np", ignore=shutil.ignore_patterns("__pycache__", "html"))
    key = report.key(run.QUICK)
    monkeypatch.setattr(report, "PACKAGE", tmp_path / "lora_np")
    assert report.key(run.QUICK) == key
    with (tmp_path / "lora_np" / "reproduce" / "page.py").open("a") as file:
        file.write("# other\n")
    assert report.key(run.QUICK) == key
    with (tmp_path / "lora_np" / "lora.py").open("a") as file:
        file.write("# other\n")
    assert report.key(run.QUICK) != key


def test_a_section_comes_back_as_it_was_kept(tmp_path):
    section = run.counts()
    kept = Kept(tmp_path, "key")
    assert kept.section("counts") is None
    kept.keep_section(Done(section, 1.5, "2026-01-31"))
    back = Kept(tmp_path, "key").section("counts")
    assert (back.seconds, back.day) == (1.5, "2026-01-31")
    assert page([back.section], {}, pictures=False) == page([section], {}, pictures=False)
    assert Kept(tmp_path, "other").section("counts") is None
    path = tmp_path / "parts" / "key" / "counts.json"
    for wrong in (path.read_text().replace('"title"', '"titel"'), path.read_text().replace('"holds"', '"is so"'), "{"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")):
            kept.section("counts")


def test_a_training_comes_back_as_it_was_kept(tmp_path):
    kept = Kept(tmp_path, "key")
    params = {"layers.0.attn.q.A": xp.asarray(np.arange(6, dtype="float32").reshape(2, 3))}
    assert kept.training("one") is None
    kept.keep_training("one", params, Score(1.25, 0.1))
    kept.keep_training("all", {}, Score(2.0, 0.0))
    back, score = kept.training("one")
    assert score == Score(1.25, 0.1)
    assert {name: asnumpy(p).tobytes() for name, p in back.items()} == {
        name: asnumpy(p).tobytes() for name, p in params.items()
    }
    assert kept.training("all") == ({}, Score(2.0, 0.0))
    kept.discard_trainings()
    assert kept.training("one") is None
    kept.discard_trainings()


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
