"""The page about a curation: counts, scores, and a few dropped rows word for word. It is the owner's own."""

# ruff: noqa: E501 (markup reads better in its own lines)

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from apiary.config.schema import Method
from apiary.data.examples import FileReport, Source
from apiary.data.turns import said
from apiary.report.page import HEAD, STYLE
from client.curation.pipeline import Curation

_SHOWN = 3  # rows for each reason
_BINS = 24

PAGE: Final = (
    HEAD
    + """<title>Curation: {{ kept }} of {{ total }} rows kept</title>
<style>"""
    + STYLE
    + """
.columns { display: flex; align-items: flex-end; gap: 2px; height: 150px; border-bottom: 1px solid var(--line); }
.columns i { flex: 1; display: flex; flex-direction: column-reverse; height: 100%; }
.columns b { display: block; background: var(--central); }
.columns b.gone { background: var(--wrong); opacity: 0.75; }
.axis { display: flex; justify-content: space-between; font-size: 13px; color: var(--muted); margin-top: 5px; }
</style>
</head>
<body>
<main>
<header>
<div class="brand"><b>Apiary</b> · curation</div>
<h1>{{ kept }} of {{ total }} rows are kept.</h1>
<p class="lead">This page is private: it shows rows of the data word for word. It belongs where the data is.</p>
<p class="note">Rows are numbered as they stand in {{ "the file" if files == 1 else "their files" }}: by line in JSON Lines, by data row elsewhere. Rows that could not be used count too.</p>
</header>
<section>
<h2>Step by step</h2>
<div class="panel scroll">
<table>
<thead><tr><th scope="col">Step</th><th scope="col" class="num">Rows in</th><th scope="col" class="num">Dropped</th><th scope="col" class="num">Rewritten</th><th scope="col">Reasons</th><th scope="col" class="num">Seconds</th></tr></thead>
<tbody>
{% if unusable %}<tr><th scope="row">reading</th><td class="num">{{ total }}</td><td class="num">{{ total - usable }}</td><td class="num">0</td><td>{% for reason, count in unusable.items() %}{{ count }} {{ reason }}<br>{% endfor %}</td><td class="num"></td></tr>{% endif %}
{% for step in steps %}
<tr><th scope="row">{{ step.name }}{% if step.options %}<br><small>{{ step.options }}</small>{% endif %}</th><td class="num">{{ step.report.rows_in }}</td><td class="num">{{ step.report.rows_in - step.report.rows_out }}</td><td class="num">{{ step.report.rewritten }}</td><td>{% for reason, count in step.report.reasons.items() %}{{ count }} {{ reason }}<br>{% endfor %}</td><td class="num">{{ "%.1f" | format(step.report.seconds) }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% for line in warnings %}<p class="note" style="margin-top:14px"><b>Warning:</b> {{ line }}</p>{% endfor %}
</section>
{% for chart in charts %}
<section>
<h2>Scores of {{ chart.name }}</h2>
<p class="note">{{ chart.rows }} rows by score; green: kept by this step, red: dropped.{% if chart.beyond %} {{ chart.beyond }} more lie above {{ "%.2f" | format(chart.high) }}.{% endif %}</p>
<div class="panel">
<div class="columns">{% for stay, gone in chart.bars %}<i><b style="height:{{ stay }}%"></b><b class="gone" style="height:{{ gone }}%"></b></i>{% endfor %}</div>
<div class="axis"><span>{{ "%.2f" | format(chart.low) }}</span><span>{{ "%.2f" | format(chart.high) }}</span></div>
</div>
</section>
{% endfor %}
{% for group in groups %}
<section>
<h2>{{ group.step }}: {{ group.reason }}</h2>
<p class="note">{{ group.count }} row{{ "" if group.count == 1 else "s" }}{% if group.count > group.rows | length %}; the first {{ group.rows | length }}{% endif %}.</p>
<div class="samples">
{% for row in group.rows %}
<article class="panel sample">
<div class="asked"><span class="label">{{ row.place }}{% if row.score is not none %} · score {{ "%.3f" | format(row.score) }}{% endif %}</span><p class="text">{{ row.question }}</p></div>
<div class="answers"><span class="label">Answer</span><p class="text">{{ row.answer }}</p></div>
</article>
{% endfor %}
</div>
</section>
{% endfor %}
</main>
</body>
</html>
"""
)


class Chart(NamedTuple):
    """A histogram: bars of (kept, dropped) in percent of the highest, from `low` to `high`; `beyond` above that."""

    name: str
    rows: int
    bars: list[tuple[float, float]]
    low: float
    high: float
    beyond: int


def render(curation: Curation, source: Source, reports: Sequence[FileReport], methods: Sequence[Method]) -> str:
    """The page as one HTML text; rows are untrusted text, so it is escaped and forbids itself every request.

    Args:
        curation: what happened.
        source: the rows as they came in.
        reports: of the files that they came from.
        methods: the steps with their options.
    """
    unusable = Counter[str]()
    for report in reports:
        unusable.update({reason: count for reason, (count, _) in report.problems.items()})
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        kept=len(curation.rows),
        total=sum(report.rows for report in reports),
        usable=len(source.examples),
        unusable=unusable,
        files=len(reports),
        steps=[
            {"name": report.name, "options": _options(method), "report": report}
            for report, method in zip(curation.reports, methods, strict=False)
        ],
        warnings=curation.warnings,
        charts=[chart for name, scores in curation.scores.items() if (chart := _chart(name, scores, curation))],
        groups=_groups(curation, source, several=len(reports) > 1),
    )


def _options(method: Method) -> str:
    return ", ".join(f"{name} = {value}" for name, value in method.options.items())


def _chart(name: str, scores: Mapping[int, float], curation: Curation) -> Chart | None:
    finite = {index: score for index, score in scores.items() if np.isfinite(score)}
    if not finite:
        return None
    values = np.array(list(finite.values()))
    gone = np.array([curation.fates.get(index, ("", ""))[0] == name for index in finite])
    low, high = float(values.min()), float(np.quantile(values, 0.98))  # a few far ones would flatten the rest
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    stay, away = np.histogram(values[~gone], edges)[0], np.histogram(values[gone], edges)[0]
    tallest = max(1, int((stay + away).max()))
    bars = [(round(100 * s / tallest, 2), round(100 * a / tallest, 2)) for s, a in zip(stay, away, strict=True)]
    return Chart(name, len(finite), bars, low, float(edges[-1]), int((values > edges[-1]).sum()))


def _groups(curation: Curation, source: Source, *, several: bool) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], list[int]] = {}
    for index, fate in sorted(curation.fates.items()):
        found.setdefault(fate, []).append(index)
    return [
        {
            "step": step,
            "reason": reason,
            "count": len(indices),
            "rows": [
                {
                    "place": _place(source, index, several),
                    "score": curation.scores.get(step, {}).get(index),
                    "question": "\n\n".join(map(said, source.examples[index].turns[:-1])),
                    "answer": said(source.examples[index].turns[-1]),
                }
                for index in indices[:_SHOWN]
            ],
        }
        for (step, reason), indices in found.items()
    ]


def _place(source: Source, index: int, several: bool) -> str:
    file, row = source.places[index]
    return f"{source.reports[file].name}, row {row}" if several else f"Row {row}"
