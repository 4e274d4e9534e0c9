"""A report's page, read as a browser would."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from apiary.report import render
from apiary.report.data import parse_metrics

VOID = {"meta", "link", "img", "br", "hr", "input"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(metrics: dict[str, Any], events: list[dict[str, Any]] | None = None, config: str = "") -> str:
    return render(parse_metrics(metrics), events or [], config)


def table(**losses: float) -> dict[str, Any]:
    rows = [{"method": m, "loss": v, "ci95": {"loss": [v - 0.05, v + 0.05]}} for m, v in losses.items()]
    return {"schema": 1, "table": rows}
