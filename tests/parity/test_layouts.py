"""Adapters whose names PEFT would not find, written anew by `convert`, and loaded by PEFT; which modules it targets."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora_np import cli
from lora_np.formats.adapters.contents import read_contents
from lora_np.formats.adapters.keys import read_key
from lora_np.formats.adapters.targets import Known, candidates, mistargeted
from lora_np.formats.merged.folder import merge_folder

families = pytest.importorskip("families", reason="the extra peers")
torch, peft = families.torch, families.peft
pytestmark = [*families.QUIET, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # PEFT's, of what matches nothing
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
TOKENS = torch.arange(2, 12)[None]


def logits(module):
    with torch.no_grad():
        return module.to(torch.float64).eval()(input_ids=TOKENS).logits


def wrapped(key):
    key = key.replace(".layers.", "._orig_mod.layers.")
    return key.replace(".weight", ".default.weight") if ".lora_" in key else key


# How a program may have named PEFT's tensors.
NAMES = {
    "doubled": lambda key: PREFIX + key,
    "none": lambda key: key.removeprefix(PREFIX),
    "wrapped": wrapped,
    "missing": lambda key: key.replace(f"{PREFIX}model.", PREFIX),
    "twice": lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}model.model."),
    "towers": lambda key: key.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model."),
}
Q = {"target_modules": ["q_proj", "v_proj"], **families.PATTERNS}
SETTINGS = {
    "suffixes": Q,
    "expression": {"target_modules": r"model\.layers\.[01]\.self_attn\.(q|o)_proj", "use_rslora": True},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "norms": {**Q, "modules_to_save": ["input_layernorm"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    "tables": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows": {**Q, "trainable_token_indices": [3, 5]},
    "ranks": {
        **Q,
        "use_rslora": True,
        "rank_pattern": {r".*0\..*q_proj": 3},
        "alpha_pattern": {"v_proj": 5},
    },
}
PATHS = {  # of modules, in full, as PEFT's model has them
    "target_modules": [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")],
    "rank_pattern": {"^model.layers.0.self_attn.q_proj": 3, "model.layers.1.self_attn.v_proj": 5},
    "alpha_pattern": {"model.layers.0.self_attn.v_proj": 9, r"model\.layers\.1\.self_attn\.[q]_proj": 2},
    "modules_to_save": ["model.norm"],
    "trainable_token_indices": {"model.embed_tokens": [3, 5]},
}
SETTINGS["paths"] = PATHS
GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
EXPERTS = {
    "all": {"target_modules": ["q_proj"], "target_parameters": families.EXPERTS},
    "paths": {
        "target_modules": ["model.layers.1.self_attn.q_proj"], "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {DOWN: 2, r"q_pro[j]": 3}, "alpha_pattern": {GATE_UP: 5},
        "modules_to_save": ["model.layers.0.input_layernorm"], "trainable_token_indices": {"model.embed_tokens": [3]},
    },
}  # fmt: skip
CASES = [
    *((family, settings, name) for family in ("mistral", "llama") for settings in SETTINGS for name in NAMES),
    *((family, settings, name) for family in ("qwen3_moe", "gpt_oss") for settings in EXPERTS for name in NAMES),
]


def run(*argv):
    return cli.main([str(part) for part in argv])


@pytest.mark.proves("L1")
@pytest.mark.parametrize(("family", "settings", "name"), CASES)
def test_convert_writes_what_peft_loads(tmp_path, capsys, family, name, settings):
    """PEFT's model with the folder that was written computes what its model with its own file does."""
    settings = (EXPERTS if family in ("qwen3_moe", "gpt_oss") else SETTINGS)[settings]
    model = families.make(family, torch.float32, seed=1)
    model.save_pretrained(str(tmp_path / "base"))
    module = families.adapted(model, settings, torch.float32, seed=2)
    module.save_pretrained(str(tmp_path / "ad"))
    due = logits(module)
    path = tmp_path / "ad" / WEIGHTS
    tensors = {NAMES[name](key): value for key, value in load_file(path).items()}
    save_file(tensors, path)
    done = merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
    assert any(line.endswith("; lora-np convert writes a right file") for line in done.remarks)
    folders = ("--base", tmp_path / "base", "--adapter", tmp_path / "ad")
    assert run("verify", *folders) == 1
    assert run("convert", *folders, "--out", tmp_path / "right") == 0
    assert "lora-np convert writes a right file" in capsys.readouterr().out
    base = families.make(family, torch.float32, seed=1)
    before = logits(base).clone()
    got = logits(peft.PeftModel.from_pretrained(base.float(), str(tmp_path / "right")))
    assert (got - due).abs().max() <= 1e-9 * due.abs().max()
    assert (before - due).abs().max() > 1e-3 * due.abs().max()
    right = ("--base", tmp_path / "base", "--adapter", tmp_path / "right")
    assert run("verify", *right) == 0, capsys.readouterr().out


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_mlx_lms_adapter_becomes_pefts(tmp_path, family, dora):
    model = families.make(family, torch.float32, seed=1)
    model.save_pretrained(str(tmp_path / "base"))
    settings = {"target_modules": ["q_proj", "up_proj"], "use_dora": dora}
    module = families.adapted(model, settings, torch.float32, seed=2)
    due = logits(module)
    (tmp_path / "mlx").mkdir()
    tensors = {}
    for key, value in peft.get_peft_model_state_dict(module).items():
        stem = key.removeprefix(PREFIX).removesuffix(".weight")
        stem = stem.replace("lora_A", "lora_a").replace("lora_B", "lora_b").replace("lora_magnitude_vector", "m")
        tensors[stem] = value.float().numpy().T.copy()
    save_file(tensors, tmp_path / "mlx" / "adapters.safetensors")
    kind = "dora" if dora else "lora"
    about = {"fine_tune_type": kind, "lora_parameters": {"rank": 4, "scale": 1.5}}  # 6 / 4, as families has them
    (tmp_path / "mlx" / CONFIG).write_text(json.dumps(about))
    folders = ("--base", tmp_path / "base", "--adapter", tmp_path / "mlx", "--out", tmp_path / "right")
    assert run("convert", *folders) == 0
    base = families.make(family, torch.float32, seed=1)
    got = logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "right")))
    assert (got - due).abs().max() <= 1e-9 * due.abs().max()


