"""Charts of the report as inline SVG in the page's own colours (light, dark and print alike).

matplotlib draws with stand-in colours; each one is then replaced by `var(--name)`. Text stays text,
in the page's font. Every chart comes in a wide and a narrow drawing, and the page shows the one
that fits: shrinking one drawing to a phone would make its text unreadable.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from apiary.config import gauged
from apiary.core.formatting import bytes_text, loss_text, share_text
from apiary.report.data import (
    METHODS,
    OUTCOMES,
    Client,
    Gain,
    MethodName,
    Metrics,
    Outcome,
    OwnModel,
    OwnName,
    OwnRound,
    Round,
)

SHORT: dict[MethodName, str] = {
    "base": "Untuned",
    "start": "Start",
    "local": "Alone",
    "federated": "Federated",
    "central": "Pooled",
    "central_serial": "Serial",
}
_NAMES = (
    "ink",
    "muted",
    "line",
    "base",
    "start",
    "local",
    "federated",
    "central",
    "central_serial",
    "up",
    "down",
    "personal",
)
_STAND_IN = {name: f"#0a0b{0x10 + i:02x}" for i, name in enumerate(_NAMES)}
_DASHES: dict[MethodName, Any] = {
    "base": (0, (1, 2)),
    "start": (0, (3, 1, 1, 1)),
    "local": (0, (5, 3)),
    "central": (0, (6, 2, 1, 2)),
    "central_serial": (0, (3, 2)),
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 13,
    "xtick.major.pad": 9,
    "ytick.major.pad": 9,
    "axes.labelpad": 8,
    "text.color": _STAND_IN["ink"],
    "axes.labelcolor": _STAND_IN["muted"],
    "axes.edgecolor": _STAND_IN["line"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _STAND_IN["line"],
    "xtick.color": _STAND_IN["muted"],
    "ytick.color": _STAND_IN["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
}
_CURVES, _LABELS, _LONGEST_NAME = 40, 8, 13  # sites drawn, sites named, letters of a name
Draw = Callable[[Figure, bool], None]  # (figure, narrow)


def loss_chart(metrics: Metrics) -> Markup | None:
    """Held-out loss by round with its 95% band, other methods as lines; None without a round."""
    points = [r for r in metrics.rounds if r.loss is not None]
    if not points:
        return None
    label = f"Held-out loss by round, from {loss_text(points[0].loss)} to {loss_text(points[-1].loss)}"
    return _chart(lambda figure, narrow: _draw_loss(figure, narrow, metrics, points), 360, 320, label)


def _line_axes(figure: Figure) -> Axes:
    """Axes with room for names at their right."""
    width = figure.get_figwidth() * 72
    room = 112 / width
    bottom = 52 / (figure.get_figheight() * 72)
    return figure.add_axes((44 / width, bottom, 1 - 44 / width - room, 0.98 - bottom))


def _draw_loss(figure: Figure, narrow: bool, metrics: Metrics, points: Sequence[Round]) -> None:
    axes = _line_axes(figure)
    x, y = [r.round for r in points], [r.loss or 0.0 for r in points]
    _band(axes, points)
    marks = "o" if len(points) <= (12 if narrow else 40) else ""
    axes.plot(x, y, color=_STAND_IN["federated"], lw=2.4, marker=marks, ms=5, zorder=5, clip_on=False)
    ends: list[tuple[MethodName, float]] = [("federated", y[-1])]
    for method in METHODS:
        row = metrics.row(method)
        if method != "federated" and row is not None and row.loss is not None:
            axes.axhline(row.loss, color=_STAND_IN[method], lw=1.8, ls=_DASHES[method])
            ends.append((method, row.loss))
    pad = 0.5 if len(set(x)) == 1 else 0.0
    axes.set_xlim(min(x) - pad, max(x) + pad)
    low, high = _limits([*y, *(value for _, value in ends), *_edges(points)])
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if narrow else 12))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("round")
    labels = [(f"{SHORT[method]} {loss_text(loss, 2)}", loss, method, method == "federated") for method, loss in ends]
    _end_labels(axes, labels, gap=(high - low) * 0.075)


def gauge_chart(
    rounds: Sequence[Round], threshold: float | None = None, left: str = gauged.KEEPS_RANK
) -> Markup | None:
    """What averaging A and B apart misses by round, with its 95% band, and what the best of the rank would miss.

    Args:
        rounds: those with a gauge.
        threshold: from where on the run averages products; drawn as a line.
        left: the name of what the best factors of the adapter's rank would leave.
    """
    points = [r for r in rounds if r.gauge is not None and r.gauge.relative is not None]
    if not points:
        return None
    first, last = (share_text(_missed(r)) for r in (points[0], points[-1]))
    label = f"Share of the change that averaging A and B apart misses by round, from {first} to {last}"
    return _chart(lambda figure, narrow: _draw_gauge(figure, narrow, points, threshold, left), 260, 260, label)


def _missed(measured: Round) -> float:
    return (measured.gauge.relative or 0.0) if measured.gauge else 0.0


def _left(measured: Round) -> float:
    """What the best factors of the adapter's rank would leave of it."""
    return _missed(measured) - ((measured.gauge.in_rank or 0.0) if measured.gauge else 0.0)


