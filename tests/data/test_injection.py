"""Planted instructions: the rows that are trained, and the wordings of measuring."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from chat_templates import BYTE_TOKENIZER, TALK, build, trained_texts

from apiary.config import loading
from apiary.data import injection, tokenization
from apiary.data.examples import Example
from apiary.data.injection import SEEN, UNSEEN, encode_training, trained
from apiary.data.turns import Turn
from client.site import Site
from client.site_rows import SiteRows

COUNT = 2000


def _row(number: int) -> Example:
    data = f"row {number}: b, a"
    return Example((Turn("user", f"Sort.\n\n{data}", data=7), Turn("assistant", f"a, b ({number})")), {})


ROWS = [_row(number) for number in range(COUNT)]


def _planted(row: Example) -> str:
    """What stands behind the row's data once it is written to be trained; "" for nothing."""
    made = trained(row, 0.5)
    assert made.turns[0].text.startswith(row.turns[0].text)
    assert made.turns[1:] == row.turns[1:] and made.turns[0].data == row.turns[0].data  # its answer stays
    return made.turns[0].text[len(row.turns[0].text) :]


def test_the_share_is_what_was_asked_and_the_kinds_are_even() -> None:
    """Within four standard deviations of a binomial: 0.5 +- 4 * sqrt(0.25 / 2000), and a quarter of those each."""
    texts = [text for text in map(_planted, ROWS) if text]
    assert abs(len(texts) / COUNT - 0.5) < 0.045
    kinds = {
        "separation": sum(len(text) - len(text.lstrip("\r\n ")) > 3 for text in texts),
        "completion": sum(text.startswith("\n\n") and text[2:3].strip() != "" for text in texts),
        "ignore": sum(any(text.startswith(f" {s} ") for s in injection._TRAINED.ignore) for text in texts),
    }
    kinds["naive"] = len(texts) - sum(kinds.values())
    assert all(abs(count / len(texts) - 0.25) < 0.055 for count in kinds.values()), kinds
    assert len(set(texts)) > 0.8 * len(texts)  # a model cannot know them by heart
    for share in (0.0, 1.0):
        assert all((trained(row, share) is row) == (share == 0) for row in ROWS)


def test_what_a_row_becomes_follows_from_the_row_alone() -> None:
    template, config = build("plain", BYTE_TOKENIZER, boundary="structured")
    whole = encode_training(ROWS[:60], template, BYTE_TOKENIZER, config)
    assert 0 < sum(trained(row, 0.5) is not row for row in ROWS[:60]) < 60
    for i in random.Random(1).sample(range(60), 20):
        others = [TALK, _row(i), _row(i), *ROWS[100:130]]
        part = encode_training(others, template, BYTE_TOKENIZER, config)
        ids = whole.ids[whole.offsets[i] : whole.offsets[i + 1]].tolist()
        for place in (1, 2):
            assert part.ids[part.offsets[place] : part.offsets[place + 1]].tolist() == ids


def test_the_model_sees_the_instruction_within_the_data_and_trains_the_clean_answer() -> None:
    template, config = build("plain", BYTE_TOKENIZER, boundary="structured")
    corpus = encode_training(ROWS[:200], template, BYTE_TOKENIZER, config)
    assert len(corpus) == 200  # one row stays one row
    seen = 0
    for i, row in enumerate(ROWS[:200]):
        part = slice(corpus.offsets[i], corpus.offsets[i + 1])
        text = BYTE_TOKENIZER.decode(corpus.ids[part].tolist())
        made = trained(row, 0.5)
        data = made.turns[0].text[7:]
        assert text.startswith(f"User: Sort.\n\n<<<DATA>>>\n{data}\n<<<END>>>\n\nAssistant:\n")
        encoded = tokenization.Encoded(corpus.ids[part], corpus.trained[part], False)
        assert trained_texts(encoded, BYTE_TOKENIZER) == [f"{row.turns[1].text}</s>"]
        seen += data != row.turns[0].text[7:]
    assert 70 < seen < 130


def test_plain_and_a_share_of_nothing_train_the_rows_as_they_are() -> None:
    for options in ({}, {"injected": 0.9}, {"boundary": "structured", "injected": 0.0}):
        template, config = build("plain", BYTE_TOKENIZER, **options)
        made = encode_training(ROWS[:50], template, BYTE_TOKENIZER, config)
        assert made.ids.tolist() == tokenization.encode_all(ROWS[:50], template, BYTE_TOKENIZER, config).ids.tolist()


