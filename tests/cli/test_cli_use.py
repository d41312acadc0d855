"""The command line where a model is used: what is named is looked at first, and what cannot be used says what can."""

import io
import json
import os
import re
import sys

import numpy as np
import pytest
from commands import one_line, run
from strategies import random_model

import lora_np as ln
from lora_np import cli
from lora_np.cli import use
from lora_np.formats.adapters.base import load_base_for
from lora_np.formats.adapters.head import task_for
from lora_np.formats.adapters.task import Task
from lora_np.formats.adapters.unfinished import CHECKPOINT
from lora_np.formats.models.labels import named_labels
from lora_np.training import finetune

CONFIG = ln.Config(256, 32, n_layer=1, n_head=2, d_model=8, d_ff=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a base of bytes and a text."""
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    folder = tmp_path_factory.mktemp("home")
    ln.save_model(folder / "base", ln.Model(CONFIG, ln.init_weights(CONFIG, seed=0)))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 20)
    return folder


# --- What is named ---------------------------------------------------------------------------------------------------


READERS = [
    ["finetune", "--out", "OUT", "--data", "PATH"],
    ["finetune", "--out", "OUT", "--task", "classify", "--data", "PATH"],
    ["finetune", "--out", "OUT", "--data", "TEXT", "--dev", "PATH"],
    ["finetune", "--out", "OUT", "--data", "TEXT", "--chat-template", "PATH"],
    ["eval", "--data", "PATH"],
    ["eval", "--data", "PATH", "--task", "tag"],
    ["predict", "--data", "PATH"],
    ["generate", "--prompts", "PATH"],
]  # fmt: skip


@pytest.fixture
def no_base(monkeypatch, tmp_path):
    """Nothing is in the cache, and making the embedded base takes too long to be done for nothing."""
    monkeypatch.setenv("LORA_NP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lora_np.training.embedded.train_on_text", lambda *_: pytest.fail("the base was made"))


@pytest.mark.parametrize("argv", READERS, ids=" ".join)
@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("folder", "expected a file, got a folder"),
        ("nothing", "no such file"),
        pytest.param(
            "pipe", "no regular file", marks=pytest.mark.skipif(os.name != "posix", reason="pipes with names are POSIX")
        ),
    ],
)
def test_what_is_no_file_is_said_before_any_work(home, tmp_path, capsys, no_base, argv, made, said):
    path = tmp_path / "path"
    if made == "folder":
        path.mkdir()
    elif made == "pipe":
        os.mkfifo(path)
    names = {"PATH": path, "TEXT": home / "text.txt", "OUT": tmp_path / "out"}
    assert f"{path}: {said}" in one_line(capsys, *(names.get(arg, arg) for arg in argv))
    assert not (tmp_path / "out").exists()


# --- Training that is not finished -----------------------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """Whoever watched has seen enough."""


@pytest.fixture(scope="module")
def unfinished(home):
    """The folder of a training of 20 steps that was stopped when its checkpoint after 5 was written."""

    def save(*args):
        saved(*args)
        raise Stopped

    saved, out = finetune.save_checkpoint, home / "unfinished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "save_checkpoint", save)
        argv = ["finetune", "--base", home / "base", "--data", home / "text.txt", "--out", out]
        more = ["--window", "8", "--batch", "2", "--r", "2", "--every", "5", "--steps", "20"]
        assert cli.main([*map(str, argv), *more]) == 130
    assert os.listdir(out) == [CHECKPOINT]
    return out


TAKERS = [
    ["inspect", "ADAPTER"],
    ["inspect", "ADAPTER", "ADAPTER"],
    ["generate", "--adapter", "ADAPTER", "--prompt", "x"],
    ["eval", "--adapter", "ADAPTER", "--data", "TEXT"],
    ["predict", "--adapter", "ADAPTER", "--data", "TEXT"],
    ["merge", "--adapter", "ADAPTER", "--out", "OUT"],
    ["convert", "--adapter", "ADAPTER", "--out", "OUT.npz"],
    ["combine", "--adapter", "ADAPTER", "--adapter", "ADAPTER", "--out", "OUT"],
    ["verify", "--base", "BASE", "--adapter", "ADAPTER"],
    ["verify", "--base", "BASE", "--adapter", "ADAPTER", "--merged", "BASE"],
]  # fmt: skip


@pytest.mark.parametrize("argv", TAKERS, ids=" ".join)
def test_an_adapter_that_is_still_trained_is_refused_with_its_step_and_how_to_go_on(
    home, unfinished, tmp_path, capsys, no_base, argv
):
    names = {"ADAPTER": unfinished, "TEXT": home / "text.txt", "BASE": home / "base", "OUT": tmp_path / "out"}
    line = one_line(capsys, *(names.get(arg, arg) for arg in argv))
    expected = "training is not finished: its checkpoint is at step 5 of 20; the same lora-np finetune with --resume"
    assert line.startswith(f"lora-np: {unfinished}: {expected}")
    assert "--base" not in line


@pytest.mark.parametrize("argv", TAKERS, ids=" ".join)
def test_a_model_in_an_adapters_place_is_named(home, tmp_path, capsys, no_base, argv):
    names = {"ADAPTER": home / "base", "TEXT": home / "text.txt", "BASE": home / "base", "OUT": tmp_path / "out"}
    line = one_line(capsys, *(names.get(arg, arg) for arg in argv))
    assert line.startswith(
        f"lora-np: {home / 'base'}: expected an adapter's folder, with adapter_config.json, got a mod"
    )


# --- Labels and tags -------------------------------------------------------------------------------------------------


def give(monkeypatch, text):
    """What standard input has."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def learn(home, task, data, out):
    """An adapter on the home's base for a task, of which it may know nothing."""
    (home / data.split("\n")[0].replace("\t", " ")).write_text(data)
    argv = ["finetune", "--base", home / "base", "--data", home / data.split("\n")[0].replace("\t", " "), "--out", out]
    more = ["--dev", argv[4], "--task", task, "--r", "2", "--steps", "2", "--batch", "2", "--window", "12"]
    assert cli.main([*map(str, argv), *map(str, more)]) == 0
    return out


@pytest.fixture(scope="module")
def classifier(home):
    return learn(home, "classify", "so dull\tbad\na joy\tgood\n", home / "classifier")


@pytest.fixture(scope="module")
def tagger(home):
    return learn(home, "tag", "Anna\tPER\nruns\tO\n\nRome\tLOC\n", home / "tagger")


def probabilities(base, adapter, text):
    """Softmax of the logits of a text's bytes."""
    model = load_base_for(adapter, base)
    e = np.exp(ln.asnumpy(ln.forward(model, [list(text.encode())], ln.load_adapter(adapter, model))).astype(float)[0])
    return e / e.sum(axis=-1, keepdims=True)


def test_a_line_is_a_text_and_has_its_label_with_the_probability(home, classifier, capsys, monkeypatch):
    """Empty lines stay empty; what stands behind a tab is left out; a text longer than in training is cut, and said."""
    argv = ["predict", "--base", home / "base", "--adapter", classifier]
    give(monkeypatch, "so dull\n\na\x1b joy\tgood\nmore than twelve bytes")
    status, out, err = run(capsys, *argv)
    assert status == 0
    assert err.splitlines() == [
        "standard input: 3 texts; 1 longer than 12 tokens cut; 1 with a tab: what is behind it, a label, is left out; "
        "1 empty, which stay so"
    ]
    texts, tokens = ["so dull", "", "a\x1b joy", "more than twelve bytes"], ["so dull", "", "a\x1b joy", "more than ts"]
    names = ("bad", "good")
    for line, text, kept in zip(out.splitlines(), texts, tokens, strict=True):
        if not text:
            assert line == ""
            continue
        p = probabilities(home / "base", classifier, kept)
        label, probability, shown = line.split("\t")
        assert (label, shown) == (names[p.argmax()], text.replace("\x1b", "\\x1b"))
        assert abs(float(probability) - p.max()) <= 0.5e-4 + 1e-6
    (home / "texts.csv").write_text('id,text\n1,"so\ndull"\n2,\n')
    status, out, _ = run(capsys, *argv, "--data", home / "texts.csv", "--json")
    (found,) = json.loads(out)
    assert (status, found["line"], found["text"]) == (0, 2, "so\ndull")
    assert list(found["probabilities"]) == ["bad", "good"]
    np.testing.assert_allclose(
        [*found["probabilities"].values()], probabilities(home / "base", classifier, "so\ndull"), rtol=1e-5
    )
    assert found["probability"] == max(found["probabilities"].values()) == found["probabilities"][found["label"]]


def test_a_line_is_a_sentence_and_its_words_have_tags(home, tagger, capsys, monkeypatch):
    argv = ["predict", "--base", home / "base", "--adapter", tagger]
    give(monkeypatch, "Anna runs\n\nRome is far away\n")
    status, out, err = run(capsys, *argv)
    assert status == 0
    assert err.splitlines() == [
        "standard input: 2 sentences; 1 longer than 12 tokens cut; words without a tag, for which - stands: 1"
    ]
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == ["Anna", "runs", "", "Rome", "is", "far", "away"]
    assert rows[-1] == ["away", "-", "-"]  # it begins with the thirteenth byte
    p = probabilities(home / "base", tagger, "Anna runs")
    for (_, tag, probability), at in zip(rows[:2], (0, 5), strict=True):
        assert tag == ("LOC", "O", "PER")[p[at].argmax()]
        assert abs(float(probability) - p[at].max()) <= 0.5e-4 + 1e-6
    give(monkeypatch, "Anna PER\nruns O\n\nRome LOC\n")  # the columns of training
    status, out, _ = run(capsys, *argv, "--json")
    assert [[word["word"] for word in one["words"]] for one in json.loads(out)] == [["Anna", "runs"], ["Rome"]]


@pytest.mark.parametrize("kind", ["classifier", "tagger"])
def test_a_merged_model_gives_the_labels_of_its_adapter(home, kind, tmp_path, capsys, monkeypatch, request):
    """Their names, and where texts are cut, go along."""
    adapter = request.getfixturevalue(kind)
    assert run(capsys, "merge", "--base", home / "base", "--adapter", adapter, "--out", tmp_path / "merged")[0] == 0
    found = []
    for argv in (["--base", home / "base", "--adapter", adapter], ["--base", tmp_path / "merged"]):
        give(monkeypatch, "so dull\nmore than twelve bytes\n")
        status, out, err = run(capsys, "predict", *argv)
        assert (status, "1 longer than 12 tokens cut" in err) == (0, True)
        found.append([line.split("\t")[:2] for line in out.splitlines()])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("labels", "names"), [({"0": "no", "1": "yes"}, ("no", "yes")), (None, ("LABEL_0", "LABEL_1"))]
)
def test_labels_are_named_as_the_bases_configuration_has_them(tmp_path, labels, names):
    model = random_model(ln.Config(**{**vars(CONFIG), "head": "classify", "n_labels": 2}), seed=0)
    (tmp_path / "config.json").write_text(json.dumps({} if labels is None else {"id2label": labels}))
    assert task_for(tmp_path, None, model.config) == Task("classify", names, CONFIG.longest)


