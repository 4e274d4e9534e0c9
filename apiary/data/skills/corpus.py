"""The built-in instruction corpus `builtin:skills`: twelve skills with exactly checkable answers.

Every row is made from a seed. Whether a row is a training or a held-out row is decided by a hash
of its content (what is asked about, and the answer) and of nothing else: no seed, size or
phrasing can move a content from one side to the other, so no held-out content is ever trained on.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

from apiary.data.skills import words
from apiary.data.skills.phrasings import PHRASINGS

Split = Literal["train", "test"]

PER_SKILL: Final = 500
"""Rows of each skill in a split, where nobody says."""

HELD_OUT_ONE_IN: Final = 5
"""One content in this many is held out, by hash."""

FIRST_DAY: Final = datetime.date(2023, 1, 1)
"""Dates without a year are counted in a common year, so 28 February is followed by 1 March."""


class Item(NamedTuple):
    """One task before it is worded.

    Attributes:
        kind: the key into `PHRASINGS` after the skill, e.g. `numbers` of `sort.numbers`.
        content: what is asked about; shown as the row's input unless `shown` is false.
        answer: the only right answer.
        slots: values for the phrasing's `{slots}`.
        shown: false where the instruction itself holds the content and the row's input stays empty.
    """

    kind: str
    content: str
    answer: str
    slots: Mapping[str, object] = {}
    shown: bool = True


Maker = Callable[[random.Random], Item]


def is_held_out(skill: str, content: str, answer: str) -> bool:
    """Returns whether this content belongs to the held-out split, for every seed and phrasing."""
    key = "\x1f".join((skill, content, answer)).encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def record_lines(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Returns `count` different (field, value) pairs about one person, in random order."""
    name = f"{rng.choice(words.FIRST_NAMES)} {rng.choice(words.LAST_NAMES)}"
    pairs = [
        ("name", name),
        ("city", rng.choice(words.CITIES)),
        ("age", str(rng.randint(18, 89))),
        ("job", rng.choice(words.JOBS)),
        ("colour", rng.choice(words.COLOURS)),
        ("pet", rng.choice(words.ANIMALS)),
        ("room", str(rng.randint(100, 999))),
    ]
    return rng.sample(pairs, count)


def _extract(rng: random.Random) -> Item:
    pairs = record_lines(rng, rng.randint(3, 5))
    field, value = rng.choice(pairs)
    joiner = rng.choice(("\n", "; "))
    return Item("field", joiner.join(f"{key}: {item}" for key, item in pairs), value, {"field": field})


def _lookup(rng: random.Random) -> Item:
    size = rng.randint(3, 5)
    if rng.random() < 0.5:
        kind, head, keys = "price", "item | price", rng.sample((*words.TOOLS, *words.FOODS), size)
        values = [str(number) for number in rng.sample(range(2, 99), size)]
    else:
        kind, head, keys = "city", "name | city", rng.sample(words.FIRST_NAMES, size)
        values = rng.sample(words.CITIES, size)
    row = rng.randrange(size)
    table = "\n".join((head, *(f"{key} | {value}" for key, value in zip(keys, values, strict=True))))
    return Item(kind, table, values[row], {"thing": keys[row]})


def _sort(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        chosen = rng.sample(words.NOUNS, rng.randint(3, 4))
        return Item("words", ", ".join(chosen), ", ".join(sorted(chosen)))
    numbers = rng.sample(range(10, 100), rng.randint(3, 5))
    return Item("numbers", ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers))))


