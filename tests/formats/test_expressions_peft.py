"""Regular expressions in adapter_config.json take the modules, ranks and scales that they take in PEFT itself.

A file of the modules that PEFT adapts, each of PEFT's rank, is read with PEFT's scales. One of another set is refused.
"""

import copy
import functools
import json
import re
from dataclasses import replace
from itertools import count

import numpy as np
import peers  # skips this file where torch, transformers or peft is missing
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peers import peft
from safetensors.numpy import save_file
from strategies import random_model

import lora_np as ln
from lora_np.adapter import adapted_shapes
from lora_np.formats.models.names import module_names

IGNORED = [
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings",
    "ignore:You have passed exclude_modules",
]
pytestmark = [*peers.FILTERS, *map(pytest.mark.filterwarnings, IGNORED)]

NUMBERS = count()
CONFIGS = {"gpt2": peers.GPT2, "bert": peers.BERT, "roberta": peers.ROBERTA, "llama": peers.LLAMA}
CASES = [("gpt2", "lm"), ("gpt2", "tag"), ("bert", "none"), ("bert", "tag"), ("roberta", "classify"), ("llama", "lm")]
each_family = pytest.mark.parametrize(("family", "head"), CASES, ids=["-".join(case) for case in CASES])


@functools.cache
def pair(family, head):
    """A tiny random model of transformers, and our configuration of it."""
    config = replace(CONFIGS[family], head=head)
    return peers.make(family, config, seed=1).module, config


@functools.cache
def known(family, head):
    """The full names of the modules that we can adapt."""
    config = pair(family, head)[1]
    full = module_names(config)
    return [full[name] for name in adapted_shapes(config) if name in full]


def theirs(family, head, **settings):
    """PEFT's r and s of each module that it adapts and we could, and those that we could not; None if it refuses."""
    try:
        adapted = peft.get_peft_model(copy.deepcopy(pair(family, head)[0]), peft.LoraConfig(**settings))
    except ValueError:
        return None
    layers = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in adapted.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    ours = {name: value for name, value in layers.items() if name in known(family, head)}
    return ours, layers.keys() - ours.keys()


@functools.cache
def model(family, head):
    return random_model(pair(family, head)[1], seed=1)


def ours(home, family, head, ranks, **settings):
    """The same by our reading of a file that has modules of these ranks, with the same settings."""
    base, tensors = model(family, head), {"base_model.model.x": np.ones(1)} if not ranks else {}
    full, shapes = module_names(base.config), adapted_shapes(base.config)
    for name in (name for name in full if full[name] in ranks):
        (n_out, n_in), r = shapes[name], ranks[full[name]]
        ends = ("embedding_A", "embedding_B") if name == "embed.tokens" else ("A.weight", "B.weight")
        for end, shape in zip(ends, ((r, n_in), (n_out, r)), strict=True):
            tensors[f"base_model.model.{full[name]}.lora_{end}"] = np.ones(shape)
    saved = [name for name in settings.get("modules_to_save") or () if name == full.get("head", "").split(".")[0]]
    for name in saved:  # whole, as PEFT saves it
        tensors |= {
            f"base_model.model.{full[stem]}.{kind}": np.zeros(base.weights[f"{stem}.{kind}"].shape)
            for stem in ("pooler", "head") if stem in full and full[stem].split(".")[0] == name
            for kind in ("weight", "bias") if f"{stem}.{kind}" in base.weights
        }  # fmt: skip
    folder = home / f"{next(NUMBERS)}"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    adapter = ln.load_adapter(folder, base)
    return {full[name]: (adapter.config.rank(name), adapter.config.scale(name)) for name in adapter.matrices}


def check_exact(home, family, head, expected, **settings):
    """Exactly these modules are read, with these ranks and scales: not one less, and not one more."""
    ranks = {name: r for name, (r, _) in expected.items()}
    assert ours(home, family, head, ranks, **settings) == expected
    first, *_ = ranks
    others = [name for name in known(family, head) if name not in ranks]
    if len(ranks) > 1:
        with pytest.raises(ValueError, match=r"targeted of which the file has no|pattern.*no adapted module fits"):
            ours(home, family, head, {name: r for name, r in ranks.items() if name != first}, **settings)
    if others:
        with pytest.raises(ValueError, match=r"modules of the file are not targeted|expected rank 3, as"):
            ours(home, family, head, {**ranks, others[0]: 3}, **settings)


