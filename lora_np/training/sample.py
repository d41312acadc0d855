"""Small files of data to try things on, one for each task: about a town that is made up. The same on every machine."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..formats.files.atomic import new_folder

FIRST = "Ada Bram Celia Dorn Edda Falk Greta Hugo Ines Jarl Kaja Lorne Mira Nils Orla Pim Rhea Sten Tilda Wim"
LAST = "Brook Carver Dale Elm Fenn Garrick Holm Ives Keel Lark Moss Nye Pell Reeve Stone Thorn Vale Wick"
COLOURS = "Amber Blue Copper Green Grey Old Red Silver White Golden"
THINGS = "Anchor Bell Crane Fox Heron Key Lantern Mill Oak Swan"
STREETS = ["Mill Lane", "Bridge Street", "Harbour Row", "Tanner's Hill", "Church Walk", "Orchard Road", "Sand Quay"]
KINDS = {
    "bakery": "rye bread", "bookshop": "old maps", "inn": "fish soup", "workshop": "clocks", "tea room": "plum cake",
    "dairy": "goat cheese", "florist": "white tulips", "tailor": "rain coats",
}  # fmt: skip
PRICES = {"low": "cheap", "middling": "fairly priced", "high": "expensive"}

GOOD = "warm bright lovely generous careful fresh splendid friendly quick charming"
BAD = "cold gloomy dreadful stingy careless stale shabby rude slow dull"
NOUNS = "the soup|the room|the service|the evening|the bread|the music|the garden|the owner|the coffee|the view"
REVIEWS = [
    "{noun} was {one} and {other}", "{one} from the first minute, and {noun} {other} too", "what a {one} place",
    "we found {noun} {one}", "not at all {opposite}: {noun} was {one}", "never {opposite}, always {one}",
    "I expected it to be {opposite}, but it was {one}", "{noun} could not have been more {one}",
    "a {one}, {other} hour; I shall tell everyone",
]  # fmt: skip

QUESTIONS = {
    "Where is the {name}?": "The {name} is in {street}.",
    "Who keeps the {name}?": "{owner} keeps the {name}.",
    "What is the {name} known for?": "The {name} is known for its {sells}.",
    "Is the {name} expensive?": "The {name} is {dear}.",
    "What kind of place is the {name}?": "The {name} is {article} {kind}.",
}

KINDS_FR = {
    "bakery": "une boulangerie", "bookshop": "une librairie", "inn": "une auberge", "workshop": "un atelier",
    "tea room": "un salon de thé", "dairy": "une crèmerie", "florist": "un fleuriste", "tailor": "un tailleur",
}  # fmt: skip
SELLS_FR = {
    "rye bread": "du pain de seigle", "old maps": "de vieilles cartes", "fish soup": "de la soupe de poisson",
    "clocks": "des horloges", "plum cake": "du gâteau aux prunes", "goat cheese": "du fromage de chèvre",
    "white tulips": "des tulipes blanches", "rain coats": "des imperméables",
}  # fmt: skip
FRENCH = {
    "Where is the {name}?": "Où se trouve le {name} ?",
    "The {name} is in {street}.": "Le {name} se trouve dans {street}.",
    "{owner} keeps the {name}.": "{owner} tient le {name}.",
    "The {name} is {article} {kind}.": "Le {name} est {kind_fr}.",
    "The {name} sells {sells}.": "Le {name} vend {sells_fr}.",
    "{owner} sells {sells} in {street}.": "{owner} vend {sells_fr} dans {street}.",
}


class Place(NamedTuple):
    """A place in the town: what there is to say about it."""

    name: str
    kind: str
    article: str
    sells: str
    street: str
    owner: str
    price: str
    dear: str


def _person(rng: random.Random) -> str:
    return f"{rng.choice(FIRST.split())} {rng.choice(LAST.split())}"


def _places(rng: random.Random) -> list[Place]:
    """A hundred places."""
    names = [f"{colour} {thing}" for colour in COLOURS.split() for thing in THINGS.split()]
    places = []
    for name in rng.sample(names, len(names)):
        kind, price = rng.choice(list(KINDS)), rng.choice(list(PRICES))
        article, owner = "an" if kind == "inn" else "a", _person(rng)
        places.append(Place(name, kind, article, KINDS[kind], rng.choice(STREETS), owner, price, PRICES[price]))
    return places


def _text(rng: random.Random) -> Iterator[str]:
    """Prose, a paragraph a line."""
    for place in _places(rng):
        sentences = [
            f"In {place.street} stands the {place.name}, {place.article} {place.kind}.",
            f"It belongs to {place.owner}, who is known for {place.sells}.",
            f"Those who have been there say that it is {place.dear}.",
        ]
        yield " ".join(sentences[: rng.choice([2, 3])])
        yield f"{place.owner} opens the {place.name} at {rng.randint(6, 10)} and closes it at {rng.randint(17, 22)}."
        yield f"From the {place.name} it is {rng.randint(2, 20)} minutes on foot to {rng.choice(STREETS)}."


def _pairs(rng: random.Random) -> Iterator[str]:
    """Facts, and the sentence that says them: prompt||completion."""
    for place in _places(rng):
        facts = f"name: {place.name} | kind: {place.kind} | street: {place.street}"
        yield f"{facts}||The {place.name} is {place.article} {place.kind} in {place.street}."
        facts += f" | owner: {place.owner}"
        yield f"{facts}||The {place.name} is {place.article} {place.kind} in {place.street}, kept by {place.owner}."
        where = f"In {place.street}, {place.owner} keeps the {place.name}, {place.article} {place.kind}."
        yield f"{facts} | price: {place.price}||{where} It is {place.dear}."


def _chat(rng: random.Random) -> Iterator[str]:
    """Conversations of one or two questions, as JSON lines."""
    for place in _places(rng):
        for n in (1, 1, 2):
            messages = [{"role": "system", "content": "You know the town of Marren."}] if n == 2 else []
            for question, answer in rng.sample(list(QUESTIONS.items()), n):
                messages.append({"role": "user", "content": question.format(**place._asdict())})
                messages.append({"role": "assistant", "content": answer.format(**place._asdict())})
            yield json.dumps({"messages": messages})


def _labels(rng: random.Random) -> Iterator[str]:
    """Reviews, good or bad: text<TAB>label."""
    for n in range(400):
        words, opposites, label = (GOOD, BAD, "good") if n % 2 else (BAD, GOOD, "bad")
        one, other = rng.sample(words.split(), 2)
        noun, opposite = rng.choice(NOUNS.split("|")), rng.choice(opposites.split())
        text = rng.choice(REVIEWS).format(noun=noun, one=one, other=other, opposite=opposite)
        yield f"{text}\t{label}"


def _tags(rng: random.Random) -> Iterator[str]:
    """Sentences as CoNLL columns, a word and its tag a line: people (PER), streets (LOC), places (ORG)."""
    forms = ["PER went to ORG in LOC .", "On Monday PER met PER .", "ORG has moved to LOC .", "PER sold ORG to PER ."]
    for place in _places(rng):
        for form in rng.sample(forms, 3):
            for word in form.split():
                entity = {
                    "PER": _person(rng), "ORG": f"the {place.name}", "LOC": place.street,
                }.get(word)  # fmt: skip
                if entity is None:
                    yield f"{word} O"
                else:
                    for i, part in enumerate(entity.split()):
                        yield f"{part} {'I' if i else 'B'}-{word}"
            yield ""


def _french(rng: random.Random) -> Iterator[str]:
    """Sentences and their translations into French: source<TAB>target."""
    for place in _places(rng):
        words = place._asdict() | {"kind_fr": KINDS_FR[place.kind], "sells_fr": SELLS_FR[place.sells]}
        for source, target in rng.sample(list(FRENCH.items()), 3):
            yield f"{source.format(**words)}\t{target.format(**words)}"


FILES = {
    "text.txt": _text,
    "pairs.txt": _pairs,
    "chat.jsonl": _chat,
    "french.tsv": _french,
    "reviews.tsv": _labels,
    "tags.conll": _tags,
}


def write_sample(folder: Path) -> dict[str, int]:
    """Writes the files into a new folder. -> the lines of each. A FileExistsError if it is there already."""
    lines = {name: list(write(random.Random(name))) for name, write in FILES.items()}
    with new_folder(folder) as new:
        for name, found in lines.items():
            (new / name).write_text("\n".join(found) + "\n", encoding="utf-8", newline="\n")
    return {name: len(found) for name, found in lines.items()}
