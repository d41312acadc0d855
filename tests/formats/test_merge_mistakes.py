"""What is wrong with a merge, by name: mistakes planted in a small base, and none named where the merge is right."""

import json
import shutil

import numpy as np
import pytest
from hostile import GPT2, edit_tensors, write_gpt2, write_peft
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_rounding import dtype_of

from lora_np import cli
from lora_np.formats.merged.comparison import compare
from lora_np.formats.merged.folder import merge_folder
from lora_np.formats.merged.mistakes import explained
from lora_np.formats.merged.plan import plan_merge

D, LAYERS, R, ALPHA = 64, 3, 4, 8
KINDS = ("q_proj", "v_proj", "up_proj")
WIDTHS = {"q_proj": D, "v_proj": D, "up_proj": 2 * D}
FORMATS = ["F32", "F16", "BF16"]
SIZES = [0.1, 1.0, 30.0]  # of the update, beside the base's own: up to where it is much larger
seeds = st.integers(0, 2**20)


def modules(layers=range(LAYERS), kinds=KINDS):
    return [f"model.layers.{i}.self_attn.{kind}" for i in layers for kind in kinds]


class Planted:
    """A base, an adapter, and a folder with what `made` makes of each module's W0 and dW, rounded to the dtype."""

    def __init__(self, home, name, seed, size, made, *, ranks=None, settings=None, least=0.0):
        shutil.rmtree(home, ignore_errors=True)
        for folder in ("base", "ad", "merged"):
            (home / folder).mkdir(parents=True)
        rng, self.home, self.dtype = np.random.default_rng(seed), home, dtype_of(name)
        base, merged, factors = {}, {}, {}
        for module in modules():
            n_out, r = WIDTHS[module.rpartition(".")[2]], (ranks or {}).get(module, R)
            W0 = 0.02 * rng.standard_normal((n_out, D))
            W0 = self.cast(W0 + np.copysign(least, W0))
            A = (rng.uniform(-1, 1, (r, D)) / np.sqrt(D)).astype("float32")
            B = (0.02 * size * rng.standard_normal((n_out, r))).astype("float32")
            factors |= {f"base_model.model.{module}.lora_A.weight": A, f"base_model.model.{module}.lora_B.weight": B}
            base[f"{module}.weight"] = W0
            dW = ALPHA / r * B.astype(float) @ A.astype(float)
            merged[f"{module}.weight"] = self.cast(made(module, W0.astype(float), dW))
        base["model.norm.weight"] = merged["model.norm.weight"] = self.cast(np.ones(D))
        about = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False}
        for folder, tensors in (("base", base), ("merged", merged)):
            save_file(tensors, home / folder / "model.safetensors")
            (home / folder / "config.json").write_text(json.dumps(about))
        save_file(factors, home / "ad" / "adapter_model.safetensors")
        about = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": list(KINDS)}
        (home / "ad" / "adapter_config.json").write_text(json.dumps({**about, **(settings or {})}))

    def cast(self, values):
        return values.astype("float32").astype(self.dtype)

    def judged(self):
        plan = plan_merge(self.home / "base", [self.home / "ad"], [1.0])
        found = compare(plan, self.home / "merged", 1)
        return found, explained(found, plan.scales)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("planted") / "home"


# --- Some modules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@given(seed=seeds, size=st.sampled_from([0.03, *SIZES]), layers=st.sets(st.integers(0, 2), min_size=1, max_size=2))
def test_layers_that_were_left_out(place, name, seed, size, layers):
    left = set(modules(layers))
    found, said = Planted(place, name, seed, size, lambda m, W0, dW: W0 + dW * (m not in left)).judged()
    assert not found.holds
    several = " ".join(map(str, sorted(layers)))
    assert said == f"layer{'s' if len(layers) > 1 else ''} {several}: not merged"


@pytest.mark.parametrize("name", FORMATS)
@given(seed=seeds, size=st.sampled_from(SIZES), kind=st.sampled_from(KINDS))
def test_a_kind_of_matrix_that_was_left_out(place, name, seed, size, kind):
    found, said = Planted(place, name, seed, size, lambda m, W0, dW: W0 + dW * (not m.endswith(kind))).judged()
    assert not found.holds
    assert said == f"self_attn.{kind} in all {LAYERS} layers: not merged"