def test_labels_that_are_no_names_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"id2label": {"0": "a", "2": "b"}}')
    with pytest.raises(ValueError, match=r"config\.json: id2label: expected a name for each of 0 1, got"):
        named_labels(tmp_path, 2)
    assert named_labels(tmp_path, 3) is None


def test_a_model_of_another_kind_says_which_command_is_meant(home, classifier, tagger, tmp_path, capsys):
    base = ["--base", home / "base"]
    line = one_line(capsys, "predict", *base, "--data", home / "text.txt")
    assert f"{home / 'base'}: a language model, which gives no labels: lora-np generate writes text with it" in line
    for adapter in (classifier, tagger):
        line = one_line(capsys, "generate", *base, "--adapter", adapter, "--prompt", "x")
        assert line.startswith(f"lora-np: {adapter}: a ")
        assert "lora-np predict gives its labels" in line
    bare = ln.Config(**{**vars(CONFIG), "head": "none"})
    ln.save_model(tmp_path / "bare", ln.Model(bare, ln.init_weights(bare, seed=0)))
    line = one_line(capsys, "predict", "--base", tmp_path / "bare", "--data", home / "text.txt")
    assert "bare: a model without a head, which gives no labels: name an --adapter that learned some" in line
    assert "bare: expected a language model" in one_line(
        capsys, "generate", "--base", tmp_path / "bare", "--prompt", "x"
    )


