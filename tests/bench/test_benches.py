"""Every benchmark runs, on tiny sizes and without peers, and what it finds is kept, drawn and compared."""

import io
import json
import re
import sys
from importlib.util import find_spec
from inspect import isfunction

import numpy as np
import pytest

from bench import figures, held, readme, scaling, step
from bench.__main__ import BENCHES, main
from bench.decode import bytes_a_token
from bench.measure import Side, Timing, measure
from bench.models import work
from bench.options import Options
from bench.timing import timed
from bench.worker import serve
from lora_np import ops

needs_gguf = pytest.mark.skipif(not find_spec("gguf"), reason="writes GGUF files: the extra models")
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
        pytest.param("held", "tokens/s", {"lora_np", "the memory's limit"}, marks=needs_gguf),
        ("merge", "x", {"merged / base", "unmerged / base"}),
        ("switch", "s", {"lora_np: unmerge, merge"}),
        ("load", "x", {"lora_np: peak / lora_np: what is kept"}),
        ("scaling", "s", {"N=1", "T=8", "layers=1", "r=2"}),
        ("large", "s", {"NF4, step", "Q4_0, step"}),
        ("peers", "B", {"lora_np"}),
    ],
)
def test_every_benchmark_gives_its_figures(quick, bench, unit, whats):
    assert whats <= {f.what for f in figures.read(quick).of(bench) if f.unit == unit}


def test_each_primitive_is_measured(quick):
    """Each public function of lora_np.ops, each backward among its forward's cases, but what is part of another, or
    belongs to loading."""
    measured = {f.case.split(",")[0] for f in figures.read(quick).of("ops")}
    public = {name for name, f in vars(ops).items() if isfunction(f) and f.__module__ == ops.__name__}
    forwards = {name for name in public if not name.startswith("_") and not name.endswith("_backward")}
    assert forwards - measured == {"erf", "rotary_angles", "llama3_factors"}
    assert "lora_linear" in measured


@pytest.mark.parametrize("argv", [[], ["list"]])
def test_list_names_every_benchmark(argv, capsys):
    main(argv)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHES)