def test_rows_without_data_are_trained_as_they_are() -> None:
    assert trained(TALK, 1.0) is TALK
    late = Example((*TALK.turns[:2], Turn("user", "x\n\ny", data=3), Turn("assistant", "no", trained=False)), {})
    assert trained(late, 1.0) is late  # nothing is learnt after its data


def test_an_instruction_may_stand_in_what_a_tool_says() -> None:
    turns = (Turn("user", "How warm?"), Turn("tool", "18 degrees"), Turn("assistant", "18"))
    made = trained(Example(turns, {}), 1.0)
    assert made.turns[0] == turns[0] and made.turns[2] == turns[2]
    assert made.turns[1].text.startswith("18 degrees") and len(made.turns[1].text) > 12


def test_a_row_that_no_longer_fits_is_trained_as_it_is() -> None:
    template, config = build("plain", BYTE_TOKENIZER, boundary="structured", injected=1.0)
    row = ROWS[0]
    length = len(tokenization.encode_all([row], template, BYTE_TOKENIZER, config).ids)
    tight = config.model_copy(update={"max_tokens": length})
    made = encode_training([row, TALK], template, BYTE_TOKENIZER, tight)
    clean = tokenization.encode_all([row, TALK], template, BYTE_TOKENIZER, tight)
    assert made.ids.tolist() == clean.ids.tolist() and made.stats == clean.stats


def test_wordings_of_training_and_of_measuring_have_nothing_in_common() -> None:
    for one, other in zip(injection._TRAINED, injection._MEASURED, strict=True):
        assert not {str(words) for words in one} & {str(words) for words in other}
    assert not set(SEEN) & set(UNSEEN)
    words = " ".join(injection._TASKS).casefold()
    assert not [word for word in injection._WITNESSES if word.casefold() in words]


@pytest.mark.parametrize("kind", [*SEEN, *UNSEEN])
def test_an_attack_puts_its_instruction_at_the_end_of_the_last_data(kind: str) -> None:
    order, witness = injection.demand(ROWS[3], seed=5)
    assert witness in order and witness not in ROWS[3].turns[0].text
    made = injection.attacked(ROWS[3], kind, order, seed=5)
    assert made == injection.attacked(ROWS[3], kind, order, seed=5)
    assert made.turns[0].text.startswith(ROWS[3].turns[0].text) and order in made.turns[0].text
    assert made.turns[1:] == ROWS[3].turns[1:] and made.turns[0].data == 7


def test_a_demanded_word_is_not_in_the_row() -> None:
    said = "Zanzibar OBELISK marzipan Quicksilver Juniper Bumblebee periWinkle"
    row = Example((Turn("user", f"Q\n\n{said}", data=3), Turn("assistant", "a")), {})
    assert {injection.demand(row, seed)[1] for seed in range(20)} == {"Xylophone"}


def test_a_site_trains_what_was_planted_and_measures_what_was_not(tmp_path: Path) -> None:
    template, config = build("plain", BYTE_TOKENIZER, boundary="structured", injected=1.0)
    run = loading.load(None, ["prompt.boundary=structured", "prompt.injected=1.0", "prompt.template=plain"])
    rows = tuple(ROWS[:8])
    site = Site("a", rows, rows, tmp_path, tmp_path / "ledger.json", 4)
    held = SiteRows(run, BYTE_TOKENIZER, template)
    clean = tokenization.encode_all(rows, template, BYTE_TOKENIZER, config).ids.tolist()
    assert held.corpus(site, "test", rows).ids.tolist() == clean
    for part in ("train", "buffer"):
        made = held.corpus(site, part, rows).ids.tolist()
        assert made != clean
        assert made == encode_training(rows, template, BYTE_TOKENIZER, config).ids.tolist()


def test_rows_of_a_file_know_where_their_input_begins(tmp_path: Path) -> None:
    from apiary.data.examples import read

    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [
        {"instruction": "Sort.", "input": "b, a", "output": "a, b"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"question": "Who?", "context": "Ann came.", "answer": "Ann"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    one, two, three = read(str(path)).examples
    assert one.turns[0].text[one.turns[0].data :] == "b, a"
    assert two.turns[0].data is None
    assert three.turns[0].text[three.turns[0].data :] == "Ann came."
