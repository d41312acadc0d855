"""The paper's tables of trained parameters: counted by hand, and judged right where a printed figure is wrong."""

import pytest

import lora_np as ln
from lora_np.reproduce import counts
from lora_np.reproduce.counts import PAPER

proves = pytest.mark.proves
# Layers and widths as the models' own papers give them: 2 matrices a layer, r (D + D) each.
HAND = [
    12 * 2 * 8 * 2 * 768,
    24 * 2 * 8 * 2 * 1024,
    48 * 2 * 16 * 2 * 1536,
    24 * 2 * 4 * 2 * 1024,
    36 * 2 * 4 * 2 * 1280,
    96 * 2 * 1 * 2 * 12288,
    96 * 2 * 8 * 2 * 12288,
]


@proves("L8")
def test_the_papers_models_are_counted_as_by_hand():
    assert [row.counted for row in PAPER] == HAND
    assert HAND[3:5] == [393_216, 737_280]


@proves("L8")
def test_the_paper_agrees_but_for_gpt2():
    """0.35M and 0.77M are printed where 0.39M and 0.74M are meant; the others agree."""
    assert [row.model for row in PAPER if row.rounded != row.millions] == ["GPT-2 M", "GPT-2 L"]
    claim = counts.table_claim(list(PAPER))
    assert claim.verdict == "holds in part"
    for figure in ("5 of 7", "0.35M", "393,216", "0.77M", "737,280"):
        assert figure in claim.figure
    assert counts.table_claim([row for row in PAPER if not row.model.startswith("GPT-2")]).verdict == "holds"
    assert counts.table_claim([PAPER[0]._replace(millions="0.4")]).verdict == "does not hold"


@proves("L8")
def test_the_size_of_a_model_is_that_of_its_weights():
    config = ln.Config(11, 8, 2, 2, 8, 12)
    assert counts.size(config) == sum(w.size for w in ln.init_weights(config, seed=0).values())
    assert counts.size(ln.PRESETS["gpt2-large"]) == 774_030_080  # as OpenAI's files have it
    assert 174e9 < counts.size(ln.PRESETS["gpt3-175b"]) < 176e9


@pytest.mark.parametrize(
    ("base_gb", "adapter_mb", "verdict"),
    [
        (350, 35, "holds"),
        (349.2, 37.7, "holds"),
        (349.2, 75.5, "holds in part"),
        (700, 35, "holds in part"),
        (700, 70, "does not hold"),
    ],
)
def test_the_verdict_on_a_checkpoint(base_gb, adapter_mb, verdict):
    assert counts.checkpoint_claim(base_gb, adapter_mb).verdict == verdict


@pytest.mark.parametrize(
    ("times", "verdict"), [(9_251, "holds"), (10_900, "holds"), (8_000, "does not hold"), (37_000, "does not hold")]
)
def test_the_verdict_on_ten_thousand_times(times, verdict):
    assert counts.fewer_claim(times).verdict == verdict


@proves("L8")
def test_the_section_says_what_follows_for_gpt3():
    section = counts.counts()
    assert [claim.verdict for claim in section.claims] == ["holds in part", "holds", "holds"]
    by_rank = {row[0]: row[1:] for row in section.tables[1].rows}
    assert by_rank["1"][0] == "4,718,592"
    assert by_rank["8"][0] == "37,748,736"
    assert by_rank["4"] == ["18,874,368", "9,251", "37.7 MB"]
