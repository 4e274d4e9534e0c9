"""What the report says of clients' own models, read off invented figures."""

from __future__ import annotations

from typing import Any

import pytest
from fake_run import fake_metrics
from report_pages import HOSTILE, Page, page

from apiary.report import personal_lines, table_plain
from apiary.report.data import parse_metrics
from apiary.report.personal import advice, own_lines
from apiary.report.verdict import headline, second


def own(kept: str, alone: float, joint: float, mine: float, ends: list[float] | None, n: int = 90) -> dict[str, Any]:
    """A client's own model with its losses; the interval is of its own less alone."""
    return {
        "kept": kept,
        "weight": 0.25 if kept == "mixed" else 0.0,
        "steps": 72,
        "federation_steps": 36,
        "alone_steps": 54,
        "why": f"it has the lowest loss of 6 candidates on {n} validation rows",
        "rows": {"train": 300, "validation": n, "chosen_by": "training rows set apart"},
        "own": {"local": alone + 0.1, "local_best": alone, "federated": joint, "personal": mine},
        "own_ci95": {
            "local_best": [alone - 0.1, alone + 0.1],
            "federated": None,
            "personal": [mine - 0.05, mine + 0.07],
        },
        "own_paired": {"local_best": {"difference": mine - alone, "ci95": ends, "n": n}},
        "mix_loss": {"federated": 0.6, "personal": 0.9},
        "curves": {
            "alone": [[18, 0.9], [36, 0.7], [54, 0.6], [72, 0.65]],
            "federated": [[9, 1.2], [18, 1.0], [27, 0.9], [36, 0.8]],
            "tuned": [[36, 0.8], [45, 0.6], [54, 0.55], [63, 0.5], [72, 0.5]],
        },
    }


MODELS = (
    own("mixed", 0.70, 0.80, 0.50, [-0.30, -0.10]),
    own("tuned", 0.60, 0.50, 0.45, [-0.20, -0.02]),
    own("alone", 0.40, 0.90, 0.40, [0.0, 0.0]),
    own("federated", 0.50, 0.62, 0.62, [0.05, 0.20]),
    own("federated", 0.55, 0.50, 0.50, None, n=20),
)


def metrics(*models: dict[str, Any], set_apart: bool = True) -> dict[str, Any]:
    found = fake_metrics(len(models))
    for client, model in zip(found["clients"], models, strict=True):
        client["personal"] = model
        client["own"] |= {name: model["own"][name] for name in ("local_best", "personal")}
    table = [
        {"method": name, "own": sum(m["own"][name] for m in models) / len(models), "own_ci95": [0.1, 0.9], "steps": 36}
        for name in ("local", "local_best", "federated", "personal")
    ]
    table[2]["mix"], table[3]["mix"] = 0.6, 0.9
    return {**found, "personal": {"set_apart": set_apart, "table": table}}


def test_the_sentences_say_who_kept_what_and_who_is_better_off() -> None:
    said = own_lines(parse_metrics(metrics(*MODELS)))
    assert said[0] == (
        "By validation rows of its own, each client chose a model: of 5, 2 kept the federated model as it is, 1 mixed "
        "it with training alone, 1 tuned it further, 1 stays alone."
    )
    assert "2 of 5 clients gain, 1 loses, 2 cannot tell" in said[1] and "20 to 90 rows each" in said[1]
    # gains by hand: 0.20, 0.15, 0, -0.12, 0.05, their mean 0.056
    assert "the mean gain is +0.056" in said[1] and "the least \N{MINUS SIGN}0.120 (client-03)" in said[1]
    # federated less alone by hand: +0.10, -0.10, +0.50, +0.12, -0.05, their mean 0.114
    assert "neither clearly better nor clearly worse than training alone at its best: +0.114 nats per token" in said[2]
    assert "lower for 2 of 5 clients" in said[2]
    assert "a loss of 0.900, the federated model 0.600 (+0.300)" in said[4]


def test_the_opening_asks_each_way_of_training_at_its_best_and_says_who_is_worse() -> None:
    """Federated may beat training alone on everybody's rows, and yet no client want it for its own."""
    models = [own("tuned", 0.70 + shift, 0.80 + 2 * shift, 0.65, [-0.1, -0.01]) for shift in (0.0, 0.01, 0.02)]
    found = parse_metrics(metrics(*models))
    assert (
        "on their own rows training alone at its best has 0.710, the shared model 0.820, own models 0.650"
        in headline(found)
    )
    # the differences are 0.10, 0.11 and 0.12: t of 95% with 2 degrees is 4.303, so 0.11 -+ 4.303 * 0.01 / sqrt(3)
    assert (
        "the shared model as it is, is worse than training alone at its best: +0.110 nats per token on average (95% "
        "interval over clients +0.085 to +0.135), and it is lower for 0 of 3 clients" in second(found)
    )
    same = own("tuned", 0.7, 0.7, 0.65, None)
    apart = [own("tuned", 0.7, 0.7, mine, None) for mine in (0.6, 0.8)]
    assert "may be no gain at all" in own_lines(parse_metrics(metrics(*apart)))[1]
    assert "may be no gain at all" not in own_lines(parse_metrics(metrics(same, same)))[1]


