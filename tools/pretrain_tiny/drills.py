"""Drills: short (cue, result) pairs that exercise one primitive each, worded unlike the corpus.

A drill's cue is terse (`rising: 34 12 56`), as in a notebook. `documents.py` sets them as notes,
tables and short chats. Sums and dates are drawn from a small space, so each of them asks
`is_held_out` and never shows held-out content; lists and records are checked when the whole
document is known.
"""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from typing import Final

from apiary.data.skills import words
from apiary.data.skills.corpus import FIRST_DAY, is_held_out, record_lines

Pair = tuple[str, str]
Drill = Callable[[random.Random], Pair]

SEPARATORS: Final = (", ", ", ", ", ", " ", " ", "; ", "\n")


def _listed(rng: random.Random, items: list[str], result: list[str], tags: tuple[str, ...]) -> Pair:
    """Returns a tagged list and its result, both with the same separator."""
    joiner = rng.choice(SEPARATORS)
    tag = rng.choice(tags)
    shape = rng.choice(
        (
            "{tag}: {items}",
            "{items} ({tag})",
            "{tag}\n{items}",
            "{items}, {tag}",
            "{tag} of {items}",
        )
    )
    return shape.format(tag=tag, items=joiner.join(items)), joiner.join(result)


def by_letter(rng: random.Random) -> Pair:
    """Returns words, and the same words in the order of their letters."""
    bank = rng.choice((words.NOUNS, words.NOUNS, words.FIRST_NAMES, words.CITIES))
    items = rng.sample(bank, rng.randint(2, 6))
    return _listed(
        rng,
        items,
        sorted(items),
        ("by letter", "a-z", "abc order", "letter order", "as in an index"),
    )


def before(rng: random.Random) -> Pair:
    """Returns two words, and the one that an index has first (or second)."""
    pair = rng.sample(words.NOUNS, 2)
    first, second = sorted(pair)
    if rng.random() < 0.5:
        return f"first by letter, {pair[0]} or {pair[1]}", first
    return f"after {first} by letter: {pair[0]} or {pair[1]}", second


def rising(rng: random.Random) -> Pair:
    """Returns numbers, and the same numbers rising or falling."""
    numbers = rng.sample(range(1, 1000) if rng.random() < 0.2 else range(10, 100), rng.randint(2, 6))
    items = [str(number) for number in numbers]
    up = [str(number) for number in sorted(numbers)]
    if rng.random() < 0.7:
        return _listed(rng, items, up, ("rising", "upwards", "small to big", "climbing", "from the least"))
    return _listed(rng, items, up[::-1], ("falling", "downwards", "big to small", "sinking", "from the most"))


def extreme(rng: random.Random) -> Pair:
    """Returns numbers, and the largest or the smallest."""
    numbers = rng.sample(range(10, 1000) if rng.random() < 0.5 else range(10, 100), rng.randint(2, 5))
    items = [str(number) for number in numbers]
    joiner = rng.choice((", ", " ", " or ", " and ", " vs "))
    if rng.random() < 0.6:
        return f"{rng.choice(('most', 'top', 'max', 'more'))}: {joiner.join(items)}", str(max(numbers))
    return f"{rng.choice(('least', 'bottom', 'min', 'less'))}: {joiner.join(items)}", str(min(numbers))


def over(rng: random.Random) -> Pair:
    """Returns numbers, and those above or below a line."""
    line = rng.randrange(10, 91, 10) if rng.random() < 0.7 else rng.randint(10, 90)
    numbers = rng.sample([n for n in range(10, 100) if n != line], rng.randint(1, 6))
    items = [str(n) for n in numbers]
    if rng.random() < 0.7:
        kept, tag = [n for n in numbers if n > line], rng.choice(("over", "beyond", ">", "past"))
    else:
        kept, tag = [n for n in numbers if n < line], rng.choice(("under", "<", "short of"))
    joiner = rng.choice((", ", " ", ", "))
    return f"{tag} {line}: {joiner.join(items)}", joiner.join(map(str, kept)) or "none"


