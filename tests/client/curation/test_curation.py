"""Curation keeps what it promises: what is masked, what counts as said twice, what a budget leaves, what a score is."""

from __future__ import annotations

import copy
import math
import random
import re
import string
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import phonenumbers
import pytest
from conftest import overrides_for
from hypothesis import given, settings
from hypothesis import strategies as st
from stdnum import iban, luhn

from apiary.config import loading
from apiary.config.schema import Method
from apiary.core.errors import UserError
from apiary.data import tokenization
from apiary.data.examples import Example
from apiary.data.turns import Turn
from apiary.models import adapters
from apiary.models.inference import ModelProbe
from client.curation import STEPS, Context, Curation, Reader, Step, StepResult, build_steps, curate, digest, restore
from client.curation.steps.budget import Budget, within
from client.curation.steps.duplicates import components, jaccard, minhash, shingle_sets

REGIONS = ("DE", "US", "FR", "GB", "IT", "ES", "NL", "CH", "IN", "JP", "BR", "NO")


def row(question: str, answer: str, **tags: str) -> Example:
    return Example((Turn("user", question), Turn("assistant", answer)), tags)


def method(name: str, **options: Any) -> Method:
    return Method.model_validate({"name": name, **options})


def kept(examples: Sequence[Example], name: str, context: Context = Context(), **options: Any) -> list[int]:
    return list(curate(examples, [method(name, **options)], context).kept)


def masked(text: str, answer: str = "ok", **options: Any) -> tuple[str, str]:
    (made,) = curate([row(text, answer)], [method("mask", **options)]).examples
    return made.turns[0].text, made.turns[1].text


# --- masking


def random_iban(rng: random.Random) -> str:
    country = rng.choice(["DE", "FR", "GB", "NL", "ES", "IT", "CH", "AT", "BE", "PL", "SE", "NO", "PT", "FI", "IE"])
    structure = iban._ibandb.info(country + "00")[0][1]["bban"]
    letters = {"n": string.digits, "a": string.ascii_uppercase, "c": string.ascii_uppercase + string.digits}
    bban = "".join(
        rng.choice(letters[kind]) for size, kind in re.findall(r"(\d+)!([nac])", structure) for _ in range(int(size))
    )
    full = country + iban.calc_check_digits(f"{country}00{bban}") + bban
    return rng.choice((full, full.lower(), iban.format(full), iban.format(full, "-")))


def random_card(rng: random.Random) -> str:
    start, size = rng.choice((("4", 16), ("51", 16), ("2720", 16), ("37", 15), ("6011", 16), ("36", 14), ("62", 19)))
    body = start + "".join(rng.choice(string.digits) for _ in range(size - len(start) - 1))
    number = body + luhn.calc_check_digit(body)
    if size == 15 and rng.random() < 0.5:
        return f"{number[:4]} {number[4:10]} {number[10:]}"
    return rng.choice(("", " ", "-")).join(number[i : i + 4] for i in range(0, size, 4))


def random_email(rng: random.Random) -> str:
    name = "".join(rng.choices(string.ascii_letters + string.digits, k=rng.randint(1, 12)))
    host = rng.choice(("example.com", "mail.example.co.uk", "xn--bcher-kva.example", "uni-köln.de", "a.io"))
    return f"{name}{rng.choice(('', '.x', '+tag', '_9'))}@{host}"


def random_phone(rng: random.Random) -> str:
    kinds = (phonenumbers.PhoneNumberType.MOBILE, phonenumbers.PhoneNumberType.FIXED_LINE)
    number = phonenumbers.example_number_for_type(rng.choice(REGIONS), rng.choice(kinds))
    while True:
        body = str(number.national_number)[:-3] + "".join(rng.choices(string.digits, k=3))
        other = phonenumbers.PhoneNumber(
            number.country_code, int(body), italian_leading_zero=number.italian_leading_zero
        )
        if phonenumbers.is_valid_number(other):
            formats = phonenumbers.PhoneNumberFormat
            form = rng.choice((formats.E164, formats.INTERNATIONAL))
            return phonenumbers.format_number(other, form)


