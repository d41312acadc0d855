"""What `import lora_np` gives: its names, to people, editors and type checkers."""

import ast
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from strategies import same_bits

import lora_np as ln

SOURCE = ast.parse(Path(ln.__file__).read_text(encoding="utf-8"))
EXTRA = {"testing"}  # needs hypothesis: `from lora_np import *` must do without


def for_type_checkers():
    """The names that type checkers see imported, each with the module that it is imported from."""
    block = next(s for s in SOURCE.body if isinstance(s, ast.If) and ast.unparse(s.test) == "TYPE_CHECKING")
    return {alias.asname or alias.name: s.module or alias.name for s in block.body for alias in s.names}


def test_type_checkers_see_every_name_that_is_imported_on_first_use():
    assert for_type_checkers() == ln._LAZY


def test_an_unknown_name_is_an_error_to_type_checkers_too():
    """A module's __getattr__ that they saw would make any name a known one, of type Any."""
    shown = [s for s in SOURCE.body if isinstance(s, ast.FunctionDef)]
    assert "__getattr__" not in {s.name for s in shown}
    with pytest.raises(AttributeError, match="module 'lora_np' has no attribute 'lora_liner'"):
        _ = ln.lora_liner


@pytest.mark.parametrize("name", sorted({*ln.__all__, *ln._LAZY}))
def test_every_public_name_is_there_and_listed(name):
    assert getattr(ln, name) is not None
    assert name in dir(ln)
    assert name in {*ln.__all__, *EXTRA}


def test_what_is_listed_is_for_others():
    """Names of the implementation are none: what is listed is public, a module, or Python's own."""
    others = {
        name for name in dir(ln) if not isinstance(getattr(ln, name), types.ModuleType) and name not in ln.__all__
    }
    assert all(name.startswith("__") and name.endswith("__") for name in others)


def test_all_that_is_imported_is_public():
    """What the package imports of its own is for others, and is named once."""
    own = (s for s in SOURCE.body if isinstance(s, ast.ImportFrom) and s.level)
    imported = {alias.asname or alias.name for s in own for alias in s.names}
    assert {name for name in imported if not name.startswith("_")} | (ln._LAZY.keys() - EXTRA) == set(ln.__all__)
    assert len(set(ln.__all__)) == len(ln.__all__)


# ---- shown ----


def test_adapters_and_states_are_shown_in_a_line():
    config = ln.Config(7, 8, 2, 2, 8, 6)
    model = ln.Model(config, ln.init_weights(config, seed=0))
    adapter = ln.init_adapter(model, ln.LoRAConfig(r=2, targets=["q", "down"], bias="all"), seed=0)
    size = ln.count_parameters(config, adapter.config)
    assert repr(adapter) == f"Adapter(r=2, alpha=16, targets=('q', 'down'), {size} parameters, float32)"
    batch = {"tokens": [[1, 2, 3]], "targets": [[2, 3, 4]]}
    state = ln.train(model, adapter, lambda step: batch, ln.Settings(steps=3, lr=0.01))
    assert repr(state) == f"State(step 3, {size} parameters)"
    assert repr(state.optimizer) == f"AdamWState(step 3, {size} parameters)"


# ---- what is passed ----

CONFIG = ln.Config(256, 16, 1, 2, 8, 8)
WEIGHTS = ln.init_weights(CONFIG, seed=0)
MODEL = ln.Model(CONFIG, WEIGHTS)
LORA = ln.LoRAConfig(r=2)
ADAPTER = ln.init_adapter(MODEL, LORA, seed=0)
TEXT = [[5, 6, 7, 8], [9, 10, 11, 12]]
TOKENS, TARGETS = [row[:-1] for row in TEXT], [row[1:] for row in TEXT]
GRADS = ln.loss_and_grads(MODEL, ADAPTER, TOKENS, TARGETS)[1]
MATRICES = {"x": [[1.0] * 8], "W0": [[1.0] * 8] * 3, "b": None, "A": [[1.0] * 8], "B": [[1.0]] * 3, "s": 0.5}
TORCH = "expected an array of numbers, got Needy: call detach first"


class Needy:
    """What torch's tensors that require a gradient do."""

    def __array__(self, *_, **__):
        raise RuntimeError("call detach first")


