"""The page about a sweep: one file that opens anywhere and asks for nothing."""

# ruff: noqa: E501 (markup reads better in its own lines)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from apiary.config import toml_text
from apiary.core.formatting import bytes_text, plural, seconds_text
from apiary.report.page import HEAD, STYLE
from simulation.sweep import space, words

_CURVES = 8  # settings that are drawn by name beside winner and reference

PAGE: Final = (
    HEAD
    + """<title>Sweep {{ name }}: {{ best }}</title>
<style>"""
    + STYLE
    + """
.sweep th, .sweep td { font-size: 14px; padding: 9px 10px; }
.sweep tr.winner > * { font-weight: 650; }
.sweep tr.lost > * { color: var(--muted); font-weight: 400; }
pre.command { overflow-x: auto; white-space: pre-wrap; font: 14px/1.6 var(--mono); margin: 0; user-select: all; }
</style>
</head>
<body>
<main>
<header>
<div class="brand"><b>Apiary</b> · sweep {{ name }}</div>
<h1>{{ best }}</h1>
{% for line in verdict %}<p{% if loop.first %} class="lead"{% endif %}>{{ line }}</p>
{% endfor %}
{% for line in warnings %}<p class="note"><b>Note:</b> {{ line }}.</p>
{% endfor %}
</header>
<section>
<h2>Run the winner</h2>
<p class="note">On all held-out rows, as any run. The same is in best.toml beside this page.</p>
<div class="panel"><pre class="command">{{ command }}</pre></div>
</section>
<section>
<h2>Setting by setting</h2>
<p class="note">Means over seeds, in nats per response token (lower is better). {{ rows.choosing }} held-out rows choose the winner; all other figures are on {{ rows.figures }} others, which choose nothing. Differences are paired: seed by seed and row by row. The first interval is of each difference by itself; of many such intervals some miss the truth by chance, so the second one is as wide as it takes for all {{ comparisons }} to hold at once in 95 of 100 sweeps (Bonferroni).</p>
<div class="panel scroll">
<table class="sweep">
<thead><tr><th scope="col">Setting</th><th scope="col" class="num">Rows that choose</th><th scope="col" class="num">Rows of the figures</th><th scope="col" class="num">Less the reference</th><th scope="col" class="num">Seeds</th><th scope="col" class="num">Federation</th><th scope="col" class="num">Sent</th></tr></thead>
<tbody>
{% for row in table %}
<tr class="{{ row.kind }}"><th scope="row">{{ row.name }}{% if row.kind == "winner" %}<br><small>chosen</small>{% endif %}{% if row.why %}<br><small>{{ row.state }}: {{ row.why }}</small>{% endif %}</th><td class="num">{{ row.choosing }}</td><td class="num">{{ row.loss }}<small>{{ row.lowest }} to {{ row.highest }}</small></td><td class="num">{{ row.less }}<small>{{ row.wide }}</small></td><td class="num">{{ row.seeds }}</td><td class="num">{{ row.seconds }}</td><td class="num">{{ row.bytes }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% if chart %}
<section>
<h2>Learning, round by round</h2>
<p class="note">Loss on the rows of the figures after each round, mean over seeds.{% if undrawn %} The {{ undrawn }} other settings are not named.{% endif %}</p>
<div class="panel">{{ chart }}</div>
</section>
{% endif %}
<section>
<h2>What it cost</h2>
<dl class="facts">
{% for name, value in facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
</section>
</main>
</body>
</html>
"""
)


def render(found: Mapping[str, Any], name: str) -> str:
    """The page as one HTML text; the same input gives the same bytes.

    Args:
        found: the content of results.json.
        name: of the sweep.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    chart, undrawn = _chart(found)
    return environment.from_string(PAGE).render(
        name=name,
        best=space.words(found["winner"]["values"]),
        verdict=found["verdict"],
        warnings=found["warnings"],
        command=found["command"],
        rows=found["rows"],
        comparisons=found["comparisons"],
        table=[_row(row, found) for row in found["table"]],
        chart=chart,
        undrawn=undrawn,
        facts=_facts(found),
    )


def _row(row: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    name, choosing, loss, lowest, highest, less, wide, seeds, seconds, sent = words.cells(row, found)
    kind = "winner" if row["number"] == found["winner"]["number"] else "lost" if row["why"] else ""
    return {
        "name": name,
        "kind": kind,
        "state": row["state"],
        "why": row["why"],
        "choosing": choosing,
        "loss": loss,
        "lowest": lowest,
        "highest": highest,
        "less": less,
        "wide": wide,
        "seeds": seeds,
        "seconds": seconds,
        "bytes": sent,
    }


def _chart(found: Mapping[str, Any]) -> tuple[Any, int]:
    """The curves, winner and reference in colours of their own, and how many other settings have no name in it."""
    from apiary.report.plots import Curve, settings_chart  # draws with Matplotlib

    drawn = [row for row in found["table"] if len(row["curve"]) > 1]
    if not drawn:
        return None, 0
    special = {found["winner"]["number"]: "federated", found["reference"]["number"]: "local"}
    special[found["winner"]["number"]] = "federated"
    others = [row for row in drawn if row["number"] not in special]
    named = len(others) <= _CURVES
    curves = [
        Curve(
            _short(row, found) if row["number"] in special or named else "",
            special.get(row["number"], "muted"),
            row["curve"],
        )
        for row in sorted(drawn, key=lambda row: row["number"] in special)
    ]
    return settings_chart(curves), 0 if named else len(others)


def _short(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The values alone, where a single key is varied, else the number of the setting."""
    values = [toml_text.shown(value) for value in row["values"].values()]
    return values[0] if len(values) == 1 and len(values[0]) <= 10 else f"no. {row['number'] + 1}"


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    runs, machine = found["runs"], found["machine"]
    sent = [row["bytes"] * len(row["seeds"]) for row in found["table"] if row["bytes"] is not None]
    return [
        ("Runs", f"{plural(runs['finished'], 'run')} finished of {runs['begun']} begun"),
        ("Time", f"{seconds_text(found['seconds'])}, baselines and measuring included"),
        (
            "At a time",
            f"{plural(machine.get('jobs', 1), 'run')}, each with {plural(machine.get('threads', 1), 'thread')}",
        ),
        ("Sent in all runs", bytes_text(sum(sent))),
        ("Baselines trained", f"{found['baselines']}, shared where runs have them alike"),
        ("Search", found["search"]),
        ("Seeds", ", ".join(map(str, found["seeds"]))),
    ]
