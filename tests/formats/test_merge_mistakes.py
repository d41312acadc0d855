"""Wrong merges, planted one at a time: each is found in every dtype, and called by its name; right ones are not."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rounding import dtype_of

import lora_np as ln
from lora_np.backend import asnumpy, xp
from lora_np.cli import main
from lora_np.formats.files.atomic import write_tensors
from lora_np.formats.merged.comparison import compare, difference
from lora_np.formats.merged.evidence import sums_of
from lora_np.formats.merged.mistakes import explained, which
from lora_np.formats.merged.plan import plan_merge
from lora_np.formats.merged.target import Rows, summed
from lora_np.lora import Update

LAYERS, R, ALPHA = 3, 4, 12
FLAGS = {"base": "base", "ad": "adapter", "merged": "merged"}
KINDS = {"self_attn.q_proj": (128, 128), "self_attn.v_proj": (64, 128), "mlp.down_proj": (128, 256)}
MODULES = {f"model.layers.{i}.{kind}": shape for i in range(LAYERS) for kind, shape in KINDS.items()}
DTYPES = ["F32", "F16", "BF16"]
CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": [kind[-6:] for kind in KINDS]}


class Home:
    """A base of Qwen's names in a dtype, an adapter with updates of about `size` of W0's, and what is made of them."""

    def __init__(self, path, dtype, size, seed=0, **config):
        rng = np.random.default_rng(seed)
        self.path, self.dtype, self.config = path, dtype_of(dtype), {**CONFIG, **config}
        ranks = {name: config.get("rank_pattern", {}).get(name[-6:], R) for name in MODULES}
        alphas = {name: config.get("alpha_pattern", {}).get(name[-6:], ALPHA) for name in MODULES}
        self.W0 = {name: (0.05 * rng.standard_normal(shape)).astype(self.dtype) for name, shape in MODULES.items()}
        self.A, self.B, self.s = {}, {}, {}
        for name, (n_out, n_in) in MODULES.items():
            r = ranks[name]
            self.s[name] = alphas[name] / r
            self.A[name] = rng.standard_normal((r, n_in)).astype("f4")
            self.B[name] = (0.05 * size / self.s[name] / r**0.5 * rng.standard_normal((n_out, r))).astype("f4")
        factors = {f"base_model.model.{name}.lora_A.weight": A for name, A in self.A.items()}
        factors |= {f"base_model.model.{name}.lora_B.weight": B for name, B in self.B.items()}
        self.write("base", self.W0)
        (path / "ad").mkdir()
        (path / "ad" / "adapter_config.json").write_text(json.dumps(self.config))
        write_tensors(path / "ad" / "adapter_model.safetensors", factors, {})

    def write(self, folder, weights):
        (self.path / folder).mkdir()
        raw = {"model_type": "qwen2", "num_hidden_layers": LAYERS, "architectures": ["Qwen2ForCausalLM"]}
        (self.path / folder / "config.json").write_text(json.dumps(raw))
        tensors = {f"{name}.weight": W.astype(self.dtype) for name, W in weights.items()}
        write_tensors(self.path / folder / "model.safetensors", tensors, {})

    def update(self, name):
        return self.s[name] * (self.B[name].astype("f8") @ self.A[name].astype("f8"))

    def merged(self, name):
        return self.W0[name].astype("f8") + self.update(name)

    def judged(self, weights):
        """-> whether it holds, and what it looks like"""
        self.write("merged", weights)
        found = compare(plan_merge(self.path / "base", [self.path / "ad"], [1.0]), self.path / "merged", 1)
        return found.holds, explained(found, self.config)

    def without(self, left_out, instead):
        return {name: instead(name) if left_out(name) else self.merged(name) for name in MODULES}


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


SOME = {
    "one layer": (lambda name: ".1." in name, "layer 1"),
    "two layers": (lambda name: ".1." not in name, "layers 0 2"),
    "one kind": (lambda name: "v_proj" in name, "self_attn.v_proj of all layers"),
    "one module": (lambda name: name == "model.layers.2.mlp.down_proj", "model.layers.2.mlp.down_proj.weight"),
}


@pytest.mark.parametrize("size", [1.0, 2e-3])
@pytest.mark.parametrize("some", SOME)
def test_what_was_forgotten(tmp_path, dtype, some, size):
    """Also where an update is less than the file's rounding, and no element is further off than one step."""
    which_ones, text = SOME[some]
    home = Home(tmp_path, dtype, size)
    found = home.judged(home.without(which_ones, lambda name: home.W0[name]))
    assert found == (False, f"not merged: {text}")