MISTAKES = {
    "an adapter for its params": (
        lambda: ln.adamw(ADAPTER, GRADS, None, lr=0.1),
        "adamw: params: expected a dict of arrays (an adapter's are adapter.params), got Adapter",
    ),
    "loss and grads for grads": (
        lambda: ln.adamw(ADAPTER.params, (0.1, GRADS), None, lr=0.1),
        "adamw: grads: expected a dict of arrays (an adapter's are adapter.params), got tuple",
    ),
    "params and state for the state": (
        lambda: ln.adamw(ADAPTER.params, GRADS, ln.adamw(ADAPTER.params, GRADS, None, lr=0.1), lr=0.1),
        "adamw: state: expected the state that the last step gave, or None, got tuple",
    ),
    "a rate in words": (lambda: ln.adamw(ADAPTER.params, GRADS, None, lr="0.1"), "adamw: lr: expected a number"),
    "params and state for params": (
        lambda: ln.Adapter(LORA, ln.adamw(ADAPTER.params, GRADS, None, lr=0.1)),
        "Adapter: params: expected a dict of arrays, got tuple",
    ),
    "a dict for a configuration": (
        lambda: ln.init_adapter(MODEL, {"r": 2}, seed=0),
        "lora_config: expected a LoRAConfig, got dict",
    ),
    "no seed": (lambda: ln.init_adapter(MODEL, LORA, seed=None), "seed: expected an integer of at least 0, got None"),
    "a model to count": (lambda: ln.count_parameters(MODEL, LORA), "config: expected a Config, got Model"),
    "params to merge": (lambda: ln.merge(MODEL, ADAPTER.params), "adapter: expected an Adapter, got dict"),
    "one adapter to combine": (
        lambda: ln.combine(ADAPTER, [1.0]),
        "combine: adapters: expected a list of adapters, got Adapter",
    ),
    "one weight to combine": (
        lambda: ln.combine([ADAPTER], 1.0),
        "combine: weights: expected a list of numbers, got float",
    ),
    "params for an adapter": (
        lambda: ln.forward(MODEL, TOKENS, ADAPTER.params),
        "adapter: expected an Adapter, None, or a list of them, got dict",
    ),
    "params to train": (
        lambda: ln.loss_and_grads(MODEL, ADAPTER.params, TOKENS, TARGETS),
        "adapter: expected an Adapter, None, or a list of them, got dict",
    ),
    "a seed of dropout in words": (
        lambda: ln.loss_and_grads(MODEL, ADAPTER, TOKENS, TARGETS, dropout_seed="0"),
        "dropout_seed: expected an integer of at least 0, got '0'",
    ),
    "text for tokens": (
        lambda: ln.generate(MODEL, "The capital", n=1),
        "tokens: expected an array of numbers, got text; a tokenizer makes tokens of it (load_tokenizer)",
    ),
    "an encoding for tokens": (
        lambda: ln.forward(MODEL, {"input_ids": TOKENS}),
        "tokens: expected an array of numbers, got dict",
    ),
    "rows of two lengths": (
        lambda: ln.forward(MODEL, [[1, 2], [3]]),
        "tokens: expected an array of numbers, got rows of different lengths",
    ),
    "one sequence for a batch": (
        lambda: ln.forward(MODEL, [1, 2]),
        "tokens: expected shape (N, T) with N, T >= 1, got (2,); one sequence is a batch as [tokens]",
    ),
    "tokens that require a gradient": (lambda: ln.forward(MODEL, Needy()), f"tokens: {TORCH}"),
    "weights that require a gradient": (
        lambda: ln.Model(CONFIG, {**WEIGHTS, "norm.bias": Needy()}),
        f"Model: norm.bias: {TORCH}",
    ),
    "parameters that require a gradient": (
        lambda: ln.Adapter(LORA, {"q.A": Needy(), "q.B": Needy()}),
        f"Adapter: q.A: {TORCH}",
    ),
    "gradients that are none": (lambda: ln.clip({"q.A": Needy()}, 1.0), f"clip: grads: q.A: {TORCH}"),
    "a matrix that requires a gradient": (
        lambda: ln.lora_linear(**{**MATRICES, "A": Needy()}),
        f"lora_linear: A: {TORCH}",
    ),
    "integers": (
        lambda: ln.lora_linear(**{**MATRICES, "x": [[1] * 8]}),
        "lora_linear: x: expected floats, got int64",
    ),
    "a mask of booleans": (
        lambda: ln.lora_linear(**MATRICES, dropout_mask=[[True] * 8]),
        "lora_linear: dropout_mask: expected floats, got bool",
    ),
    "no scale": (lambda: ln.lora_linear(**{**MATRICES, "s": None}), "lora_linear: s: expected a number, got NoneType"),
    "h and saved for saved": (
        lambda: ln.lora_linear_backward([[1.0] * 3], ln.lora_linear(**MATRICES)),
        "lora_linear_backward: saved: expected what lora_linear gave with h, got tuple",
    ),
    "a gradient of another shape": (
        lambda: ln.lora_linear_backward([[1.0] * 8], ln.lora_linear(**MATRICES)[1]),
        "lora_linear_backward: dh: expected shape (1, 3), got (1, 8)",
    ),
    "an adapter saved in the wrong order": (
        lambda: ln.save_adapter("never", MODEL, ADAPTER),
        "save_adapter: adapter: expected an Adapter, got Model",
    ),
    "a model for a path": (lambda: ln.load_adapter(MODEL, "never"), "load_adapter: path: expected a path, got Model"),
    "a batch for batches": (
        lambda: ln.train(MODEL, ADAPTER, [{"tokens": TOKENS, "targets": TARGETS}], ln.Settings(steps=1, lr=0.1)),
        "train: batches: expected a function that gives the batch of a step, got list",
    ),
    "settings in a dict": (
        lambda: ln.train(MODEL, ADAPTER, lambda step: {}, {"steps": 1}),
        "train: settings: expected Settings(steps=..., lr=...), got dict",
    ),
    "n in words": (
        lambda: ln.generate(MODEL, TOKENS, n="3"),
        "generate: n: expected an integer of at least 0, got '3'",
    ),
}


