"""Where pieces of a text meet, with the tokenizers that models have: generate goes on from what was trained."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_np.formats.adapters.task import Task
from lora_np.formats.models.chat_template import load_chat_template
from lora_np.formats.models.tokenizer import load_tokenizer
from lora_np.training.examples import encode_pair, prompt_ids
from lora_np.training.records import Pair
from lora_np.training.tasks import Reading, read_examples

pytest.importorskip("tokenizers", reason="models' own tokenizers: the extra models")

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
ADDED = [
    {
        "id": i,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    for i, token in enumerate(SPECIAL)
]
AROUND = {
    "": None,
    "<s> A": [("<s>", True), ("A", False)],
    "<s> A </s>": [("<s>", True), ("A", False), ("</s>", True)],
    "A </s>": [("A", False), ("</s>", True)],
}
BYTES = ["Ġ" if chr(i) == " " else "Ċ" if chr(i) == "\n" else chr(i) for i in [10, *range(32, 127)]]
MERGES = {
    "byte-level": ["Ġ a", "a b", "| |", "|| a", "Ċ Ċ", "Ċ a", "a Ġ"],
    "metaspace": ["▁ a", "a b", "| |", "|| a", "a ▁"],
}
SCHEMES = {
    "byte-level": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    },
    "metaspace": {
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    },
}  # fmt: skip


def write(folder, scheme, around="", **config):
    """A tokenizer's folder, as Llama's (byte pairs of pieces, a space before the text) or GPT-2's."""
    letters = BYTES if scheme == "byte-level" else ["▁", "\n", *(chr(i) for i in range(33, 127))]
    merges = MERGES[scheme]
    tokens = [*SPECIAL, *letters, *(merge.replace(" ", "") for merge in merges)]
    processor = None
    if AROUND[around]:
        processor = {
            "type": "TemplateProcessing", "pair": [],
            "single": [
                {"SpecialToken" if special else "Sequence": {"id": name, "type_id": 0}}
                for name, special in AROUND[around]
            ],
            "special_tokens": {t: {"id": t, "ids": [SPECIAL.index(t)], "tokens": [t]} for t in ("<s>", "</s>")},
        }  # fmt: skip
    raw = {
        "version": "1.0", "added_tokens": ADDED, "normalizer": None, "post_processor": processor, **SCHEMES[scheme],
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    names = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | config))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {
        (scheme, around): write(tmp_path_factory.mktemp("tokenizer"), scheme, around)
        for scheme in SCHEMES
        for around in AROUND
    }


KINDS = [(scheme, around) for scheme in SCHEMES for around in AROUND]
strings = st.text("ab| \nxé", max_size=8).map(lambda text: text.replace("é", "z"))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@given(prompt=strings.filter(bool), completion=strings)
def test_generate_goes_on_from_what_was_trained(made, kind, prompt, completion):
    """What generate starts from is what training had before the first scored token; what is scored writes the
    completion behind the prompt, to the letter; the end token comes once, behind all."""
    tokenizer = made[kind]
    tokens, targets, _ = encode_pair(tokenizer, Pair(prompt, completion), 100).example
    ids = [*tokens.tolist(), int(targets[-1])]
    start = prompt_ids(tokenizer, prompt)
    assert ids[: len(start)] == start
    assert np.flatnonzero(targets != -100)[0] == len(start) - 1
    assert ids.count(2) == 1
    assert ids[-1] == 2
    assert ids.count(1) == ("<s>" in kind[1])
    assert tokenizer.decode(ids) == tokenizer.decode(start) + completion


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_the_first_token_of_a_completion(made, kind):
    """By hand: no space that the text has not; a token that reaches over the end of the prompt is never one."""
    tokenizer = made[kind]
    space = "Ġ" if kind[0] == "byte-level" else "▁"

    def first(prompt, completion):
        _, targets, _ = encode_pair(tokenizer, Pair(prompt, completion), 100).example
        return tokenizer.backend.id_to_token(int(targets[targets != -100][0]))

    assert first("x||", "b") == "b"
    assert first("x||", " a") == f"{space}a"
    assert first("x||", "ab") == "ab"
    assert first("x|", "|") == "|"  # together they would be one token
    assert first("x ", "a") == "a"  # and so would the space and the a
    assert first("x", "") == "</s>"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_first_token_that_the_text_has_is_not_doubled(made, scheme):
    """As of a chat template that begins with <s>, given to generate."""
    tokenizer = made[scheme, "<s> A </s>"]
    assert tokenizer.encode("<s>b")[:2] == [1, 1]
    assert prompt_ids(tokenizer, "<s>b").count(1) == 1
    assert prompt_ids(tokenizer, "b").count(1) == 1
    assert prompt_ids(made[scheme, ""], "b").count(1) == 0


CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")

# An a would be one token with the line end before it: transformers then trains what generate cannot write.
answers = st.text("ab| x", min_size=1, max_size=8).filter(lambda text: text[0] != "a")


@pytest.mark.parametrize("around", AROUND)
@given(turns=st.lists(st.tuples(strings, answers), min_size=1, max_size=3))
def test_tokens_of_a_conversation_are_transformers(tmp_path_factory, around, turns):
    """Its ids and its mask, one token later; no first token twice; and the prompt of each answer is a beginning."""
    transformers = pytest.importorskip("transformers", reason="a peer: the extra peers")
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = write(folder, "byte-level", around, chat_template=PLAIN)
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    (folder / "data").write_text(json.dumps({"messages": messages}))
    reading = Reading(None, lambda: load_chat_template(folder))
    ((tokens, targets, _),), summary = read_examples(folder / "data", Task("lm", longest=500), tokenizer, reading)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = peer.apply_chat_template(messages, chat_template=CHATML, return_assistant_tokens_mask=True)
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    assert tokens.tolist() == ids[:-1]
    assert (targets != -100).tolist() == [bool(m) for m in mask[1:]]
    assert targets[targets != -100].tolist() == [i for i, m in zip(ids, mask, strict=True) if m]
    prompt = peer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    start = prompt_ids(tokenizer, prompt)
    assert tokens[: len(start)].tolist() == start
    assert summary.endless == 0
    assert (summary.examples, summary.scored, summary.tokens) == (1, sum(mask), len(ids) - 1)


def test_answers_that_no_special_token_ends_are_counted(tmp_path):
    tokenizer = write(tmp_path, "byte-level", chat_template=PLAIN.replace("<|im_end|>", "<end>"))
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "data").write_text(json.dumps({"messages": messages}))
    reading = Reading(None, lambda: load_chat_template(tmp_path))
    _, summary = read_examples(tmp_path / "data", Task("lm", longest=500), tokenizer, reading)
    assert summary.endless == 1


def test_an_answers_first_token_does_not_reach_into_the_prompt(tmp_path):
    tokenizer = write(tmp_path, "byte-level", chat_template=PLAIN)
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "data").write_text(json.dumps({"messages": messages}))
    reading = Reading(None, lambda: load_chat_template(tmp_path))
    ((_, targets, _),), _ = read_examples(tmp_path / "data", Task("lm", longest=500), tokenizer, reading)
    assert [tokenizer.backend.id_to_token(int(i)) for i in targets[targets != -100]] == ["a", "<|im_end|>"]
