"""What the report says of the clients' own models: what each kept, whether it is better off, what it gives up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from apiary.core import formatting
from apiary.core.formatting import clean
from apiary.report.data import OWN_NAMES, Client, Gain, Metrics, OwnModel, OwnName, OwnRow, gain_by_own_model
from apiary.report.verdict import outcomes_text, rows_text, shared_at_best

WAYS: dict[OwnName, tuple[str, str]] = {
    "local": ("Training alone", "on the client's own rows, in the steps that it made in the federation"),
    "local_best": (
        "Training alone, at its best",
        "given as many steps in all as its own model may have, and taken where its validation rows say",
    ),
    "federated": ("Federated", "the model that clients trained together, as it is"),
    "personal": ("Own model", "what the client chose of the federated model, training alone and what it made of both"),
}
"""A name and a sentence for each row of the table."""

_KEPT = {  # a choice with the words around its number
    "federated": "kept the federated model as it is",
    "earlier": "took the federated model of an earlier round",
    "mixed": "mixed it with training alone",
    "tuned": "tuned it further",
    "alone": "stay alone",
}
_ONE_ALONE = "stays alone"
_LITTLE = 0.05  # of the loss of training alone: a gain that is surely less is next to nothing
_NAMED, _LISTED = 8, 24  # clients with a name in a sentence, and with a line of their own


def own_content(metrics: Metrics) -> dict[str, Any] | None:
    """What the page shows of the clients' own models; None where the run made none."""
    from apiary.report import plots  # draws with Matplotlib, which sentences do without

    clients = [client for client in metrics.clients if client.personal is not None]
    if metrics.personal is None or not clients:
        return None
    gain = gain_by_own_model(metrics)
    curves = plots.mean_curves([client.personal for client in clients if client.personal is not None])
    return {
        "said": own_lines(metrics),
        "rows": [row for row in metrics.personal.table if row.method in OWN_NAMES],
        "ways": WAYS,
        "clients": [
            (client.client, _kept_text(client), _outcome(client, gain), _reason(client)) for client in clients[:_LISTED]
        ],
        "left_out": max(0, len(clients) - _LISTED),
        "chart": plots.own_chart(clients[:_LISTED]),
        "curves": plots.own_curves(curves),
        "on_its_way": "federated" in curves,
    }


def own_lines(metrics: Metrics) -> list[str]:
    """The sentences on the clients' own models, in plain text; none where the run made none."""
    clients = [client for client in metrics.honest if client.personal is not None]
    if metrics.personal is None or not clients:
        return []
    gain = gain_by_own_model(metrics)
    gains = [_gains(gain), shared_at_best(metrics)]
    said = [_choices(clients), *gains, advice(clients, gain), _everyone(metrics.personal.table)]
    if not metrics.personal.set_apart:
        said.append(
            "The run set no rows apart for this before round 1, so half of each client's held-out rows chose, and "
            "these figures are on the other half alone."
        )
    if metrics.private:
        said.append(
            "Own models are made without noise, of rows that their client holds anyway; they stay with it, and nothing "
            "of them is released. What is promised to each row is promised of the federated model, not of them."
        )
    return [line for line in said if line]


def _choices(clients: Sequence[Client]) -> str:
    counts: Counter[str] = Counter(client.personal.kept for client in clients if client.personal)
    said = [
        f"{counts[kind]} {_ONE_ALONE if kind == 'alone' and counts[kind] == 1 else words}"
        for kind, words in _KEPT.items()
        if counts[kind]
    ]
    return f"By validation rows of its own, each client chose a model: of {len(clients)}, {', '.join(said)}."


def _gains(gain: Gain | None) -> str:
    """How clients fare by their own models, against the strongest that they could do alone."""
    if gain is None:
        return ""
    ends = gain.mean_ends
    among = "" if ends is None else f" (95% interval over clients {' to '.join(map(formatting.change_text, ends))})"
    if ends is not None and ends[0] <= 0 <= ends[1]:
        among += ", which may be no gain at all"
    rows = f" ({rows_text(gain)})" if gain.rows else ""
    name, least = gain.worst
    return (
        f"On their own held-out rows{rows}, against training alone at its best and given as many steps, "
        f"{outcomes_text(gain)}: the mean gain is {formatting.change_text(gain.mean)} nats per token{among}, the least "
        f"{formatting.change_text(least)} ({clean(name)})."
    )


def advice(clients: Sequence[Client], gain: Gain | None) -> str:
    """To whom staying alone is the better advice, or no worse, and why."""
    chose = [client.client for client in clients if client.personal and client.personal.kept == "alone"]
    worse = [
        client.client
        for client in clients
        if client.client not in chose and gain and client.client in gain.gains and gain.outcome(client.client) == "lose"
    ]
    said = []
    if chose:
        said.append(
            f"Staying alone is the better advice for {_names(chose)}: of all candidates the validation rows chose "
            "training alone."
        )
    if worse:
        said.append(
            f"Staying alone is the better advice for {_names(worse)}: on the reported rows the own model is clearly "
            "worse than training alone at its best, which the validation rows did not show."
        )
    if enough := [c for c in clients if c.client not in (*chose, *worse) and gain and _gains_nothing(c, gain)]:
        rows = [f"{c.client} ({formatting.count_text(c.personal.rows.train)} rows)" for c in enough if c.personal]
        said.append(
            f"Rows of its own are enough for {_names(rows)}: joining lowers the loss of training alone at its best by "
            f"less than {_LITTLE:.0%}, by the 95% interval."
        )
    if not said:
        said.append("For no client do its rows say that staying alone is the better advice.")
    return " ".join(said)


def _gains_nothing(client: Client, gain: Gain) -> bool:
    """Whether a client does not clearly gain, and the interval leaves out every gain worth the name."""
    if gain.outcome(client.client) == "gain":
        return False
    alone = client.personal.own.get("local_best") if client.personal else None
    pair = gain.paired.get(client.client)
    return pair is not None and pair.ci95 is not None and alone is not None and -pair.ci95[0] < _LITTLE * alone


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(map(clean, names[:_NAMED]))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"


def _everyone(table: Sequence[OwnRow]) -> str:
    """What own models give up on everyone's rows."""
    mix = {row.method: row.mix for row in table if row.mix is not None}
    if not {"federated", "personal"} <= mix.keys():
        return ""
    own, joint = mix["personal"] or 0.0, mix["federated"] or 0.0
    return (
        f"On everyone's held-out rows the clients' own models have a loss of {formatting.loss_text(own)}, the "
        f"federated model {formatting.loss_text(joint)} ({formatting.change_text(own - joint)}): whoever needs the "
        "skills of all takes the federated one."
    )


def _kept_text(client: Client) -> str:
    found = client.personal or OwnModel(kept="federated")
    share = f" ({found.weight:g} alone)" if found.kept == "mixed" else ""
    return f"{found.kept}{share}, {formatting.count_text(found.steps)} steps"


def _outcome(client: Client, gain: Gain | None) -> str:
    if gain is None or client.client not in gain.gains:
        return ""
    change = gain.gains[client.client]
    match gain.outcome(client.client):
        case "gain":
            return f"gains {formatting.loss_text(abs(change))}"
        case "lose":
            return f"loses {formatting.loss_text(abs(change))}"
        case _:
            return f"cannot tell: {formatting.change_text(change)}"


def _reason(client: Client) -> str:
    return client.personal.why if client.personal else ""
