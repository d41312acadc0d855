"""The benchmarks: every one of them runs, on tiny sizes and without peers; operations are counted as they are made."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

import lora_np as ln
from bench import figures, readme
from bench.__main__ import BENCHES, main
from bench.decode import bytes_a_token
from bench.figures import Figure, Run
from bench.flops import forward_flops, step_flops
from bench.models import WORKS, work
from bench.options import Options
from bench.timing import timed
from lora_np import lora, transformer

# --- Runs ------------------------------------------------------------------------------------------------------------

UNITS = {"s", "B", "GFLOP/s", "GB/s", "GFLOP", "FLOP/B", "tokens/s", "share", "x"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The file that a quick run of all of them writes."""
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    main(["all", "--quick", "--alone", "--rounds", "2", "--json", str(path)])
    return path


def test_a_run_is_written_with_its_environment_and_every_round(quick):
    raw = json.loads(quick.read_text())
    assert raw.keys() == {"environment", "figures"}
    assert raw["environment"].keys() >= {"date", "cores", "backend", "python", "numpy"}
    assert raw["environment"]["sizes"] == "tiny"
    for row in raw["figures"]:
        assert row.keys() == {"bench", "case", "what", "unit", "values", "median", "least", "most"}
        assert row["unit"] in UNITS
        assert row["least"] <= row["median"] <= row["most"]
        assert all(value > 0 for value in row["values"])
        assert len(row["values"]) <= 2
    keys = [(row["bench"], row["case"], row["what"]) for row in raw["figures"]]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("bench", "unit", "whats"),
    [
        ("ops", "share", {"share of the roofline"}),
        ("step", "s", {"lora_np: LoRA", "lora_np: every weight"}),
        ("memory", "B", {"lora_np: LoRA", "lora_np: every weight", "N=2", "N=8"}),
        ("decode", "tokens/s", {"lora_np", "the memory's limit"}),
        ("merge", "x", {"merged / base", "unmerged / base"}),
        ("switch", "s", {"lora_np: unmerge, merge"}),
        ("scaling", "s", {"N=1", "T=8", "layers=1", "r=2"}),
        ("peers", "B", {"lora_np"}),
    ],
)
def test_every_benchmark_gives_its_figures(quick, bench, unit, whats):
    assert whats <= {f.what for f in figures.read(quick).of(bench) if f.unit == unit}


def test_each_primitive_is_measured_forward_and_backward(quick):
    """As many cases as lora_np.ops and lora.lora_linear have functions that take part in a pass."""
    measured = {f.case.split(",")[0] for f in figures.read(quick).of("ops")}
    forwards = {"linear", "lora_linear", "embedding", "pick", "layer_norm", "rms_norm", "gelu", "gelu_tanh", "silu"}
    assert measured >= forwards | {"softmax", "attention", "rotary", "dropout", "dropout_mask", "cross_entropy"}


