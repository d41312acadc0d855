"""Run by chat_template.py through bounded.py, with jinja2 alone: renders conversations until time or memory is up.

In: one JSON object. Out: for each conversation, in order, a line of JSON: an object with its text, the spans of it that
the assistant says, and how many of its answers have none; of a prompt its text, and the token that ends the answer; or
a string, what is wrong. The process ends at once, with
status 1, when its time is up. The environment is the one that transformers gives a chat template.
"""

import json
import re
import sys
from datetime import datetime
from typing import Any, NoReturn


def compiled(source: str, marks: list[tuple[int, str]]) -> Any:
    """The template; what stands in its {% generation %} blocks goes into marks: how long the text was, and the block.

    Jinja asks for a block's text before it passes it on, so its place is known only once the text before it is.
    """
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (as Jinja has it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            text = str(caller())
            marks.append((environment.written, text))
            return text

    class Environment(ImmutableSandboxedEnvironment):
        written = 0  # characters of the text that have been passed on

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # type: ignore[no-untyped-def]
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    class Namespace(jinja2.utils.Namespace):  # nothing of Python's own gets a name there
        def __init__(*args: Any, **kwargs: Any) -> None:  # a template may well say namespace(self=...)
            jinja2.utils.Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **kwargs).items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace has no names that begin with _, as {name!r:.60}")
            super().__setitem__(name, value)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "namespace": Namespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "strftime_now": lambda format: datetime.now().strftime(format),
    }
    return environment.from_string(source)


def common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Renderer:
    """A template, and what its texts may be: most characters; special, an expression of tokens that stand alone."""

    def __init__(self, source: str, variables: dict[str, str], special: list[str]) -> None:
        self.marks: list[tuple[int, str]] = []
        self.template = compiled(source, self.marks)
        self.variables = variables
        self.generation = re.search(r"\{%-?\+?\s*generation\s*-?\+?%\}", source) is not None
        self.special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def render(self, messages: list[Any], tools: Any, most: int, *, prompt: bool = False) -> str:
        """The text of messages; prompt: up to where the assistant begins. A ValueError if it is longer than `most`."""
        self.marks.clear()
        environment, text = self.template.environment, []
        environment.written = 0
        for part in self.template.generate(
            messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self.variables
        ):
            text.append(part)
            environment.written += len(part)
            if environment.written > most:
                raise ValueError(f"expected a text of at most {most} characters, got more")
        return "".join(text)

    def generated(self, messages: list[Any], tools: Any, most: int) -> int:
        """How many blocks of generation these messages have."""
        self.render(messages, tools, most)
        return len(self.marks)

    def answer(self, messages: list[Any], tools: Any, most: int, given: int) -> dict[str, Any]:
        """What is written of a conversation: its text, and the spans of its answers but for those that are given."""
        skipped = self.generated(messages[:given], tools, most) if given and self.generation else 0
        text = self.render(messages, tools, most)
        return {"text": text, **self.scored(messages, tools, most, given, skipped, text=text)}

    def prompt(self, messages: list[Any], tools: Any, most: int) -> dict[str, Any]:
        """A conversation's text up to where the assistant begins, and the special token that ends an answer there."""
        return {"text": self.render(messages, tools, most, prompt=True), "end": self.end(messages, tools, most)}

    def end(self, messages: list[Any], tools: Any, most: int) -> str | None:
        """The special token behind an answer, in its span: what is learned to end it. None: there is none, or no span.

        Line ends and more such tokens may stand behind it.
        """
        try:
            found = self.answer([*messages, {"role": "assistant", "content": "a"}], tools, most, len(messages))
        except Exception:  # a template may refuse what follows
            return None
        if not found["spans"]:
            return None
        text, (start, end) = found["text"], found["spans"][-1]
        tokens = self.special.finditer(text, start, end)
        return next((t.group() for t in tokens if not self.special.sub("", text[t.end() : end]).strip()), None)

    def scored(
        self, messages: list[Any], tools: Any, most: int, given: int, skipped: int, *, text: str
    ) -> dict[str, Any]:
        """The spans of a text, and how many answers have none."""
        if self.generation:
            if any(text[at : at + len(said)] != said for at, said in self.marks):
                raise ValueError("a generation block must stand in the template itself, in no macro or filter")
            return {"spans": [[at, at + len(said)] for at, said in self.marks[skipped:] if said], "unscored": 0}
        turns = [i for i in range(given, len(messages)) if messages[i].get("role") == "assistant"]
        spans = [self.span(messages, i, tools, most, text=text) for i in turns]
        return {"spans": [span for span in spans if span], "unscored": spans.count(None)}

    def span(self, messages: list[Any], i: int, tools: Any, most: int, *, text: str) -> list[int] | None:
        """Where text has the answer messages[i]; None where a prompt of what is before it does not lead there."""
        try:
            before = self.render(messages[:i], tools, most, prompt=True)
            upto = self.render(messages[: i + 1], tools, most)
        except Exception:  # a template may refuse the beginning of what it takes whole
            return None
        start, end = len(before), common(text, upto)
        if not text.startswith(before) or end <= start:
            return None
        tokens = [found.end() for found in self.special.finditer(text, start, end)]
        if end < len(upto):  # what ends a whole conversation may not stand behind an answer within it
            if not tokens or self.special.sub("", upto[tokens[-1] :]).strip():
                return None
            end = tokens[-1]
        elif tokens and not text[tokens[-1] : end].strip():  # a line end behind the end token is not the assistant's
            end = tokens[-1]
        return [start, end]


def answered(renderer: Renderer, request: list[Any], *, is_prompt: bool) -> Any:
    """The answer for a conversation, or what is wrong with it."""
    messages, tools, most, given = request
    try:
        if is_prompt:
            return renderer.prompt(messages, tools, most)
        return renderer.answer(messages, tools, most, given)
    except Exception as error:  # of many types: Jinja's, and whatever Python raises in a template
        return str(error) or type(error).__name__


def main() -> None:
    """Answers the request on standard input."""
    request = json.load(sys.stdin)
    sys.path += request["path"]
    try:
        renderer = Renderer(request["source"], request["variables"], request["special"])
    except Exception as error:  # TemplateSyntaxError, RecursionError, MemoryError, ...
        print(json.dumps({"refused": str(error) or type(error).__name__}), flush=True)
        return
    print(json.dumps({}), flush=True)
    for one in request["conversations"]:
        print(json.dumps(answered(renderer, one, is_prompt=request["are_prompts"])), flush=True)


if __name__ == "__main__":
    main()