def test_a_transpose(tmp_path, dtype):
    home = Home(tmp_path, dtype, 0.3)
    turned = home.without(lambda name: "q_proj" in name, lambda name: home.W0[name].astype("f8") + home.update(name).T)
    assert home.judged(turned) == (False, "the transpose of the update: self_attn.q_proj of all layers")


@pytest.mark.parametrize(
    ("patterns", "s", "text"),
    [
        ({"rank_pattern": {"v_proj": 6}}, ALPHA / R, "the scale of the rank r: rank_pattern is passed over"),
        ({"alpha_pattern": {"v_proj": 5}}, ALPHA / R, "the scale of lora_alpha: alpha_pattern is passed over"),
    ],
)
def test_patterns_passed_over(tmp_path, dtype, patterns, s, text):
    home = Home(tmp_path, dtype, 0.3, **patterns)
    wrong = home.without(
        lambda name: "v_proj" in name,
        lambda name: home.W0[name].astype("f8") + s / home.s[name] * home.update(name),
    )
    assert home.judged(wrong) == (False, f"{text}: self_attn.v_proj of all layers")


def by_groups(W, size, rounding):
    return np.concatenate([rounding(group) for group in W.reshape(-1, size)]).reshape(W.shape)


def even(most):
    return lambda group: np.round(group / (np.abs(group).max() / most)) * (np.abs(group).max() / most)


def q4_0(group):
    """llama.cpp's: the element of largest size is -8 steps, and steps are halves at most away, from 0 to 15."""
    step = group[np.argmax(np.abs(group))] / -8
    return (np.minimum(np.floor(group / step + 8.5), 15) - 8) * step


def nf4(group):
    """By its definition: 16 quantiles of a normal distribution, of which the outermost are left out, and 0 is one."""
    from statistics import NormalDist

    quantile, offset = NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*above, *below, 0.0])) / quantile(offset)
    largest = np.abs(group).max()
    return levels[np.abs(group[:, None] / largest - levels).argmin(axis=1)] * largest


def from_least(group):
    step = (group.max() - group.min()) / 15
    return np.round((group - group.min()) / step) * step + group.min()


def with_zero(group):
    """16 numbers from the least to the greatest, one of which is 0 itself."""
    step = (max(group.max(), 0) - min(group.min(), 0)) / 15
    zero = np.round(-min(group.min(), 0) / step)
    levels = (np.arange(16) - zero) * step
    return levels[np.abs(group[:, None] - levels).argmin(axis=1)]


ROUNDINGS = {
    "8 bits, by rows": lambda W: by_groups(W, W.shape[1], even(127)),
    "8 bits, in blocks of 32": lambda W: by_groups(W, 32, even(127)),
    "4 bits, NF4 in blocks of 64": lambda W: by_groups(W, 64, nf4),
    "4 bits, in blocks of 32": lambda W: by_groups(W, 32, q4_0),
    "4 bits, by rows": lambda W: by_groups(W, W.shape[1], even(7)),
    "4 bits, in groups of 64": lambda W: by_groups(W, 64, from_least),
    "4 bits, in groups of 128": lambda W: by_groups(W, 128, from_least),
    "4 bits, in groups of 64 with a zero": lambda W: by_groups(W, 64, with_zero),
    "4 bits, in groups of 128 with a zero": lambda W: by_groups(W, 128, with_zero),
}