def of_kind(rng: random.Random) -> Pair:
    """Returns a mixed list, and those of its words that belong to one group."""
    group, *others = rng.sample(sorted(words.CATEGORIES), 3)
    kept = rng.sample(words.CATEGORIES[group], rng.randint(1, 3))
    rest = [rng.choice(words.CATEGORIES[rng.choice(others)]) for _ in range(rng.randint(1, 4))]
    mixed = [*kept, *rest]
    rng.shuffle(mixed)
    chosen = [word for word in mixed if word in kept]
    joiner = rng.choice((", ", " ", ", ", " / "))
    shape = rng.choice(("{group} in {items}", "{items}; {group}", "{group}: {items}", "the {group} here: {items}"))
    return shape.format(group=group, items=joiner.join(mixed)), joiner.join(chosen)


def kind_of(rng: random.Random) -> Pair:
    """Returns a word, and its group."""
    group = rng.choice(sorted(words.CATEGORIES))
    return f"{rng.choice(words.CATEGORIES[group])} is among", f"the {group}"


def length(rng: random.Random) -> Pair:
    """Returns a list, and how long it is."""
    bank = rng.choice((words.NOUNS, words.NOUNS, words.FIRST_NAMES, words.CITIES, words.TOOLS))
    items = rng.sample(bank, rng.randint(1, 9))
    tag = rng.choice(("tally", "size", "total entries", "amount", "n"))
    shape = rng.choice(("{tag}: {items}", "{items} ({tag})", "{tag} of {items}"))
    return shape.format(tag=tag, items=rng.choice(SEPARATORS).join(items)), str(len(items))


def occurrences(rng: random.Random) -> Pair:
    """Returns a list, and how often one word is in it."""
    bag = rng.sample(words.NOUNS, rng.randint(2, 3))
    items = [bag[0]] * rng.randint(1, 5) + rng.choices(bag[1:], k=rng.randint(1, 5))
    rng.shuffle(items)
    tag = rng.choice(("{thing} x ? in {items}", "tally of {thing}: {items}", "{items} ({thing}, times)"))
    joiner = rng.choice((", ", " ", ", "))
    return tag.format(thing=bag[0], items=joiner.join(items)), str(items.count(bag[0]))


def backwards(rng: random.Random) -> Pair:
    """Returns words, and the same words from the last to the first."""
    bank = rng.choice((words.NOUNS, words.NOUNS, words.FIRST_NAMES, words.PLAIN_WORDS))
    items = rng.sample(bank, rng.randint(2, 6))
    return _listed(rng, items, items[::-1], ("backwards", "in mirror order", "from the tail", "flipped"))


def copied(rng: random.Random) -> Pair:
    """Returns a list, and the list once more."""
    items = rng.sample((*words.NOUNS, *words.FIRST_NAMES, *words.CITIES), rng.randint(1, 6))
    if rng.random() < 0.4:
        items = [str(rng.randint(0, 9999)) for _ in items]
    return _listed(rng, items, items, ("again", "copy", "ditto", "once more", "unchanged"))


def nth(rng: random.Random) -> Pair:
    """Returns a list, and the word at one place in it."""
    items = rng.sample(words.NOUNS, rng.randint(3, 6))
    ordinals = ("first", "second", "third", "fourth")
    at = rng.randrange(min(len(items), 4))
    if rng.random() < 0.3:
        return f"the last of {', '.join(items)}", items[-1]
    return f"the {ordinals[at]} of {', '.join(items)}", items[at]


def linked(rng: random.Random) -> Pair:
    """Returns words, and the same words tied together."""
    items = rng.sample(words.NOUNS, rng.randint(2, 5))
    link, tag = rng.choice(
        (
            ("-", "dashed"),
            ("-", "with dashes"),
            ("_", "underlined"),
            ("/", "slashed"),
            ("+", "with +"),
        )
    )
    return f"{tag}: {' '.join(items)}", link.join(items)


