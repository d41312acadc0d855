"""Run by expressions.py through bounded.py, with the standard library alone: matches until time or memory is up.

In: one JSON object. Out: for each expression, in order, a line of JSON: the numbers of the names that it fits, or what
is wrong with it.
"""

import json
import re
import sys


def fitting(text: str, whole: bool, names: list[str]) -> list[int] | str:
    """The numbers of the names that an expression fits: all of a name, or only a beginning; or what is wrong."""
    try:
        expression = re.compile(text)
        match = expression.fullmatch if whole else expression.match
        return [n for n, name in enumerate(names) if match(name)]
    except Exception as error:  # of many types: re.error, ValueError, RecursionError, OverflowError, MemoryError
        return str(error) or type(error).__name__


def main() -> None:
    """Answers the request on standard input."""
    request = json.load(sys.stdin)
    for text, whole in request["expressions"]:
        print(json.dumps(fitting(text, whole, request["names"])), flush=True)


if __name__ == "__main__":
    main()
