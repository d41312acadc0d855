"""What PEFT's configuration may ask for, a rule a row: the merged folder computes what PEFT's model does unmerged.

PEFT's own merge is no judge of a tied head: it changes the table under both ends. The adapter is judged as it runs, in
float64; float32 weights are rounded once, so logits differ by some 2^-24 of the largest.
"""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_np as ln
from lora_np import cli
from lora_np.formats.merged.combined import combine_files
from lora_np.formats.merged.folder import merge_folder

families = pytest.importorskip("families", reason="the extra peers")
torch, peft = families.torch, families.peft
pytestmark = families.QUIET
PREFIX, CLOSE = "base_model.model.", 1e-6
Q, TIED = {"target_modules": ["q_proj"]}, {"tie_word_embeddings": True}
EMBED, HEAD = "model.embed_tokens", "lm_head"
ATTN, MAGNITUDE = "model.layers.0.self_attn", "lora_magnitude_vector"
MLM = "cls.predictions.decoder"
ROWS = "token_adapter.trainable_tokens_delta"


def save(*modules):
    return {**Q, "modules_to_save": list(modules)}


def dora(*modules, **more):
    return {"target_modules": list(modules), "use_dora": True, **more}


def rows(tokens):
    return {**Q, "trainable_token_indices": tokens}


def params(*names, **more):
    return {"target_modules": [], "target_parameters": list(names), **more}