FRAMES = ("Write to {} today.", "{}", "Mine: {}, thanks", "({})", "Reach me at {}.", "a\n{}\nb", "Contact:{};")


@pytest.mark.parametrize(
    ("kind", "make"), [("IBAN", random_iban), ("CARD", random_card), ("EMAIL", random_email), ("PHONE", random_phone)]
)
def test_valid_details_are_masked(kind: str, make: Any) -> None:
    rng = random.Random(kind)
    found = 0
    for _ in range(200):
        frame = rng.choice(FRAMES)
        found += masked(frame.format(make(rng)))[0] == frame.format(f"<{kind}_1>")
    assert found >= 198


@pytest.mark.parametrize(
    ("region", "text"),
    [("DE", "030 12345678"), ("US", "(202) 555-0123"), ("FR", "06 12 34 56 78"), ("GB", "020 7946 0018")],
)
def test_home_numbers_are_masked_where_their_region_is_given(region: str, text: str) -> None:
    assert masked(f"Ring {text} now", regions=[region])[0] == "Ring <PHONE_1> now"
    assert masked(f"Ring {text} now")[0] == f"Ring {text} now"


@pytest.mark.parametrize(
    "text",
    [
        "Released on 2024-01-15 and 12.05.2023, 12/31/1999, 2024-01-15 08:30:12",
        "31.12.2023 bis 01.01.2024, or 5-3-2024",
        "version 1.2.3.4000, v2.10.11, Python 3.11.4",
        "ISBN 978-3-16-148410-0 or 0-306-40615-2 or ISBN: 9783161484100",
        "costs $1,234,567.89 or 12 345 678 EUR, 1.299,00 €, USD 2025550",
        "order 12345678, number 4539578763621486789012",
        "pi is 3.14159265358979; 1700000000 and 20240131123045",
        "sort 55, 23, 91, 17, 45, 39, 57, 87, 63, 62, 14, 86",
        "41 11 11 11 11 11 11 11",
        "192.168.0.1 from 10:30-11:45 in 1914-1918",
        "the @ sign, a@b, user@localhost",
        "DE89 3704 0044 0532 0130 01",  # a wrong check digit
        "4111 1111 1111 1112",
    ],
)
@pytest.mark.parametrize("regions", [(), *((region,) for region in REGIONS), REGIONS])
def test_ordinary_numbers_stay(text: str, regions: tuple[str, ...]) -> None:
    assert masked(text, regions=regions)[0] == text


def test_a_card_before_its_expiry_date_is_masked() -> None:
    assert masked("4111 1111 1111 1111 12/27")[0] == "<CARD_1> 12/27"


def test_the_same_value_has_one_placeholder_in_all_turns() -> None:
    question, answer = masked(
        "Write to Ann@x.org or bo@x.org", "I wrote to bo@x.org and ann@X.org, GB82 WEST 1234 5698 7654 32"
    )
    assert question == "Write to <EMAIL_1> or <EMAIL_2>"
    assert answer == "I wrote to <EMAIL_2> and <EMAIL_1>, <IBAN_1>"


def test_a_value_that_leans_on_another_is_found_and_named_alike() -> None:
    assert masked("a@b.example'a@b.example")[0] == "<EMAIL_1>'<EMAIL_1>"


def test_new_values_do_not_take_the_name_of_a_placeholder_already_there() -> None:
    assert masked("<EMAIL_1> and new@x.org")[0] == "<EMAIL_1> and <EMAIL_2>"


def test_machine_addresses_are_masked_where_asked() -> None:
    assert (
        masked("from 10.0.0.1 and fe80::1, not 999.1.1.1", kinds=["ip"])[0] == "from <IP_1> and <IP_2>, not 999.1.1.1"
    )


_DETAILS = st.sampled_from(
    [
        "a@b.example",
        "+49 30 12345678",
        "4111 1111 1111 1111",
        "GB82WEST12345698765432",
        "<EMAIL_1>",
        "<CARD_3>",
        "+",
        "1",
        "@x.de",
        "(",
        "030",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_DETAILS | st.text(max_size=5), max_size=8), st.sampled_from(["", " ", "-"]))
