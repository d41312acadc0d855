"""Two adapters beside each other: what is computed from the factors is what the two matrices give."""

import numpy as np
import pytest
from hostile import write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from strategies import seeds

from lora_np.formats.merged.beside import beside


def factors(rng, r, out=7, n_in=6):
    return rng.standard_normal((r, n_in)), rng.standard_normal((out, r))


def two(home, first, second, **second_settings):
    """Two adapters by hand, of s = 2 and s = 3 / r."""
    (r, *_), (q, *_) = ({len(A) for A, _ in one.values()} for one in (first, second))
    write_peft(home / "a", first, r=r, alpha=2 * r)
    write_peft(home / "b", second, r=q, alpha=3, **second_settings)
    return beside(home / "a", home / "b")


@pytest.mark.proves("A1")
@given(r=st.integers(1, 4), q=st.integers(1, 4), seed=seeds)
def test_cosine_distance_and_phi_are_those_of_the_matrices(tmp_path_factory, r, q, seed):
    rng = np.random.default_rng(seed)
    (A, B), (C, D) = factors(rng, r), factors(rng, q)
    (found,) = two(tmp_path_factory.mktemp("b"), {"x.q": (A, B)}, {"x.q": (C, D)}).modules
    dW, other = 2 * B @ A, 3 / q * D @ C
    size = np.linalg.norm(dW)
    assert found.cosine == pytest.approx((dW * other).sum() / size / np.linalg.norm(other), abs=1e-12)
    assert found.distance == pytest.approx(np.linalg.norm(dW - other) / size, rel=1e-12)
    P, Q = np.linalg.pinv(A) @ A, np.linalg.pinv(C) @ C  # onto the two row spaces
    assert found.phi == pytest.approx(np.trace(P @ Q) / min(r, q), abs=1e-9)
    assert found.chance == pytest.approx(max(r, q) / 6)
    assert (found.ranks, found.scales) == ((r, q), (2, 3 / q))


@pytest.mark.parametrize("size", [1e-160, 1.0, 1e160])
def test_an_adapter_beside_itself(tmp_path, size):
    A, B = factors(np.random.default_rng(1), 3)
    write_peft(tmp_path / "a", {"x.q": (A * size, B)}, r=3, alpha=1)
    found = beside(tmp_path / "a", tmp_path / "a")
    (module,) = found.modules
    assert module.cosine == pytest.approx(1, abs=1e-15)
    assert module.distance < 1e-15
    assert module.phi == pytest.approx(1, abs=1e-12)
    assert not any((found.only_first, found.only_second, found.config, found.other_shapes, found.prefix))


def test_experts_are_taken_one_by_one(tmp_path):
    """dW_e = s B[:, e::E] A[e r : (e + 1) r]: another matrix than B A."""
    rng = np.random.default_rng(2)
    (A, B), (C, D) = factors(rng, 6), factors(rng, 6)
    for name, pair in (("a", (A, B)), ("b", (C, D))):
        write_peft(tmp_path / name, {"x.experts": pair}, r=2, alpha=2, target_parameters=["experts.w"])
    (found,) = beside(tmp_path / "a", tmp_path / "b").modules
    dW, other = (np.stack([b[:, e::3] @ a[2 * e : 2 * e + 2] for e in range(3)]) for a, b in ((A, B), (C, D)))
    sizes = np.linalg.norm(dW), np.linalg.norm(other)
    assert found.cosine == pytest.approx((dW * other).sum() / sizes[0] / sizes[1], abs=1e-12)
    assert found.distance == pytest.approx(np.linalg.norm(dW - other) / sizes[0], rel=1e-12)


def test_what_each_has_alone_and_what_differs(tmp_path):
    rng = np.random.default_rng(3)
    first = {"x.q": factors(rng, 2), "x.k": factors(rng, 2), "x.v": factors(rng, 2)}
    second = {"x.q": factors(rng, 3), "x.v": factors(rng, 3, out=4), "x.o": factors(rng, 3)}
    found = two(tmp_path, first, second, use_rslora=True, bias="none", lora_bias=False)
    assert [m.name for m in found.modules] == ["x.q"]
    assert (found.only_first, found.only_second, found.other_shapes) == (["x.k"], ["x.o"], ["x.v"])
    assert found.config == {
        "r": (2, 3), "lora_alpha": (4, 3), "use_rslora": ("absent", True),
        "target_modules": (["x.k", "x.q", "x.v"], ["x.o", "x.q", "x.v"]),
    }  # fmt: skip


def test_an_update_that_is_zero_has_no_angle(tmp_path):
    A, B = factors(np.random.default_rng(4), 2)
    (module,) = two(tmp_path, {"x.q": (A, B)}, {"x.q": (A, B * 0)}).modules
    assert (module.cosine, module.distance) == (None, 1.0)
    (back,) = beside(tmp_path / "b", tmp_path / "a").modules
    assert (back.cosine, back.distance) == (None, None)
    assert back.phi == pytest.approx(1, abs=1e-12)


def test_mlx_adapters_and_prefixes(tmp_path):
    """mlx-lm's factors are PEFT's turned, its scale is s; its names lack a prefix here, and PEFT's modules are more."""
    A, B = factors(np.random.default_rng(5), 2)
    write_peft(tmp_path / "a", {"model.layers.0.q": (A, B), "model.layers.0.k": (A, B)}, r=2, alpha=8)
    (tmp_path / "b").mkdir()
    tensors = {"layers.0.q.lora_a": A.T, "layers.0.q.lora_b": B.T, "layers.0.v.lora_a": A.T, "layers.0.v.lora_b": B.T}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "b/adapters.safetensors")
    (tmp_path / "b/adapter_config.json").write_text('{"fine_tune_type": "lora", "lora_parameters": {"scale": 4.0}}')
    found = beside(tmp_path / "a", tmp_path / "b")
    assert found.prefix == ("", "model")
    (module,) = found.modules
    assert module.name == "model.layers.0.q"
    assert module.distance < 1e-15
    assert (found.only_first, found.only_second) == (["model.layers.0.k"], ["model.layers.0.v"])


def test_nothing_in_common_is_one_line(tmp_path):
    pair = factors(np.random.default_rng(6), 2)
    with pytest.raises(ValueError, match=r"b: expected modules of .*a, which has x\.q; got y\.k, and none of the same"):
        two(tmp_path, {"x.q": pair}, {"y.k": pair})
