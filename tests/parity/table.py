"""The table of families and what of each is held against transformers, PEFT and llama.cpp, from the tests' results.

python -m pytest tests/parity/test_models.py tests/parity/test_gguf_models.py --junitxml=results.xml
python tests/parity/table.py results.xml
"""

import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

README = Path(__file__).parents[2] / "lora_np" / "formats" / "README.md"
BEGIN, END = "<!-- written by python tests/parity/table.py -->", "<!-- end of what it wrote -->"
# The columns, and the tests of each.
COLUMNS = {
    "logits": ("test_logits_and_the_gradient_of_every_weight",),
    "gradients": ("test_logits_and_the_gradient_of_every_weight", "test_an_adapter_of_pefts"),
    "cached decoding": ("test_cached_decoding",),
    "finetune": ("test_finetune",),
    "merge": ("test_a_merge",),
    "verify": ("test_verify",),
    "PEFT's files": ("test_an_adapter_of_pefts", "test_an_adapter_of_ours"),
    "GGUF": (
        "test_logits_are_transformers",
        "test_llama_cpp_says_the_same",
        "test_a_file_of_several_types",
        "test_an_adapter_in_llama_cpps_file",
    ),
}
# The families, and what their cases' names begin with: the longest that fits.
ROWS = {
    "GPT-2": "gpt2",
    "Llama, to 3.3": "llama",
    "Mistral": "mistral",
    "Qwen 2 and 2.5": "qwen2",
    "Qwen 3": "qwen3",
    "Gemma": "gemma",
    "Gemma 3 (text)": "gemma3",
    "Phi-3, Phi-4": "phi3",
    "OPT": "opt",
    "BERT": "bert",
    "RoBERTa": "roberta",
    "DistilBERT": "distilbert",
    "DeBERTa v2 and v3": "deberta",
    "T5, v1.1, Flan-T5": "t5",
    "mT5": "mt5",
    "BART": "bart",
}


def row_of(case: str) -> str | None:
    """The family of a test's case: qwen3-tag-None is Qwen 3's."""
    fitting = [name for name, start in ROWS.items() if case.startswith(start)]
    return max(fitting, key=lambda name: len(ROWS[name]), default=None)


def counted(results: Path) -> dict[tuple[str, str], Counter[str]]:
    """How many tests of a family passed, failed, and were left out, by row and column."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for test in ET.parse(results).iter("testcase"):
        function, _, case = test.get("name", "").partition("[")
        row = row_of(case)
        for column, functions in COLUMNS.items():
            if row is not None and function in functions:
                kinds = [kind for kind in ("failure", "error", "skipped") if test.find(kind) is not None]
                found.setdefault((row, column), Counter())[(kinds or ["passed"])[0]] += 1
    return found


def table(results: Path) -> str:
    """The tests that passed; a dash where there is none, and "no" where one did not pass."""
    found = counted(results)

    def cell(row: str, column: str) -> str:
        counts = found.get((row, column), Counter())
        return "no" if counts["failure"] or counts["error"] else str(counts["passed"] or "-")

    rows = [[row, *(cell(row, column) for column in COLUMNS)] for row in ROWS]
    return "\n".join(f"| {' | '.join(line)} |" for line in [["family", *COLUMNS], ["---"] * (len(COLUMNS) + 1), *rows])


def main() -> None:
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{README}: expected {BEGIN} and {END}")
    README.write_text(f"{before}{begin}\n\n{table(Path(sys.argv[1]))}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