def test_masking_twice_changes_nothing_more(parts: list[str], between: str) -> None:
    once = masked(between.join(parts) or "x", regions=("DE",))
    assert masked(*once, regions=("DE",)) == once


# --- said twice


def test_minhash_estimates_jaccard() -> None:
    rng = np.random.default_rng(0)
    for overlap in (0.1, 0.5, 0.7, 0.9):
        common = int(400 * overlap)
        sets = [
            frozenset([(str(i),) for i in range(common)] + [(f"{side}{i}",) for i in range((400 - common) // 2)])
            for side in "ab"
        ]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        assert jaccard(*sets) == exact
        seed = int(rng.integers(2**31))
        estimate = minhash(sets[0], 256, seed).jaccard(minhash(sets[1], 256, seed))
        assert abs(estimate - exact) < 3 / math.sqrt(256)


def test_similar_pairs_merge_into_one_group_through_the_row_between() -> None:
    rows = [row(" ".join(f"word{i}" for i in range(start, start + 60)), "yes") for start in (0, 6, 12)]
    first, second, third = shingle_sets(rows, 5)
    assert jaccard(first, second) >= 0.7 and jaccard(second, third) >= 0.7 > jaccard(first, third)
    assert len(kept(rows, "near_duplicates", boilerplate=1.0)) == 1
    assert kept([rows[0], rows[2]], "near_duplicates", boilerplate=1.0) == [0, 1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_components_are_those_of_the_graph(pairs: list[tuple[int, int]]) -> None:
    reach = np.eye(12, dtype=bool)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = True
    for _ in range(12):
        reach |= (reach.astype(int) @ reach.astype(int)) > 0
    assert {tuple(group) for group in components(12, pairs)} == {tuple(np.flatnonzero(line)) for line in reach}


def test_the_longest_of_a_group_stays_or_the_first() -> None:
    text = " ".join(f"word{i}" for i in range(30))
    rows = [row(text, "a long answer"), row(text + " please", "a long answer indeed"), row("another thing", "no")]
    assert kept(rows, "near_duplicates") == [1, 2]
    assert kept(rows, "near_duplicates", keep="first") == [0, 2]


def test_permuted_words_are_no_duplicates() -> None:
    tokens = [f"word{i}" for i in range(30)]
    mixed = random.Random(0).sample(tokens, 30)
    assert kept([row(" ".join(tokens), "yes"), row(" ".join(mixed), "yes")], "near_duplicates") == [0, 1]


def test_one_instruction_before_many_inputs_is_no_duplication() -> None:
    instruction = " ".join(f"rule{i}" for i in range(100))
    rows = [row(f"{instruction}\n\ninput number{i}", "yes") for i in range(60)]
    assert len(kept(rows, "near_duplicates")) == 60
    assert len(kept(rows, "near_duplicates", boilerplate=1.0)) == 1


def test_several_questions_about_one_text_are_no_duplicates() -> None:
    text = " ".join(f"word{i}" for i in range(100))
    assert kept([row(f"{text} Who?", "Ada Snow"), row(f"{text} Where?", "in Bonn")], "near_duplicates") == [0, 1]
    assert kept([row(f"{text} Who?", "4"), row(f"{text} Who then?", "44")], "near_duplicates") == [0, 1]


def test_rows_in_scripts_without_spaces_are_compared_too() -> None:
    text = "我们在花园里看到了许多蜜蜂它们正在采集花蜜然后飞回蜂巢"
    assert kept(
        [row(text, "好"), row(text + "吧", "好"), row("今天天气很好我们去散步吧", "好")], "near_duplicates"
    ) == [1, 2]


def test_exact_duplicates_are_found_after_normalising() -> None:
    rows = [
        row("Say  Hello", "Yes"),
        row("say hello", "yes"),
        row("\uff33\uff41\uff59 hello", "YES "),
        row("say hello", "no"),
    ]
    assert kept(rows, "duplicates") == [0, 3]


# --- rules


def test_length_names_what_is_wrong() -> None:
    rows = [
        row("q", "..."),
        row("q", "one"),
        row("q", "one two three four five six"),
        row("Say  this now", "say this NOW"),
        row("q", "a b c a b c a b c"[:11]),
        row("q", "fine and well"),
        row("q", "+"),
        row("q", "🙂"),
    ]
    made = curate(rows, [method("length", min=2, max=6, repetition=0.2)])
    assert {i: why for i, (_, why) in made.fates.items()} == {
        0: "answer is empty or only punctuation",
        1: "answer too short",
        3: "answer is the question",
        4: "answer repeats itself",
        6: "answer too short",
        7: "answer too short",
    }
    assert kept(rows, "length") == [1, 2, 4, 5, 6, 7]
    assert kept(rows, "length", unit="characters", max=3) == [1, 6, 7]


def test_held_out_rows_are_not_trained_on() -> None:
    passage = " ".join(f"word{i}" for i in range(20))
    rows = [
        row(f"Read: {passage}", "yes"),
        row("What IS it?", "no"),
        row(" ".join(f"word{i}" for i in range(9)), "x"),
        row("Something else", "y"),
    ]
    context = Context(held_out=[row(f"{passage} and then?", "z"), row("what is it", "other")])
    assert kept(rows, "held_out", context) == [2, 3]


def test_an_instruction_shared_with_the_held_out_rows_is_no_leak() -> None:
    instruction = " ".join(f"rule{i}" for i in range(30))
    rows = [row(f"{instruction}\n\ninput{i}", "yes") for i in range(40)]
    context = Context(held_out=[row(f"{instruction}\n\nheld", "yes")])
    assert len(kept(rows, "held_out", context)) == 40
    assert len(kept([*rows, row(f"{instruction}\n\nHELD", "no")], "held_out", context)) == 40


# --- budgets


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 2000), st.randoms(use_true_random=False))
def test_a_token_budget_is_never_exceeded_and_never_left_unused(
    sizes: list[int], most: int, rng: random.Random
) -> None:
    ranked = rng.sample(range(len(sizes)), len(sizes))
    chosen = within(ranked, Budget(tokens=most), len(sizes), dict(enumerate(sizes)))
    used = sum(sizes[i] for i in chosen)
    assert used <= most
    assert all(used + sizes[i] > most for i in ranked if i not in chosen)


@pytest.mark.parametrize(
    ("came_in", "options", "stay"),
    [
        (1000, {"keep": 0.1}, 100),
        (1000, {"keep": 0.01}, 50),
        (100, {"keep": 0.1}, 32),
        (20, {"keep": 0.1}, 20),
        (1000, {"keep": 0.01, "floor": 3}, 10),
        (1000, {"keep": 0.01, "floor": 30}, 30),
        (1000, {"rows": 7}, 7),
    ],
)
def test_shares_have_a_floor_and_numbers_are_exact(came_in: int, options: dict[str, Any], stay: int) -> None:
    assert len(kept([row(f"q{i}", "a") for i in range(came_in)], "random", **options)) == stay


@pytest.mark.parametrize(
    "options", [{}, {"keep": 0.5, "rows": 3}, {"rows": 3, "floor": 2}, {"keep": 1.5}, {"keeep": 0.5}, {"rows": 0}]
)
def test_a_budget_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="curate"):
        build_steps([method("random", **options)])


def test_random_depends_on_seed_client_and_row_alone() -> None:
    rows = [row(f"q{i}", "a") for i in range(200)]
    half = kept(rows, "random", rows=100)
    assert half == kept(rows, "random", rows=100)
    assert half != kept(rows, "random", Context(seed=1), rows=100)
    assert half != kept(rows, "random", Context(client="b"), rows=100)
    order = random.Random(0).sample(range(200), 200)
    assert sorted(order[i] for i in kept([rows[i] for i in order], "random", rows=100)) == half


# --- IFD


@pytest.fixture(scope="module")
def reader(tiny_model: Any, rows_file: Any) -> Reader:
    run = loading.load(None, overrides_for(tiny_model, rows_file))
    lm = adapters.load(run.model, run.adapter)
    adapters.set_adapter(lm, adapters.fresh_adapter(lm, 0))
    template = tokenization.make_template(run.prompt, lm.tokenizer)
    return Reader(template, lm.tokenizer, run.prompt, lambda: ModelProbe(lm, 128))


def by_hand(reader: Reader, before: Sequence[str], response: str) -> float:
    """Mean nats of the response after what was said before, from plain logits."""
    import torch

    lm = reader.probe()._lm  # type: ignore[attr-defined]
    head, tail = ([i for t in ts for i in reader.tokenizer(t)["input_ids"]] for ts in (before, [response]))
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(tail)))