@pytest.mark.parametrize("size", [2.0, 0.01])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_base_of_few_bits(tmp_path, dtype, rounding, size):
    """With updates larger than W0, whose rounding hides much, and small ones, beside which the base's is large."""
    home = Home(tmp_path, dtype, size)
    wrong = {name: ROUNDINGS[rounding](home.W0[name].astype("f8")) + home.update(name) for name in MODULES}
    assert home.judged(wrong) == (False, f"a merge onto the base rounded to {rounding}")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_base_of_few_bits_below_the_sums_own_rounding(tmp_path, dtype, rounding):
    """By the sum of all errors, where an update is so large that each element is what a right merge may have."""
    home = Home(tmp_path, dtype, 30.0)
    wrong = {name: ROUNDINGS[rounding](home.W0[name].astype("f8")) + home.update(name) for name in MODULES}
    holds, said = home.judged(wrong)
    assert not holds
    assert said.startswith(f"a merge onto the base rounded to {rounding}")


@given(seed=st.integers(0, 999), size=st.sampled_from([0.1, 1.0, 10.0]), kept=st.sampled_from([0.99, 0.5, 0.0]))
def test_another_base_is_none_that_was_rounded(tmp_path_factory, seed, size, kept):
    """Though what rounding changes goes against W0, as in a base that is less of W0, and some of another."""
    home = Home(tmp_path_factory.mktemp("home"), "F32", size, seed)
    rng = np.random.default_rng(seed + 1)
    other = {name: kept * W + (1 - kept) * 0.005 * rng.standard_normal(W.shape) for name, W in home.W0.items()}
    home.write("merged", {name: other[name] + home.update(name) for name in MODULES})
    found = compare(plan_merge(home.path / "base", [home.path / "ad"], [1.0]), home.path / "merged", 1)
    assert not found.holds
    assert {one.rounded_to for one in found.changed} == {None}


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.0])
def test_a_multiple_of_the_base_is_none_that_was_rounded(kept):
    """NF4 brings normal weights nearer to 0: its errors go with those of (1 - c) W0, but no further than W0 does."""
    rng = np.random.default_rng(4)
    W0, A, B = (rng.standard_normal(shape).astype("f4") for shape in ((512, 512), (R, 512), (512, R)))
    merged = (kept * W0 + 0.1 * B @ A).astype("f4")
    found, _ = difference("W", merged.size, summed(merged, W0, [Update(A, B, 0.1)]), 1)
    assert not found.fits
    assert found.rounded_to is None


def test_a_base_that_was_held_in_nf4_with_its_maxima_in_8_bits(tmp_path, dtype):
    """As QLoRA holds it (L11). It is near the rounding without double quantisation, and has that one's name."""
    home = Home(tmp_path, dtype, 1.0)
    dequantised = {name: asnumpy(ln.quantise_nf4(xp.asarray(home.W0[name].astype("f4")))[:]) for name in MODULES}
    wrong = {name: W.astype("f8") + home.update(name) for name, W in dequantised.items()}
    assert home.judged(wrong) == (False, "a merge onto the base rounded to 4 bits, NF4 in blocks of 64")


@pytest.mark.parametrize("size", [10.0, 1.0, 0.01])
@pytest.mark.parametrize("to", ["F32", "F16"])
def test_a_base_that_was_read_in_bfloat16(tmp_path, to, size):
    """And merged in more bits; but a merge that is itself in bfloat16 is right, rounded more often than once."""
    bfloat16 = dtype_of("BF16")
    home = Home(tmp_path, to, size)
    coarse = {name: home.W0[name].astype("f4").astype(bfloat16).astype("f8") + home.update(name) for name in MODULES}
    assert home.judged(coarse) == (False, "a merge onto the base rounded to bfloat16")
    shutil.rmtree(tmp_path / "merged")
    home.dtype = bfloat16
    assert home.judged(coarse) == (True, None)


def test_an_element_that_was_changed_is_no_other_base(tmp_path, dtype):
    """Nor is a tensor that is missing: they are named as what they are."""
    home = Home(tmp_path, dtype, 1.0)
    right = {name: home.merged(name) for name in MODULES}
    name = next(iter(MODULES))
    changed = right[name].copy()
    changed[1, 1] += 0.01
    assert home.judged(right | {name: changed}) == (False, None)
    shutil.rmtree(tmp_path / "merged")
    assert home.judged({key: value for key, value in right.items() if key != name}) == (False, None)