@st.composite
def expressions(draw, family, head):
    """An expression of parts of the names of the family's modules."""
    part = st.sampled_from(sorted({p for name in known(family, head) for p in name.split(".") if not p.isdecimal()}))
    atom = st.one_of(
        part,
        st.builds("({}|{})".format, part, part),
        st.builds("(?:{}|{}|)".format, part, part),
        st.builds(r"(?!.*{})".format, part),
        st.sampled_from(
            [r"\.", ".", ".*", ".*?", ".+", r"\d", "[01]", "[^1]", r"\w+", r"\.\d+\.", "[a-z_]{2,4}", r"\b"]
        ),
    )
    body = "".join(draw(st.lists(atom, min_size=1, max_size=5)))
    return draw(st.sampled_from(["", ".*", r".*\.", "^"])) + body + draw(st.sampled_from(["", ".*", "$"]))


@pytest.mark.proves("L1")
@each_family
@given(data=st.data())
def test_an_expression_takes_the_modules_that_it_takes_in_peft(tmp_path_factory, family, head, data):
    home = tmp_path_factory.mktemp("home")
    text = data.draw(expressions(family, head))
    settings = {"target_modules": text, "r": 3, "lora_alpha": 6}
    if data.draw(st.booleans()):
        settings["exclude_modules"] = data.draw(expressions(family, head))
    expected, others = theirs(family, head, **settings) or (None, ())
    if expected is None:  # nothing fits, or also what PEFT has no LoRA for, such as a norm
        assume(not any(re.fullmatch(text, name) for name in known(family, head)))
    if not expected:
        with pytest.raises(ValueError, match="modules of the file are not targeted"):
            ours(home, family, head, {known(family, head)[0]: 3}, **settings)
    elif others:  # a table of positions, a pooler
        with pytest.raises(ValueError, match=f"{len(others)} modules are targeted of which the file has no tensor"):
            ours(home, family, head, {name: r for name, (r, _) in expected.items()}, **settings)
    else:
        check_exact(home, family, head, expected, **settings)


@pytest.mark.proves("L1")
@each_family
@given(data=st.data(), rslora=st.booleans())
def test_patterns_give_the_ranks_and_scales_that_they_give_in_peft(tmp_path_factory, family, head, data, rslora):
    home = tmp_path_factory.mktemp("home")
    some = st.dictionaries(expressions(family, head), st.integers(1, 4), max_size=3)
    targets = r".*\d+\..*(c_attn|c_proj|query|value|dense|[qv]_proj|down_proj)"
    settings = {"target_modules": targets, "r": 3, "lora_alpha": 6, "use_rslora": rslora}
    adapted = [name for name in known(family, head) if re.fullmatch(targets, name)]
    for key in ("rank_pattern", "alpha_pattern"):
        drawn = data.draw(some)
        fitting = {p: v for p, v in drawn.items() if any(re.match(rf"(.*\.)?({p})$", name) for name in adapted)}
        if fitting != drawn:
            with pytest.raises(ValueError, match=f"{key}.*no adapted module fits"):
                ours(home, family, head, dict.fromkeys(adapted, 3), **settings, **{key: drawn})
        settings[key] = fitting
    expected, others = theirs(family, head, **settings)
    assert set(expected) == set(adapted)
    if not others:
        check_exact(home, family, head, expected, **settings)


@pytest.mark.parametrize("task", [None, "SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"])
@pytest.mark.parametrize(
    ("family", "head"), [*CASES, ("gpt2", "classify"), ("bert", "classify"), ("llama", "classify")], ids="-".join
)
@pytest.mark.parametrize("excluded", [None, r".*\.1\..*"])
def test_all_linear_is_what_it_is_in_peft(tmp_path, family, head, task, excluded):
    settings = {"target_modules": "All-Linear", "task_type": task, "exclude_modules": excluded, "r": 3}
    # PEFT trains a classifier's head whole whatever the file says, and then writes that into it.
    settings["modules_to_save"] = ["classifier", "score"] if task in ("SEQ_CLS", "TOKEN_CLS") else None
    try:
        expected, _ = theirs(family, head, **settings)
    except (AttributeError, TypeError):
        pytest.skip("a task that this model has not")
    if task in ("SEQ_CLS", "TOKEN_CLS") and head in ("lm", "none"):
        pytest.skip("a task that this model has not")
    assert expected
    check_exact(tmp_path, family, head, expected, **settings)