def initials(rng: random.Random) -> Pair:
    """Returns a full name, and its initials."""
    name = [*rng.sample(words.FIRST_NAMES, rng.randint(1, 2)), rng.choice(words.LAST_NAMES)]
    shape = rng.choice(("{} signs as", "monogram of {}", "{}, in short", "short for {}"))
    return shape.format(" ".join(name)), "".join(f"{part[0]}." for part in name)


def capitals(rng: random.Random) -> Pair:
    """Returns a word, and the word in capitals or with one."""
    word = rng.choice((*words.NOUNS, *words.COLOURS, *words.JOBS))
    return rng.choice((f"{word} in capitals", f"{word} at the head of a line")), (
        word.upper() if rng.random() < 0.5 else word.capitalize()
    )


def first_letter(rng: random.Random) -> Pair:
    """Returns a word, and its first letter."""
    word = rng.choice((*words.NOUNS, *words.FIRST_NAMES, *words.LAST_NAMES))
    return f"{word} begins with", word[0]


def addition(rng: random.Random) -> Pair:
    """Returns a sum of two numbers, and its value."""
    a, b = rng.randint(0, 60), rng.randint(0, 39)
    if rng.random() < 0.5:
        a, b = b, a
    low, high = sorted((a, b))
    if is_held_out("arithmetic", f"{low} + {high}", str(a + b)):
        return addition(rng)
    shape = rng.choice(("{} + {} =", "{} and {} make", "{} + {}", "{} with {} more", "{} and another {}:"))
    return shape.format(a, b), str(a + b)


def subtraction(rng: random.Random) -> Pair:
    """Returns a difference of two numbers, and its value."""
    a, b = rng.randint(0, 60), rng.randint(0, 39)
    if is_held_out("arithmetic", f"{a + b} - {b}", str(a)):
        return subtraction(rng)
    shape = rng.choice(("{} - {} =", "from {} less {}", "{} - {}", "of {} without {} remain", "{} down by {}:"))
    return shape.format(a + b, b), str(a)


def later_date(rng: random.Random) -> Pair:
    """Returns a date and a number of days, and the later date."""
    day, steps = FIRST_DAY + datetime.timedelta(days=rng.randrange(365)), rng.randint(1, 6)
    after = day + datetime.timedelta(days=steps)
    if is_held_out("dates", f"{words.date_words(day)} + {steps}", words.date_words(after)):
        return later_date(rng)
    unit = "day" if steps == 1 else "days"
    shape = rng.choice(("{} + {} {}", "{} and {} {} more", "from {}, {} {} on", "{} plus {} {}"))
    return shape.format(words.date_words(day), steps, unit), words.date_words(after)


def later_weekday(rng: random.Random) -> Pair:
    """Returns a weekday and a number of days, and the later weekday."""
    today, steps = rng.randrange(7), rng.randint(1, 7)
    unit = "day" if steps == 1 else "days"
    shape = rng.choice(("{} + {} {}", "{} and {} {} more", "from {}, {} {} on", "{} plus {} {}"))
    return shape.format(words.WEEKDAYS[today], steps, unit), words.WEEKDAYS[(today + steps) % 7]


def dated(rng: random.Random) -> Pair:
    """Returns a date in one notation, and in another."""
    day = datetime.date(rng.randint(1890, 2039), 1, 1) + datetime.timedelta(days=rng.randrange(365))
    spelled, short = f"{words.date_words(day)} {day.year}", day.isoformat()
    slashed = f"{day.day:02}/{day.month:02}/{day.year}"
    if is_held_out("convert", short, spelled) or is_held_out("convert", spelled, short):
        return dated(rng)
    one, two = rng.sample((spelled, short, slashed, spelled, short), 2)
    return (f"{one} is also", two) if one != two else (f"month {day.month:02}", words.MONTHS[day.month - 1])