@pytest.mark.parametrize("call", [call for call, _ in MISTAKES.values()], ids=list(MISTAKES))
def test_a_likely_mistake_is_told_in_one_line(call):
    message = next(message for other, message in MISTAKES.values() if other is call)
    with pytest.raises((TypeError, ValueError)) as told:
        call()
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


TAKES_A_MODEL = {
    "forward": lambda m: ln.forward(m, TOKENS),
    "loss": lambda m: ln.loss(m, TOKENS, TARGETS),
    "loss_and_grads": lambda m: ln.loss_and_grads(m, ADAPTER, TOKENS, TARGETS),
    "sharded_loss_and_grads": lambda m: ln.sharded_loss_and_grads(m, ADAPTER, TOKENS, TARGETS),
    "generate": lambda m: ln.generate(m, TOKENS, n=1),
    "init_adapter": lambda m: ln.init_adapter(m, LORA, seed=0),
    "merge": lambda m: ln.merge(m, ADAPTER),
    "unmerge": lambda m: ln.unmerge(m, ADAPTER),
    "save_model": lambda m: ln.save_model("never", m),
    "save_adapter": lambda m: ln.save_adapter("never", ADAPTER, m),
    "load_adapter": lambda m: ln.load_adapter("never", m),
}


@pytest.mark.parametrize("name", TAKES_A_MODEL)
@pytest.mark.parametrize("given", [WEIGHTS, CONFIG, "gpt2", ADAPTER, None], ids=lambda given: type(given).__name__)
def test_what_is_no_model_is_told_wherever_a_model_is_taken(name, given):
    with pytest.raises(TypeError, match=r"^model: expected a Model, as Model\(config, weights\) makes it, got"):
        TAKES_A_MODEL[name](given)


JUNK = ("x", -1, 0.5, float("nan"), True, [], {}, object(), None)


@pytest.mark.parametrize("kind", [CONFIG, LORA], ids=["Config", "LoRAConfig"])
def test_whatever_a_configuration_is_given_is_taken_or_told_by_its_field(kind):
    """With the field's name, in one line; what is taken is of a type that the field's default has."""
    for field in fields(kind):
        for junk in JUNK:
            try:
                taken = replace(kind, **{field.name: junk})
            except (TypeError, ValueError) as error:
                assert type(kind).__name__ in str(error)  # noqa: PT017
                assert field.name in str(error) or "Config: " in str(error)  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017
            else:
                assert field.name == "family" or isinstance(
                    getattr(taken, field.name), (bool, int, float, dict, tuple, type(None))
                )


# ---- the order of adapter and data ----


def test_adapter_and_data_are_told_apart_in_either_order():
    trained = replace(
        ADAPTER, params={name: np.arange(p.size, dtype=p.dtype).reshape(p.shape) for name, p in ADAPTER.params.items()}
    )
    for tokens, targets in ((TOKENS, TARGETS), (np.array(TOKENS), np.array(TARGETS))):
        for adapter in (trained, None, [trained, None], (None, None)):
            assert same_bits(ln.forward(MODEL, tokens, adapter), ln.forward(MODEL, adapter, tokens))
            assert ln.loss(MODEL, tokens, targets, adapter) == ln.loss(MODEL, adapter, tokens, targets)
            one, other = ln.generate(MODEL, tokens, adapter, n=2), ln.generate(MODEL, adapter, tokens, n=2)
            assert one.tolist() == other.tolist()
        for step in (ln.loss_and_grads, ln.sharded_loss_and_grads):
            (loss, grads), (other, others) = (
                step(MODEL, trained, tokens, targets),
                step(MODEL, tokens, targets, trained),
            )
            assert loss == other
            assert same_bits(grads, others)
            everything = step(MODEL, None, tokens, targets, trainable="all")
            assert step(MODEL, tokens, targets, None, trainable="all")[0] == everything[0]
    assert ln.loss(MODEL, TOKENS, TARGETS, trained) != ln.loss(MODEL, TOKENS, TARGETS)


def test_sequences_are_taken_where_lists_are():
    arrays = ln.lora_linear(**{name: np.asarray(a) if isinstance(a, list) else a for name, a in MATRICES.items()})
    assert same_bits(ln.lora_linear(**MATRICES)[0], arrays[0])
    both = ln.combine([ADAPTER, ADAPTER], [0.5, 2.0])
    for kind in (tuple, iter, lambda given: dict(enumerate(given)).values()):
        assert same_bits(ln.combine(kind([ADAPTER, ADAPTER]), kind([0.5, 2.0])).params, both.params)
    assert same_bits(ln.combine([ADAPTER, ADAPTER], np.array([0.5, 2.0])).params, both.params)