def _count(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        chosen = rng.sample(words.NOUNS, rng.randint(2, 8))
        return Item("all", ", ".join(chosen), str(len(chosen)))
    bag = rng.sample(words.NOUNS, 3)
    thing, times = bag[0], rng.randint(1, 4)
    items = [thing] * times + rng.choices(bag[1:], k=rng.randint(2, 4))
    rng.shuffle(items)
    return Item("one", ", ".join(items), str(times), {"thing": thing})


def _filter(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        group, *others = rng.sample(sorted(words.CATEGORIES), 3)
        kept = rng.sample(words.CATEGORIES[group], rng.randint(1, 3))
        rest = [rng.choice(words.CATEGORIES[other]) for other in others]
        mixed = rng.sample(kept + rest, len(kept) + len(rest))
        answer = ", ".join(word for word in mixed if word in kept)
        return Item("category", ", ".join(mixed), answer, {"thing": group})
    threshold = rng.randrange(20, 81, 10)
    numbers = rng.sample([n for n in range(10, 100) if n != threshold], rng.randint(3, 5))
    above = [str(n) for n in numbers if n > threshold]
    if not above:
        return _filter(rng)
    return Item("above", ", ".join(map(str, numbers)), ", ".join(above), {"thing": threshold})


def _compare(rng: random.Random) -> Item:
    if rng.random() < 0.34:
        pair = rng.sample(range(10, 1000), 2)
        return Item("larger", f"{pair[0]} and {pair[1]}", str(max(pair)))
    size = rng.randint(2, 4)
    ages = dict(zip(rng.sample(words.FIRST_NAMES, size), rng.sample(range(18, 90), size), strict=True))
    kind, pick = ("oldest", max) if rng.random() < 0.5 else ("youngest", min)
    listed = ", ".join(f"{name} is {age}" for name, age in ages.items())
    return Item(kind, listed, pick(ages, key=ages.__getitem__))


def _arithmetic(rng: random.Random) -> Item:
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    name = rng.choice(words.FIRST_NAMES)
    if rng.random() < 0.5:
        low, high = sorted((a, b))
        return Item("add", f"{low} + {high}", str(a + b), {"a": a, "b": b, "name": name}, shown=False)
    slots = {"a": a + b, "b": b, "name": name}
    return Item("subtract", f"{a + b} - {b}", str(a), slots, shown=False)


def _dates(rng: random.Random) -> Item:
    day = FIRST_DAY + datetime.timedelta(days=rng.randrange(365))
    steps, date = rng.randint(2, 6), words.date_words(day)
    if rng.random() < 0.5:
        answer = words.date_words(day + datetime.timedelta(days=steps))
        return Item("later", f"{date} + {steps}", answer, {"date": date, "n": steps}, shown=False)
    today = rng.randrange(7)
    slots = {"date": date, "n": steps, "weekday": words.WEEKDAYS[today]}
    answer = words.WEEKDAYS[(today + steps) % 7]
    return Item("weekday", f"{slots['weekday']} {date} + {steps}", answer, slots, shown=False)


def _convert(rng: random.Random) -> Item:
    kind = rng.choice(("iso_to_words", "words_to_iso", "pairs"))
    if kind == "pairs":
        pairs = record_lines(rng, rng.randint(2, 3))
        lines = "\n".join(f"{key}: {value}" for key, value in pairs)
        return Item(kind, lines, ";".join(f"{key}={value}" for key, value in pairs))
    day = datetime.date(rng.randint(1900, 2029), 1, 1) + datetime.timedelta(days=rng.randrange(365))
    spelled = f"{words.date_words(day)} {day.year}"
    if kind == "iso_to_words":
        return Item(kind, day.isoformat(), spelled)
    return Item(kind, spelled, day.isoformat())


def _transform(rng: random.Random) -> Item:
    kind = rng.choice(("reverse", "join", "initials"))
    if kind == "initials":
        name = [*rng.sample(words.FIRST_NAMES, rng.randint(1, 2)), rng.choice(words.LAST_NAMES)]
        return Item(kind, " ".join(name), "".join(f"{part[0]}." for part in name))
    chosen = rng.sample(words.NOUNS, rng.randint(3, 5))
    answer = "-".join(chosen) if kind == "join" else " ".join(reversed(chosen))
    return Item(kind, " ".join(chosen), answer)


def _classify(rng: random.Random) -> Item:
    if rng.random() < 0.5:
        good = rng.random() < 0.5
        adjectives = rng.sample(words.GOOD_WORDS if good else words.BAD_WORDS, 2)
        deed = rng.choice(words.GOOD_DEEDS if good else words.BAD_DEEDS)
        thing = rng.choice(words.REVIEWED)
        shape = rng.choice(REVIEW_SHAPES)
        text = shape.format(thing=thing, one=adjectives[0], two=adjectives[1], deed=deed)
        return Item("sentiment", text[0].upper() + text[1:], "positive" if good else "negative")
    labels = rng.sample(sorted(words.TOPICS), 3)
    topic = rng.choice(labels)
    one, two, three = rng.sample(words.TOPICS[topic], 3)
    text = rng.choice(TOPIC_SHAPES).format(one=one, two=two, three=three)
    return Item("topic", text, topic, {"labels": f"{labels[0]}, {labels[1]} or {labels[2]}"})


REVIEW_SHAPES: Final = (
    "the {thing} was {one} and {two}, {deed}.",
    "what a {one} {thing}! {deed}.",
    "{deed}. The {thing} seemed {one} to me.",
    "we found the {thing} {one}, even {two}.",
    "my new {thing} is {one}; {deed}.",
)
TOPIC_SHAPES: Final = (
    "She talked about the {one} and the {two}, then about the {three}.",
    "The {one} was better than the {two}.",
    "First came the {one}, after it the {two} and the {three}.",
    "He forgot the {one} because of the {two}.",
    "Nobody expected such a {one}, or such a {two}.",
)


def _passage(rng: random.Random) -> Item:
    people = rng.sample(words.FIRST_NAMES, 2)
    facts = {
        "city": rng.sample(words.CITIES, 2),
        "job": rng.sample(words.JOBS, 2),
        "object": rng.sample(words.TOOLS, 2),
    }
    kind, asked = rng.choice(sorted(facts)), rng.randrange(2)
    sentences = []
    for at in rng.sample(range(2), 2):
        city, job, thing = (facts[key][at] for key in ("city", "job", "object"))
        sentences.append(rng.choice(PASSAGE_SHAPES).format(name=people[at], city=city, job=job, thing=thing))
    return Item(kind, " ".join(sentences), facts[kind][asked], {"name": people[asked]})


PASSAGE_SHAPES: Final = (
    "{name} works as a {job} in {city}. Last week {name} bought a {thing}.",
    "In {city} lives {name}, a {job}, who bought a {thing}.",
    "{name}, who is a {job}, lives in {city} and bought a {thing}.",
    "The {job} {name} bought a {thing} and took it home to {city}.",
)

MAKERS: Final[dict[str, Maker]] = {
    "extract": _extract,
    "lookup": _lookup,
    "sort": _sort,
    "count": _count,
    "filter": _filter,
    "compare": _compare,
    "arithmetic": _arithmetic,
    "dates": _dates,
    "convert": _convert,
    "transform": _transform,
    "classify": _classify,
    "passage": _passage,
}
SKILLS: Final[tuple[str, ...]] = tuple(MAKERS)


def rows(split: Split, per_skill: int = PER_SKILL, seed: int = 0) -> list[dict[str, str]]:
    """Returns `per_skill` rows of each skill with distinct contents, skill after skill.

    Args:
        split: `train` or `test`; the two share no content, whatever their seeds.
        per_skill: rows of each skill.
        seed: same seed and arguments, same rows.

    Returns:
        Rows with the keys `instruction`, `input` (may be empty), `output` and `skill`.

    Raises:
        ValueError: on another split, or if a skill has fewer than `per_skill` contents to draw.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: allowed are 'train' and 'test'")
    all_rows: list[dict[str, str]] = []
    for skill in SKILLS:
        all_rows += _rows_of(skill, split, per_skill, random.Random(f"{seed}/{split}/{skill}"))
    return all_rows


def _rows_of(skill: str, split: Split, count: int, rng: random.Random) -> list[dict[str, str]]:
    seen: dict[tuple[str, str], dict[str, str]] = {}
    for _ in range(count * HELD_OUT_ONE_IN * 20):
        if len(seen) >= count:
            break
        item = MAKERS[skill](rng)
        key = (item.content, item.answer)
        if key not in seen and is_held_out(skill, *key) == (split == "test"):
            seen[key] = _worded(skill, item, rng)
    if len(seen) < count:
        raise ValueError(f"per_skill={count}: skill {skill!r} gave only {len(seen)} contents; ask for fewer")
    return list(seen.values())


def _worded(skill: str, item: Item, rng: random.Random) -> dict[str, str]:
    instruction = rng.choice(PHRASINGS[f"{skill}.{item.kind}"]).format(**item.slots)
    shown = item.content if item.shown else ""
    return {"instruction": instruction, "input": shown, "output": item.answer, "skill": skill}
