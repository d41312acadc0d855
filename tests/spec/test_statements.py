"""The statements: their ids, and that the README says the same."""

import inspect
import math
import re
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

import lora_np as ln
from lora_np.backend import asnumpy, xp
from lora_np.lora import linear_rounding_bound
from lora_np.vectors.statements import PARTS, STATEMENTS

README = Path(__file__).parents[2] / "README.md"
ROWS = dict(re.findall(r"^\| ([LTOAP]\d+) \| (.+) \|$", README.read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_ids_are_counted_through_in_each_part():
    for part, ids in groupby(STATEMENTS, key=lambda name: name[0]):
        ids = list(ids)
        assert ids == [f"{part}{n}" for n in range(1, len(ids) + 1)]
    assert list(PARTS) == list(dict.fromkeys(name[0] for name in STATEMENTS)) == ["L", "T", "O", "A", "P"]


def test_every_statement_has_a_title_and_ends_as_a_sentence():
    for name, statement in STATEMENTS.items():
        assert statement.title, name
        for text in (statement.text, *statement.notes.values()):
            assert re.search(r"[^.,:;]\.?$|\.\$\$$|[^.,:;]\$\$$", text), name


def test_defaults_are_those_of_the_functions():
    """As the statements print them: 10^-8, 0.9."""
    defaults = {name: p.default for name, p in inspect.signature(ln.adamw).parameters.items()}
    (b1, b2), exponent = defaults["betas"], round(math.log10(defaults["eps"]))
    assert (10.0**exponent, defaults["weight_decay"]) == (defaults["eps"], 0)
    said = " ".join(STATEMENTS["O1"].text.split())
    assert rf"$\beta_1 = {b1}$, $\beta_2 = {b2}$, $\varepsilon = 10^{{{exponent}}}$ and $\lambda = 0$" in said
    epsilons = [ln.Config.eps, ln.PRESETS["bert-base"].eps]
    powers = [rf"$10^{{{round(math.log10(eps))}}}$" for eps in epsilons]
    assert all(math.isclose(10 ** round(math.log10(eps)), eps) for eps in epsilons)
    assert all(power in STATEMENTS["T3"].text for power in powers)
    assert powers[0] in STATEMENTS["T4"].text


def test_the_bound_of_l5_is_the_one_that_is_computed():
    """The formula as the notes say it, of factors so small that underflow is what counts, and of usual ones."""
    for size in (1.0, 2.0**-80):
        rng = np.random.default_rng(0)
        x, W0, A, B = (size * rng.standard_normal(shape) for shape in ((2, 5), (4, 5), (3, 5), (4, 3)))
        s, b, (n_in, r) = 1.5, size * rng.standard_normal(4), (5, 3)
        u, eta = 2.0**-24, 2.0**-149
        gamma = (n_in + r + 4) * u / (1 - (n_in + r + 4) * u)
        P, B1, x1 = np.abs(x) @ np.abs(A).T, np.abs(B).sum(axis=1), np.abs(x).sum(axis=1)[:, None]
        M = np.abs(x) @ np.abs(W0).T + abs(s) * P @ np.abs(B).T + np.abs(b)
        under = P @ np.abs(B).T + (1 + n_in * abs(s)) * B1 + (2 + r * abs(s)) * x1 + 2 * n_in + r
        found = linear_rounding_bound(*(xp.asarray(a) for a in (x, W0, b, A, B)), s, np.dtype("float32"))
        np.testing.assert_allclose(asnumpy(found), 2 * gamma * M + eta * under, rtol=1e-13)


def test_the_readme_has_l1_to_l9():
    assert list(ROWS) == [name for name in STATEMENTS if name.startswith("L")][:9]


@pytest.mark.parametrize("name", ROWS)
def test_the_readme_says_the_same(name):
    """In a cell of a table there are no paragraphs, and a row ends without a stop."""
    assert " ".join(STATEMENTS[name].text.replace("$$", "$").split()).removesuffix(".") == ROWS[name]