def test_a_folder_asked_for_as_gguf_says_what_makes_it(home, classifier, tmp_path, capsys):
    for argv in (
        ["merge", "--base", home / "base", "--adapter", classifier, "--out", tmp_path / "x.gguf"],
        ["convert", "--base", home / "base", "--adapter", home / "base", "--out", tmp_path / "x.gguf"],
    ):
        assert "llama.cpp's convert_hf_to_gguf.py FOLDER --outfile FILE" in one_line(capsys, *argv)
    assert not (tmp_path / "x.gguf").exists()


# --- Prompts ---------------------------------------------------------------------------------------------------------


def test_each_prompt_of_a_file_is_gone_on_from_as_it_is_alone(home, tmp_path, capsys):
    argv = ["generate", "--base", home / "base", "-n", "8", "--seed", "3"]
    alone = [json.loads(run(capsys, *argv, "--json", "--prompt", text)[1])["text"] for text in ("the quick", "fox ")]
    (tmp_path / "prompts").write_text("the quick\n\nfox \n")
    status, out, _ = run(capsys, *argv, "--prompts", tmp_path / "prompts", "--json")
    expected = [
        {"line": line, "prompt": prompt, "text": text}
        for line, prompt, text in zip((1, 3), ("the quick", "fox "), alone, strict=True)
    ]
    assert (status, json.loads(out)) == (0, expected)
    _, out, _ = run(capsys, *argv, "--prompts", tmp_path / "prompts")
    parts = re.split(r"^==> .*:(\d+) <==\n", out, flags=re.MULTILINE)
    assert parts[1::2] == ["1", "3"]
    assert [len(part) > 0 for part in parts[2::2]] == [True, True]


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<said>{% endif %}"