def test_what_mlx_lm_trained_whole_is_refused(tmp_path, capsys):
    model = families.make("mistral", torch.float32, seed=1)
    model.save_pretrained(str(tmp_path / "base"))
    (tmp_path / "mlx").mkdir()
    q = "model.layers.0.self_attn.q_proj"
    ends = {f"{q}.lora_a": (16, 2), f"{q}.lora_b": (2, 16), "model.norm.weight": (16,)}
    save_file(
        {key: np.ones(shape, "float32") for key, shape in ends.items()}, tmp_path / "mlx" / "adapters.safetensors"
    )
    about = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2}}
    (tmp_path / "mlx" / CONFIG).write_text(json.dumps(about))
    folders = ("--base", tmp_path / "base", "--adapter", tmp_path / "mlx", "--out", tmp_path / "right")
    assert run("convert", *folders) == 2
    assert "model.norm.weight: trained whole" in capsys.readouterr().err
    assert not (tmp_path / "right").exists()


# --- Which modules are targeted --------------------------------------------------------------------------------------

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCKS = [f"{'mlp' if name[0] in 'gud' else 'self_attn'}.{name}" for name in LINEAR]
FULL = [f"model.layers.{i}.{name}" for i in range(2) for name in BLOCKS]
ENDINGS = st.lists(
    st.sampled_from([*LINEAR, *BLOCKS, *FULL, "layers.1.mlp.up_proj"]), min_size=1, max_size=4, unique=True
)
EXPRESSIONS = st.sampled_from(
    [r".*\.(q|k)_proj", r"model\.layers\.1\..*_proj", r".*mlp.*proj", r".*layers\.[0]\.self.*proj"]
)


@st.composite
def selections(draw):
    found = {"target_modules": draw(ENDINGS | EXPRESSIONS)}
    if draw(st.booleans()):
        found["exclude_modules"] = draw(ENDINGS | EXPRESSIONS)
    if isinstance(found["target_modules"], list) and draw(st.booleans()):
        found["layers_to_transform"] = draw(st.sampled_from([0, 1, [0], [1], [0, 1], []]))
        if found["layers_to_transform"] != [] and draw(st.booleans()):
            found["layers_pattern"] = draw(st.sampled_from(["layers", ["layers"], ["h", "layers"]]))
    if draw(st.booleans()):
        found["modules_to_save"] = draw(
            st.lists(st.sampled_from(["mlp", "layers.0", "up_proj"]), min_size=1, max_size=2)
        )
    return found


MODEL = None


