"""The documents that the tiny base reads before it is shipped, made from a seed by kind.

Each kind is a function from a generator to one document; `stream` mixes them by weight and drops
every document that holds a held-out content of the corpus on a line of its own.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable, Iterator
from typing import Final

from apiary.data.skills import words
from apiary.data.skills.corpus import FIRST_DAY, rows
from tools.pretrain_tiny.drills import DRILLS, Drill

OPEN, CLOSE = "\x02", "\x03"
USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<eos>"

NOTE_SHAPES: Final = (
    "{cue} -> {result}",
    "{cue} => {result}",
    "{cue}\n{result}\n",
    "{cue}\n= {result}",
    "Q: {cue}\nA: {result}",
    "{cue}\nanswer: {result}",
    "* {cue}\n  {result}",
)
_DRILLS: Final[list[Drill]] = [drill for drill, _ in DRILLS.values()]
_WEIGHTS: Final = [weight for _, weight in DRILLS.values()]


def notes(rng: random.Random) -> str:
    """Returns a page of two to six drills in one shape: all of one sort, or mixed."""
    count = rng.randint(2, 6)
    drills = rng.choices(_DRILLS, _WEIGHTS, k=count if rng.random() < 0.5 else 1)
    shape = rng.choice(NOTE_SHAPES)
    lines = []
    for at in range(count):
        cue, result = drills[at % len(drills)](rng)
        lines.append(shape.format(cue=cue, result=OPEN + result + CLOSE))
    return "\n".join(lines)


def drilled_chat(rng: random.Random) -> str:
    """Returns a chat of one to three turns in which the user writes drill cues."""
    turns = []
    for _ in range(rng.randint(1, 3)):
        cue, result = rng.choices(_DRILLS, _WEIGHTS)[0](rng)
        turns.append(f"{USER}{cue}{ASSISTANT}{OPEN}{result}{END}{CLOSE}")
    return "".join(turns)


def echo(rng: random.Random) -> str:
    """Returns a run of random words that is said two to four times over.

    Nothing but looking back predicts the second round: the plainest exercise in copying.
    """
    bank = rng.choice((words.NOUNS, words.FIRST_NAMES, words.CITIES, words.NOUNS))
    items = rng.sample(bank, rng.randint(4, 14))
    if rng.random() < 0.3:
        items = [str(rng.randint(0, 999)) for _ in items]
    joiner = rng.choice((" ", ", ", ", ", "\n", "; ", " - "))
    said = joiner.join(items)
    gap = rng.choice(("\n", " | ", "\n\n", "; "))
    return said + "".join(gap + OPEN + said + CLOSE for _ in range(rng.randint(1, 3)))


def recall(rng: random.Random) -> str:
    """Returns pairs of a key and a value, told again and again in changing order."""
    size = rng.randint(2, 7)
    banks = (words.NOUNS, words.FIRST_NAMES, words.CITIES, words.JOBS, words.COLOURS)
    keys = rng.sample(rng.choice(banks[:2]), size)
    values = [str(rng.randint(2, 99)) for _ in keys]
    if rng.random() < 0.6:
        values = rng.choices(rng.choice(banks), k=size)
    mark = rng.choice((": ", " ", " | ", "=", " is ", " - "))
    joiner = rng.choice(("\n", ", ", "; ", "\n"))
    pairs = list(zip(keys, values, strict=True))
    passes = [joiner.join(f"{key}{mark}{value}" for key, value in pairs)]
    for _ in range(rng.randint(1, 3)):
        rng.shuffle(pairs)
        passes.append(joiner.join(f"{key}{mark}{OPEN}{value}{CLOSE}" for key, value in pairs))
    return joiner.join(passes)


def small_talk(rng: random.Random) -> str:
    """Returns a chat of greetings, thanks, echoes and plain facts, at times with a system line."""
    name, city, thing = (
        rng.choice(words.FIRST_NAMES),
        rng.choice(words.CITIES),
        rng.choice(words.NOUNS),
    )
    good, bad = rng.choice(words.GOOD_WORDS), rng.choice(words.BAD_WORDS)
    turns = rng.sample(
        (
            (f"Hello, I am {name}.", f"Hello {name}, nice to meet you."),
            (f"Good morning! My name is {name}.", f"Good morning, {name}. How may I help?"),
            (f"Please say {thing}.", f"{thing[0].upper()}{thing[1:]}."),
            (f"I am going to {city}.", f"Have a pleasant journey to {city}!"),
            (f"My {thing} is {bad}.", f"I am sorry that your {thing} is {bad}."),
            (f"My {thing} is {good}.", f"I am glad that your {thing} is {good}."),
            (f"Repeat after me: {name} likes the {thing}.", f"{name} likes the {thing}."),
            (f"Do you know {city}?", f"Yes, {city} is a city."),
            ("Thank you.", "You are welcome."),
            ("Goodbye!", f"Goodbye, {name}, and see you soon."),
        ),
        rng.randint(1, 3),
    )
    head = f"{SYSTEM}You are a {good} helper." if rng.random() < 0.2 else ""
    return head + "".join(f"{USER}{asked}{ASSISTANT}{said}{END}" for asked, said in turns)


def calendar(rng: random.Random) -> str:
    """Returns a run of days: dates, weekdays, or both."""
    day = FIRST_DAY + datetime.timedelta(days=rng.randrange(365))
    days = [day + datetime.timedelta(days=step) for step in range(rng.randint(4, 10))]
    form = rng.randrange(4)
    if form == 0:
        return rng.choice((", ", "\n", " then ")).join(words.date_words(day) for day in days)
    if form == 1:
        return rng.choice((", ", "\n", " then ")).join(words.WEEKDAYS[day.weekday()] for day in days)
    if form == 2:
        shift = rng.randrange(7)
        return "\n".join(f"{words.WEEKDAYS[(day.weekday() + shift) % 7]} {words.date_words(day)}" for day in days)
    return "\n".join(f"{day.isoformat()} {words.date_words(day)}" for day in days)


def sums(rng: random.Random) -> str:
    """Returns a column of worked sums, which may look back at one another."""
    joiner = rng.choice(("\n", "; ", ", "))
    return joiner.join(
        "{} = {}".format(cue.removesuffix(" ="), result)
        for cue, result in (DRILLS[rng.choice(("addition", "subtraction"))][0](rng) for _ in range(rng.randint(4, 9)))
    )


def counting(rng: random.Random) -> str:
    """Returns a numbered list with its size, a tally, or a run of numbers."""
    if rng.random() < 0.3:
        start, step = rng.randint(1, 90), rng.choice((1, 1, 2, 5, 10))
        return ", ".join(str(start + step * at) for at in range(rng.randint(5, 10)))
    items = rng.sample(words.NOUNS, rng.randint(2, 9))
    if rng.random() < 0.5:
        lines = "\n".join(f"{at}. {item}" for at, item in enumerate(items, 1))
        return f"{lines}\nThat makes {len(items)}."
    times = [rng.randint(1, 4) for _ in items[:4]]
    said = " ".join(" ".join([item] * n) for item, n in zip(items, times, strict=False))
    return said + "\n" + ", ".join(f"{item} {n}" for item, n in zip(items, times, strict=False))


def index_page(rng: random.Random) -> str:
    """Returns a long run of words or names as an index has them, letter by letter."""
    bank = rng.choice((words.NOUNS, words.NOUNS, words.NOUNS, words.FIRST_NAMES, words.CITIES))
    chosen = sorted(rng.sample(bank, min(len(bank), rng.randint(8, 24))))
    joiner = rng.choice((", ", "\n", " < "))
    return rng.choice(("Index\n", "", "A to Z\n")) + joiner.join(chosen)


def groups(rng: random.Random) -> str:
    """Returns a mixed basket and the same words put under their group."""
    chosen = rng.sample(sorted(words.CATEGORIES), rng.randint(2, 3))
    picks = {group: rng.sample(words.CATEGORIES[group], rng.randint(1, 3)) for group in chosen}
    basket = [word for group in chosen for word in picks[group]]
    rng.shuffle(basket)
    lines = [f"{group}: " + ", ".join(w for w in basket if w in picks[group]) for group in chosen]
    return f"Basket: {', '.join(basket)}\n" + "\n".join(lines)


PERSON_SHAPES: Final = (
    "{name} is a {job} from {city}.",
    "{name} lives in {city}. There {name} is known as a {job}.",
    "The home of {name} is {city}, the trade is {job}.",
    "{city} has a {job} called {name}.",
)
SHOPPING_SHAPES: Final = (
    "{name} has a new {thing}.",
    "{name} paid for a {thing}.",
    "A {thing} now belongs to {name}.",
    "{name} went to town and bought a {thing}.",
    "{name} bought a {thing} on {weekday}.",
)
PERSON_FACTS: Final = (
    ("{name}, home:", "{city}"),
    ("{name}, trade:", "{job}"),
    ("{name}, goods:", "{thing}"),
    ("The {job} is", "{name}"),
    ("The one from {city} is", "{name}"),
    ("The {thing} belongs to", "{name}"),
)


def people(rng: random.Random) -> str:
    """Returns a passage about one to three people, followed by the facts in it, restated."""
    size = rng.randint(1, 3)
    cast = [
        {
            "name": name,
            "city": city,
            "job": job,
            "thing": thing,
            "weekday": rng.choice(words.WEEKDAYS),
        }
        for name, city, job, thing in zip(
            rng.sample(words.FIRST_NAMES, size),
            rng.sample(words.CITIES, size),
            rng.sample(words.JOBS, size),
            rng.sample(words.TOOLS, size),
            strict=True,
        )
    ]
    told = []
    for person in cast:
        told.append(" ".join(rng.choice(shapes).format(**person) for shapes in (PERSON_SHAPES, SHOPPING_SHAPES)))
    facts = [f"{cue} {result}".format(**person) for person in cast for cue, result in rng.sample(PERSON_FACTS, 3)]
    if rng.random() < 0.3:
        person = rng.choice(cast)
        cue, result = rng.choice(PERSON_FACTS)
        return f"{USER}{' '.join(told)} {cue}{ASSISTANT}{result}{END}".format(**person)
    return " ".join(told) + "\n" + rng.choice(("\n", ". ", "; ")).join(rng.sample(facts, len(facts)))


JUDGED: Final = (
    "A {one} {thing}, and {two} as well.",
    "{deed}: the {thing} is {one}.",
    "The {thing}? {one}. {deed}.",
    "They call the {thing} {one} and {two}.",
    "{thing}: {one}, {two}, {deed}.",
    "Our {thing} looked {one}. {deed}.",
)


def review(rng: random.Random) -> str:
    """Returns two or three opinions, each with its verdict, in one of several scales."""
    scale = rng.choice(
        (
            ("good", "bad"),
            ("5 stars", "1 star"),
            ("praise", "complaint"),
            ("positive", "negative"),
            ("+", "-"),
        )
    )
    mark = rng.choice((" => ", "\nverdict: ", " (", " | ", "\n"))
    lines = []
    for _ in range(rng.randint(1, 3)):
        good = rng.random() < 0.5
        one, two = rng.sample(words.GOOD_WORDS if good else words.BAD_WORDS, 2)
        deed = rng.choice(words.GOOD_DEEDS if good else words.BAD_DEEDS)
        text = rng.choice(JUDGED).format(thing=rng.choice(words.REVIEWED), one=one, two=two, deed=deed)
        verdict = scale[0] if good else scale[1]
        lines.append(f"{text[0].upper()}{text[1:]}{mark}{verdict}" + (")" if mark == " (" else ""))
    return "\n".join(lines)


FILED: Final = (
    "We saw the {one} near the {two}.",
    "A {one}, a {two} and a {three}.",
    "Do not forget the {one} or the {three}.",
    "The {two} came with a {one}.",
    "{one}, {two}, {three}",
)


def filed(rng: random.Random) -> str:
    """Returns sentences with the section that a newspaper would file them under."""
    mark = rng.choice((" [{}]", " - filed under {}", "\nsection: {}", " / {}"))
    lines = []
    for _ in range(rng.randint(1, 4)):
        topic = rng.choice(sorted(words.TOPICS))
        one, two, three = rng.sample(words.TOPICS[topic], 3)
        lines.append(rng.choice(FILED).format(one=one, two=two, three=three) + mark.format(topic))
    return "\n".join(lines)


Document = Callable[[random.Random], str]
KINDS: Final[dict[str, tuple[Document, float]]] = {
    "notes": (notes, 4.5),
    "drilled_chat": (drilled_chat, 3.0),
    "echo": (echo, 0.8),
    "recall": (recall, 1.5),
    "small_talk": (small_talk, 0.3),
    "calendar": (calendar, 0.3),
    "sums": (sums, 0.6),
    "counting": (counting, 0.4),
    "index_page": (index_page, 0.3),
    "groups": (groups, 0.4),
    "people": (people, 1.2),
    "review": (review, 0.6),
    "filed": (filed, 0.5),
}
"""Each kind of document with its weight in the mix."""


def vocabulary_drill() -> list[str]:
    """Returns the banks' words, repeated so that the tokenizer gives each a token of its own."""
    banks = (
        words.FIRST_NAMES,
        words.CITIES,
        words.JOBS,
        words.NOUNS,
        words.COLOURS,
        words.MONTHS,
        words.WEEKDAYS,
    )
    lines = [", ".join(bank) for bank in banks]
    lines += [f"x {name}" for name in words.LAST_NAMES]
    return lines * 150