def _draw_gauge(figure: Figure, narrow: bool, points: Sequence[Round], threshold: float | None, name: str) -> None:
    axes = _line_axes(figure)
    x, y, left = [r.round for r in points], [_missed(r) for r in points], [_left(r) for r in points]
    errors = [1.96 * ((r.gauge.stderr or 0.0) if r.gauge else 0.0) for r in points]
    low, high = ([max(0.0, v + sign * e) for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=_STAND_IN["federated"], alpha=0.18, lw=0)
    axes.plot(x, left, color=_STAND_IN["muted"], lw=1.8, ls=_DASHES["local"])
    marks = "o" if len(points) <= (12 if narrow else 40) else ""
    axes.plot(x, y, color=_STAND_IN["federated"], lw=2.4, marker=marks, ms=5, zorder=5, clip_on=False)
    ends = [
        (f"Apart {share_text(y[-1])}", y[-1], "federated", True),
        (f"{name} {share_text(left[-1])}", left[-1], "muted", False),
    ]
    if threshold is not None:
        axes.axhline(threshold, color=_STAND_IN["local"], lw=1.8, ls=_DASHES["base"])
        ends.append((f"Switch {share_text(threshold, 0)}", threshold, "local", False))
    top = max(*high, *(height for _, height, _, _ in ends)) * 1.08 or 1.0
    pad = 0.5 if len(set(x)) == 1 else 0.0
    axes.set_xlim(min(x) - pad, max(x) + pad)
    axes.set_ylim(0, top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if narrow else 12))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axes.set_xlabel("round")
    _end_labels(axes, ends, gap=top * 0.11)


def sites_chart(rounds: Sequence[OwnRound]) -> Markup | None:
    """Loss on the sites' own held-out rows by round, all together and site by site; None without two rounds."""
    points = [measured for measured in rounds if measured.loss is not None]
    if len(points) < 2:
        return None
    label = f"Loss on the sites' own held-out rows by round, from {_first_and_last(points)}"
    return _chart(lambda figure, narrow: _draw_sites(figure, narrow, points), 320, 300, label)


def _first_and_last(points: Sequence[OwnRound]) -> str:
    return f"{loss_text(points[0].loss)} to {loss_text(points[-1].loss)}"


def _draw_sites(figure: Figure, narrow: bool, points: Sequence[OwnRound]) -> None:
    names = sorted({name for measured in points for name in measured.sites})
    curves = {
        name: [(measured.round, loss) for measured in points if (loss := measured.sites.get(name)) is not None]
        for name in names[:_CURVES]
    }
    together = [(measured.round, measured.loss or 0.0) for measured in points]
    axes = _line_axes(figure)
    for curve in curves.values():
        axes.plot(*zip(*curve, strict=True), color=_STAND_IN["muted"], lw=1.2, alpha=0.8)
    axes.plot(*zip(*together, strict=True), color=_STAND_IN["federated"], lw=2.4, marker="o", ms=5, clip_on=False)
    axes.set_xlim(together[0][0], together[-1][0])
    low, high = _limits([loss for curve in (together, *curves.values()) for _, loss in curve])
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if narrow else 12))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("round")
    ends = [(f"All {loss_text(together[-1][1], 2)}", together[-1][1], "federated", True)]
    if len(curves) <= _LABELS:
        ends += [(_short(name), curve[-1][1], "muted", False) for name, curve in curves.items() if curve]
    _end_labels(axes, ends, gap=(high - low) * 0.085)