@given(seed=seeds, factor=st.sampled_from([(0.0, "not merged"), (-1.0, "subtracted"), (2.0, "merged twice")]))
def test_one_module_is_named(place, seed, factor):
    """And so is a module with another multiple, by its number."""
    c, text = factor
    changed = {modules()[1]: c, modules()[5]: 0.7}
    found, said = Planted(place, "F32", seed, 1.0, lambda m, W0, dW: W0 + changed.get(m, 1.0) * dW).judged()
    assert not found.holds
    assert said == f"{modules()[1]}.weight: {text}; {modules()[5]}.weight: 0.7 times the update"


def test_a_layer_whose_update_hides_in_one_step(place):
    """All elements are then near enough to the merge; that they lack their share of the update, their sum tells."""
    left = set(modules([1]))

    def made(module, W0, dW):
        return W0 + dW * (module not in left)

    found, said = Planted(place, "BF16", 1, 0.02, made, least=0.13).judged()
    assert max(one.max_ulps for one in found.changed) <= 1
    assert not found.holds
    assert said == "layer 1: not merged"


# --- The transpose ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@given(seed=seeds, size=st.sampled_from(SIZES), kinds=st.sets(st.sampled_from(KINDS[:2]), min_size=1))
def test_the_transpose(place, name, seed, size, kinds):
    """Where a matrix is square, its transpose fits too."""

    def made(module, W0, dW):
        return W0 + (dW.T if module.endswith(tuple(kinds)) else dW)

    found, said = Planted(place, name, seed, size, made).judged()
    assert not found.holds
    assert said.endswith(": the transpose of the update merged")
    assert {kind for kind in KINDS if kind in said} == kinds
    assert {one.tensor for one in found.changed if one.turned} == {f"{m}.weight" for m in modules(kinds=kinds)}


def test_the_transpose_in_a_base_of_other_orientation(tmp_path):
    """Conv1D's matrices are stored (in, out)."""
    write_gpt2(tmp_path / "base", GPT2)
    rng = np.random.default_rng(3)
    factors = {f"transformer.h.{i}.attn.c_proj": tuple(rng.standard_normal((2, 4, 8), "float32")) for i in range(2)}
    factors = {name: (A, B.T.copy()) for name, (A, B) in factors.items()}
    write_peft(tmp_path / "ad", factors, r=4, alpha=8, fan_in_fan_out=True)
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "merged")
    base = load_file(tmp_path / "base" / "model.safetensors")

    def turn(tensors):
        for name, (A, B) in factors.items():
            tensors[f"{name}.weight"] = base[f"{name}.weight"] + 2 * B @ A

    plan = plan_merge(tmp_path / "base", [tmp_path / "ad"], [1.0])
    assert compare(plan, tmp_path / "merged", 1).holds
    edit_tensors(tmp_path / "merged" / "model.safetensors", turn)
    found = compare(plan, tmp_path / "merged", 1)
    assert explained(found, plan.scales) == "the transpose of the update merged"


# --- A base that was rounded -----------------------------------------------------------------------------------------