def targeted_by_peft(settings):
    """The modules that PEFT adapts, of a tiny Llama."""
    global MODEL
    MODEL = MODEL or families.make("llama", torch.float32, seed=1)
    config = peft.LoraConfig(r=1, **settings)
    check = peft.tuners.tuners_utils.check_target_module_exists
    found = {name for name in FULL if check(config, name)}
    excluded = {name for name in FULL if isinstance(check(config, name), peft.tuners.tuners_utils._ExcludedModule)}
    return found - excluded


@given(settings=selections())
@example({"target_modules": ["q_proj"], "layers_to_transform": 0})
@example({"target_modules": ["mlp.up_proj", "q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"})
def test_what_is_targeted_is_what_peft_targets(tmp_path_factory, settings):
    """Of a file that has every module, the rest is not targeted; of one that has a few, the others are missing."""
    due = targeted_by_peft(settings)
    folder = tmp_path_factory.mktemp("ad")
    about = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, **settings}
    (folder / CONFIG).write_text(json.dumps(about))

    def write(names):
        keys = [f"{PREFIX}{name}.lora_{letter}.weight" for name in names for letter in "AB"]
        save_file({key: np.ones((1, 1), "float32") for key in keys}, folder / WEIGHTS)
        return read_contents(folder)

    def counted(lines, what):
        return sum(int(line.split()[1]) for line in lines if line.startswith("target_modules: ") and what in line)

    every = Known({name: name for name in FULL}, FULL, candidates(FULL, FULL))
    assert counted(mistargeted(write(FULL), every), "not targeted") == len(set(FULL) - due)
    few = FULL[:1] + FULL[-1:]
    some = Known({name: name for name in few}, FULL, candidates(few, FULL))
    assert counted(mistargeted(write(few), some), "targeted of which the file has no") == len(due - set(few))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj", "k_prj"]}, "target_modules: 'k_prj': no module fits; nearest are k_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layer.1"]}, "exclude_modules: 'layer.1': no module fits"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["nrm"]}, "modules_to_save: 'nrm': the file has no tensor"),
        ({"target_modules": ["q_proj", "k_proj"]}, "target_modules: 2 modules are targeted of which the file has no"),
        ({"target_modules": ["k_proj"]}, "target_modules: 2 modules of the file are not targeted"),
        ({"target_parameters": ["experts.up"]}, "target_parameters: 'experts.up': no module fits"),
    ],
)
def test_a_name_that_fits_nothing_is_said_and_verify_does_not_hold(tmp_path, capsys, settings, said):
    model = families.make("mistral", torch.float32, seed=1)
    model.save_pretrained(str(tmp_path / "base"))
    families.adapted(model, {"target_modules": ["q_proj"]}, torch.float32, seed=2).save_pretrained(str(tmp_path / "ad"))
    path = tmp_path / "ad" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    folders = ("--base", tmp_path / "base", "--adapter", tmp_path / "ad")
    capsys.readouterr()
    assert run("verify", *folders) == 1
    assert f"ad: {said}" in capsys.readouterr().out
    assert run("merge", *folders, "--out", tmp_path / "out") == 0
    assert f"ad: {said}" in capsys.readouterr().out


def methods():
    """The names of tensors of every method of PEFT's but LoRA."""
    for tuner in vars(peft.tuners).values():
        layer = getattr(tuner, "tuner_layer_cls", None)
        if isinstance(layer, type) and layer is not peft.tuners.lora.LoraLayer:
            yield from (name for name in layer.adapter_layer_names if not name.startswith("lora_"))


def test_every_other_method_of_pefts_is_known_by_its_tensors():
    known = {"trainable_tokens_delta"}  # which is LoRA's too
    names = set(methods()) - known
    assert len(names) > 40
    for name in names:
        with pytest.raises(ValueError, match=r"a tensor of .*, which is not supported; LoRA is"):
            read_key(f"{PREFIX}model.layers.0.q_proj.{name}.default.weight")


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_table_that_no_stack_looks_up_in_is_refused(tmp_path, family):
    """PEFT's model computes what the base does; merged it would not."""
    model = families.make(family, torch.float32, seed=1)
    model.save_pretrained(str(tmp_path / "base"))
    module = families.adapted(model, {"target_modules": ["shared"]}, torch.float32, seed=2)
    module.save_pretrained(str(tmp_path / "ad"))
    given = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}
    with torch.no_grad(), module.disable_adapter():
        before = module(**given).logits
    assert torch.equal(module(**given).logits, before)
    with pytest.raises(ValueError, match=r"shared: an update of this table is not supported"):
        merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