def test_ifd_is_the_ratio_of_hand_computed_nats(reader: Reader) -> None:
    turns = (Turn("user", "One?"), Turn("assistant", "wax"), Turn("user", "Two?"), Turn("assistant", "comb"))
    rows = [row("Name a bee.", "Maja of the hive"), Example(turns, {}), row("Say the first: queen drone", "queen")]
    befores = [
        ["User: Name a bee.\n\nAssistant:\n"],
        ["User: One?\n\nAssistant:\n", "wax<eos>", "\n\nUser: Two?\n\nAssistant:\n"],
        ["User: Say the first: queen drone\n\nAssistant:\n"],
    ]
    context = Context(reader=reader)
    losses = curate(rows, [method("ifd", threshold=None)], context).scores["ifd"]
    perplexities = curate(rows, [method("ifd", threshold=None, ratio="perplexity")], context).scores["ifd"]
    by_itself = curate(rows, [method("ifd", threshold=None, alone=True)], context).scores["ifd"]
    for index, (example, before) in enumerate(zip(rows, befores, strict=True)):
        response = example.turns[-1].text + "<eos>"
        given, alone = by_hand(reader, before, response), by_hand(reader, ["User: \n\nAssistant:\n"], response)
        assert losses[index] == pytest.approx(given / alone, rel=1e-4)
        assert by_itself[index] == pytest.approx(given / alone, rel=1e-4)
        assert perplexities[index] == pytest.approx(math.exp(given - alone), rel=1e-4)


