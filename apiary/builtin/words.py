"""Word banks of the built-in corpus and of the documents that the tiny base reads.

Both sides draw from the same banks on purpose: a three-million-parameter model knows only the words it has met, and
what the corpus tests is whether a skill reaches new *content*, not new vocabulary.
"""

from __future__ import annotations

import datetime
from typing import Final

FIRST_NAMES: Final = tuple(
    """Ada Agnes Albert Alma Amos Anna Arthur Basil Bella Bruno Carl Cecil Clara Daisy Daniel Dora Edgar Edith Elsa
    Emma Ernest Ethel Felix Flora Frank Fred George Greta Hanna Harold Helen Henry Hugo Ida Irene Iris Ivan Jacob Jane
    Jonas Julia Karl Kate Laura Leo Lewis Lily Lucy Mabel Maria Martha Max Mina Nina Nora Olga Oscar Otto Paul Pearl
    Peter Rita Robert Rosa Ruth Sam Sara Simon Stella Tess Thomas Tina Tom Vera Victor Viola Walter Wanda""".split()
)
LAST_NAMES: Final = tuple(
    """Adler Baker Barnes Bell Berg Blake Brook Carter Cole Cook Cross Dale Drake Field Finch Fisher Ford Fox Grant
    Gray Green Hale Hall Hart Hill Holt Hunt King Lake Lane Long Marsh Mason Miller Moore Nash North Page Park Pike
    Pond Price Reed Rice Rivers Rose Shaw Snow Stone Swan Tanner Wells West White Wood Young""".split()
)
CITIES: Final = tuple(
    """Athens Berlin Bern Bonn Boston Cairo Cork Dakar Delhi Dover Dublin Geneva Hanoi Lagos Leeds Lima Lisbon London
    Lyon Madrid Malta Milan Naples Nice Oslo Oxford Paris Perth Porto Prague Quito Riga Rome Seoul Sofia Tokyo Tunis
    Turin Venice Vienna Warsaw York""".split()
)
JOBS: Final = tuple(
    """actor baker barber carpenter cook dentist doctor driver farmer fisher gardener judge lawyer miner nurse painter
    pilot plumber poet porter printer sailor singer soldier tailor teacher waiter weaver writer""".split()
)
ANIMALS: Final = tuple(
    """bear camel cat cow crow deer dog donkey duck eagle fox frog goat goose hare hen horse lamb lion monkey mouse
    otter owl pig rabbit seal sheep snake swan tiger wolf zebra""".split()
)
FOODS: Final = tuple(
    """apple bacon banana bean bread butter cake carrot cheese cherry corn cream egg fig grape honey jam lemon melon
    mustard nut olive onion orange peach pear pepper pie plum potato rice salad salt soup sugar tea tomato""".split()
)
TOOLS: Final = tuple(
    """axe bag bell book boot bottle bowl box brush bucket button candle chair clock coat cup desk drum fork glove
    hammer hat jug kettle key knife ladder lamp map mirror nail needle pan pen pipe plate pot ring rope saw scarf
    shoe spade spoon stool table tent towel vase wheel""".split()
)
COLOURS: Final = tuple(
    "black blue brown gold green grey orange pink purple red silver violet white yellow".split()
)
PLAIN_WORDS: Final = tuple(
    """air arch autumn bank beach bridge castle chapel church cloud coast corner cottage dream echo evening fence field
    fire flame flower forest garden gate grass harbour hill home hour house idea island journey kitchen leaf letter
    light market meadow minute moon morning mountain music night ocean palace path piano picture pool rain river road
    roof room sand school shadow shop silence sky smoke snow song spring star stone storm story street summer sun
    theatre tower town tree valley village voice wall water weather window winter wood year""".split()
)
CATEGORIES: Final[dict[str, tuple[str, ...]]] = {
    "animals": ANIMALS,
    "foods": tuple(word for word in FOODS if word not in COLOURS),
    "colours": tuple(word for word in COLOURS if word not in FOODS),
    "tools": TOOLS,
    "jobs": JOBS,
}
NOUNS: Final = tuple(sorted({*ANIMALS, *FOODS, *TOOLS, *PLAIN_WORDS}))

WEEKDAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS: Final = tuple(
    """January February March April May June July August September October November December""".split()
)

GOOD_WORDS: Final = tuple(
    """amazing beautiful brilliant charming cheerful clever comfortable delicious delightful excellent fantastic fine
    fresh friendly generous great helpful lovely perfect pleasant reliable splendid superb sweet warm wonderful""".split()
)
BAD_WORDS: Final = tuple(
    """awful bitter boring broken cheap cold dirty dreadful dull faulty horrible nasty noisy poor rude sad
    shabby slow sour stale terrible ugly unpleasant useless weak worthless""".split()
)
GOOD_DEEDS: Final = tuple(
    """I loved it|I would buy it again|it made my day|we laughed all evening|I recommend it|worth every penny|it
    works perfectly|my family adored it|I was very happy|we will come back|it exceeded my hopes|I smiled the whole
    time""".replace("\n    ", " ").split("|")
)
BAD_DEEDS: Final = tuple(
    """I hated it|I want my money back|it ruined my day|we left early|I regret it|a waste of money|it broke
    at once|my family disliked it|I was very angry|we will never return|it failed completely|I nearly fell
    asleep""".replace("\n    ", " ").split("|")
)
REVIEWED: Final = tuple(
    """book film hotel meal song play coat phone lamp chair cake soup tea garden museum concert train room bed
    shop waiter tour bicycle story coffee boat""".split()
)

TOPICS: Final[dict[str, tuple[str, ...]]] = {
    "sport": tuple(
        """goal match team race player referee coach stadium ball runner trophy league score champion
        tennis football swimmer final""".split()
    ),
    "cooking": tuple(
        """oven recipe flour butter sauce pan dough spice onion garlic boil bake roast kitchen soup pepper
        knife stir""".split()
    ),
    "weather": tuple(
        """rain snow wind storm cloud frost thunder fog sunshine breeze temperature hail forecast drizzle
        lightning ice mist flood""".split()
    ),
    "music": tuple(
        """violin song piano choir melody drum singer concert guitar tune orchestra flute rhythm band
        opera trumpet chorus harp""".split()
    ),
    "travel": tuple(
        """train ticket airport hotel luggage passport flight station map tourist ferry journey harbour
        suitcase platform bus guide border""".split()
    ),
    "money": tuple(
        """bank loan coin price tax budget salary debt invoice market profit cheque savings cash wage
        account fee rent""".split()
    ),
}


def date_words(day: datetime.date) -> str:
    """Returns a date as "5 March"."""
    return f"{day.day} {MONTHS[day.month - 1]}"


def plural(noun: str) -> str:
    """Returns the regular English plural of a bank's noun (the banks hold few irregular ones)."""
    irregular = {"mouse": "mice", "goose": "geese", "wolf": "wolves", "knife": "knives", "sheep": "sheep"}
    irregular |= {"deer": "deer", "leaf": "leaves", "bread": "loaves", "butter": "butter"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("s", "sh", "ch", "x", "to")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"
