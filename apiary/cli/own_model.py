"""`apiary deploy personal`: a site's own model, made at home, and what it is worth on the site's own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer

from apiary.cli.shared import shown


class Asked(NamedTuple):
    """What the site's operator says."""

    site: str
    data: Path
    state: Path
    model: Path | None
    device: str | None
    columns: Mapping[str, str]
    adapter: Path  # a run directory or an adapter folder
    run: str | None
    start: Path | None


def name_of(adapter: Path) -> str:
    """What a model is called that is made of an adapter: as its run directory or folder is."""
    path = adapter.resolve()
    return path.parent.name if path.name == "adapter" else path.name


def make(asked: Asked, out: Path, overrides: Sequence[str]) -> list[str]:
    """Make the model in `out`, and return the lines to print.

    Raises:
        UserError: the first thing that cannot work; nothing was written.
    """
    from client.personal import at_site
    from client.site import Facts

    model = None if asked.model is None else str(asked.model.expanduser().resolve())
    data = asked.data.expanduser().resolve()
    facts = Facts(asked.site, data, asked.state, model, asked.device, columns=asked.columns)
    plan = at_site.prepare(facts, at_site.Handed(asked.adapter, asked.run, asked.start), out, overrides)
    for line in plan.remarks:
        typer.echo(f"{asked.site}: {line}", err=True)
    personal, task = plan.home.config.personal, plan.task
    counts = [len(part) for part in task.rows]
    typer.echo(
        f"{asked.site}: {counts[0]:,} rows to train on, {counts[1]:,} that choose, {counts[2]:,} that figures are on; "
        f"at most {round(personal.budget * task.steps):,} optimizer steps for each candidate",
        err=True,
    )
    choice = at_site.make(plan)
    private = plan.home.config.privacy.unit == "record"
    return [*lines(choice, private=private), f"model: {shown(out)}   training alone: {shown(out / 'alone')}"]


def lines(choice: Mapping[str, Any], *, private: bool) -> list[str]:
    """What a site is told of its own model.

    Args:
        choice: the content of `choice.json`, with figures.
        private: whether the run promised the rows record-level privacy.
    """
    from apiary.core import formatting
    from apiary.export.personal import label
    from apiary.report.data import Client, OwnModel, OwnName, gain_of
    from apiary.report.personal import WAYS, advice
    from client.personal.own_model import STEPS

    found = OwnModel.model_validate(dict(choice))
    site = Client(client=choice["client"], personal=found)
    rows = [("", "loss", "95% interval", "steps")]
    names: tuple[OwnName, ...] = ("local_best", "federated", "personal")
    for name in names:
        ends = found.own_ci95.get(name)
        interval = "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
        rows.append((WAYS[name][0], formatting.loss_text(found.own.get(name)), interval, str(choice[STEPS[name]])))
    wide = [max(len(row[column]) for row in rows) for column in range(4)]
    table = [f"{row[0]:<{wide[0]}}  {row[1]:>{wide[1]}}  {row[2]:>{wide[2]}}  {row[3]:>{wide[3]}}" for row in rows]
    pair = found.own_paired.get("local_best")
    gain = gain_of([(site.client, found.own.get("local_best"), found.own.get("personal"), pair)])
    said = table if found.own else ["no held-out row of this site can be measured, so there are no figures"]
    if pair is not None and gain is not None:
        said.append(
            f"on {pair.n} held-out rows of this site, in nats per response token; the own model against training alone "
            f"at its best: {_outcome(gain.outcome(site.client), gain.gains[site.client], pair.ci95)}"
        )
    said.append(f"kept: {label(found.kept, found.weight)}, for {found.why}")
    alone = found.kept == "alone" or (gain is not None and gain.outcome(site.client) == "lose")
    said.append(advice([site], gain) if alone else "The rows of this site do not say that staying alone is better.")
    promise = " What the run promises to rows, it promises of the federated model, not of this one." if private else ""
    said.append(
        "Own models are made of the site's rows without noise, for this site alone. Nothing was sent to anybody, "
        f"not even what was kept.{promise}"
    )
    return said


def _outcome(outcome: str, gain: float, ends: tuple[float, float] | None) -> str:
    from apiary.core import formatting

    turned = [formatting.change_text(-end) for end in reversed(ends or ())]  # a lower loss is a gain
    interval = f" (95% interval {' to '.join(turned)})" if turned else ""
    words = {"gain": "it gains", "lose": "it loses", "cannot tell": "these rows cannot tell"}[outcome]
    return f"{words}, {formatting.change_text(gain)}{interval}"