def test_pictures_are_drawn(quick, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures: the extra plot")
    from bench import plots

    plots.draw(tmp_path, figures.read(quick))
    assert {path.name for path in tmp_path.iterdir()} == {"roofline.png", "scaling.png", "memory.png"}  # no peers: none


def test_no_number_of_the_roofline_covers_another_or_a_point():
    """Thirty primitives of which most stand close together, as products and norms do."""
    pytest.importorskip("matplotlib", reason="pictures: the extra plot")
    from matplotlib.text import Text

    from bench import plots

    rng = np.random.default_rng(0)
    found = [
        figures.Figure("ops", "the machine", what, unit, [value])
        for what, unit, value in (
            ("products, one product a core at once", "GFLOP/s", 450.0), ("memory, a = b + c", "GB/s", 60.0),
            ("memory, reading", "GB/s", 73.0),
        )
    ]  # fmt: skip
    for i in range(30):
        intensity, speed = (0.5, 6.0) if i < 16 else (80.0, 330.0) if i < 27 else (10.0 ** (i - 29), 1.0)
        x, y = intensity * rng.uniform(0.7, 1.4), speed * rng.uniform(0.7, 1.4)
        for what, value in (("operations", y), ("operations a byte", x), ("share of the roofline", 0.5)):
            found.append(figures.Figure("ops", f"primitive {i}", what, "", [value, value]))
    picture = plots.roofline(figures.Run({}, found))
    axes = picture.axes[0]
    picture.draw_without_rendering()
    numbers = [text for text in axes.texts if text.get_text().isdecimal()]
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines that lead to points
    assert [int(text.get_text()) for text in numbers] == list(range(1, 31))
    assert not [(i, j) for i, one in enumerate(boxes) for j, other in enumerate(boxes[:i]) if one.overlaps(other)]
    points = axes.transData.transform([line.get_xydata()[0] for line in axes.lines[1:] if line.get_marker() == "o"])
    assert len(points) == 30
    assert not [(i, tuple(at)) for i, box in enumerate(boxes) for at in points if box.contains(*at)]
    assert min(text.get_fontsize() for text in numbers) >= 9


@pytest.mark.parametrize("argv", [["nonsense"], ["all", "--rounds", "0"], ["compare", "one.json"], ["table"]])
def test_what_is_not_understood_is_said(argv, capsys):
    with pytest.raises(SystemExit):
        main(argv)
    assert "expected" in capsys.readouterr().err


def test_a_missing_package_is_said_and_the_side_left_out(capfd):

    sides = [Side("here", "bench.peers:ours", {"M": 2, "D": 4, "r": 1}), Side("absent", "bench.no_such_module:f")]
    assert measure(sides, Options(rounds=1, quick=True)).keys() == {"here"}
    assert "absent: left out: No module named 'bench.no_such_module'" in capfd.readouterr().err


def test_without_jax_its_side_is_left_out_by_name(tmp_path, monkeypatch, capfd):
    (tmp_path / "jax.py").write_text("raise ImportError('no jax here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sides = [side for side in step.peers("gpt2", Options(quick=True)) if side.name == step.JAX]
    assert len(sides) == 1
    assert measure(sides, Options(rounds=1, quick=True)) == {}
    assert "JAX, compiled: left out: no jax here" in capfd.readouterr().err


def test_jax_has_a_side_where_its_text_has_the_model():
    """A decoder, not a classifier; and none without peers."""
    names = {name: [side.name for side in step.peers(name, Options())] for name in ("gpt2", "minilm", "smollm2")}
    assert [step.JAX in found for found in names.values()] == [True, False, True]
    assert step.peers("gpt2", Options(alone=True)) == []


@pytest.mark.parametrize("bench", ["step", "memory"])
def test_one_long_sequence_is_measured(quick, bench):
    cases = {f.case for f in figures.read(quick).of(bench) if f.what == step.LORA}
    assert {f"{title}, N=1, T={T}, r=8" for title, T in (("GPT-2 small", 16), ("SmolLM2-135M", 32))} <= cases


@pytest.mark.parametrize("wrong", [step.EAGER, step.JAX])
def test_sides_whose_losses_differ_are_named(wrong):
    """By one part in a thousand."""
    losses = {side: 1.001 if side == wrong else 1.0 for side in (step.EAGER, step.JAX)}
    measured = {side: {"step": Timing([1.0], value, 0, {})} for side, value in losses.items()}
    measured[step.OURS] = {step.LORA: Timing([1.0], 1.0, 0, {})}
    with pytest.raises(ValueError, match=re.escape(f"1.001 with {wrong}")):
        step.check_losses(measured)


def test_pytorch_is_measured_to_the_longest_sequence_that_fits():
    """SmolLM2's peak was 3.18 GB at T=1024 and 5.46 at 2048: 2.22 MB a token, which the count meets within a tenth."""
    at = {T: scaling.both_bytes(work("smollm2", N=1, T=T)) for T in (1024, 2048, 4096, 8192)}
    assert (at[2048] - at[1024]) / 1.5 == pytest.approx(5.46e9 - 3.18e9, rel=0.1)
    assert at[4096] < scaling.MOST_BYTES < at[8192]


def test_the_panel_of_lengths_shows_both_sides(quick):
    pytest.importorskip("matplotlib", reason="pictures: the extra plot")
    from bench import plots

    run = figures.read(quick)
    theirs = [
        f._replace(case=f"against T, {step.EAGER}") for f in run.of("scaling") if f.case == "against T" if f.unit == "s"
    ]
    axes = plots.scaling(run._replace(figures=[*run.figures, *theirs[:1]])).axes[1]
    assert {step.OURS, step.EAGER} <= {text.get_text() for text in axes.get_legend().get_texts()}
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_each_thread_has_cases_of_its_own():
    seen = []
    _, value = timed([lambda: seen.append("a") or 1, lambda: seen.append("b") or 2], calls=3)
    assert (sorted(seen), value) == (["a"] * 3 + ["b"] * 3, 1)


RESULTS = """
import weakref

class Result:
    pass

def cases():
    alive = weakref.WeakSet()

    def give():
        result = Result()
        alive.add(result)
        return result

    return {"give": give, "count": lambda: len(alive)}
"""


def test_what_a_call_gave_is_gone_before_the_next_one(tmp_path, monkeypatch):
    """Else the next one works in other memory: a case's place in the round would show in its time."""
    (tmp_path / "results.py").write_text(RESULTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("give\ncount\n" * 2))  # the first time of each warms up
    out = io.StringIO()
    serve("results:cases", "{}", 1, 0.0, out)
    assert json.loads(out.getvalue().splitlines()[-1])["value"] == 0


def test_compare_on_the_command_line(quick, capsys):
    main(["compare", str(quick), str(quick)])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("  ") and line.endswith(" 1.000") for line in lines[:-1])
    assert len(lines) == 1 + len(figures.read(quick).figures)


def test_a_quick_run_is_no_table(quick, tmp_path):
    with pytest.raises(ValueError, match="tiny"):
        readme.write(tmp_path / "README.md", figures.read(quick))


@needs_gguf
def test_held_weights_are_measured_as_the_file_has_them(quick, tmp_path):
    """Bytes of a number: 4; 2; those of a block by 32; in NF4 1/2 + 1/64, and 4 of the table, which stays wide."""
    w = held.of_work(quick=True)
    shapes = w.config.weight_shapes()
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items() if len(shape) == 2}
    vectors = 4 * sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    each = {"float32": 4, "bfloat16": 2, "Q8_0": 34 / 32, "Q4_0": 18 / 32, "Q4_1": 20 / 32}
    found = {f.case for f in figures.read(quick).of("held") if f.what == "lora_np"}
    assert found == {held.case(w, kind) for kind in held.KINDS}
    for kind, (stored, storage) in held.KINDS.items():
        path = tmp_path / f"{kind}.gguf"
        held.write_gguf(path, w, stored)
        n_bytes = held.ours(str(path), [1], 1, storage)["bytes"]()
        if kind == "NF4":  # of a matrix an offset more, and its last 256 maxima may be fewer
            least = sum(size * (4 if name == "embed.tokens" else 33 / 64) for name, size in sizes.items())
            assert 0 <= n_bytes - vectors - least <= 8 * len(sizes)
        else:
            assert n_bytes == vectors + each[kind] * sum(sizes.values())


def test_without_the_package_that_writes_files_held_weights_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    assert not [*held.figures(Options(quick=True))]
    assert "held: left out: " in capsys.readouterr().err


def test_decoding_reads_every_weight_but_those_looked_up():
    """SmolLM2's table is its head: all is read. GPT-2's positions give one row."""
    smollm2, gpt2 = (work(name).config for name in ("smollm2", "gpt2"))
    whole = {c: 4 * sum(int(np.prod(shape)) for shape in c.weight_shapes().values()) for c in (smollm2, gpt2)}
    assert bytes_a_token(smollm2) == whole[smollm2]
    assert bytes_a_token(gpt2) == whole[gpt2] - 4 * 768 * (gpt2.n_positions - 1)
