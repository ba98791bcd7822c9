"""A heat map as a page: the texts in it are seen, and nothing of them is obeyed."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raymi.heatmap import heatmap

EVIL = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "</SCRIPT\t>",
    "<!--",
    "\u2028alert(1)\u2029",
    "]]>",
    "<img src=x onerror=alert(1)>",
    "\x1b[31m\u202e",
    "\\u003c/script>",
    "'\"`${alert(1)}",
]


class Page(HTMLParser):
    """The scripts of a page, and how often there is what nobody wrote."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.tags: list[str] = []
        self.comments = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data

    def handle_comment(self, data: str) -> None:
        self.comments += 1


def drawn(tokens: list[str], title: str) -> alt.Chart:
    n = len(tokens)
    frame = pl.DataFrame(
        {
            "layers": [[layer] for layer in range(2) for _ in range(n)],
            "heads": [None] * (2 * n),
            "queries": [[n - 1]] * (2 * n),
            "keys": [[key] for _ in range(2) for key in range(n)],
            "kl": [float(at) for at in range(2 * n)],
        }
    )
    return heatmap(frame, tokens, "kl", None, None, title)


def written(page: Page) -> str:
    """The chart as JSON, as it stands in its script."""
    [script] = [script for script in page.scripts if '"encoding"' in script]
    begins = script.index('{"config"')
    return script[begins : json.JSONDecoder().raw_decode(script, begins)[1]]


def labels(tokens: list[str]) -> list[str]:
    return [f"{at} {token}" for at, token in enumerate(tokens)]


def seen(text: str) -> str:
    """What stands on a screen."""
    return text.replace("\u2060", "")


OBEYED = re.compile("</|<!--|[\u2028\u2029\u202e\x1b]")
PLAIN = Page(drawn(["a", "b"], "plain").to_html())


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(EVIL) | st.text(st.characters(exclude_categories=["Cs"])), min_size=2), st.text())
@example(EVIL, "</script>")
def test_a_page_has_the_tags_of_a_plain_one_and_every_text(tokens: list[str], title: str) -> None:
    page = Page(drawn(tokens, title).to_html())
    assert (page.tags, page.comments) == (PLAIN.tags, 0)
    assert not OBEYED.search(written(page))
    shown = json.loads(written(page))["encoding"]["x"]["sort"]
    for label, token in zip(shown, labels(tokens), strict=True):
        if token.isprintable():
            assert seen(label) == seen(token)


@pytest.mark.parametrize("text", EVIL)
def test_every_way_out_of_altair(text: str, tmp_path: Path) -> None:
    chart = drawn([text, "b"], text)
    chart.save(tmp_path / "chart.html")
    beside = (chart | chart).to_html()
    for page in ((tmp_path / "chart.html").read_text("utf-8"), beside, chart.to_html(fullhtml=False)):
        assert not OBEYED.search(written(Page(page)))


def test_usual_tokens_are_as_they_were() -> None:
    assert drawn(["<s>", "a<b"], "a < b").to_dict()["encoding"]["x"]["sort"] == ["0 <s>", "1 a<b"]
