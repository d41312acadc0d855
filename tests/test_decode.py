"""Generation: with a cache as without, greedy as forward says, sampled as the probabilities say."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOAT64, cases, checked, deviation, lora_configs, random_model, seeds, trained_adapter

import lora_np as ln
from lora_np import decode
from lora_np.backend import asnumpy
from lora_np.binding import bind

proves = pytest.mark.proves
GPT2 = ln.Config(7, 10, 2, 2, 8, 6)
MODELS = {"heads": ("lm",), "causal": True, "padding": ("none", "left"), **FLOAT64}


def prompt(case):
    """tokens and mask of a Case."""
    return case.batch["tokens"], case.batch["mask"]


def source_of(case):
    """What an encoder reads, by name, where there is one."""
    return {name: a for name, a in case.batch.items() if name.startswith("source")}


def uncached_logits(model, tokens, adapter, mask, **source):
    """The logits after the last of tokens (N,S), from a forward of all of them; mask (N,T) is of the first T."""
    if mask is not None:
        grown = np.ones((len(mask), tokens.shape[1] - mask.shape[1]), dtype=bool)
        mask = np.concatenate([mask, grown], axis=1)
    return asnumpy(ln.forward(model, tokens, adapter, mask=mask, **source))[:, -1]


# --- The cache -------------------------------------------------------------------------------------------------------


@proves("T16", "T9", "T18", "T20")
@given(cases(**MODELS), seeds)
def test_cached_logits_are_the_uncached(case, seed):
    """The prompt at once, then a token or two at a time: each time as a forward of the whole."""
    model, adapter, _, _ = case
    tokens, mask = prompt(case)
    (N, T), config = tokens.shape, model.config
    cache = decode.new_cache(config, N=N, longest=T + 4, dtype=model.dtype)
    run = decode.keep_source(bind(model, adapter, rows=N), checked(config, case.batch))
    new, seen = tokens, mask
    for more in (1, 2, 1, 0):
        cached = decode.next_logits(run, cache, new, seen)
        assert deviation(cached, uncached_logits(model, tokens, adapter, mask, **source_of(case))) <= 1e-12
        assert cache.length == tokens.shape[1]
        new = np.random.default_rng(seed).integers(0, config.vocab_size, (N, more))
        tokens = np.concatenate([tokens, new], axis=1)
        seen = None if seen is None else np.pad(seen, ((0, 0), (0, more)), constant_values=True)


@proves("T16", "T1")
def test_a_model_with_token_types_decodes_as_its_forward_does():
    """Where none are given, all are of type 0."""
    model = random_model(replace(GPT2, n_types=2), seed=0)
    tokens = np.array([[1, 2, 3]])
    cache = decode.new_cache(model.config, N=1, longest=3, dtype=model.dtype)
    cached = decode.next_logits(bind(model, None, rows=1), cache, tokens)
    assert deviation(cached, uncached_logits(model, tokens, None, None)) <= 1e-12


@proves("T16", "T10")
def test_the_cache_holds_grouped_heads_only():
    config = replace(GPT2, n_head=4, n_kv_head=1)
    cache = decode.new_cache(config, N=3, longest=5, dtype="float32")
    assert [k.shape for k in cache.keys] == [v.shape for v in cache.values] == [(3, 1, 5, 2)] * 2
    assert {a.dtype for a in (*cache.keys, *cache.values)} == {np.dtype("float32")}


# --- Greedy ----------------------------------------------------------------------------------------------------------


@proves("T16")
@given(cases(**MODELS), st.integers(0, 4))
def test_greedy_takes_the_likeliest_token_each_time(case, n):
    model, adapter, _, _ = case
    tokens, mask = prompt(case)
    result = ln.generate(model, tokens, adapter, n=n, mask=mask, **source_of(case))
    T = tokens.shape[1]
    assert isinstance(result, np.ndarray)
    assert result.shape == (len(tokens), T + n)
    assert result.dtype == tokens.dtype
    assert np.array_equal(result[:, :T], tokens)
    for end in range(T, T + n):
        logits = uncached_logits(model, result[:, :end], adapter, mask, **source_of(case))
        taken = np.take_along_axis(logits, result[:, end : end + 1], axis=-1)[:, 0]
        assert np.all(taken >= logits.max(axis=-1) - 1e-12 * np.abs(logits).max())


@proves("T16", "L7")
@given(cases(**MODELS), st.data())
def test_generation_with_an_adapter_for_each_row(case, data):
    """Each text alone, with its own adapter or none, gives the same tokens."""
    model, _, _, _ = case
    tokens, mask = prompt(case)
    lora = lora_configs(model.config, dropout=False)
    adapters = [
        config and trained_adapter(model, config, seed=n)
        for n, config in enumerate(data.draw(st.one_of(st.none(), lora)) for _ in tokens)
    ]
    together = ln.generate(model, tokens, adapters, n=3, mask=mask, **source_of(case))
    for n, adapter in enumerate(adapters):
        row = {name: None if a is None else a[n : n + 1] for name, a in {"mask": mask, **source_of(case)}.items()}
        alone = ln.generate(model, tokens[n : n + 1], adapter, n=3, **row)
        assert np.array_equal(together[n : n + 1], alone)


@proves("T16")
@given(cases(**MODELS | {"padding": ("none",)}), st.integers(1, 3))
def test_padding_on_the_left_changes_no_token(case, left):
    model, adapter, _, _ = case
    tokens, _ = prompt(case)
    padded = np.pad(tokens, ((0, 0), (left, 0)))
    mask = np.pad(np.ones(tokens.shape, dtype=bool), ((0, 0), (left, 0)))
    n = min(3, model.config.longest - padded.shape[1])
    expected = ln.generate(model, tokens, adapter, n=n, **source_of(case))
    assert np.array_equal(ln.generate(model, padded, adapter, n=n, mask=mask, **source_of(case))[:, left:], expected)


@proves("T16", "L5")
@given(cases(**MODELS))
def test_merged_and_unmerged_models_write_the_same(case):
    model, adapter, _, _ = case
    tokens, mask = prompt(case)
    unmerged = ln.generate(model, tokens, adapter, n=3, mask=mask, **source_of(case))
    merged = ln.generate(ln.merge(model, adapter), tokens, n=3, mask=mask, **source_of(case))
    assert np.array_equal(merged, unmerged)


# --- Sampling --------------------------------------------------------------------------------------------------------

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15]))


class Fixed:
    """A generator that gives the numbers that it is told."""

    def __init__(self, numbers):
        self.numbers = np.array(numbers, dtype="float64")

    def random(self, shape):
        return self.numbers.reshape(shape)


def chosen(numbers, logits=LOGITS, *, temperature=1.0, top_k=None, top_p=None):
    """The tokens that `choose` takes where the generator gives `numbers`, one a text."""
    rows = np.tile(logits, (len(numbers), 1))
    return decode.choose(rows, Fixed(numbers), temperature=temperature, top_k=top_k, top_p=top_p).tolist()


@proves("T16")
def test_sampling_inverts_the_cumulated_probabilities():
    """Likeliest first: 1 up to 0.4, 3 up to 0.7, 4 up to 0.85, 0 up to 0.95, then 2."""
    assert chosen([0.0, 0.39, 0.41, 0.69, 0.71, 0.84, 0.86, 0.94, 0.96, 1 - 2**-53]) == [1, 1, 3, 3, 4, 4, 0, 0, 2, 2]


@proves("T16")
@pytest.mark.parametrize(
    ("options", "probabilities"),
    [
        ({}, {1: 0.4, 3: 0.3, 4: 0.15, 0: 0.1, 2: 0.05}),
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 99}, {1: 0.4, 3: 0.3, 4: 0.15, 0: 0.1, 2: 0.05}),
        ({"top_p": 0.6}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.71}, {1: 40 / 85, 3: 30 / 85, 4: 15 / 85}),
        ({"top_p": 1e-9}, {1: 1.0}),
        ({"top_p": 1.0}, {1: 0.4, 3: 0.3, 4: 0.15, 0: 0.1, 2: 0.05}),
        ({"top_k": 3, "top_p": 0.5}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 2, "top_p": 0.5}, {1: 1.0}),
        ({"temperature": 0.5}, {1: 160 / 285, 3: 90 / 285, 4: 22.5 / 285, 0: 10 / 285, 2: 2.5 / 285}),
        ({"temperature": 1e-3}, {1: 1.0}),
    ],
    ids=str,
)
def test_sampled_frequencies(options, probabilities):
    """Of n = 20000 draws no token lies five deviations off n p, and no other token is ever drawn."""
    n = 20000
    options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    drawn = decode.choose(np.tile(LOGITS, (n, 1)), np.random.default_rng(0), **options)
    counts = np.bincount(drawn, minlength=5)
    for token, count in enumerate(counts):
        p = probabilities.get(token, 0.0)
        assert abs(count - n * p) <= 5 * math.sqrt(n * p * max(1 - p, 0)) + (1e-6 if p in (0, 1) else 0)


@proves("T16")
def test_top_p_is_reached_after_top_k_has_cut():
    """top_k = 2 leaves 4/7 and 3/7; top_p = 0.6 of that needs both, 0.5 only the first."""
    assert chosen([0.99], top_k=2, top_p=0.6) == [3]
    assert chosen([0.99], top_k=2, top_p=0.5) == [1]


@proves("T16")
def test_rounding_never_draws_a_token_that_was_cut():
    """A cumulated sum may end a little below the largest number drawn, as it does of 49 equal ones."""
    largest = np.nextafter(1.0, 0)
    ends = {k: np.cumsum(np.full(k, 1.0) / k)[-1] for k in range(1, 100)}
    below = [k for k, end in ends.items() if end < largest]
    assert len(below) >= 5
    for k in (1, 2, 3, *below):
        assert chosen([largest] * 2, np.zeros(k + 1), top_k=k) == [k - 1] * 2


@proves("T16")
def test_equal_logits_are_taken_in_order():
    """Among so many that a sort which is not stable would mix them."""
    logits = np.tile([0.0, 1.0, 1.0, -1.0], 250)
    greedy = decode.choose(np.tile(logits, (2, 1)), None, temperature=0.0, top_k=None, top_p=None)
    assert greedy.tolist() == [1, 1]
    assert [chosen([0.999], logits, top_k=k) for k in (1, 2, 3, 4, 5, 500)] == [[1], [2], [5], [6], [9], [998]]


@proves("T16")
def test_sampling_with_large_logits():
    """1e4 apart, in float32 too: nothing overflows."""
    assert chosen([0.5], np.array([-1e4, 1e4, 0.0], "float32")) == [1]


@proves("T16")
@given(seeds)
def test_sampling_depends_on_its_seed_alone(seed):
    model = random_model(GPT2, seed=0)
    tokens = np.zeros((8, 2), dtype=int)
    one, two, other = (ln.generate(model, tokens, n=6, temperature=2.0, seed=s) for s in (seed, seed, seed + 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert one.max() < GPT2.vocab_size


@proves("T16")
@given(cases(**MODELS), seeds)
def test_sampling_from_the_likeliest_alone_is_greedy(case, seed):
    model, adapter, _, _ = case
    tokens, mask = prompt(case)
    given = {"n": 3, "mask": mask, **source_of(case)}
    greedy = ln.generate(model, tokens, adapter, **given)
    drawn = ln.generate(model, tokens, adapter, **given, temperature=1.0, top_k=1, seed=seed)
    assert np.array_equal(drawn, greedy)


# --- What does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, "n: expected an integer of at least 0, got -1"),
        ({"n": 9}, r"2 \+ 9 tokens pass the model's longest sequence, 10"),
        ({"temperature": -1.0}, "temperature: expected 0 or more"),
        ({"temperature": math.nan, "seed": 0}, "temperature: expected 0 or more"),
        ({"temperature": 1.0}, "needs a seed"),
        ({"top_k": 3}, "need a temperature above 0"),
        ({"top_p": 0.5}, "need a temperature above 0"),
        ({"temperature": 1.0, "seed": 0, "top_k": 0}, "top_k: expected an integer of at least 1"),
        ({"temperature": 1.0, "seed": 0, "top_p": 0.0}, "top_p: expected 0 < top_p <= 1"),
        ({"temperature": 1.0, "seed": 0, "top_p": 1.1}, "top_p: expected 0 < top_p <= 1"),
        ({"mask": [[True, False]]}, "pad on the left"),
        ({"tokens": [[1, 7]]}, r"tokens: expected ids in 0\.\.6, got 7"),
    ],
    ids=str,
)
def test_a_wrong_request_is_refused(options, message):
    arguments = {"tokens": [[1, 2]], "n": 1, **options}
    with pytest.raises(ValueError, match=message):
        ln.generate(random_model(GPT2, seed=0), **arguments)


@pytest.mark.parametrize("fields", [{"causal": False}, {"head": "tag", "n_labels": 2}, {"head": "none"}], ids=str)
def test_what_is_no_causal_language_model_is_refused(fields):
    with pytest.raises(ValueError, match="expected a causal language model"):
        ln.generate(random_model(replace(GPT2, **fields), seed=0), [[1, 2]], n=1)


# --- Past the longest sequence -----------------------------------------------------------------------------------


@proves("T16")
@given(cases(**MODELS), st.integers(0, 25))
def test_past_the_longest_text_its_last_half_is_the_prompt(case, n):
    """Each new token is the likeliest after a window that is filled up, and then cut to its last half."""
    model, adapter, _, _ = case
    window = tokens = case.batch["tokens"]
    for _ in range(n):
        if window.shape[1] == model.config.longest:
            window = window[:, -(model.config.longest // 2) :]
        new = ln.generate(model, window, adapter, n=1, **source_of(case))[:, -1:]
        window, tokens = np.concatenate([window, new], axis=1), np.concatenate([tokens, new], axis=1)
    assert np.array_equal(decode.generate_on(model, case.batch["tokens"], adapter, n=n, **source_of(case)), tokens)


@proves("T16")
@pytest.mark.parametrize("write", [decode.generate, decode.generate_on])
@given(data=st.data())
def test_a_text_ends_where_each_row_has_a_token_that_stops_it(write, data):
    """It is the beginning of what is written without: up to the last of the rows' first such tokens."""
    config = replace(GPT2, n_positions=12)
    model = random_model(config, seed=data.draw(seeds), dtype="float64")
    N = data.draw(st.integers(1, 3)) if write is decode.generate else 1
    tokens = np.arange(2 * N).reshape(N, 2)
    n = data.draw(st.integers(0, 10 if write is decode.generate else 20))
    stop = data.draw(st.sets(st.integers(0, config.vocab_size - 1), max_size=3))
    whole = write(model, tokens, n=n, temperature=2.0, seed=0)
    found = np.isin(whole[:, 2:], list(stop))
    length = 2 + (int(found.argmax(axis=1).max()) + 1 if found.any(axis=1).all() else n)
    assert np.array_equal(write(model, tokens, n=n, temperature=2.0, seed=0, stop=stop), whole[:, :length])