@given(seed=st.integers(0, 10**6), at=st.integers(0, 10**6))
def test_the_base_itself_where_rounding_hides_all_but_one_element(seed, at):
    """An element that the sum just moves, and another order of summing just does not: one step, by chance."""
    rng = np.random.default_rng(seed)
    W0 = (1 + rng.integers(0, 2**9, (8, 8)) * 2.0**-9).astype("f2")
    row, column = divmod(at % 64, 8)
    A, B = np.full((1, 8), 2.0**-10), np.full((8, 1), 0.48)  # in steps of float16: 0.48, 0.49 and 0.4944, and 0.5047
    A[0, column], B[row, 0] = 1.03 * 2.0**-10, 0.49
    found, _ = difference("W", 64, summed(W0, W0, [Update(A, B, 1.0)]), 1)
    assert found.differing == 1
    assert found.max_ulps == 1
    assert found.fits


def test_another_base(tmp_path, dtype):
    home = Home(tmp_path, dtype, 1.0)
    rng = np.random.default_rng(7)
    wrong = {name: home.merged(name) + 0.01 * rng.standard_normal(shape) for name, shape in MODULES.items()}
    said = "the adapter on another base, or on this one rounded in a way that is not known here"
    assert home.judged(wrong) == (False, said)


@given(seed=st.integers(0, 999), size=st.sampled_from([1e-3, 0.1, 1.0, 10.0, 100.0]), dtype=st.sampled_from(DTYPES))
def test_a_right_merge_has_no_name(tmp_path_factory, seed, size, dtype):
    """Summed as PEFT does it: B A, its scale and the sum each rounded to the file's dtype."""
    home = Home(tmp_path_factory.mktemp("home"), dtype, size, seed)
    right = {}
    for name in MODULES:
        product = (home.B[name].astype("f8") @ home.A[name].astype("f8")).astype(home.dtype).astype("f8")
        scaled = (home.s[name] * product).astype(home.dtype).astype("f8")
        right[name] = home.W0[name].astype("f8") + scaled
    assert home.judged(right) == (True, None)


@pytest.mark.parametrize("off", [9, 10, 11, 12])
def test_no_more_than_ten_rows(tmp_path, capsys, off):
    many = {f"model.layers.{i}.self_attn.q_proj": (16, 16) for i in range(12)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "MODULES", many)
        home = Home(tmp_path, "F32", 1.0)
        home.write("merged", home.without(lambda name: int(name.split(".")[2]) < off, lambda name: home.W0[name]))
    argv = [
        "verify",
        *(str(part) for name in ("base", "ad", "merged") for part in (f"--{FLAGS[name]}", tmp_path / name)),
    ]
    assert main([*argv, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)["merged"]
    named = [one["tensor"] for one in result["changed"] if one["looks_like"] == ["not merged"]]
    assert sorted(named) == sorted(f"{name}.weight" for name in list(many)[:off])
    assert main(argv) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith("  not merged") for line in lines) == min(off, 10)
    assert any(f"and {off - 10} more; --json has all" in line for line in lines) == (off > 10)


def test_a_head_that_is_the_table_is_no_fault(tmp_path):
    """A tied head written out beside the table; one that is another is."""
    home = Home(tmp_path, "F32", 1.0)
    table = np.ones((9, 128), "f4")
    home.W0["model.embed_tokens"] = table
    shutil.rmtree(tmp_path / "base")
    home.write("base", home.W0)
    right = {name: home.merged(name) for name in MODULES} | {"model.embed_tokens": table}
    assert home.judged(right) == (True, None)
    for head, holds in ((table, True), (2 * table, False)):
        tensors = {f"{name}.weight": W.astype("f4") for name, W in right.items()} | {"lm_head.weight": head}
        write_tensors(tmp_path / "merged" / "model.safetensors", tensors, {})
        found = compare(plan_merge(tmp_path / "base", [tmp_path / "ad"], [1.0]), tmp_path / "merged", 1)
        assert found.holds is holds
        assert found.extra == ([] if holds else ["lm_head.weight"])


