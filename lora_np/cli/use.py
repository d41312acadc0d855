"""lora-np generate: what a model says, with an adapter or without."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..decode import generate_on
from ..formats.adapters.task import load_task
from ..formats.files.messages import shown
from ..formats.models.chat_template import Conversation, load_chat_template
from ..model import Config, Model
from ..training.examples import Tokens, prompt_ids
from ..training.inputs import Input, input_name, read_prompts, read_sources
from ..training.records import FORMATS
from ..training.translation import Source, decoder_start, encode_source, ended, source_prompt
from .base import AddCommand, adapted, add_base, add_seed, add_storage, awaited, base_path, tokenizer_of, utf8, whole
from .output import Bar, emit


class Prompt(NamedTuple):
    """What is gone on from: its ids, its text, None where it is not shown again, and the tokens that end the answer.

    source: what an encoder reads (T20); the ids are then the decoder's first.
    """

    ids: list[int]
    text: str | None
    stop: Collection[int]
    source: Source | None = None


def run_generate(args: argparse.Namespace) -> int:
    if args.prompt == "":
        raise ValueError("--prompt: expected some text to go on from, got none")
    with Bar() as bar:
        path = base_path(args, bar)
        model, adapter = adapted(args, path)
        _check_head(model, path if args.adapter is None else args.adapter)
        tokenizer = tokenizer_of(path, model.config)
        if translates := _translates(args, path, model.config):
            tokenizer = ended(tokenizer)
        read = read_sources if translates else read_prompts
        asked = [Input(0, args.prompt)] if args.prompts is None else read(awaited(args.prompts, bar), args.format)
        prompts = (
            _sources(args, asked, tokenizer, path, model.config)
            if translates
            else _prompts(args, asked, tokenizer, path)
        )
        results = []
        for n, (one, prompt) in enumerate(zip(asked, prompts, strict=True)):
            _note_length(args, one, prompt, model.config.longest, bar)
            inputs = {} if prompt.source is None else {"source": prompt.source.tokens[None]}
            tokens = generate_on(
                model, np.array([prompt.ids]), adapter, n=args.n, temperature=args.temperature, top_k=args.top_k,
                top_p=args.top_p, seed=args.seed if args.temperature > 0 else None, stop=prompt.stop, **inputs,
            )[0].tolist()  # fmt: skip
            given = {"messages": one.asked.messages} if isinstance(one.asked, Conversation) else {"prompt": one.asked}
            results.append({"line": one.line, **given, "text": _said(tokenizer, prompt, tokens)})
            if len(asked) > 1:
                bar.show("generating", n + 1, len(asked), f"{len(tokens) - len(prompt.ids)} tokens")
    if args.prompts is None:
        del results[0]["line"]
    lines = [line for one in results for line in _lines(args, one)]
    emit(args, results if args.prompts else results[0], lines, longest=sys.maxsize)  # JSON has it to the letter
    return 0


def _check_head(model: Model, path: Path) -> None:
    """A ValueError unless it is a language model; it says what to do instead."""
    if model.config.head in ("classify", "tag"):
        what = "a classifier, which gives labels to texts" if model.config.head == "classify" else "a tagger"
        raise ValueError(f"{path}: {what} and writes none: lora-np predict gives its labels")
    if model.config.head != "lm" or not model.config.causal:
        raise ValueError(f"{path}: expected a language model, which writes text, got one without such a head")


def _translates(args: argparse.Namespace, base: Path, config: Config) -> bool:
    """Whether what is asked is a source: of an encoder-decoder, and of what was trained for that task."""
    task = load_task(base if args.adapter is None else args.adapter)
    translates = config.n_encoder > 0 or (task is not None and task.name == "translate")
    for option in ("chat", "system", "chat_template"):
        if translates and getattr(args, option):
            raise ValueError(f"--{option.replace('_', '-')}: this model translates, and has no conversations")
    return translates


def _sources(
    args: argparse.Namespace, asked: Sequence[Input], tokenizer: Tokens, base: Path, config: Config
) -> list[Prompt]:
    """The prompts' tokens, where each is a source: what is written after it is shown alone."""
    start = decoder_start(base, config, tokenizer)
    stop = [] if tokenizer.eos is None else [tokenizer.eos]
    prompts = []
    for one in asked:
        if start is None:
            prompts.append(Prompt(source_prompt(tokenizer, one.asked), None, stop))
            continue
        try:
            source = encode_source(tokenizer, one.asked, config.longest)
        except ValueError as error:
            raise ValueError(f"{_where(args, one)}: {error}") from None
        prompts.append(Prompt([start], None, stop, source))
    return prompts


