"""The table of figures in bench/README.md."""

import pytest

from bench import readme
from bench.__main__ import README
from bench.figures import Figure, Run
from bench.models import work


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
    with pytest.raises(ValueError, match="got none"):
        readme.write(path, run._replace(figures=[ours]))
    assert path.read_text() == text
    path.write_text("no marks")
    with pytest.raises(ValueError, match="README"):
        readme.write(path, run)
    assert path.read_text() == "no marks"


def test_the_file_that_table_writes_has_its_marks_once_and_in_their_order():
    lines = README.read_text(encoding="utf-8").splitlines()
    marks = [readme.BEGIN, readme.END, readme.GPU_BEGIN, readme.GPU_END]
    assert [line for line in lines if line in marks] == marks