# A rule: the family, what its configuration has beside, the vocabulary's new size, what PEFT is asked for, and keys
# that PEFT writes for it.
RULES = {
    "rows": ("llama", {}, None, rows([3, 9, 11]), [f"{EMBED}.{ROWS}"]),
    "rows-by-module": ("llama", {}, None, rows({"embed_tokens": [3, 9], "lm_head": [5]}), [f"{HEAD}.{ROWS}"]),
    "rows-tied": ("llama", TIED, None, rows([3, 9]), [f"{EMBED}.{ROWS}"]),
    "rows-tied-apart": (
        "llama",
        TIED,
        None,
        rows({"embed_tokens": [3, 9], "lm_head": [5]}),
        [f"{EMBED}.{ROWS}", f"{HEAD}.{ROWS}"],
    ),
    "rows-tying": ("llama", TIED, None, {**rows([3, 9]), "ensure_weight_tying": True}, [f"{EMBED}.{ROWS}"]),
    "rows-gpt2": (
        "gpt2",
        {},
        None,
        {"target_modules": ["c_attn"], "trainable_token_indices": [3]},
        [f"transformer.wte.{ROWS}"],
    ),
    "rows-new": ("llama", {}, 70, rows([65, 66]), [f"{EMBED}.token_adapter.base_layer.weight"]),
    "rows-new-tied": ("llama", TIED, 70, rows([65, 66]), [f"{HEAD}.token_adapter.base_layer.weight"]),
    "whole": ("llama", {}, None, save("embed_tokens", "lm_head"), [f"{EMBED}.weight", f"{HEAD}.weight"]),
    "whole-tied": ("llama", TIED, None, save("embed_tokens", "lm_head"), [f"{EMBED}.weight", f"{HEAD}.weight"]),
    "whole-table-tied": ("llama", TIED, None, save("embed_tokens"), [f"{EMBED}.weight"]),
    "whole-head-tied": ("llama", TIED, None, save("lm_head"), [f"{HEAD}.weight"]),
    "whole-table-tying": (
        "llama",
        TIED,
        None,
        {**save("embed_tokens"), "ensure_weight_tying": True},
        [f"{EMBED}.weight", f"{HEAD}.weight"],
    ),
    "whole-head-tying": ("llama", TIED, None, {**save("lm_head"), "ensure_weight_tying": True}, [f"{EMBED}.weight"]),
    "whole-norms": ("llama", {}, None, save("norm", "input_layernorm"), ["model.layers.0.input_layernorm.weight"]),
    "whole-layer": ("llama", {}, None, save("layers.1.mlp"), ["model.layers.1.mlp.up_proj.weight"]),
    "grown": ("llama", {}, 70, Q, [f"{EMBED}.weight", f"{HEAD}.weight"]),
    "grown-tied": ("llama", TIED, 70, Q, [f"{EMBED}.weight", f"{HEAD}.weight"]),
    "grown-gpt2": ("gpt2", {}, 70, {"target_modules": ["c_attn"]}, ["transformer.wte.weight", f"{HEAD}.weight"]),
    "grown-whole": (  # three copies of each
        "llama",
        {},
        70,
        save("embed_tokens", "lm_head"),
        [f"{EMBED}.weight", f"{EMBED}.modules_to_save.weight", f"{EMBED}.original_module.weight"],
    ),
    "grown-whole-tied": (
        "llama",
        TIED,
        70,
        {**save("embed_tokens"), "ensure_weight_tying": True},
        [f"{HEAD}.modules_to_save.weight"],
    ),
    "grown-adapted": (
        "llama",
        {},
        70,
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        [f"{EMBED}.base_layer.weight", f"{EMBED}.lora_embedding_A"],
    ),
    "shrunk-whole": ("llama", {}, 60, save("embed_tokens", "lm_head"), [f"{HEAD}.modules_to_save.weight"]),
    "table": ("llama", {}, None, {"target_modules": ["embed_tokens"]}, [f"{EMBED}.lora_embedding_B"]),
    "table-tied": ("llama", TIED, None, {"target_modules": ["embed_tokens"]}, [f"{EMBED}.lora_embedding_B"]),
    "table-tying": (
        "llama",
        TIED,
        None,
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        [f"{HEAD}.lora_A.weight", f"{EMBED}.lora_embedding_B"],
    ),
    "head-tied": ("llama", TIED, None, {"target_modules": ["lm_head"]}, [f"{HEAD}.lora_B.weight"]),
    "head-gpt2": ("gpt2", {}, None, {"target_modules": ["lm_head"]}, [f"{HEAD}.lora_B.weight"]),
    "both-tied": ("llama", TIED, None, {"target_modules": ["embed_tokens", "lm_head"]}, [f"{HEAD}.lora_B.weight"]),
    "positions": ("gpt2", {}, None, {"target_modules": ["wpe"]}, ["transformer.wpe.lora_embedding_A"]),
    "table-bloom": ("bloom", {}, None, {"target_modules": ["word_embeddings"]}, []),
    "table-opt": ("opt", {}, None, {"target_modules": ["embed_tokens"]}, []),
    "table-neox": ("gpt_neox", {}, None, {"target_modules": ["embed_in", "embed_out"]}, []),
    "head-neox": ("gpt_neox", {}, None, {"target_modules": ["lm_head"]}, ["lm_head.lora_B.weight"]),
    "table-bert": ("bert", {}, None, {"target_modules": ["word_embeddings"]}, []),
    "table-roberta": ("roberta", {}, None, {"target_modules": ["word_embeddings", "query"]}, []),
    "table-distilbert": ("distilbert", {}, None, {"target_modules": ["word_embeddings"]}, []),
    "table-electra": ("electra", {}, None, {"target_modules": ["word_embeddings"]}, []),
    "table-albert": ("albert", {}, None, {"target_modules": ["word_embeddings"]}, []),
    "table-modernbert": ("modernbert", {}, None, {"target_modules": ["tok_embeddings"]}, []),
    "head-bert": ("bert", {}, None, {"target_modules": ["decoder"]}, [f"{MLM}.lora_B.weight"]),
    "whole-head-bert": (
        "bert",
        {},
        None,
        {"target_modules": ["query"], "modules_to_save": ["decoder"]},
        [f"{MLM}.weight", f"{MLM}.bias"],
    ),
    "whole-cls-bert": ("bert", {}, None, {"target_modules": ["query"], "modules_to_save": ["cls"]}, [f"{MLM}.bias"]),
    "head-whisper": ("whisper", {}, None, {"target_modules": ["proj_out"]}, ["proj_out.lora_B.weight"]),
    "head-t5": ("t5", {}, None, {"target_modules": ["lm_head"]}, ["lm_head.lora_B.weight"]),
    "head-llava": ("llava", {}, None, {"target_modules": ["lm_head"]}, ["lm_head.lora_B.weight"]),
    "dora": ("llama", {}, None, dora("q_proj", "v_proj", "down_proj"), [f"{ATTN}.q_proj.{MAGNITUDE}"]),
    "dora-conv1d": ("gpt2", {}, None, dora("c_attn", "c_proj", "c_fc"), [f"transformer.h.0.attn.c_attn.{MAGNITUDE}"]),
    "dora-fused": ("phi3", {}, None, dora("qkv_proj", "gate_up_proj"), [f"{ATTN}.qkv_proj.{MAGNITUDE}"]),
    "dora-table": ("llama", {}, None, dora("embed_tokens", "lm_head"), [f"{EMBED}.{MAGNITUDE}", f"{HEAD}.{MAGNITUDE}"]),
    "dora-table-tied": ("llama", TIED, None, dora("embed_tokens"), [f"{EMBED}.{MAGNITUDE}"]),
    "dora-head-tied": ("gpt2", {}, None, dora("lm_head"), [f"{HEAD}.{MAGNITUDE}"]),
    "dora-positions": ("gpt2", {}, None, dora("wpe", "wte"), [f"transformer.wpe.{MAGNITUDE}"]),
    "dora-grown": ("llama", {}, 70, dora("q_proj", "embed_tokens", "lm_head"), [f"{EMBED}.{MAGNITUDE}"]),
    "dora-biases": ("qwen2", {}, None, dora("q_proj", bias="lora_only"), [f"{ATTN}.q_proj.{MAGNITUDE}"]),
    "dora-patterns": (
        "llama",
        {},
        None,
        dora("q_proj", "v_proj", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        [f"{ATTN}.v_proj.{MAGNITUDE}"],
    ),
    "dora-whole": ("llama", {}, None, dora("q_proj", modules_to_save=["norm"]), [f"{ATTN}.q_proj.{MAGNITUDE}"]),
    "dora-rows": ("llama", {}, None, dora("q_proj", trainable_token_indices=[3, 9]), [f"{ATTN}.q_proj.{MAGNITUDE}"]),
    "dora-bert": ("bert", {}, None, dora("query", "dense"), []),
    "dora-t5": ("t5", {}, None, dora("q", "wo"), []),
    "biases": ("qwen2", {}, None, {**Q, "bias": "all"}, ["model.layers.0.self_attn.q_proj.base_layer.bias"]),
    "biases-adapted": (
        "qwen2",
        {},
        None,
        {**Q, "bias": "lora_only"},
        ["model.layers.0.self_attn.q_proj.base_layer.bias"],
    ),
    "biases-tied": ("bert", {}, None, {"target_modules": ["query"], "bias": "all"}, ["cls.predictions.bias"]),
    "biases-tied-table": (
        "bert",
        {},
        None,
        {"target_modules": ["word_embeddings"], "bias": "all"},
        ["cls.predictions.bias"],
    ),
    "bias-of-B": ("qwen2", {}, None, {**Q, "lora_bias": True}, ["model.layers.0.self_attn.q_proj.lora_B.bias"]),
    "layers": ("llama", {}, None, {**Q, "layers_to_transform": [1]}, []),
    "layers-by-list": ("llama", {}, None, {**Q, "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}, []),
    "excluded": ("llama", {}, None, {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, []),
    "expression": ("llama", {}, None, {"target_modules": r".*layers\.[01]\.(mlp\.up_proj|self_attn\.o_proj)"}, []),
    "patterns": (
        "llama",
        {},
        None,
        {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "v_proj": 3},
            "alpha_pattern": {r".*1.*v_proj": 9, "self_attn.q_proj": 5},
            "use_rslora": True,
        },
        [],
    ),
    "square-conv1d": ("gpt2", {}, None, {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True}, []),
    "gaussian": ("llama", {}, None, {**Q, "init_lora_weights": "gaussian"}, []),
    "orthogonal": ("llama", {}, None, {**Q, "init_lora_weights": "orthogonal"}, []),
    "mica": ("llama", {}, None, {**Q, "init_lora_weights": "mica"}, []),
    "experts": (
        "qwen3_moe",
        {},
        None,
        params("experts.down_proj", "experts.gate_up_proj"),
        ["model.layers.0.mlp.experts.base_layer.lora_A.weight", "model.layers.0.mlp.experts.lora_A.weight"],
    ),
    "experts-up": ("qwen3_moe", {}, None, params("experts.gate_up_proj"), []),
    "experts-down": ("qwen3_moe", {}, None, params("experts.down_proj", use_rslora=True), []),
    "experts-square": ("qwen3_moe", {"moe_intermediate_size": 16}, None, params("experts.down_proj"), []),
    "experts-one": ("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1}, None, params("gate_up_proj"), []),
    "experts-patterns": (
        "qwen3_moe",
        {},
        None,
        params(
            "experts.down_proj",
            "experts.gate_up_proj",
            rank_pattern={"experts.gate_up_proj": 2},
            alpha_pattern={r".*1.*down_proj": 5},
        ),
        [],
    ),
    "experts-all-linear": (
        "qwen3_moe",
        {},
        None,
        {"target_modules": "all-linear"},
        ["model.layers.0.mlp.gate.lora_A.weight", "model.layers.0.mlp.experts.base_layer.lora_A.weight"],
    ),
    "experts-mixtral-all-linear": ("mixtral", {}, None, {"target_modules": "all-linear"}, []),
    "experts-mixtral-old-names": ("mixtral", {}, None, {"target_modules": ["w1", "w2", "w3", "q_proj"]}, []),
    "router": ("qwen3_moe", {}, None, params("mlp.gate.weight"), ["model.layers.0.mlp.gate.lora_A.weight"]),
    "experts-turned": ("gpt_oss", {}, None, params("experts.down_proj", "experts.gate_up_proj"), []),
    "experts-turned-square": ("gpt_oss", {"intermediate_size": 8}, None, params("experts.gate_up_proj"), []),
    "experts-turned-down": ("gpt_oss", {}, None, params("experts.down_proj"), []),  # (E, 16, 16): square
    "experts-llama4": ("llama4", {}, None, params("experts.down_proj", "experts.gate_up_proj"), []),
}  # fmt: skip


def logits(model, family):
    """Of ten tokens; of an encoder with a decoder, also of four that are known."""
    tokens = torch.arange(2, 12)[None]
    given = {"input_ids": tokens}
    if family in ("t5", "whisper"):
        given["decoder_input_ids"] = tokens[:, :4]
    if family == "whisper":
        del given["input_ids"]
        given["input_features"] = torch.ones(1, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        return model(**given).logits


def opened(path, family):
    """A folder as transformers opens it: every key is used, and none is missing."""
    prefix, _, end, _ = families.FAMILIES[family]
    model, info = getattr(families.T, prefix + end).from_pretrained(
        str(path), output_loading_info=True, dtype=torch.float64, experts_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def adapted(home, family, sizes, vocabulary, settings):
    """A base in float32, PEFT's random adapter on it, and PEFT's model in float64."""
    families.make(family, torch.float32, seed=1, **sizes).save_pretrained(str(home / "base"))
    model = opened(home / "base", family).float()
    if vocabulary:
        torch.manual_seed(3)
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    module = families.adapted(model, settings, torch.float32, seed=2)
    module.save_pretrained(str(home / "ad"))
    return module.to(torch.float64).eval()


def run(capsys, *argv):
    """A command's status and what it says, in JSON."""
    capsys.readouterr()
    status = cli.main([str(part) for part in (*argv, "--json")])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.proves("L5")
@pytest.mark.parametrize(("family", "sizes", "vocabulary", "settings", "keys"), RULES.values(), ids=RULES)
def test_a_merge_computes_what_pefts_model_does(tmp_path, capsys, family, sizes, vocabulary, settings, keys):
    """And verify says that it is the merge, with no remark: these are PEFT's own files."""
    module = adapted(tmp_path, family, sizes, vocabulary, settings)
    assert {PREFIX + key for key in keys} <= load_file(tmp_path / "ad" / "adapter_model.safetensors").keys()
    before = logits(opened(tmp_path / "base", family), family)
    due = logits(module, family)
    assert merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out").remarks == []
    got = logits(opened(tmp_path / "out", family), family)
    assert (got - due).abs().max() <= CLOSE * due.abs().max()
    assert due.shape != before.shape or (due - before).abs().max() > 100 * CLOSE * due.abs().max()
    folders = ("--base", tmp_path / "base", "--adapter", tmp_path / "ad", "--merged", tmp_path / "out")
    status, found = run(capsys, "verify", *folders)
    assert status == 0, found


@pytest.mark.proves("L5", "L10")
@pytest.mark.parametrize("name", ["dora", "dora-conv1d", "dora-fused", "dora-patterns", "dora-biases", "dora-table"])
def test_dora_beside_pefts_merge_and_unload(tmp_path, name):
    """In float64 to some roundings: PEFT too multiplies each row of the sum by m over its norm."""
    family, sizes, _, settings, _ = RULES[name]
    base = families.make(family, torch.float64, seed=1, **sizes)
    base.save_pretrained(str(tmp_path / "base"))
    module = families.adapted(base, settings, torch.float64, seed=2)
    module.save_pretrained(str(tmp_path / "ad"))
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
    theirs = {key: value.numpy() for key, value in module.merge_and_unload().state_dict().items()}
    start, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    trunk = next(iter(ours)) not in theirs
    changed = set()
    for key, value in ours.items():
        due = theirs[f"transformer.{key}" if trunk else key]
        # c sums a row's squares, at most 64 of them; of each element a sum of r products, a quotient and a product.
        assert (np.abs(value - due) <= 100 * 2.0**-53 * np.abs(due).max()).all()
        changed |= {target for target in settings["target_modules"] if target in key and (value != start[key]).any()}
    assert changed == set(settings["target_modules"])


@pytest.mark.parametrize(
    ("adapters", "weights"), [(["ad"], [0.5]), (["ad", "ad"], [1.0, 1.0]), (["ad", "plain"], [1.0, 0.5])], ids=str
)
def test_a_weighted_sum_with_dora_is_refused(tmp_path, capsys, adapters, weights):
    adapted(tmp_path, "llama", {}, None, {**Q}).save_pretrained(str(tmp_path / "plain"))
    adapted(tmp_path, "llama", {}, None, dora("q_proj"))
    given = [part for one in adapters for part in ("--adapter", tmp_path / one)]
    argv = ["merge", "--base", tmp_path / "base", *given, "--weights", *weights, "--out", tmp_path / "out"]
    assert cli.main([str(part) for part in argv]) == 2
    assert "DoRA scales the rows of W0 + s B A, which is no sum of updates (L10)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="DoRA scales the rows of"):
        combine_files([tmp_path / one for one in adapters], weights, tmp_path / "out")


# --- What is refused, and its reason ---------------------------------------------------------------------------------

OTHER_METHODS = {
    "VERA": lambda: peft.VeraConfig(r=4, **Q),
    "LOHA": lambda: peft.LoHaConfig(r=4, **Q),
    "LOKR": lambda: peft.LoKrConfig(r=4, **Q),
    "ADALORA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **Q),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **Q),
    "OFT": lambda: peft.OFTConfig(r=4, oft_block_size=0, **Q),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **Q),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=10, **Q),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]),
}
# Settings of LoRA that make something else of it, and how it is called; a start that changes the base has a way out.
OTHER_LORA = {
    "aLoRA": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
    "BD-LoRA": {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
    "QALoRA": {"use_qalora": True},
    "KaSA": {"kasa_config": {"beta": 0.0001, "gamma": 0.001}},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA-iterations": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
}
WAY_OUT = "path_initial_model_for_weight_conversion"


def refusals(home, capsys):
    """What each command says of the adapter in home/ad, in one line each."""
    base = ("--base", home / "base", "--adapter", home / "ad")
    said = []
    for argv in (("merge", *base, "--out", home / "out"), ("verify", *base), ("inspect", home / "ad")):
        capsys.readouterr()
        assert cli.main([str(part) for part in argv]) == 2
        said.append(capsys.readouterr().err)
    assert all(text.count("\n") == 1 for text in said)
    assert not (home / "out").exists()
    return said


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_another_method_is_refused_by_its_name(tmp_path, capsys, method):
    model = families.make("llama", torch.float32, seed=1)
    model.save_pretrained(str(tmp_path / "base"))
    peft.get_peft_model(model, OTHER_METHODS[method]()).save_pretrained(str(tmp_path / "ad"))
    assert all(f"peft_type: expected 'LORA', got '{method}'" in text for text in refusals(tmp_path, capsys))


@pytest.mark.parametrize("name", OTHER_LORA)
def test_what_is_no_plain_sum_is_refused_by_its_name(tmp_path, capsys, name):
    """The tensors are LoRA's own: the configuration alone tells that their product is not the update."""
    adapted(tmp_path, "llama", {}, None, Q)
    path = tmp_path / "ad" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **OTHER_LORA[name]}))
    said = refusals(tmp_path, capsys)
    assert all(name.partition("-it")[0] in text for text in said)
    assert all((WAY_OUT in text) == ("init_lora_weights" in OTHER_LORA[name]) for text in said)


