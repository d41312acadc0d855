"""DoRA merges judged (L10): right ones in every dtype, however rounded, and mistakes planted one at a time."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_merge_mistakes import DTYPES, KINDS, MODULES, Home

from lora_np.cli import main
from lora_np.formats.files.atomic import write_tensors
from lora_np.formats.merged import target
from lora_np.formats.merged.plan import plan_merge
from lora_np.lora import Update


class DoraHome(Home):
    """A Home whose adapter has magnitudes, within `move` of the norms of W0's rows."""

    def __init__(self, path, dtype, size, move=0.05, seed=0):
        super().__init__(
            path, dtype, size, seed, use_dora=True, target_modules=[kind.rpartition(".")[2] for kind in KINDS]
        )
        rng = np.random.default_rng(seed + 1)
        self.m = {}
        for name, W0 in self.W0.items():
            norms = np.linalg.norm(W0.astype("f8"), axis=1)
            self.m[name] = (norms * (1 + move * rng.standard_normal(len(norms)))).astype("f4")
        path = path / "ad" / "adapter_model.safetensors"
        magnitudes = {f"base_model.model.{name}.lora_magnitude_vector": m for name, m in self.m.items()}
        tensors = {**load_file(path), **magnitudes}
        path.unlink()
        write_tensors(path, tensors, {})

    def sum(self, name):
        return self.W0[name].astype("f8") + self.update(name)

    def merged(self, name):
        return self.m[name].astype("f8")[:, None] * unit(self.sum(name))


def unit(W, like=None):
    """W, each row over its norm, or over that of `like`."""
    return W / np.linalg.norm(W if like is None else like, axis=1, keepdims=True)


def in_own_dtype(home, name):
    """(m / c) (W0 + s B A), each step rounded to the file's dtype; sums in float32 at least."""
    low = home.dtype
    W0, A, B = home.W0[name], home.A[name].astype(low), home.B[name].astype(low)
    wide = np.float32
    dW = (B.astype(wide) @ A.astype(wide)).astype(low)
    dW = (wide(home.s[name]) * dW.astype(wide)).astype(low)
    V = (W0.astype(wide) + dW.astype(wide)).astype(low)
    c = np.sqrt(np.cumsum(V.astype(wide) ** 2, axis=1, dtype=wide)[:, -1]).astype(low)  # one square after another
    factor = (home.m[name].astype(low).astype(wide) / c.astype(wide)).astype(low)
    return (factor.astype(wide)[:, None] * V.astype(wide)).astype(low)


@pytest.fixture(params=DTYPES)
def dtype(request):
    return request.param


@pytest.mark.proves("L10")
@pytest.mark.parametrize("size", [0.3, 2e-2])
def test_the_merge_is_exact(tmp_path, dtype, size):
    home = DoraHome(tmp_path, dtype, size)
    assert home.judged({name: home.merged(name) for name in MODULES}) == (True, None)


@pytest.mark.parametrize("size", [0.3, 2e-2])
def test_a_merge_in_the_files_own_dtype_is_right(tmp_path, dtype, size):
    """Also where c, m / c, the sum and the product are rounded to few bits each."""
    home = DoraHome(tmp_path, dtype, size)
    assert home.judged({name: in_own_dtype(home, name) for name in MODULES}) == (True, None)


MISTAKES = {
    "left out": (lambda h, name: h.sum(name), "the magnitudes are left out"),
    "of W0": (
        lambda h, name: h.m[name].astype("f8")[:, None] * unit(h.sum(name), h.W0[name].astype("f8")),
        "the norms of W0 in the place of those of W0 + s B A",
    ),
    "nothing": (lambda h, name: h.W0[name], "the base: nothing was merged"),
    "not the update": (lambda h, name: h.m[name][:, None] * unit(h.W0[name].astype("f8")), "something else"),
    "by columns": (lambda h, name: h.sum(name) * np.linalg.norm(h.sum(name)) / 10, "something else"),
}


@pytest.mark.parametrize("size", [0.3, 5e-2])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_named(tmp_path, dtype, mistake, size):
    wrong, said = MISTAKES[mistake]
    home = DoraHome(tmp_path, dtype, size)
    holds, seen = home.judged({name: wrong(home, name) for name in MODULES})
    assert not holds
    assert seen.startswith(said)