def test_to_whom_staying_alone_is_the_better_advice_is_said_by_name() -> None:
    (line,) = [s for s in own_lines(parse_metrics(metrics(*MODELS))) if "Staying alone" in s]
    assert "better advice for client-02: of all candidates the validation rows chose training alone" in line
    assert "better advice for client-03: on the reported rows the own model is clearly worse" in line
    assert "client-00" not in line and "client-04" not in line
    assert advice([], None) == "For no client do its rows say that staying alone is the better advice."


def test_a_client_whose_own_rows_are_enough_is_told_so() -> None:
    """At most 5% of the loss alone, 0.8, is 0.04; who clearly gains is told nothing of the kind, however little."""
    models = [own("mixed", 0.8, 0.9, 0.79, [low, 0.02]) for low in (-0.039, -0.041)]
    models.append(own("tuned", 0.8, 0.9, 0.77, [-0.039, -0.02]))
    (line,) = [s for s in own_lines(parse_metrics(metrics(*models))) if "are enough" in s]
    assert line == (
        "Rows of its own are enough for client-00 (300 rows): joining lowers the loss of training alone at its best by "
        "less than 5%, by the 95% interval."
    )


def test_what_an_older_run_and_a_private_one_must_say_is_said() -> None:
    found = metrics(*MODELS[:2], set_apart=False)
    assert "half of each client's held-out rows chose" in "\n".join(personal_lines(found))
    private = {
        **found,
        "privacy": {
            **{"unit": "record", "accountant": "pld", "epsilon": 3.0, "epsilon_rdp": 3.5, "delta": 1e-5},
            **{"sampler": "Poisson sampling", "budget": 3.0, "clip": 1.0, "clients": {}},
        },
    }
    assert "nothing of them is released" in "\n".join(personal_lines(private))


def test_the_page_has_the_table_the_figure_and_the_reasons() -> None:
    shown = Page(page(metrics(*MODELS)))
    text = shown.text
    for words in ("Each client's own model", "Training alone, at its best", "On everyone's rows", "mixed (0.25 alone)"):
        assert words in text
    assert "gains 0.200" in text and "loses 0.120" in text and "cannot tell: +0.050" in text
    labels = [attrs.get("aria-label") or "" for tag, attrs in shown.tags if tag == "svg"]
    assert any(label.startswith("Loss on own held-out rows of 5 clients") for label in labels)
    assert any("alone 0.650, federated 0.800, tuned 0.500" in label for label in labels)
    assert "Each client's own model" not in page(fake_metrics(3))


def test_names_and_reasons_are_text() -> None:
    found = metrics(*MODELS[:2])
    found["clients"][0]["client"] = found["clients"][0]["personal"]["why"] = HOSTILE
    shown = Page(page(found))
    assert not any(tag == "script" for tag, _ in shown.tags) and HOSTILE in shown.text


def test_curves_that_were_looked_at_after_other_steps_are_not_averaged() -> None:
    other = {**MODELS[1], "curves": {"alone": [[3, 0.9], [6, 0.7]], "tuned": [[3, 0.9], [6, 0.7]]}}
    labels = [
        attrs.get("aria-label") or "" for tag, attrs in Page(page(metrics(MODELS[0], other))).tags if tag == "svg"
    ]
    assert not any("optimizer steps" in label for label in labels)


def test_the_terminal_shows_the_table_and_a_run_without_own_models_nothing_of_it() -> None:
    lines = personal_lines(metrics(*MODELS))
    assert [line.split("  ")[0] for line in lines[1:5]] == [
        "Training alone",
        "Training alone, at its best",
        "Federated",
        "Own model",
    ]
    assert personal_lines(fake_metrics(2)) == []
    assert "each client chose a model" in table_plain(metrics(*MODELS))
    assert "chose a model" not in table_plain(fake_metrics(2))


@pytest.mark.parametrize("kept", ["mine", None])
def test_a_choice_that_is_none_is_refused(kept: str | None) -> None:
    from apiary.core.errors import UserError

    found = metrics(*MODELS[:1])
    found["clients"][0]["personal"]["kept"] = kept
    with pytest.raises(UserError, match=r"clients\.0\.personal\.kept"):
        parse_metrics(found)