class Curve(NamedTuple):
    """The losses of one setting."""

    name: str  # "" where it gets none
    color: str  # of the page
    points: Sequence[Sequence[float]]  # (round, loss)


def settings_chart(curves: Sequence[Curve]) -> Markup:
    """Loss by round of several settings, the later ones on top."""
    ends = ", ".join(f"{curve.name} {loss_text(curve.points[-1][1])}" for curve in curves if curve.name)
    return _chart(
        lambda figure, narrow: _draw_settings(figure, narrow, curves), 360, 320, f"Loss by round, last: {ends}"
    )


def _draw_settings(figure: Figure, narrow: bool, curves: Sequence[Curve]) -> None:
    axes = _line_axes(figure)
    for curve in curves:
        apart = curve.color != "muted"
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, color=_STAND_IN[curve.color], lw=2.4 if apart else 1.2, alpha=1 if apart else 0.8)
    rounds = [point[0] for curve in curves for point in curve.points]
    axes.set_xlim(min(rounds), max(rounds))
    low, high = _limits([point[1] for curve in curves for point in curve.points])
    axes.set_ylim(low, high)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if narrow else 12))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("round")
    labels = [
        (
            f"{_short(curve.name)} {loss_text(curve.points[-1][1], 2)}",
            curve.points[-1][1],
            curve.color,
            curve.color == "federated",
        )
        for curve in curves
        if curve.name
    ]
    _end_labels(axes, labels, gap=(high - low) * 0.075)


def _short(name: str) -> str:
    """A name that fits beside a chart; matplotlib takes dollars for mathematics."""
    name = " ".join(name.split())
    text = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return text.replace("$", r"\$")


def _edges(points: Sequence[Round]) -> list[float]:
    return [edge for r in points if r.ci95 for edge in r.ci95]


def _band(axes: Axes, points: Sequence[Round]) -> None:
    banded = [(r.round, r.ci95) for r in points if r.ci95 is not None]
    if len(banded) > 1:
        x = [at for at, _ in banded]
        low, high = [edge[0] for _, edge in banded], [edge[1] for _, edge in banded]
        axes.fill_between(x, low, high, color=_STAND_IN["federated"], alpha=0.18, lw=0)
    elif banded:
        at, (low_edge, high_edge) = banded[0]
        axes.vlines(at, low_edge, high_edge, color=_STAND_IN["federated"], lw=2, alpha=0.5)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """From zero where that costs little room, else tight around the values."""
    low, high = min(values), max(values)
    room = (high - low or high or 1.0) * 0.06
    return (0.0 if 0 <= low < 0.4 * high else low - room), high + room


def _end_labels(axes: Axes, ends: Sequence[tuple[str, float, str, bool]], gap: float) -> None:
    """Names each line (text, height, colour, bold) at its right end, pushed apart where they would overlap."""
    ordered = sorted(ends, key=lambda end: end[1])
    heights = spread([value for _, value, _, _ in ordered], gap, *axes.get_ylim())
    for (text, _, color, bold), height in zip(ordered, heights, strict=True):
        axes.annotate(
            text,
            xy=(1, height),
            xycoords=("axes fraction", "data"),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            color=_STAND_IN[color],
            fontweight="bold" if bold else "normal",
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending heights, moved to stand at least `gap` apart within [low, high] if they fit."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    ceiling = high
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    shift = max(0.0, low - placed[0]) if placed else 0.0
    return [height + shift for height in placed]


def cost_chart(metrics: Metrics) -> Markup | None:
    """Bytes up and down and seconds of each round, as two panels; None where none was measured."""
    rounds = [r for r in metrics.rounds if r.bytes_up or r.down or r.seconds]
    if not rounds:
        return None
    return _chart(
        lambda figure, narrow: _draw_cost(figure, narrow, rounds),
        260,
        460,
        "Bytes and seconds by round",
    )


def _draw_cost(figure: Figure, narrow: bool, rounds: Sequence[Round]) -> None:
    width = figure.get_figwidth() * 72
    left = 62 / width
    if narrow:
        boxes = [(left, 0.62, 0.99 - left, 0.31), (left, 0.115, 0.99 - left, 0.31)]
    else:
        boxes = [(left, 0.2, 0.485 - left, 0.68), (0.515 + left, 0.2, 0.485 - left, 0.68)]
    x = [r.round for r in rounds]
    sent, took = (figure.add_axes(box) for box in boxes)
    _bars(sent, [i - 0.21 for i in x], [r.bytes_up or 0 for r in rounds], "up", 0.38)
    _bars(sent, [i + 0.21 for i in x], [r.down for r in rounds], "down", 0.38)
    sent.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_bytes(value)))
    _title(sent, [("to the server", "up"), ("to the clients", "down")])
    _bars(took, x, [r.seconds or 0.0 for r in rounds], "up", 0.7)
    took.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} s"))
    _title(took, [("seconds per round", "up")])
    for axes in (sent, took):
        side = max(0.7, (6 - (max(x) - min(x))) / 2)  # a single round is a bar, not a wall
        axes.set_xlim(min(x) - side, max(x) + side)
        axes.set_xticks(_ticks([i for i in x if i] or x, 5 if narrow else 10))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.set_xlabel("round")