@pytest.mark.proves("L5")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_way_out_is_one(tmp_path, start):
    """PEFT's conversion gives an adapter of twice the rank on the base as it was; it is merged as PEFT runs it."""
    model = families.make("llama", torch.float32, seed=1)
    model.save_pretrained(str(tmp_path / "base"))
    module = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=start, **Q))
    module.peft_config["default"].init_lora_weights = True  # what is saved first is the start as it is
    module.save_pretrained(str(tmp_path / "start"))
    module.peft_config["default"].init_lora_weights = start
    for name, value in module.named_parameters():
        if "lora_" in name:
            value.data += 0.1 * torch.randn_like(value)
    module.save_pretrained(str(tmp_path / "ad"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert load_file(tmp_path / "ad" / "adapter_model.safetensors")[
        f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
    ].shape == (8, 16)
    due = logits(module.to(torch.float64).eval(), "llama")
    merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
    got, before = (logits(opened(tmp_path / name, "llama"), "llama") for name in ("out", "base"))
    assert (got - due).abs().max() <= CLOSE * due.abs().max()
    assert (before - due).abs().max() > 100 * CLOSE * due.abs().max()


@pytest.mark.proves("L9", "L12")
def test_pissa_and_its_conversion_are_pefts(tmp_path):
    """The residual, s B A at the start, and the plain LoRA of the first base, as `combine` makes it; in float32.

    Singular directions have no sign, so products are compared. PEFT's SVD is float32: both are off by some 2^-24 of W0.
    """
    base = families.make("llama", torch.float32, seed=1)
    base.save_pretrained(str(tmp_path / "base"))
    model = ln.load_model(tmp_path / "base")
    W0 = {name: ln.asnumpy(model.weights[f"{name}.weight"]) for name in ("layers.0.attn.q", "layers.1.attn.q")}
    module = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", **Q))
    module.peft_config["default"].init_lora_weights = True
    module.save_pretrained(str(tmp_path / "start"))
    residual, start = ln.init_pissa(model, ln.LoRAConfig(r=4, alpha=6, targets=("q",)))
    theirs = ln.load_adapter(tmp_path / "start", model)
    for i, (name, W) in enumerate(W0.items()):
        close = 100 * 2.0**-24 * np.linalg.norm(W, 2)
        left = module.base_model.model.model.layers[i].self_attn.q_proj.base_layer.weight.detach().numpy()
        assert np.abs(update_of(theirs, name) - update_of(start, name)).max() <= close
        assert np.abs(left - ln.asnumpy(residual.weights[f"{name}.weight"])).max() <= close
        assert np.abs(left - W).max() > 100 * close
    for name, value in module.named_parameters():
        if "lora_" in name:
            value.data += 0.1 * torch.randn_like(value)
    module.save_pretrained(str(tmp_path / "trained"))
    module.peft_config["default"].init_lora_weights = "pissa"
    module.save_pretrained(str(tmp_path / "ad"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    trained, converted = (ln.load_adapter(tmp_path / folder, model) for folder in ("trained", "ad"))
    ours = ln.combine([trained, start], [1, -1])
    assert ours.config.r == converted.config.r == 8
    for name, W in W0.items():
        size = np.linalg.norm(W, 2) + np.abs(update_of(trained, name)).max()
        assert np.abs(update_of(ours, name) - update_of(converted, name)).max() <= 100 * 2.0**-24 * size


def update_of(adapter, name):
    """s B A of one matrix, in float64."""
    A, B = (ln.asnumpy(adapter.params[f"{name}.{factor}"]).astype("f8") for factor in "AB")
    return adapter.config.scale(name) * B @ A


def test_a_bias_that_the_layer_does_not_have_is_refused_as_peft_refuses_it(tmp_path):
    module = adapted(tmp_path, "llama", {}, None, {**Q, "lora_bias": True})
    with pytest.raises(RuntimeError, match="no bias"):
        module.merge_and_unload()
    with pytest.raises(ValueError, match=r"q_proj: lora_bias: .* has no bias there to add it to"):
        merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("pattern", "close"), [("k_proj", "q_proj"), ("experts", ""), (r".*\.up_proj", ""), ("down_prj", "down_proj")]
)
def test_a_pattern_that_fits_nothing_is_named(tmp_path, key, pattern, close):
    """The experts' parameters have their own names: their module's fits none of them, in PEFT either."""
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapted(tmp_path, "qwen3_moe", {}, None, settings)
    path = tmp_path / "ad" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: {pattern: 2}}))
    said = re.escape(f"{key}: {pattern!r}: no adapted module fits") + (f"; nearest are .*{close}" if close else "")
    with pytest.raises(ValueError, match=said):
        merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")


def test_copies_of_a_table_that_differ_are_refused(tmp_path):
    """PEFT saves a table that grew three times; which of two is meant, nothing says."""
    adapted(tmp_path, "llama", {}, 70, save("embed_tokens"))
    path = tmp_path / "ad" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{PREFIX}{EMBED}.weight"] = np.zeros_like(tensors[f"{PREFIX}{EMBED}.weight"])
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is there twice, and not the same"):
        merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")


@pytest.mark.parametrize("value", [3, "experts.down_proj", [1], {"experts": 1}])
def test_target_parameters_that_are_no_names(tmp_path, value):
    adapted(tmp_path, "llama", {}, None, Q)
    path = tmp_path / "ad" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_parameters": value}))
    with pytest.raises(ValueError, match="target_parameters: expected a list of names"):
        merge_folder(tmp_path / "base", [tmp_path / "ad"], [1.0], tmp_path / "out")