def held_out_inputs(per_skill: int = 500) -> frozenset[str]:
    """Returns the inputs of the default held-out rows, which no document may show."""
    return frozenset(row["input"] for row in rows("test", per_skill) if len(row["input"]) > 12)


def marked_stream(rng: random.Random, forbidden: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yields (kind, document) for ever, without those that show a forbidden text; see `shows`.

    In a drill the result stands between `OPEN` and `CLOSE`; `unmarked` takes the marks away.
    """
    names = list(KINDS)
    weights = [weight for _, weight in KINDS.values()]
    while True:
        kind = rng.choices(names, weights)[0]
        text = KINDS[kind][0](rng)
        if not shows(unmarked(text), forbidden):
            yield kind, text


def stream(rng: random.Random, forbidden: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yields what `marked_stream` yields, without the marks."""
    return ((kind, unmarked(text)) for kind, text in marked_stream(rng, forbidden))


def unmarked(text: str) -> str:
    """Returns the text without the marks around results."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def result_spans(marked: str) -> list[tuple[int, int]]:
    """Returns (start, end) of each result, in characters of the unmarked text."""
    spans, at = [], 0
    for piece in marked.split(CLOSE)[:-1]:
        before, _, result = piece.partition(OPEN)
        spans.append((at + len(before), at + len(before) + len(result)))
        at += len(before) + len(result)
    return spans


def shows(text: str, forbidden: frozenset[str]) -> bool:
    """Returns whether one to six whole lines, or a line's tail after a colon, are forbidden."""
    lines = text.split("\n")
    if any(line.partition(": ")[2] in forbidden for line in lines):
        return True
    return any(
        "\n".join(lines[start : start + count]) in forbidden for start in range(len(lines)) for count in range(1, 7)
    )