def _short_bytes(value: float) -> str:
    return re.sub(r"\.0+ ", " ", bytes_text(value)) if value else "0"


def _ticks(x: Sequence[int], most: int) -> list[int]:
    """The rounds that get a tick: every one, or evenly spaced ones where they are many."""
    step = -(-len(x) // most)
    return list(x[step - 1 :: step])


def _bars(axes: Axes, x: Sequence[float], heights: Sequence[float], color: str, width: float) -> None:
    axes.bar(x, heights, width=width, color=_STAND_IN[color], lw=0)


def _title(axes: Axes, parts: Sequence[tuple[str, str]]) -> None:
    """A legend in words above the axes, each with a block of its colour."""
    at = 0.0
    for text, color in parts:
        axes.annotate(
            "■",
            (at, 1),
            xycoords="axes fraction",
            xytext=(0, 12),
            textcoords="offset points",
            color=_STAND_IN[color],
        )
        axes.annotate(text, (at, 1), xycoords="axes fraction", xytext=(15, 12), textcoords="offset points")
        at += 0.42


def gain_chart(gain: Gain) -> Markup:
    """The gain of every client in ascending order: for cohorts too large to name each one."""
    gains = [(value, gain.outcome(client)) for client, value in gain.gains.items()]
    label = f"Gain by joining: {', '.join(f'{outcome} {gain.count(outcome)}' for outcome in OUTCOMES)}"
    return _chart(lambda figure, narrow: _draw_gain(figure, narrow, sorted(gains)), 260, 260, label)


def _draw_gain(figure: Figure, narrow: bool, gains: Sequence[tuple[float, Outcome]]) -> None:
    width = figure.get_figwidth() * 72
    axes = figure.add_axes((52 / width, 0.2, 1 - 66 / width, 0.78))
    edges = [i + 0.5 for i in range(len(gains) + 1)]
    for outcome, color in zip(OUTCOMES, ("federated", "local", "muted"), strict=True):
        bars = [value if own == outcome else 0.0 for value, own in gains]
        axes.stairs(bars, edges, fill=True, color=_STAND_IN[color], lw=0)
    axes.axhline(0, color=_STAND_IN["muted"], lw=1)
    axes.set_xlim(0.5, len(gains) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4 if narrow else 10))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("clients, from least to most gain (nats per token); gray: cannot tell")


_OWN: dict[OwnName, str] = {"local_best": "local", "federated": "federated", "personal": "personal"}  # their colours


def own_chart(clients: Sequence[Client]) -> Markup | None:
    """By client the loss on its own rows alone at its best, federated and with its own model, with 95% intervals."""
    shown = [client for client in clients if client.personal is not None and client.personal.own]
    if not shown:
        return None
    label = f"Loss on own held-out rows of {len(shown)} clients: training alone at its best, federated, own model"
    height = 60 + 46 * len(shown)
    return _chart(lambda figure, narrow: _draw_own(figure, narrow, shown), height, height, label)


