"""A model's chat template: where its files have it, and conversations rendered by it.

Templates are programs that anyone may have written. Jinja's sandbox keeps them from all but their arguments, and
nothing stops one that runs for ever; so a process of its own renders all conversations of a file, and ends when its
time is up.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..files import bounded
from ..files.extras import missing
from ..files.json_file import read_json
from ..files.messages import named, shown
from ..files.regular import expect_file
from .gguf_file import open_gguf
from .tokenizer import TOKENIZER_CONFIG

TEMPLATE, GGUF_KEY, DEFAULT = "chat_template.jinja", "tokenizer.chat_template", "default"
MAX_TEMPLATE = 2**20  # bytes
SECONDS, SECONDS_EACH, MEMORY = 10.0, 0.02, 2**29  # for all conversations of a file; and for each message of them
GROWTH, SLACK = 16, 2**16  # characters that a text may have for one of its conversation's JSON; and besides
RENDERER = Path(__file__).with_name("render_chat.py")


class Conversation(NamedTuple):
    """Messages, each with its role and what else a template may read; and the tools that may be called.

    given: how many messages are a prompt, of which no answer is scored
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    given: int = 0


class Rendered(NamedTuple):
    """A conversation's text; the spans of characters that the assistant says; its answers that have none."""

    text: str
    spans: Sequence[Sequence[int]]
    unscored: int


class Prompted(NamedTuple):
    """The text of a conversation up to where the assistant begins; and the special token that ends what it says.

    end: None where no special token does.
    """

    text: str
    end: str | None


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template's source, and `where` it stands, which errors name."""

    source: str = field(repr=False)
    where: str

    def render(
        self, conversations: Sequence[Conversation], variables: Mapping[str, str], special: Sequence[str]
    ) -> list[Rendered | str]:
        """Each conversation's text; where the template cannot render it, what it says.

        variables: what the template reads besides, as bos_token. special: the tokens that are found in a text as they
        stand: what ends an answer. An answer's span begins where the text of the messages before it, with the
        generation prompt, ends, and goes to its end token. It has none where that text does not begin the whole
        (templates that leave out the reasoning of earlier answers). In a template with {% generation %} blocks, these
        are the spans. A ValueError if the template is none, or takes too much time or memory; an ImportError without
        jinja2.
        """
        answers = self._answers(conversations, variables, special, are_prompts=False)
        return [answer if isinstance(answer, str) else Rendered(**answer) for answer in answers]

    def prompts(
        self, conversations: Sequence[Conversation], variables: Mapping[str, str], special: Sequence[str]
    ) -> list[Prompted | str]:
        """Each conversation's text with the generation prompt, and what ends the answer; else as `render`."""
        answers = self._answers(conversations, variables, special, are_prompts=True)
        return [answer if isinstance(answer, str) else Prompted(**answer) for answer in answers]

    def _answers(
        self,
        conversations: Sequence[Conversation],
        variables: Mapping[str, str],
        special: Sequence[str],
        *,
        are_prompts: bool,
    ) -> list[Any]:
        """What the renderer says of each conversation."""
        requests = [_request(one) for one in conversations]
        n = sum(len(messages) for messages, *_ in requests)
        seconds = SECONDS + SECONDS_EACH * n
        request = {
            "source": self.source, "variables": dict(variables), "special": list(special), "path": _jinja(),
            "conversations": requests, "are_prompts": are_prompts,
        }  # fmt: skip
        answers = bounded.answers(RENDERER, request, f"{self.where}: not rendered", seconds=seconds, memory=MEMORY)
        if answers and "refused" in answers[0]:
            raise ValueError(f"{self.where}: no chat template that is supported: {shown(answers[0]['refused'])}")
        if len(answers) <= len(requests):
            raise ValueError(
                f"{self.where}: the chat template takes too long, more than {seconds:g} seconds, or too much memory"
            )
        return answers[1:]


def _request(one: Conversation) -> tuple[list[dict[str, Any]], Any, int, int]:
    """The messages, without keys whose value is null, as transformers has them; tools; the text's most characters.

    And how many messages are given.
    """
    messages = [{key: value for key, value in message.items() if value is not None} for message in one.messages]
    return messages, one.tools, GROWTH * len(json.dumps([messages, one.tools])) + SLACK, one.given


def _jinja() -> list[str]:
    """The folders of jinja2 and of what it needs; an ImportError says how to get it."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise missing("a chat template", "jinja2", "models")
        folders.append(str(Path(spec.origin).parents[1]))
    return folders


@named
def load_chat_template(path: Path, file: Path | None = None) -> ChatTemplate:
    """The chat template in `file`, or else that of a model: a Hugging Face folder, or a .gguf file.

    A folder has it in chat_template.jinja, or in tokenizer_config.json: a text, or several with names, of which
    "default" is taken. A ValueError says that there is none, and how to name one.
    """
    if file is not None:
        return ChatTemplate(_read(file), str(file))
    template = find_chat_template(path)
    if template is None:
        raise ValueError(f"{path}: this model has no chat template; name one with --chat-template FILE")
    return template


def find_chat_template(path: Path) -> ChatTemplate | None:
    """The chat template of a model, if it has one; else as `load_chat_template`."""
    found: Any = None
    where = str(path)
    if path.suffix.lower() == ".gguf":
        with open_gguf(path) as opened:
            found, where = opened.metadata.get(GGUF_KEY), f"{path}: {GGUF_KEY}"
    elif (path / TEMPLATE).is_file():
        return ChatTemplate(_read(path / TEMPLATE), str(path / TEMPLATE))
    elif (path / TOKENIZER_CONFIG).is_file():
        found = read_json(path / TOKENIZER_CONFIG).get("chat_template")
        where = f"{path / TOKENIZER_CONFIG}: chat_template"
    return None if found is None else ChatTemplate(_only(found, where), where)


def _read(path: Path) -> str:
    expect_file(path)
    with open(path, "rb") as file:
        raw = file.read(MAX_TEMPLATE + 1)
    if len(raw) > MAX_TEMPLATE:
        raise ValueError(f"{path}: expected a chat template of at most {MAX_TEMPLATE} bytes, got more")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text; byte {error.start} is not") from None


def _only(found: Any, where: str) -> str:
    """The template among what a file has under its key."""
    if isinstance(found, list):
        names = {one.get("name"): one.get("template") for one in found if isinstance(one, dict) and _is_name(one)}
        found = names.get(DEFAULT, found)
    if not isinstance(found, str):
        raise ValueError(f"{where}: expected a template, or several of which one is named {DEFAULT}, got {found!r:.60}")
    if len(found) > MAX_TEMPLATE:
        raise ValueError(f"{where}: expected a chat template of at most {MAX_TEMPLATE} bytes, got more")
    return found


def _is_name(one: dict[str, Any]) -> bool:
    return isinstance(one.get("name"), str)
