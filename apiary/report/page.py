"""The report's page: one Jinja template with its style inside.

It is a Python string because a Flower bundle carries no template files.
"""

# ruff: noqa: E501 (markup reads better in its own lines)

from __future__ import annotations

from typing import Final

HEAD: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
"""
"""How every page begins, up to its title: it fetches nothing, runs nothing, and sends nothing."""

STYLE: Final = """
:root {
  --font: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, system-ui, sans-serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  --paper: #fbfaf7; --panel: #ffffff; --ink: #1b1f24; --muted: #5d6570; --line: #e3e1da;
  --base: #6f7782; --start: #8a4f2a; --local: #c26a00; --federated: #0062a3; --central: #00805c; --central_serial: #7d4fa8; --personal: #a3175f; --wrong: #b3261e;
  --up: #47525f; --down: #b3bac3; --heat: 0.62;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1b1f25; --ink: #eceef1; --muted: #a2abb6; --line: #323942;
    --base: #a5aeb9; --start: #d2a07a; --local: #f0a64a; --federated: #62b8f2; --central: #45cda2; --central_serial: #c79cf0; --personal: #f28cc0; --wrong: #ff8a80;
    --up: #b9c1cb; --down: #5f6975; --heat: 0.5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 var(--font);
  font-variant-numeric: tabular-nums; overflow-wrap: break-word;
}
main { max-width: 1064px; margin: 0 auto; padding: 56px 32px 72px; }
h1 { font-size: clamp(26px, 3.6vw, 40px); line-height: 1.18; letter-spacing: -0.018em; font-weight: 650; margin: 10px 0 14px; max-width: 25em; text-wrap: balance; }
h2 { font-size: 21px; line-height: 1.3; letter-spacing: -0.008em; margin: 0 0 4px; }
p { margin: 0 0 12px; max-width: 46em; }
small, .note { color: var(--muted); font-size: 14px; line-height: 1.5; }
.brand { color: var(--muted); font-size: 14px; }
.brand b { color: var(--ink); letter-spacing: 0.01em; }
.lead { font-size: 18px; color: var(--muted); margin-bottom: 30px; }
section { margin-top: 52px; }
section > .note { margin-bottom: 18px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); gap: 14px; }
.tile, .panel { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 17px 20px 16px; }
.tile dt { font-size: 14px; color: var(--muted); }
.tile dd { margin: 0; }
.tile small { display: block; line-height: 1.4; margin-top: 1px; }
.tile .value { font-size: 32px; font-weight: 650; line-height: 1.3; letter-spacing: -0.02em; }
.panel { padding: 20px 22px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; font-size: 14px; color: var(--muted); }
th, td { padding: 11px 14px; vertical-align: top; border-bottom: 1px solid var(--line); }
tr:last-child > th, tr:last-child > td { border-bottom: 0; }
tr > :first-child { padding-left: 0; }
tr > :last-child { padding-right: 0; }
tbody th { color: var(--ink); font-size: 16px; }
.num { text-align: right; white-space: nowrap; }
.num small { display: block; font-weight: 400; }
.results tbody th small { display: block; font-weight: 400; min-width: 15em; }
.results tr.federated { font-weight: 650; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; background: var(--tone); }
.base { --tone: var(--base); } .start { --tone: var(--start); } .local { --tone: var(--local); } .federated { --tone: var(--federated); } .central { --tone: var(--central); } .central_serial { --tone: var(--central_serial); } .personal { --tone: var(--personal); } .local_best { --tone: var(--local); }
.track { position: relative; width: 190px; height: 24px; }
.track i { position: absolute; background: var(--tone); }
.track .fill { left: 0; top: 6px; height: 12px; opacity: 0.24; border-radius: 0 3px 3px 0; }
.track .range { top: 11px; height: 2px; min-width: 2px; }
.track .dot { width: 8px; height: 8px; top: 8px; margin-left: -4px; border-radius: 50%; }
.chart svg { display: block; width: 100%; height: auto; }
.chart svg * { stroke-linejoin: round; stroke-linecap: butt; }
.chart.narrow { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 0 0 14px; padding: 0; list-style: none; font-size: 14px; }
.bars { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px 44px; }
.client { break-inside: avoid; }
.client header { display: flex; justify-content: space-between; gap: 12px; font-size: 15px; margin-bottom: 3px; }
.client header span { color: var(--muted); white-space: nowrap; }
.bar { display: grid; grid-template-columns: minmax(0, 1fr) 3.4em; gap: 10px; align-items: center; font-size: 14px; line-height: 1.35; }
.bar i { display: block; height: 10px; min-width: 2px; border-radius: 0 4px 4px 0; background: var(--tone); }
.bar span { text-align: right; }
.heat { border-collapse: separate; border-spacing: 3px; width: auto; min-width: 100%; }
.heat th, .heat td { border: 0; padding: 7px 9px; font-size: 14px; }
.heat tbody th { font-weight: 500; white-space: nowrap; position: sticky; left: 0; background: var(--panel); padding-left: 0; }
.heat thead th { text-align: center; vertical-align: bottom; line-height: 1.25; }
.heat thead th:first-child { text-align: left; padding-left: 0; }
.heat td { text-align: center; border-radius: 5px; background: color-mix(in srgb, var(--federated) calc(var(--share) * var(--heat) * 100%), transparent); }
.heat.even { table-layout: fixed; width: 100%; }
.heat.mix th, .heat.mix td { padding: 7px 5px; font-size: 13px; }
.heat.mix tbody th { padding-left: 0; padding-right: 10px; }
.heat td.none { color: var(--muted); }
.heat td small, .heat th small { display: block; font-weight: 400; font-size: 12px; line-height: 1.3; }
.heat td.ahead { color: var(--muted); font-style: italic; }
.heat td.now { box-shadow: inset 0 0 0 2px var(--federated); }
.heat tr.joint > * { --federated: var(--central); }
.heat td.sum { background: none; text-align: right; color: var(--muted); }
.samples { display: grid; gap: 14px; }
.sample.panel { padding: 0; overflow: hidden; break-inside: avoid; display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); }
.sample > div { padding: 18px 22px; }
.sample .asked { border-right: 1px solid var(--line); }
.label { display: block; font-size: 13px; color: var(--muted); margin-bottom: 3px; }
.text { white-space: pre-wrap; font: 14px/1.5 var(--mono); margin: 0; max-height: 15em; overflow: auto; }
.text.empty { color: var(--muted); font-family: var(--font); }
.answer { margin-bottom: 12px; }
.answer:last-child { margin-bottom: 0; }
.mark { font-weight: 600; margin-left: 6px; white-space: nowrap; }
.mark.right { color: var(--central); } .mark.wrong { color: var(--wrong); }
.answer details { margin: 0; }
summary { cursor: pointer; font-weight: 600; }
.answers summary { font-size: 13px; font-weight: 400; color: var(--muted); margin-bottom: 8px; }
pre.config { overflow-x: auto; font: 13.5px/1.6 var(--mono); margin: 16px 0 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(225px, 1fr)); gap: 12px 28px; margin: 0; }
.facts div { min-width: 0; }
.facts dt { font-size: 13px; color: var(--muted); }
.facts dd { margin: 0; font-size: 15px; overflow-wrap: anywhere; }
@media (max-width: 720px) {
  main { padding: 28px 16px 48px; }
  section { margin-top: 40px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .tile { padding: 13px 14px; }
  .tile small { display: block; line-height: 1.4; margin-top: 1px; }
.tile .value { font-size: 25px; }
  .panel { padding: 15px 14px; }
  .track, .results .graph { display: none; }
  .results tbody th small { min-width: 8em; }
  .results small { font-size: 13px; }
  th, td { padding: 9px 7px; }
  .heat.even th, .heat.even td { padding: 7px 1px; font-size: 13px; white-space: normal; }
  .heat.even thead th { font-size: 12px; }
  .heat.even tbody th { overflow-wrap: anywhere; }
  .chart.wide { display: none; }
  .chart.narrow { display: block; }
  .bars { grid-template-columns: minmax(0, 1fr); gap: 14px; }
  .sample { grid-template-columns: minmax(0, 1fr); }
  .sample > div { padding: 14px; }
  .sample .asked { border-right: 0; border-bottom: 1px solid var(--line); }
}
@media print {
  @page { margin: 14mm; }
  body { background: none; }
  main { max-width: none; padding: 0; zoom: 0.66; } /* the wide layout on a narrow sheet */
  section { margin-top: 34px; }
  h2, .note { break-after: avoid; break-inside: avoid; }
  .tile, .panel, tr { break-inside: avoid; }
  .scroll { overflow: visible; }
  .text { max-height: none; }
  .chart.wide { display: block; }
  .chart.narrow { display: none; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""

PAGE: Final = (
    """{% macro finding(title, found, heads) %}
<section>
<h2>{{ title }}</h2>
<p class="note">{{ found.intro }} {{ found.verdict }}</p>
<div class="panel scroll">
<table>
<thead><tr>{% for head, is_number in heads %}<th scope="col"{% if is_number %} class="num"{% endif %}>{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in found.lines %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td{% if heads[loop.index][1] %} class="num"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{%- endmacro %}
{% macro one_answer(answer) %}
<div class="answer {{ answer.method }}"><span class="label"><span class="key"></span>{{ meaning[answer.method][0] }}{% if answer.right is not none %}<span class="mark {{ "right" if answer.right else "wrong" }}">{{ "✓ right" if answer.right else "✗ wrong" }}</span>{% endif %}</span><p class="text{{ "" if answer.text.strip() else " empty" }}">{{ answer.text if answer.text.strip() else "(no answer)" }}</p></div>
{% endmacro %}
"""
    + HEAD
    + """<title>{{ metrics.run or "Apiary run" }}: report</title>
<style>"""
    + STYLE
    + """</style>
</head>
<body>
<main>
<header>
<div class="brand"><b>Apiary</b>{% if metrics.run %} · {{ metrics.run }}{% endif %}{% if metrics.task %} · {{ metrics.task }}{% endif %}{% if metrics.seconds %} · {{ metrics.seconds | seconds }}{% endif %}</div>
<h1>{{ headline }}.</h1>
{% if second %}
<p class="lead">{{ second }}</p>
{% endif %}
{% if outline %}
<p class="note">Made by {{ outline }}.</p>
{% endif %}
{% if tiles %}
<dl class="tiles">
{% for name, value, remark in tiles %}
<div class="tile"><dt>{{ name }}</dt><dd><div class="value">{{ value }}</div><small>{{ remark }}</small></dd></div>
{% endfor %}
</dl>
{% endif %}
</header>

{% if rows %}
<section>
<h2>How well each way of training does</h2>
<p class="note">All rows are measured on the same {{ n | count if n else "" }} held-out examples, which no client trained on.</p>
<div class="panel scroll">
<table class="results">
<thead><tr><th scope="col">Training</th><th scope="col" class="num">Held-out loss</th><th class="graph" aria-hidden="true"></th>
{% if has_accuracy %}<th scope="col" class="num">Exactly right</th>{% endif %}
{% if has_steps %}<th scope="col" class="num">Steps</th>{% endif %}
{% if has_rows %}<th scope="col" class="num">Rows</th>{% endif %}
{% if has_tokens %}<th scope="col" class="num">Tokens trained</th>{% endif %}
</tr></thead>
<tbody>
{% for item in rows %}
{% set row = item.row %}
<tr class="{{ row.method }}"><th scope="row"><span class="key"></span>{{ meaning[row.method][0] }}<small class="note">{{ meaning[row.method][1] }}{{ "; without noise" if row.method in metrics.noiseless else "" }}{% for kind, reason in row.not_alike.items() if kind != "noise" %}; not alike: {{ reason }}{% endfor %}</small></th>
<td class="num">{{ row.loss | loss }}{% if row.ci95.loss %}<small>{{ row.ci95.loss[0] | loss }} to {{ row.ci95.loss[1] | loss }}</small>{% endif %}</td>
<td class="graph" aria-hidden="true">{% if item.place %}<div class="track"><i class="fill" style="width:{{ item.place[1] }}%"></i><i class="range" style="left:{{ item.place[0] }}%;width:{{ (item.place[2] - item.place[0]) | round(2) }}%"></i><i class="dot" style="left:{{ item.place[1] }}%"></i></div>{% endif %}</td>
{% if has_accuracy %}<td class="num">{{ row.accuracy | share }}{% if row.ci95.accuracy %}<small>{{ row.ci95.accuracy[0] | share }} to {{ row.ci95.accuracy[1] | share }}</small>{% endif %}</td>{% endif %}
{% if has_steps %}<td class="num">{{ row.steps | count }}</td>{% endif %}
{% if has_rows %}<td class="num">{{ row.rows | count }}</td>{% endif %}
{% if has_tokens %}<td class="num">{{ row.tokens | count }}</td>{% endif %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="note" style="margin-top:14px">
<b>Loss</b> says how much the right answer surprises the model, in nats per token (a token is a piece of a word; a nat is a unit of
surprise). Lower is better and 0 is certainty.{% if probability is not none %} {{ federated.loss | loss(2) }} nats mean that the federated model gives the right token a probability of {{ probability | share(0) }} (geometric mean).{% endif %}{% if has_accuracy %} <b>Exactly right</b> is the share of answers that match the reference in every character, white space aside.{% endif %}{% if has_rows %} <b>Steps</b>, <b>rows</b> (to draw from) and <b>tokens</b> of training alone are means over clients.{% endif %} The small numbers are 95% intervals over the held-out examples alone, of these models on these rows: they do not cover the luck of another seed, which apiary compare does for runs of several seeds.{% if not intervals %} Fewer than {{ fewest }} rows are too few for an interval of the loss.{% endif %}{% for line in paired %} {{ line }}{% endfor %}

</p>
</section>
{% endif %}

{% if loss_chart %}
<section>
<h2>Learning, round by round</h2>
<p class="note">Held-out loss of the shared model after each round (lower is better), with its 95% interval over these examples as a band. In a round, clients train on their own data and the server puts together what they learnt.{% if rows | length > 1 %} Horizontal lines: the other ways of training, at their end.{% endif %}</p>
<div class="panel">{{ loss_chart }}</div>
</section>
{% endif %}

{% if sites %}
<section>
<h2>At the sites</h2>
<p class="note">{% if federated and sites_said %}{{ sites_said | join(" ") }} {% endif %}{% if sites_chart %}The curves: the loss of the shared model on each site's own held-out rows after each round (lower is better); the thick line is all sites together, each response token counting once, those of a site up to three times the median site's, and a round is over the sites that told a loss in it. These rows stay at their sites, nobody trains on them, and they differ from site to site. The server gets one sum for each site and nothing of single rows, so there is no interval.{% endif %}</p>
<div class="panel">
{% if sites_chart %}{{ sites_chart }}{% endif %}
<div class="scroll">
<table>
<thead><tr>{% for name in sites.columns %}<th scope="col"{% if not loop.first %} class="num"{% endif %}>{{ name | capitalize }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in sites.rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td class="num">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% if sites.left_out %}<p class="note" style="margin:12px 0 0">{{ sites.left_out | count }} more sites are in metrics.json.</p>{% endif %}
</div>
</section>
{% endif %}

{% if clients %}
<section>
<h2>What each client gains</h2>
<p class="note">Loss on the client's own held-out examples, the kind of work it does itself: {{ own_said }}{% if everyone_said %} On the held-out examples of all clients: {{ everyone_said }}.{% endif %}</p>
<div class="panel">
{% if gain_chart %}
{{ gain_chart }}
<p class="note" style="margin:18px 0 10px">The {{ clients | length }} clients that gain least:</p>
{% endif %}
<ul class="legend"><li class="local"><span class="key"></span>Training alone</li><li class="federated"><span class="key"></span>Federated</li></ul>
<div class="bars">
{% for client in clients %}
<div class="client"><header><b>{{ client.name }}</b><span>{{ client.outcome }}</span></header>
{% for method, loss, width in client.bars %}
<div class="bar {{ method }}"><i style="width:{{ width | round(2) }}%"></i><span>{{ loss | loss }}</span></div>
{% endfor %}
</div>
{% endfor %}
</div>
</div>
</section>
{% endif %}

{% if own_models %}
<section>
<h2>Each client's own model</h2>
<p class="note">{{ own_models.said | join(" ") }}</p>
<div class="panel scroll">
<table class="results">
<thead><tr><th scope="col">Training</th><th scope="col" class="num">Loss on own rows</th><th scope="col" class="num">On everyone's rows</th><th scope="col" class="num">Steps</th></tr></thead>
<tbody>
{% for row in own_models.rows %}
<tr class="{{ row.method }}"><th scope="row"><span class="key"></span>{{ own_models.ways[row.method][0] }}<small class="note">{{ own_models.ways[row.method][1] }}</small></th>
<td class="num">{{ row.own | loss }}{% if row.own_ci95 %}<small>{{ row.own_ci95[0] | loss }} to {{ row.own_ci95[1] | loss }}</small>{% endif %}</td><td class="num">{{ row.mix | loss }}</td><td class="num">{{ row.steps | count }}</td></tr>
{% endfor %}
</tbody>
</table>
<p class="note" style="margin:12px 0 0">Means over clients; the small numbers are 95% intervals over clients. Steps are optimizer steps on a client's own rows, those in the federation included. Rows that chose are none of those that are reported.</p>
</div>
{% if own_models.chart %}
<div class="panel" style="margin-top:14px">
<ul class="legend"><li class="local"><span class="key"></span>Training alone, at its best</li><li class="federated"><span class="key"></span>Federated</li><li class="personal"><span class="key"></span>Own model</li></ul>
{{ own_models.chart }}
<p class="note" style="margin:12px 0 0">Each client's loss on its own held-out rows, with the 95% interval over these rows where there are {{ fewest }} at least.</p>
</div>
{% endif %}
<div class="panel scroll" style="margin-top:14px">
<table>
<thead><tr><th scope="col">Client</th><th scope="col">Kept</th><th scope="col">Against alone</th><th scope="col">Why</th></tr></thead>
<tbody>
{% for name, kept, outcome, why in own_models.clients %}
<tr><th scope="row" style="white-space:nowrap">{{ name }}</th><td>{{ kept }}</td><td>{{ outcome }}</td><td>{{ why }}</td></tr>
{% endfor %}
</tbody>
</table>
{% if own_models.left_out %}<p class="note" style="margin:12px 0 0">{{ own_models.left_out | count }} more clients are in metrics.json.</p>{% endif %}
</div>
{% if own_models.curves %}
<div class="panel" style="margin-top:14px">
{{ own_models.curves }}
<p class="note" style="margin:12px 0 0">Loss on the validation rows, mean over clients: training alone on its longest schedule{% if own_models.on_its_way %}, the federated model on its way, and tuning that goes on from it{% else %}, and tuning that begins with the federated model{% endif %}. These rows choose, so their losses lean to the good side.</p>
</div>
{% endif %}
</section>
{% endif %}

{% if skills %}
<section>
<h2>What it can do now</h2>
<p class="note">Share of held-out answers that are exactly right, by kind of task.</p>
<div class="panel scroll">
<table class="heat even">
<thead><tr><th scope="col">Task</th>{% for method in skills.methods %}<th scope="col">{{ meaning[method][0] }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, values in skills.rows %}
<tr><th scope="row">{{ name }}</th>{% for value in values %}<td{% if value is none %} class="none"{% endif %} style="--share:{{ (value or 0) | round(3) }}">{{ value | share(0) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endif %}

{% if stages %}
<section>
<h2>What it remembers, stage by stage</h2>
<p class="note">{{ stages.sentence }} {% if stages.is_accuracy %}Each cell is the share of a stage's held-out answers that are exactly right, with its loss below{% else %}Each cell is the loss on a stage's held-out examples (lower is better){% endif %}; framed: just trained, in italics: not yet trained.{% if stages.joint %} Training alone and all data pooled, here and in the rest of this report, see all stages at once in the same number of steps: they never have to remember.{% endif %}</p>
<div class="panel scroll">
<table class="heat mix">
<thead><tr><th scope="col">Model</th>{% for name, tasks in stages.columns %}<th scope="col">{{ name }}<small>{{ tasks }}</small></th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in stages.rows %}
<tr{% if name.startswith("All") %} class="joint"{% endif %}><th scope="row">{{ name }}</th>{% for cell in cells %}<td{% if cell.state %} class="{{ cell.state }}"{% endif %} style="--share:{{ cell.share | round(3) }}">{{ cell.text }}{% if cell.small %}<small>{{ cell.small }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
{% if stages.figures %}
<dl class="facts" style="margin-top:18px">
{% for name, value in stages.figures %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
<p class="note" style="margin:12px 0 0">Overall: the mean over all stages trained so far. Backward transfer: by how much they changed since each was trained; below 0 is harm. Forgetting: how far earlier stages fell from their best; above 0 is loss of knowledge.</p>
{% endif %}
</div>
</section>
{% endif %}

{% if promise %}
<section>
<h2>What is promised to each row</h2>
<p class="note">{{ privacy }}</p>
<div class="panel scroll">
<table>
<thead><tr><th scope="col">Client</th><th scope="col" class="num">Epsilon ({{ promise.accountant | upper }})</th>{% if promise.accountant != "rdp" %}<th scope="col" class="num">By Rényi</th>{% endif %}<th scope="col" class="num">Noise over clip</th><th scope="col" class="num">Chance of a row in a step</th><th scope="col" class="num">Steps</th></tr></thead>
<tbody>
{% for name, spent in promise.clients %}
<tr><th scope="row">{{ name }}</th><td class="num">{{ spent.epsilon | up }}</td>{% if promise.accountant != "rdp" %}<td class="num">{{ spent.epsilon_rdp | up }}</td>{% endif %}<td class="num">{{ "%.3f" | format(spent.noise_multiplier) }}</td><td class="num">{{ (spent.sample_rate) | share(1) }}</td><td class="num">{{ spent.steps | count }}</td></tr>
{% endfor %}
</tbody>
</table>
<p class="note" style="margin:12px 0 0">Budget: epsilon {{ promise.budget }} at delta {{ promise.delta }}; the gradient of each row is clipped to {{ promise.clip }}. Clients hold different rows, so the run's claim is that of its worst-off client. {% if not_alike %}{{ not_alike }} Their adapters are not protected, and the run's learning rate may suit them less than it suits noise.{% endif %}</p>
</div>
</section>
{% endif %}

{% if aggregation %}
<section>
<h2>How the updates were put together</h2>
{% if aggregation.sentences %}<p class="note">{{ aggregation.sentences | join(" ") }}{% if aggregation.chart %} The curve: by round, how far averaging the factors apart is from the mean of their products, as a share of the round's change of the weights; dashed, what would be left of it with the best factors of the adapter's rank.{% endif %}</p>{% endif %}

{% if aggregation.chart %}<div class="panel">{{ aggregation.chart }}</div>{% endif %}
{% if aggregation.cut_said %}<p class="note"{% if aggregation.chart %} style="margin-top:18px"{% endif %}>{{ aggregation.cut_said | join(" ") }}</p>{% endif %}

{% if aggregation.cut %}
<div class="panel scroll">
<table>
<thead><tr><th scope="col">Client</th><th scope="col" class="num">Rounds cut</th><th scope="col" class="num">Rounds taken part</th><th scope="col" class="num">Mean share</th>{% if aggregation.attacked %}<th scope="col">Attacker</th>{% endif %}<th scope="col">Why</th></tr></thead>
<tbody>
{% for row in aggregation.cut %}
<tr><th scope="row" style="white-space:nowrap">{{ row.client }}</th><td class="num">{{ row.times }}</td><td class="num">{{ row.part }}</td><td class="num">{{ row.share }}</td>{% if aggregation.attacked %}<td>{{ row.attacker }}</td>{% endif %}<td>{{ row.why }}</td></tr>
{% endfor %}
</tbody>
</table>
{% if aggregation.left_out %}<p class="note" style="margin:12px 0 0">{{ aggregation.left_out | count }} more clients are in metrics.json.</p>{% endif %}
</div>
{% endif %}
</section>
{% endif %}

{% if curation %}
<section>
<h2>What the clients left out</h2>
<p class="note">{{ curation.total[1] - curation.total[3] }} of {{ curation.total[1] | count }} training rows were dropped before training, at the clients themselves; only these counts left them.</p>
<div class="panel scroll">
<table>
<thead><tr><th scope="col">Client</th><th scope="col" class="num">Rows</th>{% for step in curation.steps %}<th scope="col" class="num">{{ step }}</th>{% endfor %}<th scope="col" class="num">Kept</th></tr></thead>
<tbody>
{% for name, rows, dropped, kept in curation.rows + [curation.total] %}
<tr><th scope="row">{{ name }}</th><td class="num">{{ rows | count }}</td>{% for count in dropped %}<td class="num">{{ count | count }}</td>{% endfor %}<td class="num">{{ kept | count }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endif %}

{% if mix %}
<section>
<h2>Who holds what</h2>
<p class="note">Training examples of each kind at each client; the darker, the larger the kind's share of that client's data.</p>
<div class="panel scroll">
<table class="heat mix">
<thead><tr><th scope="col">Client</th>{% for kind in mix.kinds %}<th scope="col">{{ kind }}</th>{% endfor %}<th scope="col">Total</th>{% if metrics.mixed %}<th scope="col">Rank</th>{% endif %}</tr></thead>
<tbody>
{% for client, cells in mix.rows %}
<tr><th scope="row">{{ client.client }}</th>{% for count, share in cells %}<td{% if not count %} class="none"{% endif %} style="--share:{{ share | round(3) }}">{{ count | count if count else "·" }}</td>{% endfor %}<td class="sum">{{ client.examples | count }}</td>{% if metrics.mixed %}<td class="sum">{{ client.rank | count }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
</table>
{% if mix.left_out %}<p class="note" style="margin:12px 0 0">{{ mix.left_out | count }} more clients are in metrics.json.</p>{% endif %}
</div>
</section>
{% endif %}

<section>
<h2>What left the clients</h2>
<p class="note">{% if sent[0] or sent[1] %}{{ sent[0] | bytes }} went from clients to the server and {{ sent[1] | bytes }} back, all rounds and evaluations together: {{ sent_what }}, never text. {% if saved %}{{ saved }} {% endif %}{% endif %}{% if not promise %}{{ privacy }}{% endif %} {{ unmeasured }}</p>
{% if cost_chart %}<div class="panel">{{ cost_chart }}</div>{% endif %}
</section>

{% if audit %}
{{ finding("What an update tells", audit, [("Attack", false), ("Found", true), ("By chance", true), ("Remark", false)]) }}
{% endif %}

{% if probe %}
{{ finding("Instructions planted in data", probe, [("The intruder", false), ("Model", false), ("Followed", true), ("Most often by", false), ("Right answers", false), ("Their loss rises by", true)]) }}
{% endif %}

{% if samples %}
<section>
<h2>Answers before and after</h2>
<p class="note">Held-out prompts, answered {% if federated and before %}by the untuned model and {% endif %}after federated training. They stand here word for word: where the data is private, so is this page (<code>evaluate.samples = 0</code> leaves them out).</p>
<div class="samples">
{% for item in samples %}
<article class="panel sample">
<div class="asked"><span class="label">Prompt{% if item.sample.skill %} · {{ item.sample.skill }}{% endif %}</span><p class="text">{{ item.sample.prompt }}</p></div>
<div class="answers">
<div class="answer"><span class="label">Reference</span><p class="text">{{ item.sample.reference }}</p></div>
{% for answer in item.shown %}{{ one_answer(answer) }}{% endfor %}
{% if item.folded %}<details><summary>Other ways of training</summary>{% for answer in item.folded %}{{ one_answer(answer) }}{% endfor %}</details>{% endif %}
</div>
</article>
{% endfor %}
</div>
</section>
{% endif %}

{% if logged %}
<section>
<h2>Refusals and warnings</h2>
{% if troubles.rows %}
<p class="note">Replies that the server did not use, and what else was noticed on the way.</p>
<div class="panel scroll">
<table>
<thead><tr><th scope="col">When</th><th scope="col">What</th><th scope="col">Client</th><th scope="col">Why</th></tr></thead>
<tbody>
{% for when, what, client, why in troubles.rows %}
<tr><td style="white-space:nowrap">{{ when }}</td><td>{{ what }}</td><td>{{ client }}</td><td>{{ why }}</td></tr>
{% endfor %}
</tbody>
</table>
{% if troubles.left_out %}<p class="note" style="margin:12px 0 0">{{ troubles.left_out | count }} more are in log.jsonl.</p>{% endif %}
</div>
{% else %}
<p class="note">None: every reply was used.</p>
{% endif %}
</section>
{% endif %}

<section>
<h2>How it was made</h2>
<p class="note">Enough to repeat the run.</p>
<div class="panel">
{% if facts %}
<dl class="facts">
{% for name, value in facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
{% if config %}
<details{% if facts %} style="margin-top:20px"{% endif %}><summary>Configuration</summary><pre class="config">{{ config }}</pre></details>
{% endif %}
</div>
</section>
</main>
</body>
</html>
"""
)