class Table:
    """A probe whose losses are looked up by the number of trained tokens, given and alone in turn."""

    def __init__(self, ratios: Sequence[float]) -> None:
        self.ratios, self.calls = ratios, 0

    def losses(self, corpus: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.array([corpus.trained[a:b].sum() for a, b in pairwise(corpus.offsets)], np.int64)
        self.calls += 1
        return (tokens * np.array(self.ratios) if self.calls % 2 else tokens.astype(float)), tokens

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        raise NotImplementedError


def scored(reader: Reader, ratios: Sequence[float], **options: Any) -> list[int]:
    table = Table(ratios)
    rows = [row(f"question {i}", "answer") for i in range(len(ratios))]
    return kept(rows, "ifd", Context(reader=reader._replace(probe=lambda: table)), **options)


def test_the_threshold_comes_first_and_then_the_hardest_or_the_easiest(reader: Reader) -> None:
    ratios = [0.2, 1.5, 0.9, 0.5, math.nan, 1.0]
    assert scored(reader, ratios) == [0, 2, 3, 5]
    assert scored(reader, ratios, rows=2) == [2, 5]
    assert scored(reader, ratios, rows=2, order="lowest") == [0, 3]
    assert scored(reader, ratios, threshold=None, rows=2) == [1, 5]
    assert scored(reader, [k / 100 for k in range(1, 101)], band=[0.05, 0.95]) == list(range(5, 95))


def test_token_budgets_hold_for_whole_rows(reader: Reader) -> None:
    rows = [row(f"question {i} " + "bee " * (i % 7), "answer") for i in range(40)]
    corpus = tokenization.encode_all(rows, reader.template, reader.tokenizer, reader.prompt)
    for name in ("ifd", "random"):
        options = {"threshold": None} if name == "ifd" else {}
        stay = kept(rows, name, Context(reader=reader), tokens=300, **options)
        assert 250 < corpus.lengths[stay].sum() <= 300


def test_rows_that_do_not_fit_are_dropped_with_a_reason(reader: Reader) -> None:
    rows = [row("short", "answer"), row("bee " * 400, "answer"), row("short", "wax " * 400)]
    made = curate(rows, [method("ifd", threshold=None)], Context(reader=reader))
    assert made.kept == (0,)
    assert made.reports[0].reasons == {"too long for prompt.max_tokens = 96": 2}


def test_text_without_a_question_has_no_ifd_and_is_the_last_that_a_budget_takes(reader: Reader) -> None:
    texts = [Example((Turn("assistant", f"A tale of bee {i}."),), {}) for i in range(3)]
    rows = [texts[0], row("Name a bee.", "Maja"), *texts[1:], row("Name two.", "Maja and Willy")]
    made = curate(rows, [method("ifd", threshold=None)], Context(reader=reader))
    assert made.kept == (0, 1, 2, 3, 4) and list(made.scores["ifd"]) == [1, 4]
    assert kept(rows, "ifd", Context(reader=reader), threshold=None, rows=3) == [0, 1, 4]
    assert kept(texts, "ifd", Context(reader=reader)) == [0, 1, 2]


def test_ifd_is_that_of_the_last_answer_that_is_trained(reader: Reader) -> None:
    asked, answered = Turn("user", "Name a bee."), Turn("assistant", "Maja of the hive")
    context = answered._replace(text="Willy", trained=False)
    rows = [
        Example((asked, answered), {}),
        Example((asked, answered, asked, context), {}),
        Example((asked, answered._replace(trained=False), asked, context._replace(trained=True)), {}),
        Example((asked, answered, asked, context._replace(trained=True)), {}),
    ]
    scores = curate(rows, [method("ifd", threshold=None)], Context(reader=reader)).scores["ifd"]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert scores[2] == pytest.approx(scores[3], rel=1e-5)
    assert scores[0] != pytest.approx(scores[2], rel=1e-4)


def test_an_answer_that_is_written_otherwise_without_its_question_costs_its_row_alone(reader: Reader) -> None:
    class Otherwise(Table):
        def losses(self, corpus: Any) -> tuple[np.ndarray, np.ndarray]:
            nats, tokens = super().losses(corpus)
            tokens[1] += self.calls == 2
            return nats, tokens

    made = curate(
        [row(f"question {i}", "answer") for i in range(3)],
        [method("ifd")],
        Context(reader=reader._replace(probe=lambda: Otherwise([0.5, 0.6, 0.7]))),
    )
    assert made.kept == (0, 2)
    assert made.scores["ifd"] == pytest.approx({0: 0.5, 2: 0.7})
    assert made.reports[0].reasons == {"answer is written otherwise without its question": 1}


def test_scoring_leaves_the_model_as_it_was(reader: Reader) -> None:
    lm = reader.probe()._lm  # type: ignore[attr-defined]
    before = copy.deepcopy(adapters.get_adapter(lm))
    flags = [(module.training, [p.requires_grad for p in module.parameters(False)]) for module in lm.model.modules()]
    curate([row(f"q{i}", "a") for i in range(9)], [method("ifd", threshold=None)], Context(reader=reader))
    after = adapters.get_adapter(lm)
    assert all((before[name] == after[name]).all() for name in before)
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert flags == [(m.training, [p.requires_grad for p in m.parameters(False)]) for m in lm.model.modules()]


@pytest.fixture(scope="module")
def tiny_reader() -> Reader:
    """The built-in base, which has learnt to copy."""
    run = loading.load(None, ["model.dtype=float32", "model.device=cpu"])
    lm = adapters.load(run.model, run.adapter)
    adapters.set_adapter(lm, adapters.fresh_adapter(lm, 0))
    template = tokenization.make_template(run.prompt, lm.tokenizer)
    return Reader(template, lm.tokenizer, run.prompt, lambda: ModelProbe(lm))


def test_a_copied_answer_is_easy_and_another_rows_answer_is_not(tiny_reader: Reader) -> None:
    from apiary.data.skills.corpus import rows as builtin

    examples = [
        row(f"{r['instruction']}\n\n{r['input']}", r["output"]) for r in builtin("train") if r["skill"] == "extract"
    ][:60]
    others = [row(a.turns[0].text, b.turns[1].text) for a, b in zip(examples, examples[1:] + examples[:1], strict=True)]
    copied = [
        row(f"Say this again: {e.turns[1].text} {i}. {e.turns[1].text} {i}.", f"{e.turns[1].text} {i}.")
        for i, e in enumerate(examples)
    ]

    def mean(rows: list[Example]) -> float:
        made = curate(rows, [method("ifd", threshold=None)], Context(reader=tiny_reader))
        return float(np.mean(list(made.scores["ifd"].values())))

    assert mean(copied) < 0.6
    assert mean(others) > mean(examples) + 0.3


# --- contracts of all steps


WORDS = st.sampled_from(
    ["bee", "hive", "wax", "comb", "honey", "queen", "a@b.example", "+4930123456", "...", "4111111111111111", "same"]
)
TEXT = st.lists(WORDS, min_size=1, max_size=12).map(" ".join)
ROWS = st.lists(st.builds(row, TEXT, TEXT), min_size=2, max_size=8)
HELD = (row("bee hive wax comb honey queen drone bee hive wax", "same"),)

# A set of options for every registered step, and rows in which dropping others changes what becomes of one.
LONG = " ".join(f"word{i}" for i in range(30))
POINTWISE: dict[str, dict[str, Any]] = {
    "mask": {"regions": ["DE"]},
    "length": {"min": 2, "max": 8, "repetition": 0.3},
    "ifd": {"alone": True},
}
NOT_POINTWISE: dict[str, tuple[dict[str, Any], list[Example]]] = {
    "duplicates": ({}, [row("a", "b"), row("A", "b")]),
    "near_duplicates": ({}, [row(LONG, "b"), row(f"{LONG} x", "b")]),
    "held_out": ({"boilerplate": 1}, [row(f"{HELD[0].turns[0].text} {i}", "b") for i in range(3)]),
    "ifd": ({"rows": 1, "threshold": None}, [row("a", "b"), row("bee hive", "wax")]),
    "random": ({"rows": 1}, [row("a", "b"), row("c", "d")]),
}


def test_every_step_is_in_the_tables_of_this_test() -> None:
    assert set(STEPS) == {*POINTWISE, *NOT_POINTWISE}


def outcome(step: Step, rows: Sequence[tuple[int, Example]], context: Context) -> dict[int, Any]:
    made = step.apply(rows, context)
    return {**dict(made.rows), **made.dropped}


@pytest.mark.parametrize("name", POINTWISE)
def test_a_pointwise_step_judges_each_row_by_itself(name: str, reader: Reader) -> None:
    step = STEPS.build(name, POINTWISE[name])
    assert step.pointwise

    @settings(max_examples=12 if step.needs_model else 60, deadline=None)
    @given(ROWS, st.data())
    def check(examples: list[Example], data: st.DataObject) -> None:
        context = Context(held_out=HELD, reader=reader)
        rows = list(enumerate(examples))
        some = data.draw(st.lists(st.sampled_from(rows), unique_by=lambda r: r[0], min_size=1)) if rows else rows
        everything = outcome(step, rows, context)
        assert outcome(step, some, Context(client="x", reader=reader)) == {i: everything[i] for i, _ in some}

    check()


@pytest.mark.parametrize("name", NOT_POINTWISE)
def test_the_other_steps_say_that_they_are_not(name: str, reader: Reader) -> None:
    options, examples = NOT_POINTWISE[name]
    step = STEPS.build(name, options)
    assert not step.pointwise
    context = Context(held_out=HELD, reader=reader)
    everything = outcome(step, list(enumerate(examples)), context)
    assert any(outcome(step, [(i, e)], context)[i] != everything[i] for i, e in enumerate(examples))


@pytest.mark.parametrize("options", [{}, {"alone": True, "keep": 0.5}, {"alone": True, "band": [0.1, 0.9]}])
def test_ifd_is_pointwise_only_row_by_row_and_without_a_budget(options: dict[str, Any]) -> None:
    assert not STEPS.build("ifd", options).pointwise


ALL = [
    method("mask", regions=["DE"]),
    method("duplicates"),
    method("near_duplicates"),
    method("length"),
    method("held_out"),
    method("ifd", threshold=5.0),
    method("random", keep=0.8, floor=1),
]


@settings(max_examples=15, deadline=None)
@given(examples=ROWS)
def test_curation_repeats_itself_restores_and_changes_nothing(examples: list[Example], reader: Reader) -> None:
    before = copy.deepcopy(examples)
    try:
        made = curate(examples, ALL, Context(held_out=HELD, reader=reader))
    except UserError:
        return  # nothing left
    assert examples == before
    again = curate(examples, ALL, Context(held_out=HELD, reader=reader))
    assert (again.rows, again.fates, again.scores) == (made.rows, made.fates, made.scores)
    assert restore(examples, ALL, made.kept) == made.rows
    assert len(made.rows) + len(made.fates) == len(examples)
    assert sum(made.dropped.values()) == len(made.fates)


def test_restoring_from_other_rows_is_refused() -> None:
    rows = [row("q", "an answer"), row("q", "...")]
    steps = [method("length")]
    with pytest.raises(ValueError, match="other data"):
        restore(rows, steps, [0, 1])
    with pytest.raises(ValueError, match="another data set"):
        restore(rows, steps, [2])


def test_the_digest_knows_rows_order_steps_and_options() -> None:
    a, b = row("q", "a"), row("q", "b", skill="x")
    digests = [
        digest([a, b], [method("mask")]),
        digest([b, a], [method("mask")]),
        digest([a], [method("mask")]),
        digest([a, b], [method("mask", regions=["DE"])]),
        digest([a, b], []),
        digest([a, row("q", "b")], [method("mask")]),
    ]
    assert len(set(digests)) == len(digests)
    assert digest([a, b], [method("mask")]) == digests[0]


def test_a_step_that_drops_nearly_all_is_warned_of_and_one_that_drops_all_is_refused() -> None:
    rows = [row(f"q{i}", "one") for i in range(99)] + [row("q", "two words")]
    made = curate(rows, [method("length", min=2)])
    assert made.kept == (99,)
    assert "99 of 100" in made.warnings[0]
    with pytest.raises(UserError, match=r"nothing left.*100 answer too short"):
        curate(rows, [method("length", min=3)])
    assert curate([], ALL).rows == ()


def test_a_step_without_its_model_is_refused() -> None:
    with pytest.raises(UserError, match="'ifd' needs a model"):
        curate([row("q", "a")], [method("ifd")])


def liar(lose: bool = False, rewrite: bool = False) -> Step:
    """A step for `test_curation:liar` that breaks its contract."""

    def apply(rows: Sequence[tuple[int, Example]], context: Context) -> StepResult:
        if rewrite:
            return StepResult(tuple((i, row("other", "other")) for i, _ in rows))
        return StepResult(tuple(rows[1:]) if lose else tuple(reversed(rows)))

    return Step(apply, pointwise=False)


@pytest.mark.parametrize("options", [{}, {"lose": True}, {"rewrite": True}])
def test_a_step_from_outside_that_breaks_the_contract_is_found_out(options: dict[str, bool]) -> None:
    STEPS.register("liar")(liar)
    try:
        with pytest.raises(ValueError, match="liar"):
            curate([row("q", "a"), row("r", "b")], [method("liar", **options)])
    finally:
        STEPS._builders.pop("liar")


def test_reports_count_what_happened() -> None:
    rows = [row("mail a@b.example", "done"), row("q", "..."), row("q", "fine")]
    made: Curation = curate(rows, [method("mask"), method("length")])
    mask, length = made.reports
    assert (mask.rows_in, mask.rows_out, mask.rewritten) == (3, 3, 1)
    assert (length.rows_in, length.rows_out, length.reasons) == (3, 2, {"answer is empty or only punctuation": 1})
    assert made.dropped == {"mask": 0, "length": 1}
    assert made.examples[0].turns[0].text == "mail <EMAIL_1>"
