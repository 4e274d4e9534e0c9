"""Word banks of the built-in corpus and of the documents that the tiny base reads.

Both sides draw from the same banks on purpose: a three-million-parameter model knows only the
words it has met, and what the corpus tests is whether a skill reaches new *content*, not new
vocabulary.
"""

from __future__ import annotations

import datetime
from typing import Final


def _bank(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split("|"))


FIRST_NAMES: Final = _bank("""
    Ada Agnes Albert Alma Amos Anna Arthur Basil Bella Bruno Carl Cecil Clara Daisy Daniel
    Dora Edgar Edith Elsa Emma Ernest Ethel Felix Flora Frank Fred George Greta Hanna Harold
    Helen Henry Hugo Ida Irene Iris Ivan Jacob Jane Jonas Julia Karl Kate Laura Leo Lewis Lily
    Lucy Mabel Maria Martha Max Mina Nina Nora Olga Oscar Otto Paul Pearl Peter Rita Robert
    Rosa Ruth Sam Sara Simon Stella Tess Thomas Tina Tom Vera Victor Viola Walter Wanda
    """)
LAST_NAMES: Final = _bank("""
    Adler Baker Barnes Bell Berg Blake Brook Carter Cole Cook Cross Dale Drake Field Finch
    Fisher Ford Fox Grant Gray Green Hale Hall Hart Hill Holt Hunt King Lake Lane Long Marsh
    Mason Miller Moore Nash North Page Park Pike Pond Price Reed Rice Rivers Rose Shaw Snow
    Stone Swan Tanner Wells West White Wood Young
    """)
CITIES: Final = _bank("""
    Athens Berlin Bern Bonn Boston Cairo Cork Dakar Delhi Dover Dublin Geneva Hanoi Lagos
    Leeds Lima Lisbon London Lyon Madrid Malta Milan Naples Nice Oslo Oxford Paris Perth Porto
    Prague Quito Riga Rome Seoul Sofia Tokyo Tunis Turin Venice Vienna Warsaw York
    """)
JOBS: Final = _bank("""
    baker barber carpenter cook dentist doctor driver farmer fisher gardener judge lawyer
    miner nurse painter pilot plumber poet porter printer sailor singer soldier tailor teacher
    waiter weaver writer
    """)
ANIMALS: Final = _bank("""
    bear camel cat cow crow deer dog donkey duck eagle fox frog goat goose hare hen horse lamb
    lion monkey mouse otter owl pig rabbit seal sheep snake swan tiger wolf zebra
    """)
FOODS: Final = _bank("""
    apple bacon banana bean bread butter cake carrot cheese cherry corn cream egg fig grape
    honey jam lemon melon mustard nut olive onion orange peach pear pepper pie plum potato
    rice salad salt soup sugar tea tomato
    """)
TOOLS: Final = _bank("""
    bag bell book boot bottle bowl box brush bucket button candle chair clock coat cup desk
    drum fork glove hammer hat jug kettle key knife ladder lamp map mirror nail needle pan pen
    pipe plate pot ring rope saw scarf shoe spade spoon stool table tent towel vase wheel
    """)
COLOURS: Final = _bank("black blue brown gold green grey orange pink purple red silver violet white yellow")
PLAIN_WORDS: Final = _bank("""
    air arch autumn bank beach bridge castle chapel church cloud coast corner cottage dream
    echo evening fence field fire flame flower forest garden gate grass harbour hill home hour
    house idea island journey kitchen leaf letter light market meadow minute moon morning
    mountain music night ocean palace path piano picture pool rain river road roof room sand
    school shadow shop silence sky smoke snow song spring star stone storm story street summer
    sun theatre tower town tree valley village voice wall water weather window winter wood
    year
    """)
CATEGORIES: Final[dict[str, tuple[str, ...]]] = {
    "animals": ANIMALS,
    "foods": tuple(word for word in FOODS if word not in COLOURS),
    "colours": tuple(word for word in COLOURS if word not in FOODS),
    "tools": TOOLS,
    "jobs": JOBS,
}
NOUNS: Final = tuple(sorted({*ANIMALS, *FOODS, *TOOLS, *PLAIN_WORDS}))

WEEKDAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: Final = _bank("""
    January February March April May June July August September October November December
    """)

GOOD_WORDS: Final = _bank("""
    amazing beautiful brilliant charming cheerful clever comfortable delicious delightful
    excellent fantastic fine fresh friendly generous great helpful lovely perfect pleasant
    reliable splendid superb sweet warm wonderful
    """)
BAD_WORDS: Final = _bank("""
    awful bitter boring broken cheap cold dirty dreadful dull faulty horrible nasty noisy poor
    rude sad shabby slow sour stale terrible ugly unpleasant useless weak worthless
    """)
GOOD_DEEDS: Final = _lines("""
    I loved it|I would buy it again|it made my day|we laughed all evening|I recommend it|worth
    every penny|it works perfectly|my family adored it|I was very happy|we will come back|it
    exceeded my hopes|I smiled the whole time
    """)
BAD_DEEDS: Final = _lines("""
    I hated it|I want my money back|it ruined my day|we left early|I regret it|a waste of
    money|it broke at once|my family disliked it|I was very angry|we will never return|it
    failed completely|I nearly fell asleep
    """)
REVIEWED: Final = _bank("""
    book film hotel meal song play coat phone lamp chair cake soup tea garden museum concert
    train room bed shop waiter tour bicycle story coffee boat
    """)

TOPICS: Final[dict[str, tuple[str, ...]]] = {
    "sport": _bank("""
    goal match team race player referee coach stadium ball runner trophy league score champion
    tennis football swimmer final
    """),
    "cooking": _bank("""
    oven recipe flour butter sauce pan dough spice onion garlic boil bake roast kitchen soup
    pepper knife stir
    """),
    "weather": _bank("""
    rain snow wind storm cloud frost thunder fog sunshine breeze temperature hail forecast
    drizzle lightning ice mist flood
    """),
    "music": _bank("""
    violin song piano choir melody drum singer concert guitar tune orchestra flute rhythm band
    opera trumpet chorus harp
    """),
    "travel": _bank("""
    train ticket airport hotel luggage passport flight station map tourist ferry journey
    harbour suitcase platform bus guide border
    """),
    "money": _bank("""
    bank loan coin price tax budget salary debt invoice market profit cheque savings cash wage
    account fee rent
    """),
}


def date_words(day: datetime.date) -> str:
    """Returns a date as "5 March"."""
    return f"{day.day} {MONTHS[day.month - 1]}"