@proves("T16")
def test_past_the_longest_text_each_part_has_its_prompt_and_its_own_seed(monkeypatch):
    """Of ten places: eight are filled up, then each time the last five tokens are the prompt of five more."""
    model, tokens = random_model(GPT2, seed=0), np.array([[1, 2], [3, 4]])
    calls, generate = [], ln.generate

    def noting(*args, **options):
        calls.append((args[1], options["n"], options["seed"]))
        return generate(*args, **options)

    monkeypatch.setattr(decode, "generate", noting)
    result = decode.generate_on(model, tokens, n=20, temperature=2.0, seed=1)
    assert [n for _, n, _ in calls] == [8, 5, 5, 2]
    ends = (2, 10, 15, 20)
    for (prompt, _, _), start, end in zip(calls, (0, 5, 10, 15), ends, strict=True):
        assert np.array_equal(prompt, result[:, start:end])
    assert len({seed for *_, seed in calls}) == 4


@proves("T16")
@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64"])
def test_new_tokens_are_of_the_dtype_of_the_given_ones(dtype):
    assert ln.generate(random_model(GPT2, seed=0), np.array([[1, 2]], dtype=dtype), n=3).dtype == dtype


@proves("T16")
def test_past_the_longest_text_too_the_draws_depend_on_the_seed_alone():
    model, tokens = random_model(GPT2, seed=0), np.zeros((4, 2), dtype=int)
    one, two, other = (decode.generate_on(model, tokens, n=40, temperature=2.0, seed=s) for s in (1, 1, 2))
    assert one.shape == (4, 42)
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("wrong", [{"n": -1}, {"n": 3, "temperature": 1.0}, {"n": 3, "top_k": 2}], ids=str)
def test_a_wrong_request_past_the_longest_text_is_refused(wrong):
    with pytest.raises(ValueError, match="generate: "):
        decode.generate_on(random_model(GPT2, seed=0), np.zeros((1, 9), dtype=int), **wrong)