def test_a_head_that_is_tied_still_where_the_merge_unties_it(tmp_path):
    rng = np.random.default_rng(2)
    for folder in ("base", "ad"):
        (tmp_path / folder).mkdir()
    raw = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    table = rng.standard_normal((32, 16)).astype("f4")
    write_tensors(tmp_path / "base" / "model.safetensors", {"model.embed_tokens.weight": table}, {})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": ["embed_tokens"]}
    (tmp_path / "ad" / "adapter_config.json").write_text(json.dumps(config))
    A, B = rng.standard_normal((R, 32)).astype("f4"), rng.standard_normal((16, R)).astype("f4")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    write_tensors(tmp_path / "ad" / "adapter_model.safetensors", {f"{prefix}A": A, f"{prefix}B": B}, {})
    shutil.copytree(tmp_path / "base", tmp_path / "merged")
    merged = {"model.embed_tokens.weight": (table + ALPHA / R * (A.T @ B.T)).astype("f4"), "lm_head.weight": table}
    plan = plan_merge(tmp_path / "base", [tmp_path / "ad"], [1.0])
    write_tensors(tmp_path / "merged" / "model.safetensors", merged, {})
    assert compare(plan, tmp_path / "merged", 1).holds
    del merged["lm_head.weight"]
    write_tensors(tmp_path / "merged" / "model.safetensors", merged, {})
    found = compare(plan, tmp_path / "merged", 1)
    assert found.missing == ["lm_head.weight"]
    assert explained(found, config) == "lm_head.weight tied to the token table still, which the adapter unties"


def test_a_symmetric_update_on_another_base_is_no_transpose(tmp_path):
    home = Home(tmp_path, "F32", 0.0)
    rng = np.random.default_rng(3)
    home.B = {name: (home.A[name].T if n_out == n_in else home.B[name]) for name, (n_out, n_in) in MODULES.items()}
    factors = {f"base_model.model.{name}.lora_A.weight": A for name, A in home.A.items()}
    factors |= {f"base_model.model.{name}.lora_B.weight": np.ascontiguousarray(B) for name, B in home.B.items()}
    write_tensors(tmp_path / "ad" / "adapter_model.safetensors", factors, {})
    wrong = {name: home.merged(name) + 10 * rng.standard_normal(shape) for name, shape in MODULES.items()}
    assert "transpose" not in home.judged(wrong)[1]


@given(first=st.integers(0, 5), n=st.integers(1, 3), seed=st.integers(0, 99))
def test_rows_of_the_transpose(first, n, seed):
    """Of a weight in several blocks: dW^T's own rows."""
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal((2, 8)), rng.standard_normal((8, 2))
    at, zeros = slice(first, first + n), np.zeros((n, 8))
    update = Update(xp.asarray(A), xp.asarray(B), 3.0)
    rows = Rows(zeros, zeros, [update._replace(B=update.B[at])], at, [update])
    np.testing.assert_allclose(rows.turned(), 3 * (B @ A).T[at], atol=1e-14)


def test_few_elements_are_no_evidence():
    """One element of which rounding leaves nothing: half the update is missing, by chance alone."""
    W0, dW = np.array([[1.0, 1.0]]), np.array([[0.6, 0.4]])
    rows = Rows(W0 + np.array([[0.0, 0.4]]), W0, [])
    assert sums_of(rows, W0 + dW, W0 + dW).scale == pytest.approx(0.16 / 0.52)
    assert not sums_of(rows, W0 + dW, W0 + dW).is_off
    many = [np.tile(values, (1, 500)) for values in (W0 + np.array([[0.0, 0.4]]), W0, dW)]
    assert sums_of(Rows(many[0], many[1], []), many[1] + many[2], many[1] + many[2]).is_off


def test_which_names():
    known = [f"a.{i}.{kind}.weight" for i in range(3) for kind in ("q", "k")]
    assert which(["a.0.k.weight", "a.0.q.weight"], known) == "layer 0"
    assert which([name for name in known if ".q." in name], known) == "q of all layers"
    assert which(["a.0.q.weight", "a.1.k.weight"], known) == "a.0.q.weight a.1.k.weight"
    assert which([f"m{i}" for i in range(7)], [f"m{i}" for i in range(9)]) == "m0 m1 m2 m3 m4 and 2 more"
