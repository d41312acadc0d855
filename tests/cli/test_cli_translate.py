"""lora-np finetune --task translate, eval and generate: the same lines for an encoder-decoder and for a decoder."""

import json

import numpy as np
import pytest
from commands import one_line, run

import lora_np as ln
from lora_np import cli
from lora_np.decode import generate_on

SIZES = {"n_positions": 24, "n_layer": 2, "n_head": 2, "d_model": 16, "d_ff": 32}
KINDS = {"encoder-decoder": ln.Config(256, **SIZES, n_encoder=1), "decoder": ln.Config(256, **SIZES)}
WORDS = ["ab", "cab", "dad", "fix", "go"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base of each kind, an adapter that has learned capitals on each, and a file of words with their capitals."""
    pytest.importorskip("safetensors", reason="the extra `cli` is not installed")
    folder = tmp_path_factory.mktemp("home")
    (folder / "data.tsv").write_text("".join(f"{word}\t{word.upper()}\n" for word in WORDS * 5))
    for kind, config in KINDS.items():
        weights = ln.init_weights(config, seed=0)
        for name, w in weights.items():
            weights[name] = w * (20 if "embed" in name else 5) if w.ndim == 2 else w
        ln.save_model(folder / kind, ln.Model(config, weights))
        assert cli.main([str(a) for a in finetune(folder, kind, f"{kind} adapter", "--task", "translate")]) == 0
    return folder


def finetune(home, kind, out, *more, steps=150):
    return [
        "finetune", "--base", home / kind, "--data", home / "data.tsv", "--dev", home / "data.tsv", "--out", home / out,
        "--steps", steps, "--lr", "0.03", "--batch", "15", "--targets", "all,head", "--r", "16", "--every", "50", *more,
    ]  # fmt: skip


def given(home, kind):
    return ["--base", home / kind, "--adapter", home / f"{kind} adapter"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_translation_of_a_prompt_is_said_alone(home, capsys, kind):
    """Greedy and drawn; it ends where the model ends it."""
    for how in (["--temperature", "0"], ["--temperature", "0.01", "--seed", "3"]):
        status, out, err = run(capsys, "generate", *given(home, kind), "--prompt", "cab", *how)
        assert (status, out, err) == (0, "CAB\n", "")


@pytest.mark.parametrize("kind", KINDS)
def test_the_sources_of_a_file_are_translated_and_their_targets_left_out(home, tmp_path, capsys, kind):
    (tmp_path / "bars").write_text("ab||no\n\ncab || neither\n")
    (tmp_path / "tabs").write_text("ab\tno\n\ncab\n")
    (tmp_path / "json").write_text('{"source": "ab", "target": "no"}\n\n{"source": "cab"}\n')
    for name in ("bars", "tabs", "json"):
        argv = ["generate", *given(home, kind), "--prompts", tmp_path / name, "--temperature", "0", "--json"]
        found = json.loads(run(capsys, *argv)[1])
        assert [(one["line"], one["prompt"], one["text"]) for one in found] == [(1, "ab", "AB"), (3, "cab", "CAB")]


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_says_is_what_the_package_generates(home, tmp_path, capsys, kind):
    """The ids by hand: the source in the encoder and 0 first in the decoder, or the source and a line end."""
    model = ln.load_model(home / kind)
    adapter = ln.load_adapter(home / f"{kind} adapter", model)
    options = {"n": 12, "temperature": 1.5, "seed": 5, "top_k": 9, "stop": [0]}
    if KINDS[kind].n_encoder:
        ids = generate_on(model, [[0]], adapter, source=[[*b"dab"]], **options)[0, 1:]
    else:
        ids = generate_on(model, [[*b"dab\n"]], adapter, **options)[0, 4:]
    argv = ["generate", *given(home, kind), "--prompt", "dab", "-n", 12, "--temperature", "1.5", "--seed", 5]
    _, out, _ = run(capsys, *argv, "--top-k", 9, "--json")
    assert json.loads(out)["text"].encode() == bytes(ids[ids != 0].tolist()).decode(errors="replace").encode()


@pytest.mark.parametrize("kind", KINDS)
def test_eval_counts_the_loss_of_a_token_of_the_targets(home, capsys, kind):
    model = ln.load_model(home / kind)
    adapter = ln.load_adapter(home / f"{kind} adapter", model)
    losses, count = dict.fromkeys(("base", "adapter"), 0.0), 0
    for word in WORDS:
        target = [*word.upper().encode(), 0]
        source = {"source": [[*word.encode()]]} if KINDS[kind].n_encoder else {}
        before = [0] if source else [*word.encode(), *b"\n"]
        targets = [-100] * (len(before) - 1) + target
        for name, one in (("base", None), ("adapter", adapter)):
            loss = ln.loss(model, [before + target[:-1]], [targets], one, **source)
            losses[name] += loss * len(target)
        count += len(target)
    status, out, _ = run(capsys, "eval", *given(home, kind), "--data", home / "data.tsv", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["losses"] == pytest.approx({name: loss / count for name, loss in losses.items()}, rel=1e-4)
    assert found["losses"]["adapter"] < 0.1 * found["losses"]["base"]
    assert found["data"]["kind"] == "translations"
    assert "accuracies" not in found
    lines = run(capsys, "eval", *given(home, kind), "--data", home / "data.tsv")[1].splitlines()
    assert [line.split(" nats ")[1] for line in lines] == ["a byte"] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_from_an_adapter_whose_task_need_not_be_said(home, tmp_path, capsys, kind):
    argv = finetune(home, kind, tmp_path / "on", "--adapter", home / f"{kind} adapter", "--json", steps=2)
    argv = [arg for arg in argv if arg not in ("--targets", "all,head", "--r", "16")]
    status, out, _ = run(capsys, *argv)
    assert status == 0
    evaluated = json.loads(run(capsys, "eval", *given(home, kind), "--data", home / "data.tsv", "--json")[1])
    assert json.loads(out)["loss"]["start"] == pytest.approx(evaluated["losses"]["adapter"], rel=1e-4)
    assert (tmp_path / "on" / "task.json").read_bytes() == (home / f"{kind} adapter" / "task.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_translates_and_is_verified(home, tmp_path, capsys, kind):
    """Without the adapter, whose task.json goes with it."""
    merged = tmp_path / "merged"
    assert run(capsys, "merge", *given(home, kind), "--out", merged)[0] == 0
    assert run(capsys, "generate", "--base", merged, "--prompt", "fix", "--temperature", "0")[1] == "FIX\n"
    status, out, _ = run(capsys, "verify", *given(home, kind), "--merged", merged, "--prompt", "fix", "--json")
    found = json.loads(out)
    assert (status, found["holds"]) == (0, True)
    assert 0 < found["effect"]["effect of the adapter"]["change"] < np.inf
    assert found["effect"]["merged beside unmerged"]["change"] < 1e-3


def test_an_encoder_decoder_without_a_task_translates_too(home, capsys):
    """As T5 does before it is adapted; its texts end with the model's last position."""
    status, out, err = run(
        capsys, "generate", "--base", home / "encoder-decoder", "--prompt", "ab", "--temperature", "0"
    )
    assert (status, err) == (0, "")
    assert 0 < len(out) <= 24 * 4


def test_a_source_that_is_too_long_is_cut_and_that_is_said(home, capsys):
    texts = ["abc" * 8, "abc" * 7 + "ab" + "xyz" + "c"]  # 24 bytes, and 26 of which the last stays
    outs = [
        run(capsys, "generate", *given(home, "encoder-decoder"), "--prompt", text, "--temperature", "0")
        for text in texts
    ]
    assert outs[0][1] == outs[1][1]
    assert [err for _, _, err in outs] == ["", "--prompt: cut to 24 tokens, as the model takes no more\n"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a", "--chat"], "--chat: this model translates, and has no conversations"),
        (["--prompt", "a", "--system", "b"], "--system: this model translates, and has no conversations"),
        (["--prompt", ""], "--prompt: expected some text to go on from, got none"),
    ],
)
def test_what_a_translator_cannot_do_is_said(home, capsys, argv, message):
    assert message in one_line(capsys, "generate", *given(home, "encoder-decoder"), *argv)


@pytest.mark.parametrize("task", ["lm", "classify", "tag"])
def test_an_encoder_decoder_learns_nothing_else(home, tmp_path, capsys, task):
    (tmp_path / "classify").write_text("a\tx\nb\ty\n" * 5)
    (tmp_path / "tag").write_text("a x\nb y\n\n" * 5)
    (tmp_path / "lm").write_text("a text that goes on " * 20)
    argv = ["finetune", "--base", home / "encoder-decoder", "--data", tmp_path / task, "--out", tmp_path / "out"]
    line = one_line(capsys, *argv, *(["--task", task] if task != "lm" else []))
    if task == "lm":  # which is the default, too
        expected = f"{home / 'encoder-decoder'}: an encoder-decoder: expected --task translate, got lm\n"
        assert line.endswith(expected)
    else:
        assert "n_encoder: expected a causal decoder with head lm or none" in line
    assert not (tmp_path / "out").exists()


def test_prompts_of_a_language_model_are_no_lines_with_tabs(home, tmp_path, capsys):
    (tmp_path / "a").write_text("a\tb\n")
    argv = ["--base", home / "decoder", "--prompts", tmp_path / "a", "--format", "parallel"]
    assert "a: format parallel is for task translate" in one_line(capsys, "generate", *argv)
