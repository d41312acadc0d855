"""Regular expressions in adapter_config.json take the modules, ranks and scales that they take in PEFT itself."""

import copy
import functools
import re
from dataclasses import replace

import peers  # skips this file where torch, transformers or peft is missing
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peers import peft

from lora_np.adapter import adapted_shapes
from lora_np.formats.adapters.peft_config import read_config
from lora_np.formats.models.names import module_names

IGNORED = [
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings",
    "ignore:You have passed exclude_modules",
]
pytestmark = [*peers.FILTERS, *map(pytest.mark.filterwarnings, IGNORED)]

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
    """PEFT's r and s of each module that it adapts and we could; None if it refuses."""
    try:
        adapted = peft.get_peft_model(copy.deepcopy(pair(family, head)[0]), peft.LoraConfig(**settings))
    except ValueError:
        return None
    layers = {
        name.removeprefix("base_model.model."): (layer.r["default"], layer.scaling["default"])
        for name, layer in adapted.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    return {name: value for name, value in layers.items() if name in known(family, head)}


def ours(family, head, **settings):
    """The same by our reading of the same settings."""
    config = pair(family, head)[1]
    lora, names = read_config({"peft_type": "LORA", **settings}, config, "adapter_config.json")
    full = module_names(config)
    return {full[name]: (lora.rank(name), lora.scale(name)) for name in names}


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
def test_an_expression_takes_the_modules_that_it_takes_in_peft(family, head, data):
    text = data.draw(expressions(family, head))
    settings = {"target_modules": text, "r": 3, "lora_alpha": 6}
    if data.draw(st.booleans()):
        settings["exclude_modules"] = data.draw(expressions(family, head))
    expected = theirs(family, head, **settings)
    if expected is None:  # nothing fits, or also what PEFT has no LoRA for, such as a norm
        assume(not any(re.fullmatch(text, name) for name in known(family, head)))
    if not expected:
        with pytest.raises(ValueError, match="no module of this model fits"):
            ours(family, head, **settings)
    else:
        assert ours(family, head, **settings) == expected


@pytest.mark.proves("L1")
@each_family
@given(data=st.data(), rslora=st.booleans())
def test_patterns_give_the_ranks_and_scales_that_they_give_in_peft(family, head, data, rslora):
    some = st.dictionaries(expressions(family, head), st.integers(1, 4), max_size=3)
    targets = r".*\d+\..*(c_attn|c_proj|query|value|dense|[qv]_proj|down_proj)"
    settings = {"target_modules": targets, "r": 3, "lora_alpha": 6, "use_rslora": rslora}
    adapted = [name for name in known(family, head) if re.fullmatch(targets, name)]
    for key in ("rank_pattern", "alpha_pattern"):
        drawn = data.draw(some)
        fitting = {p: v for p, v in drawn.items() if any(re.match(rf"(.*\.)?({p})$", name) for name in adapted)}
        if fitting != drawn:
            with pytest.raises(ValueError, match=f"{key}.*no adapted module fits"):
                ours(family, head, **settings, **{key: drawn})
        settings[key] = fitting
    assert ours(family, head, **settings) == theirs(family, head, **settings)


@pytest.mark.parametrize("task", [None, "SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM"])
@pytest.mark.parametrize(
    ("family", "head"), [*CASES, ("gpt2", "classify"), ("bert", "classify"), ("llama", "classify")], ids="-".join
)
@pytest.mark.parametrize("excluded", [None, r".*\.1\..*"])
def test_all_linear_is_what_it_is_in_peft(family, head, task, excluded):
    settings = {"target_modules": "All-Linear", "task_type": task, "exclude_modules": excluded, "r": 3}
    # PEFT trains a classifier's head whole whatever the file says, and then writes that into it.
    settings["modules_to_save"] = ["classifier", "score"] if task in ("SEQ_CLS", "TOKEN_CLS") else None
    try:
        expected = theirs(family, head, **settings)
    except (AttributeError, TypeError):
        pytest.skip("a task that this model has not")
    if task in ("SEQ_CLS", "TOKEN_CLS") and head in ("lm", "none"):
        pytest.skip("a task that this model has not")
    assert expected
    assert ours(family, head, **settings) == expected