def test_a_mistake_in_some_modules_is_placed(tmp_path, dtype):
    home = DoraHome(tmp_path, dtype, 0.3)
    weights = home.without(lambda name: "q_proj" in name, home.sum)
    assert home.judged(weights) == (False, "the magnitudes are left out: self_attn.q_proj of all layers")


def test_what_verify_says(tmp_path, capsys):
    home = DoraHome(tmp_path, "F32", 0.3)
    argv = ["--base", tmp_path / "base", "--adapter", tmp_path / "ad"]
    assert main([str(part) for part in ("merge", *argv, "--out", tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main([str(part) for part in ("verify", *argv, "--merged", tmp_path / "out")]) == 0
    assert "is (m / c) (W0 + s B A), rounded once" in capsys.readouterr().out
    home.write("wrong", {name: home.sum(name) for name in MODULES})
    assert main([str(part) for part in ("verify", *argv, "--merged", tmp_path / "wrong", "--json")]) == 1
    found = json.loads(capsys.readouterr().out)["merged"]
    assert found["looks_like"] == "the magnitudes are left out"
    assert {one["looks_like"][0] for one in found["changed"]} == {"the magnitudes are left out"}


@pytest.mark.parametrize("rows", [3, 7])
def test_a_tables_norms_are_of_all_its_rows(monkeypatch, rows):
    """However few are summed at a time: c of a look-up is the norm of each column of E + s (B A)^T."""
    monkeypatch.setattr(target, "blocks", lambda n, _: [slice(i, i + rows) for i in range(0, n, rows)])
    rng = np.random.default_rng(0)
    E, A, B, m = (rng.standard_normal(shape) for shape in ((20, 5), (2, 5), (20, 2), (5,)))
    merged = np.empty_like(E)
    for part in target.summed(merged, E, [Update(A, B, 0.5, m=m)], axis=0):
        part.place[...] = part.sum()
    W = E + 0.5 * (B @ A)
    np.testing.assert_allclose(merged, m * W / np.linalg.norm(W, axis=0), rtol=1e-13)


def test_inspect_says_how_far_magnitudes_are_from_the_norms(tmp_path, capsys):
    home = DoraHome(tmp_path, "F32", 0.3)
    argv = ["inspect", f"{tmp_path / 'ad'}", "--base", f"{tmp_path / 'base'}"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["m_over_c"]
    assert found.keys() == {f"{name}.weight" for name in MODULES}
    ratios = {name: home.m[name] / np.linalg.norm(home.sum(name), axis=1) for name in MODULES}
    for name, ratio in ratios.items():
        assert found[f"{name}.weight"] == pytest.approx((ratio.min(), ratio.max()), rel=1e-12)
    assert main(argv) == 0
    all_of = np.concatenate(list(ratios.values()))
    assert f"m / c is from {all_of.min():.4g} to {all_of.max():.4g}" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1, 1.01])
def test_magnitudes_alone_may_be_what_was_trained(tmp_path, capsys, factor):
    DoraHome(tmp_path, "BF16", 0.3, move=0)
    path = tmp_path / "ad" / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        tensors[key] = tensors[key] * np.float32(0 if "lora_B" in key else factor if "magnitude" in key else 1)
    path.unlink()
    write_tensors(path, tensors, {})
    argv = ["verify", "--base", f"{tmp_path / 'base'}", "--adapter", f"{tmp_path / 'ad'}", "--json"]
    assert main(argv) == (factor == 1)
    assert json.loads(capsys.readouterr().out)["trained"] is (factor != 1)


def test_merged_tensors_are_the_formula_rounded_once(tmp_path, dtype):
    home = DoraHome(tmp_path, dtype, 0.3)
    for one in plan_merge(tmp_path / "base", [tmp_path / "ad"], [1.0]).targets:
        due = home.merged(one.key.removesuffix(".weight")).astype(home.dtype)
        off = np.abs(one.values().astype("f8") - due.astype("f8"))
        assert (off > 0).mean() < 1e-3  # near a tie, float64's own rounding may decide
        assert (off <= 2 * np.spacing(np.abs(due))).all()
