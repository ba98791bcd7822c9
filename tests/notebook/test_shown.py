"""What a notebook shows: of texts that come from anywhere."""

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import polars as pl
import pytest
import torch

from raymi import Mask, Model
from raymi.notebook.html import block

TEXT = "The capital of France is"
HOSTILE = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "\x1b]0;mine\x07\x1b[2J",
    "\u202egnp.exe",
    "&lt;b&gt;",
    "\"'><svg onload=x>",
    "$\\href{javascript:x}{y}$",
]
ALLOWED = {"div", "table", "thead", "tbody", "tr", "th", "td", "small", "style"}


class Seen(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = set[str](), set[str](), ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Seen:
    seen = Seen(page)
    assert seen.tags <= ALLOWED
    assert seen.attributes <= {"class", "style", "border"}
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)
    assert page.startswith('<div class="tex2jax_ignore mathjax_ignore">'), "no token is a formula"
    return seen


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_html_holds_no_text_that_is_obeyed(text: str) -> None:
    seen = check(block(text, pl.DataFrame({"token": [text], "of": [[text]]})))
    if text.isprintable():
        assert text in seen.text, "and shows it as it is"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_results_show_hostile_tokens_harmlessly(tiny: Model, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def hostile(_: Any, ids: list[int]) -> dict[int, str]:
        return dict.fromkeys(ids, text)

    for where in ("results", "frames"):
        monkeypatch.setattr(f"raymi.notebook.{where}.token_texts", hostile)
    cut = Mask(0, None, ((4, 0),))
    model: Any = Model(dataclasses.replace(tiny.cached, id=text), tiny.tokenizer, tiny.loaded, tiny.dtype)
    read = dataclasses.replace(tiny.tokenize(TEXT), tokens=(text,) * 5)
    both = tiny.ablate(TEXT, cut)
    shown = [
        model,
        dataclasses.replace(tiny.clean(TEXT, capture="blocks.0.hook_resid_pre"), prompt=read),
        both,
        dataclasses.replace(tiny.sweep(TEXT, cut), prompt=read),
        dataclasses.replace(tiny.knockout(TEXT), prompt=read),
    ]
    for each in shown:
        check(each._repr_html_())
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", repr(each))


def test_html_says_what_the_text_says(tiny: Model) -> None:
    run = tiny.clean(TEXT, capture="blocks.0.hook_resid_pre")
    assert "['The', 'capital', 'of', 'France', 'is'] ->" in check(run._repr_html_()).text
    assert "blocks.0.hook_resid_pre [1, 5, 16]" in check(run._repr_html_()).text
    assert "logit" in check(run._repr_html_()).text
    cut = Mask(0, None, ((4, 0),))
    both = tiny.ablate(TEXT, cut)
    assert f"KL {both.kl:.6f} nats; 4 interventions fired" in check(both._repr_html_()).text
    assert "prob_ablated" in check(both._repr_html_()).text
    assert "ablations of ['The'" in check(tiny.sweep(TEXT, cut)._repr_html_()).text
    knocked = check(tiny.knockout(TEXT)._repr_html_()).text
    assert "knockouts of ['The'" in knocked
    assert "queries" in knocked
    assert "hidden size 16" in check(tiny._repr_html_()).text
    assert torch.equal(run.logits, tiny.clean(TEXT).logits), "and nothing else happens"
