"""What is read from source, held against what Python itself says of the same names once they are imported."""

import inspect
import re
from importlib import import_module
from operator import attrgetter

import pytest

import lora_np as ln
from lora_np.spec.definitions import PACKAGE, Refusal, read_module, read_package

MODULES = read_package()
MATHEMATICS = [
    "backend",
    "ops",
    "lora",
    "model",
    "batch",
    "layout",
    "adapter",
    "binding",
    "transformer",
    "loss",
    "optim",
    "parallel",
    "decode",
]


def module_of(tmp_path, text, name="sample"):
    (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    return read_module(tmp_path / f"{name}.py", tmp_path)


def imported(key):
    """What a key stands for, by Python's own import."""
    module, _, name = key.partition(".")
    return attrgetter(name)(import_module(f"lora_np.{module}"))


def importable(module):
    """The classes and functions that have a name outside: not those inside of functions."""
    found = [d for d in module.definitions.values() if not d.is_value]
    return [d for d in found if "." not in d.name or inspect.isclass(imported(d.key.rpartition(".")[0]))]


@pytest.mark.parametrize("name", MATHEMATICS)
def test_source_and_docstring_are_what_inspect_gives(name):
    module, lines = MODULES[name], MODULES[name].text.splitlines(keepends=True)
    found = importable(module)
    assert len(found) > 3
    for d in found:
        thing = imported(d.key)
        getter = getattr(thing, "fget", None) or getattr(thing, "func", None)  # of a property, or of a cached one
        thing = inspect.unwrap(getter or thing)
        assert "".join(lines[n - 1] for n in d.lines) == inspect.getsource(thing), d.key
        assert d.docstring == (inspect.cleandoc(thing.__doc__ or "") if d.docstring else ""), d.key


@pytest.mark.parametrize("name", MATHEMATICS)
def test_a_docstrings_lines_are_the_docstring_and_nothing_else(name):
    module = MODULES[name]
    for d in module.definitions.values():
        text = "\n".join(module.text.splitlines()[n - 1] for n in d.docstring_lines)
        assert inspect.cleandoc(text.strip().removeprefix('"""').removesuffix('"""')) == d.docstring


@pytest.mark.parametrize("name", MATHEMATICS)
def test_a_use_names_what_the_module_means_by_the_name(name):
    module, lines = MODULES[name], MODULES[name].text.splitlines()
    python = import_module(f"lora_np.{name}")
    uses = {place: key for d in module.definitions.values() for place, key in d.uses.items()}
    assert uses
    for (line, column), key in uses.items():
        written = re.match(r"\w+", lines[line - 1][column:])[0]
        if hasattr(python, written):  # not what is imported for types alone
            assert getattr(python, written) is imported(key)
        else:
            assert written == key.rpartition(".")[2]


def test_what_is_imported_stands_before_what_imports_it():
    order = list(MODULES)
    for name, module in MODULES.items():
        assert all(order.index(other) < order.index(name) for other in module.imports & MODULES.keys())
    assert order.index("ops") < order.index("lora") < order.index("transformer") < order.index("decode")


def test_a_name_of_its_own_is_no_use(tmp_path):
    last = "def fifth(y): return 'é', norm(linear(y.norm))"
    module = module_of(
        tmp_path,
        "from .ops import linear\n"
        "def norm(x): return x\n"
        "def other(norm, y): return norm(y)\n"
        "def third(y):\n    linear = y\n    return linear.norm\n"
        f"def fourth(y):\n    def norm(z): return z\n    return norm(y)\n{last}\n",
    )
    uses = {name: dict(d.uses) for name, d in module.definitions.items()}
    assert uses["other"] == uses["third"] == uses["fourth"] == {}
    assert uses["fifth"] == {(10, last.index("norm(")): "sample.norm", (10, last.index("linear")): "ops.linear"}
    assert module.definitions["fifth"].calls == {"sample.norm", "ops.linear"}


def test_relative_imports_at_any_depth(tmp_path):
    (tmp_path / "files" / "deep").mkdir(parents=True)
    path = tmp_path / "files" / "deep" / "one.py"
    path.write_text(
        "from . import a\nfrom .b import c\nfrom ..d import e as f\nfrom ...g import h\nfrom numpy import i\n"
    )
    module = read_module(path, tmp_path)
    assert module.name == "files.deep.one"
    assert module.imports == {"files.deep", "files.deep.b", "files.d", "g"}


def test_a_value_stands_with_the_comment_above_it(tmp_path):
    module = module_of(
        tmp_path, "import os\n\n# Not of X.\n\n# How many:\n# a few.\nX: int = 3\n\n\ndef f(): return X\n"
    )
    assert module.definitions["X"].is_value
    assert module.definitions["X"].lines == range(5, 8)
    assert set(module.definitions["f"].uses.values()) == {"sample.X"}


def test_decorators_belong_to_a_definition_and_an_import_runs_nothing(tmp_path):
    module = module_of(tmp_path, "raise SystemExit\n\n@cache\n@other\ndef f():\n    'text'\n    return 1\n")
    f = module.definitions["f"]
    assert (f.lines, f.docstring, f.docstring_lines) == (range(3, 8), "text", range(6, 7))


def test_refusals(tmp_path):
    module = module_of(
        tmp_path,
        "def f(x, n):\n"
        "    if x:\n        raise ValueError(f'f: expected {n}, got {x.shape[0]!r} of {len(x) + 1:d}')\n"
        "    try:\n        g()\n"
        "    except KeyError as error:\n        raise TypeError('one ' + f'two {n}') from error\n"
        "    except OSError:\n        raise\n"
        "    raise errors.Wrong('; '.join(x))\n",
    )
    assert module.definitions["f"].refusals == (
        Refusal("ValueError", "f: expected {n}, got {x.shape[0]} of {...}"),
        Refusal("TypeError", "one two {n}"),
        Refusal("errors.Wrong", "{...}"),
    )


@pytest.mark.parametrize(
    ("key", "act"),
    [
        ("optim.clip", lambda: ln.optim.clip({}, -1.0)),
        ("lora._check_shapes", lambda: ln.lora_linear(*[ln.asnumpy([1.0])] * 2, None, *[ln.asnumpy([1.0])] * 2, 1)),
        ("model.Config", lambda: ln.Config(8, 8, n_layer=1, n_head=3, d_model=4, d_ff=4)),
        ("adapter.check_weights", lambda: ln.combine([], [])),
    ],
)  # fmt: skip
def test_a_refusal_has_the_words_of_the_error(key, act):
    module, _, name = key.partition(".")
    with pytest.raises(Exception) as raised:  # noqa: PT011
        act()
    patterns = [
        (r.error, re.sub(r"\\\{.*?\\\}", ".*", re.escape(r.message)))
        for r in MODULES[module].definitions[name].refusals
    ]
    assert [1 for error, p in patterns if error == raised.type.__name__ and re.fullmatch(p, str(raised.value))] == [1]


def test_the_package_itself_can_be_read_in_whole():
    for path in PACKAGE.rglob("*.py"):
        assert read_module(path).text == path.read_text(encoding="utf-8")