def _prompts(args: argparse.Namespace, asked: Sequence[Input], tokenizer: Tokens, base: Path) -> list[Prompt]:
    """The prompts' tokens: of a text as it stands, or as the user's message; of messages by the chat template."""
    stop = [] if tokenizer.eos is None else [tokenizer.eos]
    if not args.chat and not any(isinstance(one.asked, Conversation) for one in asked):
        for option in ("system", "chat_template"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option.replace('_', '-')}: is for --chat, or prompts that are messages")
        return [Prompt(prompt_ids(tokenizer, one.asked), one.asked, stop) for one in asked]
    template = load_chat_template(base, args.chat_template)
    conversations = [_conversation(one.asked, args.system) for one in asked]
    prompts = []
    for one, text in zip(asked, template.prompts(conversations, tokenizer.special(), tokenizer.whole()), strict=True):
        if isinstance(text, str):
            raise ValueError(f"{_where(args, one)}: {template.where}: the chat template refuses this: {shown(text)}")
        end = [] if text.end is None else tokenizer.encode(text.end, special=False)
        prompts.append(Prompt(tokenizer.encode(text.text, special=False), None, stop + end[:1]))
    return prompts


def _conversation(asked: str | Conversation, system: str | None) -> Conversation:
    """What the assistant is asked; system: what is said first, unless the conversation has that itself."""
    if isinstance(asked, str):
        asked = Conversation([{"role": "user", "content": asked}])
    if system is None or asked.messages[0]["role"] == "system":
        return asked
    return asked._replace(messages=[{"role": "system", "content": system}, *asked.messages])


def _said(tokenizer: Tokens, prompt: Prompt, tokens: Sequence[int]) -> str:
    """What the model wrote, up to what ends it: behind the prompt, or alone where that is not shown."""
    new = list(tokens[len(prompt.ids) :])
    if new and new[-1] in prompt.stop:
        new.pop()
    if prompt.text is None:
        return tokenizer.decode(new)
    before, text = tokenizer.decode(prompt.ids), tokenizer.decode([*prompt.ids, *new])
    # Alone, what follows would lose the space before it where a tokenizer is as Llama's.
    return prompt.text + (text[len(before) :] if text.startswith(before) else tokenizer.decode(new))


def _where(args: argparse.Namespace, one: Input) -> str:
    return "--prompt" if args.prompts is None else f"{input_name(args.prompts)}:{one.line}"


def _note_length(args: argparse.Namespace, one: Input, prompt: Prompt, longest: int, bar: Bar) -> None:
    """Says where a prompt is longer than the model takes."""
    T = len(prompt.ids)
    if prompt.source is not None and prompt.source.cut:
        bar.note(f"{_where(args, one)}: cut to {longest} tokens, as the model takes no more")
    if longest <= T:
        bar.note(
            f"{_where(args, one)}: {T} tokens, and the model takes {longest}: the last {max(1, longest // 2)} count"
        )


def _lines(args: argparse.Namespace, result: dict[str, Any]) -> list[str]:
    """A result in lines; of several prompts, under a line that says which it is."""
    title = [] if args.prompts is None else [f"==> {input_name(args.prompts)}:{result['line']} <=="]
    return [*title, *result["text"].split("\n")]


def add_commands(command: AddCommand) -> None:
    """The command of this file, and its arguments."""
    p = command("generate", run_generate, "text after a prompt, an answer to it, or its translation")
    add_base(p)
    add_storage(p)
    p.add_argument("--adapter", type=Path, metavar="DIR", help="the adapter's folder")
    asked = p.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", type=utf8, help="the text to go on from, or to translate")
    asked.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="a prompt in each line, or prompt or messages as JSON, CSV or TSV; completions are left out (-: standard "
        "input)",
    )  # fmt: skip
    p.add_argument("--format", choices=[f for f in FORMATS if f not in ("labelled", "conll")], help="of --prompts")
    p.add_argument("--chat", action="store_true", help="the prompt is the user's message; the answer alone is shown")
    p.add_argument("--system", type=utf8, metavar="TEXT", help="with --chat: the system's message before it")
    p.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja file for conversations (default: the base's own)"
    )
    p.add_argument("-n", type=whole, default=200, help="tokens at most (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest (default: %(default)s)")
    p.add_argument("--top-k", type=whole, help="draw from the k likeliest")
    p.add_argument("--top-p", type=float, help="draw from the likeliest that together reach p")
    add_seed(p, "the draws")