NF4 = np.array([  # Dettmers et al. 2023, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def by_blocks(W, width, levels):
    """The nearest of the numbers that `levels` gives for a block, one after another."""
    out = np.empty_like(W)
    for row in range(len(W)):
        for at in range(0, W.shape[1], width):
            block = W[row, at : at + width]
            grid = levels(block)
            out[row, at : at + width] = grid[abs(block[:, None] - grid).argmin(axis=1)]
    return out


def int8(block):
    return np.arange(-127, 128) / 127 * abs(block).max()


def q4_0(block):
    return np.arange(-8, 8) * float(np.float16(block[abs(block).argmax()] / -8))


def nf4(block):
    return NF4 * abs(block).max()


def nf4_double(block):
    """The largest number kept in 8 bits itself."""
    return NF4 * abs(block).max() * 1.003


ROUNDINGS = {
    "int8 by rows": (D, int8, "8 bits"),
    "Q8_0": (32, int8, "8 bits"),
    "NF4": (64, nf4, "4 bits (NF4, blocks of 64)"),
    "NF4 twice": (64, nf4_double, "4 bits (NF4, blocks of 64)"),
    "Q4_0": (32, q4_0, "4 bits (Q4_0)"),
}


@pytest.mark.parametrize("case", ROUNDINGS)
@pytest.mark.parametrize("name", FORMATS)
@given(seed=seeds, size=st.sampled_from(SIZES))
def test_a_base_that_was_rounded(place, name, case, seed, size):
    """Also where the update is 30 times as large as the base, and one step of M more than the rounding's error."""
    width, levels, text = ROUNDINGS[case]
    found, said = Planted(place, name, seed, size, lambda _, W0, dW: by_blocks(W0, width, levels) + dW).judged()
    assert not found.holds
    assert said.startswith(f"a base that was rounded to {text}")
    assert said.endswith("before")


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_rounded_base_in_a_file_of_another_precision(place, size):
    """A base that was read in bfloat16, and saved in float32."""
    dtype = dtype_of("BF16")
    found, said = Planted(place, "F32", 1, size, lambda _, W0, dW: W0.astype(dtype).astype(float) + dW).judged()
    assert not found.holds
    assert said == "a base that was rounded to bfloat16 before"


def test_a_rounded_base_and_a_layer_left_out(place):
    left = set(modules([2]))

    def made(module, W0, dW):
        return by_blocks(W0, 64, nf4) + dW * (module not in left)

    _, said = Planted(place, "F16", 1, 1.0, made).judged()
    assert said == "a base that was rounded to 4 bits (NF4, blocks of 64) before; layer 2: not merged"


@given(seed=seeds, off=st.sampled_from([0.02, 0.1, 0.5]))
def test_another_base_is_not_called_a_rounded_one(place, seed, off):
    """By its errors' size alone: how far it is off is said, and that rounding to 4 bits could leave as much."""
    rng = np.random.default_rng(seed + 1)
    made = Planted(place, "F32", seed, 2.0, lambda _, W0, dW: W0 + off * 0.02 * rng.standard_normal(W0.shape) + dW)
    found, said = made.judged()
    assert found.rounded_to is None
    assert {one.rounded_to for one in found.changed} == {None}
    assert said.startswith("the adapter on another base, whose weights are off by ")
    assert ("about 4 bits" in said) == (off == 0.1)
    assert ("about 8 bits" in said) == (off == 0.02)


# --- Scales of ranks and alphas of modules' own ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@given(seed=seeds, own=st.sampled_from([1, 2, 16]))
def test_one_rank_for_all(place, name, seed, own):
    own_ranks = dict.fromkeys(modules(kinds=["v_proj"]), own)
    more = {"ranks": own_ranks, "settings": {"rank_pattern": {"v_proj": own}}}
    found, said = Planted(place, name, seed, 1.0, lambda m, W0, dW: W0 + dW * own_ranks.get(m, R) / R, **more).judged()
    assert not found.holds
    assert said == f"one scale, {ALPHA / R:.4g}, for all modules, as without rank_pattern and alpha_pattern"
    found, said = Planted(place, name, seed, 1.0, lambda _, W0, dW: W0 + dW, **more).judged()
    assert found.holds
    assert said is None


# --- None where the merge is right -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@given(seed=seeds, size=st.sampled_from([0.003, 0.03, *SIZES, 1000.0]), times=st.integers(1, 3))
def test_a_right_merge_has_no_mistake(place, name, seed, size, times):
    """Rounded once, twice or three times on the way, as PEFT does in the base's dtype."""
    dtype = dtype_of(name)

    def cast(values):
        return values.astype("float32").astype(dtype).astype(float)

    def made(_, W0, dW):
        dW = cast(dW / 2) * 2 if times == 3 else dW
        return W0 + (cast(dW) if times > 1 else dW)

    found, said = Planted(place, name, seed, size, made).judged()
    assert found.holds
    assert said is None
    assert not any(one.turned or one.off_scale or one.rounded_to for one in found.changed)


@given(seed=seeds, width=st.sampled_from([32, 64]))
def test_a_base_that_is_kept_in_few_bits_itself_is_merged_right(place, seed, width):
    """Its numbers stand on the grid: there is nothing that rounding would change."""
    planted = Planted(place, "F32", seed, 1.0, lambda _, W0, dW: W0)
    tensors = load_file(place / "base" / "model.safetensors")
    on_grid = {k: by_blocks(v, width, int8).astype("float32") if v.ndim == 2 else v for k, v in tensors.items()}
    save_file(on_grid, place / "base" / "model.safetensors")
    shutil.rmtree(place / "merged")
    merge_folder(place / "base", [place / "ad"], [1.0], place / "merged")
    found, said = planted.judged()
    assert found.holds
    assert said is None


# --- Tied heads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tied(tmp_path):
    """A tied base of a table and a matrix."""
    rng = np.random.default_rng(5)
    table, q = rng.standard_normal((32, D), "float32"), rng.standard_normal((D, D), "float32")
    for folder in ("base", "ad"):
        (tmp_path / folder).mkdir()
    tensors = {"model.embed_tokens.weight": table, "model.layers.0.self_attn.q_proj.weight": q}
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    about = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(about))
    return tmp_path, rng


def adapt(home, rng, module, n_out, n_in, names):
    """An adapter of one module, and the merge."""
    A, B = rng.standard_normal((R, n_in), "float32"), rng.standard_normal((n_out, R), "float32")
    keys = [f"base_model.model.{module}.{name}" for name in names]
    save_file(dict(zip(keys, (A, B), strict=True)), home / "ad" / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": [module.rpartition(".")[2]]}
    (home / "ad" / "adapter_config.json").write_text(json.dumps(about))
    merge_folder(home / "base", [home / "ad"], [1.0], home / "merged")


def edited(home, change):
    edit_tensors(home / "merged" / "model.safetensors", change)
    plan = plan_merge(home / "base", [home / "ad"], [1.0])
    found = compare(plan, home / "merged", 1)
    return found, explained(found, plan.scales)


def test_a_head_that_was_left_out_where_the_merge_unties_it(tied):
    home, rng = tied
    adapt(home, rng, "model.embed_tokens", D, 32, ["lora_embedding_A", "lora_embedding_B"])
    assert edited(home, lambda tensors: None)[0].holds
    found, said = edited(home, lambda tensors: tensors.pop("lm_head.weight"))
    assert not found.holds
    assert found.missing == ["lm_head.weight"]
    assert said == "lm_head.weight left out, as if it were still the token table, of which the adapter changes one end"


def test_a_copy_of_the_table_as_the_head_is_no_fault(tied):
    home, rng = tied
    adapt(home, rng, "model.layers.0.self_attn.q_proj", D, D, ["lora_A.weight", "lora_B.weight"])

    def write_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def another_head(tensors):
        tensors["lm_head.weight"][3, 3] += 1

    assert edited(home, write_head)[0].holds
    found, _ = edited(home, another_head)
    assert found.extra == ["lm_head.weight"]
    assert not found.holds


# --- What is shown ---------------------------------------------------------------------------------------------------


def test_the_lines_and_the_table(place, capsys):
    """At most ten tensors, the worst first; all of them in JSON."""
    Planted(place, "F32", 1, 1.0, lambda _, W0, dW: W0 + dW * (2.0 if dW.shape[0] == D else 1.5))
    argv = ["verify", "--base", place / "base", "--adapter", place / "ad", "--merged", place / "merged"]
    assert cli.main([str(part) for part in argv]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "  it looks like self_attn.q_proj in all 3 layers, self_attn.v_proj in all 3 layers: merged twice; " in (
        "\n".join(lines) + "\n"
    )
    at = next(i for i, line in enumerate(lines) if line.split()[:1] == ["tensor"])
    assert sum(line.startswith("  model.layers.") for line in lines[at:]) == 9
    assert lines[at + 1].endswith(("merged twice", "1.5 times the update"))
    assert cli.main([str(part) for part in (*argv, "--json")]) == 1
    changed = json.loads(capsys.readouterr().out)["merged"]["changed"]
    assert {one["tensor"]: one["looks_like"] for one in changed} == {
        f"{m}.weight": "1.5 times the update" if m.endswith("up_proj") else "merged twice" for m in modules()
    }
