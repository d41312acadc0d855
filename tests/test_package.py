"""What `import lora_np` gives: its names, to people, editors and type checkers."""

import ast
from pathlib import Path

import pytest

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
