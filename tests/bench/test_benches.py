"""Every benchmark runs, on tiny sizes and without peers, and what it finds is kept, drawn and compared."""

import json
from inspect import isfunction

import numpy as np
import pytest

from bench import figures, readme
from bench.__main__ import BENCHES, main
from bench.decode import bytes_a_token
from bench.measure import Side, measure
from bench.models import work
from bench.options import Options
from bench.timing import timed
from lora_np import ops

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


def test_each_thread_has_cases_of_its_own():
    seen = []
    _, value = timed([lambda: seen.append("a") or 1, lambda: seen.append("b") or 2], calls=3)
    assert (sorted(seen), value) == (["a"] * 3 + ["b"] * 3, 1)


def test_compare_on_the_command_line(quick, capsys):
    main(["compare", str(quick), str(quick)])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("  ") and line.endswith(" 1.000") for line in lines[:-1])
    assert len(lines) == 1 + len(figures.read(quick).figures)


def test_a_quick_run_is_no_table(quick, tmp_path):
    with pytest.raises(ValueError, match="tiny"):
        readme.write(tmp_path / "README.md", figures.read(quick))


def test_decoding_reads_every_weight_but_those_looked_up():
    """SmolLM2's table is its head: all is read. GPT-2's positions give one row."""
    smollm2, gpt2 = (work(name).config for name in ("smollm2", "gpt2"))
    whole = {c: 4 * sum(int(np.prod(shape)) for shape in c.weight_shapes().values()) for c in (smollm2, gpt2)}
    assert bytes_a_token(smollm2) == whole[smollm2]
    assert bytes_a_token(gpt2) == whole[gpt2] - 4 * 768 * (gpt2.n_positions - 1)