def test_chat_asks_as_the_template_writes_and_shows_the_answer_alone(home, tmp_path, capsys, monkeypatch):
    """The model sees the template's text; of what it writes nothing is left out, as bytes have no special token."""
    pytest.importorskip("jinja2", reason="chat templates: the extra models")
    seen = []

    def generate(model, prompt, adapter, *, stop, **_):
        seen.append(bytes(prompt[0].tolist()).decode())
        return np.append(prompt, [*b"yes"])[None]

    monkeypatch.setattr(use, "generate_on", generate)
    (tmp_path / "chat").write_text(CHAT)
    argv = ["generate", "--base", home / "base", "--chat-template", tmp_path / "chat"]
    assert run(capsys, *argv, "--chat", "--prompt", "q")[:2] == (0, "yes\n")
    assert run(capsys, *argv, "--chat", "--prompt", "q", "--system", "s")[:2] == (0, "yes\n")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    give(monkeypatch, json.dumps({"messages": messages}))
    status, out, _ = run(capsys, *argv, "--prompts", "-", "--json")
    assert (status, json.loads(out)) == (0, [{"line": 1, "messages": messages[:1], "text": "yes"}])
    assert seen == ["<user>q<said>", "<system>s<user>q<said>", "<user>a<said>"]
    assert "--chat-template: is for --chat" in one_line(capsys, *argv, "--prompt", "q")
    (tmp_path / "chat").write_text("{{ raise_exception('not so') }}")
    assert "--prompt: " in (line := one_line(capsys, *argv, "--chat", "--prompt", "q"))
    assert "the chat template refuses this: not so" in line


def test_an_answer_ends_with_the_template_s_token_and_a_saved_model_with_its_tokenizer_is_taken(
    tmp_path, capsys, monkeypatch
):
    """The template's end of turn is not the tokenizer's end of a text; either stops."""
    pytest.importorskip("tokenizers", reason="models' own tokenizers: the extra models")
    pytest.importorskip("jinja2", reason="chat templates: the extra models")
    vocab = {"yes": 0, "?": 1, "</s>": 2, "<end>": 3}
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    raw = {
        "version": "1.0", "added_tokens": [{"id": vocab[t], "content": t, **added} for t in ("</s>", "<end>")],
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "?"},
    }  # fmt: skip
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tokenizer.json").write_text(json.dumps(raw))
    chat = "{% for m in messages %}{{ m.content }} <end>\n{% endfor %}"
    (tmp_path / "files" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": chat}))
    config = ln.Config(**{**vars(CONFIG), "vocab_size": 4})
    model = ln.Model(config, ln.init_weights(config, seed=0))
    ln.save_model(tmp_path / "bare", model)
    assert "bare: expected a model of bytes, or one with its tokenizer" in one_line(
        capsys, "generate", "--base", tmp_path / "bare", "--prompt", "yes"
    )
    ln.save_model(tmp_path / "saved", model, tokenizer=tmp_path / "files")
    stops = []

    def generate(model, prompt, adapter, *, stop, **_):
        stops.append(set(stop))
        return np.append(prompt, [0, max(stop)])[None]

    monkeypatch.setattr(use, "generate_on", generate)
    assert run(capsys, "generate", "--base", tmp_path / "saved", "--prompt", "yes")[:2] == (0, "yes yes\n")
    assert run(capsys, "generate", "--base", tmp_path / "saved", "--chat", "--prompt", "yes")[:2] == (0, "yes\n")
    assert stops == [{2}, {2, 3}]