def _draw_own(figure: Figure, narrow: bool, clients: Sequence[Client]) -> None:
    width, height = figure.get_figwidth() * 72, figure.get_figheight() * 72
    left = 104 / width
    axes = figure.add_axes((left, 50 / height, 0.98 - left, 1 - 58 / height))
    for place, client in enumerate(clients):
        found = client.personal
        for offset, (name, color) in zip((-0.24, 0.0, 0.24), _OWN.items(), strict=True):
            loss, ends = (found.own.get(name), found.own_ci95.get(name)) if found else (None, None)
            if loss is None:
                continue
            if ends is not None:
                axes.hlines(place + offset, *ends, color=_STAND_IN[color], lw=2, alpha=0.55)
            axes.plot([loss], [place + offset], color=_STAND_IN[color], marker="o", ms=7, zorder=5)
    axes.set_yticks(range(len(clients)), [_short(client.client) for client in clients])
    axes.set_ylim(len(clients) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4 if narrow else 8))
    axes.set_xlabel("loss on own rows, nats per token")


_OWN_CURVES: Mapping[str, str] = {"alone": "local", "federated": "federated", "tuned": "personal"}  # with their colours


def mean_curves(models: Sequence[OwnModel]) -> dict[str, list[tuple[int, float]]]:
    """Validation loss over optimizer steps, by contender: means over clients that were looked at after the same steps.

    Without those that would be a point, or that differ in the steps.
    """
    found = {name: _mean_curve([model.curves.get(name, ()) for model in models]) for name in _OWN_CURVES}
    return {name: curve for name, curve in found.items() if len(curve) > 1}


def own_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Markup | None:
    """The curves of `mean_curves`; None where there are none."""
    if not curves:
        return None
    ends = ", ".join(f"{name} {loss_text(curve[-1][1])}" for name, curve in curves.items())
    label = f"Validation loss over optimizer steps: {ends}"
    return _chart(lambda figure, narrow: _draw_curves(figure, narrow, curves), 300, 280, label)


def _mean_curve(curves: Sequence[Sequence[tuple[int, float | None]]]) -> list[tuple[int, float]]:
    """The mean over clients; empty where they were not looked at after the same steps, or one gives no number."""
    if not curves or len({tuple(steps for steps, _ in curve) for curve in curves}) > 1:
        return []
    losses = [[loss for _, loss in curve] for curve in curves]
    if any(loss is None for row in losses for loss in row):
        return []
    means = [sum(loss or 0.0 for loss in column) / len(column) for column in zip(*losses, strict=True)]
    return [(steps, mean) for (steps, _), mean in zip(curves[0], means, strict=True)]


def _draw_curves(figure: Figure, narrow: bool, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    axes = _line_axes(figure)
    for name, curve in curves.items():
        axes.plot(
            *zip(*curve, strict=True), color=_STAND_IN[_OWN_CURVES[name]], lw=2.4, marker="o", ms=5, clip_on=False
        )
    if "tuned" in curves:  # it begins with the federated model
        axes.plot(*curves["tuned"][0], color=_STAND_IN["federated"], marker="o", ms=9, zorder=6, clip_on=False)
    values = [loss for curve in curves.values() for _, loss in curve]
    low, high = _limits(values)
    axes.set_ylim(low, high)
    axes.set_xlim(0, max(curve[-1][0] for curve in curves.values()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5 if narrow else 10))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("optimizer steps on the client's rows")
    ends = [
        (f"{name.capitalize()} {loss_text(curve[-1][1], 2)}", curve[-1][1], _OWN_CURVES[name], name == "tuned")
        for name, curve in curves.items()
    ]
    _end_labels(axes, ends, gap=(high - low) * 0.085)


def _chart(draw: Draw, wide_height: int, narrow_height: int, label: str) -> Markup:
    wide = _svg(draw, (1000, wide_height), False, label)
    narrow = _svg(draw, (380, narrow_height), True, label)
    return Markup(f'<div class="chart wide">{wide}</div><div class="chart narrow">{narrow}</div>')


def _svg(draw: Draw, size: tuple[int, int], narrow: bool, label: str) -> str:
    """One drawing; `size` in CSS pixels. The same numbers give the same text, byte for byte."""
    salt = hashlib.sha256(f"{label} {size}".encode()).hexdigest()[:8]  # unique ids: one page holds several drawings
    out = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72)
        draw(figure, narrow)
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    body = out.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", body)
    for name, color in _STAND_IN.items():
        body = body.replace(color, f"var(--{name})")
    head = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{html.escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, body, count=1)