def test_list_names_every_benchmark(capsys):
    main(["list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHES)


def test_pictures_are_drawn(quick, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures: pip install lora-np[plot]")
    from bench import plots

    plots.draw(tmp_path, figures.read(quick))
    assert {path.name for path in tmp_path.iterdir()} == {"roofline.png", "scaling.png", "memory.png"}  # no peers: none


@pytest.mark.parametrize("argv", [["nonsense"], ["all", "--rounds", "0"], ["compare", "one.json"], ["table"]])
def test_what_is_not_understood_is_said(argv, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert "expected" in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"figures": [1]}')
    with pytest.raises(ValueError, match=r"other\.json: expected a file that"):
        figures.read(path)


def test_a_missing_package_is_said_and_the_side_left_out(capfd):
    from bench.measure import Side, measure

    sides = [Side("here", "bench.peers:ours", {"M": 2, "D": 4, "r": 1}), Side("absent", "bench.no_such_module:f")]
    assert measure(sides, Options(rounds=1, quick=True)).keys() == {"here"}
    assert "absent: left out: No module named 'bench.no_such_module'" in capfd.readouterr().err


def test_each_thread_has_cases_of_its_own():
    seen = []
    _, value = timed([lambda: seen.append("a") or 1, lambda: seen.append("b") or 2], calls=3)
    assert (sorted(seen), value) == (["a"] * 3 + ["b"] * 3, 1)


# --- One run beside another ------------------------------------------------------------------------------------------


def a_run(**values):
    """A run of figures of seconds, by their names."""
    return Run({"numpy": "2.0"}, [Figure("step", "a model", what, "s", list(v)) for what, v in values.items()])


def test_compare_finds_what_changed():
    before = a_run(slower=[1.0, 1.1, 1.2], same=[1.0, 1.1, 1.2], faster=[2.0, 2.0], gone=[1.0])
    after = a_run(slower=[1.3, 2.2, 2.5], same=[1.2, 1.3, 1.4], faster=[1.0, 1.9], new=[1.0])
    found = {change.after.what: change for change in figures.compare(before, after)}
    assert {what: change.outside for what, change in found.items()} == {"slower": True, "same": False, "faster": True}
    assert found["slower"].ratio == pytest.approx(2.0)
    text = figures.comparison(before, after._replace(environment={"numpy": "2.4"}))
    assert "numpy: 2.0 -> 2.4" in text
    assert [line.split(": ")[2].split()[0] for line in text.splitlines() if line.startswith("* step")] == [
        "slower",
        "faster",
    ]
    assert "only in the first: step: a model: gone" in text
    assert "only in the second: step: a model: new" in text


def test_compare_on_the_command_line(quick, capsys):
    main(["compare", str(quick), str(quick)])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("  ") and line.endswith(" 1.000") for line in lines[:-1])
    assert len(lines) == 1 + len(figures.read(quick).figures)


def test_a_quotient_is_taken_round_by_round():
    run = a_run(theirs=[2.0, 9.0, 4.0], ours=[1.0, 3.0, 2.0])
    ratio = run.figures[0].over(run.figures[1])
    assert (ratio.what, ratio.unit, ratio.values, ratio.median) == ("theirs / ours", "x", [2.0, 3.0, 2.0], 2.0)


# --- The README's table ----------------------------------------------------------------------------------------------


def test_the_table_is_written_between_its_marks(tmp_path):
    path, case = tmp_path / "README.md", work("gpt2").case
    ours, theirs = (
        Figure("step", case, what, "s", v) for what, v in (("lora_np: LoRA", [2.0]), ("PyTorch + PEFT", [3.0]))
    )
    run = Run({"date": "2026-01-02", "processor": "a processor"}, [ours, theirs, theirs.over(ours)])
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.write(path, run)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "2.00 s" in text
    assert "3.00 s" in text
    assert "1.50x" in text
    assert "2026-01-02" in text
    readme.write(path, run)
    assert path.read_text() == text  # the same again
    path.write_text("no marks")
    with pytest.raises(ValueError, match="README"):
        readme.write(path, run)
    assert path.read_text() == "no marks"


def test_a_quick_run_is_no_table(quick, tmp_path):
    with pytest.raises(ValueError, match="tiny"):
        readme.write(tmp_path / "README.md", figures.read(quick))


# --- Operations ------------------------------------------------------------------------------------------------------


class Counter:
    """Operations of the products that are made, counted where they are made."""

    def __init__(self, monkeypatch):
        self.flops = 0.0
        for module in (transformer, lora):
            for name, count in {
                "linear": lambda x, W: x.size * W.shape[0],  # (..., in) (out, in)
                "linear_backward": lambda dy, W: dy.size * W.shape[1],  # (..., out) (out, in)
                "linear_weight_backward": lambda dy, x: dy.size * x.shape[-1],  # (..., out) (..., in)
            }.items():
                if hasattr(module, name):
                    self._watch(monkeypatch, module, name, count)
        self._watch(monkeypatch, transformer, "attention", lambda q, k: 2 * q.size * k.shape[2])  # q k^T; p v
        self._watch(monkeypatch, transformer, "attention_backward", lambda dy, saved: 4 * dy.size * saved.k.shape[-2])

    def _watch(self, monkeypatch, module, name, count):
        original = getattr(module, name)

        def watched(a, b, *rest, **options):
            self.flops += 2 * count(a, b)
            return original(a, b, *rest, **options)

        monkeypatch.setattr(module, name, watched)


LORAS = [
    ln.LoRAConfig(r=2),
    ln.LoRAConfig(r=3, targets=("k", "o", "down"), rank_pattern={"o": 1}),
    ln.LoRAConfig(r=2, targets=("down",)),
    ln.LoRAConfig(r=2, targets=("up",), layers=(1,)),
    ln.LoRAConfig(r=1, targets=("q", "head")),
]


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize("lora_config", [*LORAS, None], ids=lambda c: "all" if c is None else "-".join(c.targets))
def test_the_products_of_a_step_are_counted_as_they_are_made(name, lora_config, monkeypatch):
    w = work(name, quick=True, N=3)
    if lora_config is not None and w.lora.train_head:
        lora_config = replace(lora_config, train_head="head" not in lora_config.targets)
    model, batch = w.model(), w.batch()
    adapter = None if lora_config is None else ln.init_adapter(model, lora_config, seed=0)
    counter = Counter(monkeypatch)
    ln.loss_and_grads(model, adapter, *batch, trainable="all" if adapter is None else "adapter")
    assert counter.flops == step_flops(w.config, w.N, w.T, lora_config)


@pytest.mark.parametrize("name", WORKS)
def test_the_products_of_a_forward_pass_are_counted_as_they_are_made(name, monkeypatch):
    w = work(name, quick=True)
    model, counter = w.model(), Counter(monkeypatch)
    adapter = ln.init_adapter(model, w.lora, seed=0)
    ln.forward(model, w.batch()[0], adapter)
    assert counter.flops == forward_flops(w.config, w.N, w.T, w.lora)


def test_gpt2s_step_is_two_operations_a_weight_and_token_each_way():
    """By algebra, LoRA on q and v: each matrix twice, but once the lowest q, k and v; attention three times."""
    w = work("gpt2")
    D, F, V, L, M, T, r = 768, 3072, 50257, 12, 4 * 256, 256, 8
    matrices = L * (4 * D * D + 2 * D * F) + V * D
    attention = 3 * L * 2 * D * T
    branches = 2 * L * (2 * 3 * r * D) - 2 * r * D  # forward A, B; backward g B, dB, dA, (g B) A, but for the lowest
    assert step_flops(w.config, w.N, w.T, w.lora) == 2.0 * M * (2 * matrices - 3 * D * D + attention + branches)
    assert 525e9 < step_flops(w.config, w.N, w.T, w.lora) < 535e9


def test_decoding_reads_every_weight_but_those_looked_up():
    """SmolLM2's table is its head: all is read. GPT-2's positions give one row."""
    smollm2, gpt2 = (work(name).config for name in ("smollm2", "gpt2"))
    whole = {c: 4 * sum(int(np.prod(shape)) for shape in c.weight_shapes().values()) for c in (smollm2, gpt2)}
    assert bytes_a_token(smollm2) == whole[smollm2]
    assert bytes_a_token(gpt2) == whole[gpt2] - 4 * 768 * (gpt2.n_positions - 1)


def test_titles_name_sizes():
    assert re.fullmatch(r"GPT-2 small, N=2, T=64, r=4", work("gpt2", N=2, T=64, r=4).case)