def eldest(rng: random.Random) -> Pair:
    """Returns people with their ages, and who is the eldest or the youngest."""
    size = rng.randint(2, 4)
    ages = dict(zip(rng.sample(words.FIRST_NAMES, size), rng.sample(range(10, 99), size), strict=True))
    shape = rng.choice(("{} {}", "{} ({})", "{}: {}", "{}, aged {}", "{} has {} years", "{} is {}"))
    listed = rng.choice(("; ", ", ", "\n", ". ")).join(shape.format(*entry) for entry in ages.items())
    if rng.random() < 0.5:
        return f"{listed}. {rng.choice(('eldest', 'most years', 'senior'))}:", max(ages, key=ages.__getitem__)
    return f"{listed}. {rng.choice(('least old', 'fewest years', 'junior'))}:", min(ages, key=ages.__getitem__)


def card_field(rng: random.Random) -> Pair:
    """Returns a person's card, and the value of one field."""
    pairs = record_lines(rng, rng.randint(2, 6))
    field, value = rng.choice(pairs)
    mark, joiner = (
        rng.choice((": ", " = ", " - ", "=", " is ")),
        rng.choice(("\n", "; ", ", ", " | ")),
    )
    card = joiner.join(f"{key}{mark}{item}" for key, item in pairs)
    shape = rng.choice(("{card}\nhere the {field} is", "{field}? {card}", "{card} / {field}", "{field} in: {card}"))
    return shape.format(card=card, field=field), value


def card_format(rng: random.Random) -> Pair:
    """Returns a person's card in one notation, and in another."""
    pairs = record_lines(rng, rng.randint(2, 4))
    forms = {
        "colon lines": "\n".join(f"{key}: {item}" for key, item in pairs),
        "equals": ";".join(f"{key}={item}" for key, item in pairs),
        "json": "{" + ", ".join(f'"{key}": "{item}"' for key, item in pairs) + "}",
        "csv": ",".join(item for _, item in pairs),
        "dashes": "\n".join(f"- {key} {item}" for key, item in pairs),
    }
    one, two = rng.sample(sorted(forms), 2)
    if rng.random() < 0.35:
        one, two = "colon lines", "equals"
    return f"{forms[one]}\nas {two}", forms[two]


def row_of(rng: random.Random) -> Pair:
    """Returns a small table, and the value beside one of its keys."""
    size = rng.randint(2, 6)
    keys = rng.sample(rng.choice((words.TOOLS, words.FOODS, words.FIRST_NAMES, words.ANIMALS)), size)
    if rng.random() < 0.5:
        values = [str(number) for number in rng.sample(range(1, 100), size)]
    else:
        values = rng.sample(rng.choice((words.CITIES, words.COLOURS, words.JOBS)), size)
    mark = rng.choice((" | ", ": ", " - ", ", ", " ... ", "\t"))
    table = "\n".join(f"{key}{mark}{value}" for key, value in zip(keys, values, strict=True))
    at = rng.randrange(size)
    shape = rng.choice(
        (
            "{table}\nbeside {key}:",
            "row {key}\n{table}",
            "{table}\n{key}",
            "{table}\nline {key} says",
        )
    )
    return shape.format(table=table, key=keys[at]), values[at]


DRILLS: Final[dict[str, tuple[Drill, float]]] = {
    "by_letter": (by_letter, 2.5),
    "before": (before, 0.7),
    "rising": (rising, 1.5),
    "extreme": (extreme, 1.2),
    "over": (over, 1.5),
    "of_kind": (of_kind, 1.5),
    "kind_of": (kind_of, 0.3),
    "length": (length, 1.5),
    "occurrences": (occurrences, 1.2),
    "backwards": (backwards, 1.2),
    "copied": (copied, 0.6),
    "nth": (nth, 0.4),
    "linked": (linked, 0.6),
    "initials": (initials, 0.7),
    "capitals": (capitals, 0.3),
    "first_letter": (first_letter, 0.4),
    "addition": (addition, 3.0),
    "subtraction": (subtraction, 3.0),
    "later_date": (later_date, 1.8),
    "later_weekday": (later_weekday, 0.7),
    "dated": (dated, 1.0),
    "eldest": (eldest, 1.8),
    "card_field": (card_field, 1.5),
    "card_format": (card_format, 1.2),
    "row_of": (row_of, 1.8),
}
"""Each drill with its weight in the mix."""
