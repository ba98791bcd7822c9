"""What may be given to the methods of a model, in one piece or in several."""

from typing import Any

import pytest
import torch

from raymi import Mask, Model, Prompt, UserError
from tests.fakes import WORDS

TEXT = "The capital of France is"
TEXTS = [TEXT, "Lima is in Peru", "it was", "The capital of Spain is"]
SITE = "blocks.0.hook_resid_post"
CUT = Mask(0, None, ((1, 0),))


@pytest.mark.parametrize("as_given", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_clean_of_several_prompts_is_each_by_itself(tiny: Model, as_given: Any) -> None:
    found = tiny.clean(as_given(TEXTS), capture=SITE)
    assert [run.tokens for run in found] == [tuple(text.split()) for text in TEXTS]
    for text, run in zip(TEXTS, found, strict=True):
        alone = tiny.clean(text, capture=[SITE])
        assert torch.equal(run.logits, alone.logits)
        assert torch.equal(run.cache[SITE], alone.cache[SITE])
        assert run.cache[SITE].shape == (1, len(text.split()), 16)
    assert isinstance(tiny.clean([TEXT]), list)


def test_several_prompts_keep_their_names_and_answers(tiny: Model) -> None:
    found = tiny.tokenize([TEXT, Prompt("mine", TEXT, answer=" Paris")])
    assert [read.prompt.id for read in found] == ["0", "mine"]
    assert [read.answer_id for read in found] == [None, WORDS.index("Paris")]
    assert tiny.tokenize(TEXT).token_ids == found[0].token_ids


def test_one_site_may_stand_alone(tiny: Model) -> None:
    alone, listed = tiny.clean(TEXT, capture=SITE), tiny.clean(TEXT, capture=[SITE])
    assert list(alone.cache) == list(listed.cache) == [SITE]
    assert torch.equal(alone.cache[SITE], listed.cache[SITE])
    both = tiny.ablate(TEXT, CUT, capture=SITE)
    assert list(both.clean.cache) == list(both.ablated.cache) == [SITE]
    assert list(tiny.clean(TEXT, capture={SITE: True}).cache) == [SITE]  # pyright: ignore


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.clean([]), "there are no prompts"),
        (lambda m: m.clean(3), "a prompt is a text or a Prompt; found 3"),
        (lambda m: m.clean({"text": TEXT}), r"a prompt is a text or a Prompt; found \{'text'"),
        (lambda m: m.clean(TEXT.encode()), "a prompt is a text or a Prompt; found b'The"),
        (lambda m: m.clean(m.tokenize(TEXT)), "a prompt is a text or a Prompt; found TokenizedPrompt"),
        (lambda m: m.clean([TEXT, [1, 2]]), r"prompt 1: a prompt is a text or a Prompt; found \[1, 2\]"),
        (lambda m: m.clean([TEXT, "is " * 65]), "prompt '1': 65 tokens are more than its context of 64"),
        (lambda m: m.clean([TEXT, ""]), "prompt '1': '' has no tokens"),
        (lambda m: m.knockout([TEXT, TEXT]), "knockout takes one prompt, and was given 2 together\nCall it for each"),
        (lambda m: m.sweep([TEXT, TEXT, TEXT], CUT), "sweep takes one prompt, and was given 3 together"),
        (lambda m: m.ablate((TEXT,), CUT), "ablate takes one prompt, and was given 1 together"),
        (lambda m: m.knockout(None), "a prompt is a text or a Prompt; found None"),
        (lambda m: m.clean(TEXT, capture=3), "capture: a site is a name.*found 3"),
        (lambda m: m.ablate(TEXT, CUT, capture=[SITE, 3]), "capture: a site is a name.*found 3"),
        # Each of these was taken for something else.
        (lambda m: m.clean(TEXT, bos=False), "^bos: .*found False"),
        (lambda m: m.clean(TEXT, bos="allways"), "^bos: found 'allways'"),
        (lambda m: m.ablate(TEXT, CUT, bos=True), "^bos: .*found True"),
        (lambda m: m.clean(TEXT, chat_template="{{ messages }}"), "^chat_template: "),
        (lambda m: m.clean(TEXT, chat_template=True, bos="never"), "^bos: found 'never'; allowed: auto"),
        (lambda m: m.clean(TEXT).top(-1), "^k: found -1; allowed: 1 or more"),
        (lambda m: m.clean(TEXT).top(0), "^k: found 0; allowed: 1 or more"),
        (lambda m: m.ablate(TEXT, CUT).changed(-3), "^k: found -3; allowed: 1 or more"),
        (lambda m: m.ablate(TEXT, CUT).changed("3"), "^k: found '3'; allowed: 1 or more"),
    ],
)
def test_what_is_meant_otherwise_is_refused(tiny: Model, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(tiny)


def test_more_tokens_than_there_are_is_all_of_them(tiny: Model) -> None:
    assert tiny.clean(TEXT).top(1000).height == len(WORDS)
    assert tiny.ablate(TEXT, CUT).changed(1000).height == len(WORDS)


@pytest.mark.parametrize(
    ("axis", "one", "listed"),
    [
        ("layers", 1, [1]),
        ("layers", (0, 1), [0, 1]),
        ("layers", -1, [1]),
        ("heads", 2, [2]),
        ("heads", (2, 3), [2, 3]),
        ("queries", -1, ["last"]),
        ("keys", (0, 1), [0, 1]),
        ("keys", "first", [0]),
    ],
)
def test_an_axis_takes_one_or_several(tiny: Model, axis: str, one: Any, listed: Any) -> None:
    keys: dict[str, Any] = {"keys": 0} if axis == "queries" else {}
    alone, several = (tiny.knockout(TEXT, **keys, **{axis: given}).frame for given in (one, listed))
    what = ["layers", "heads", "queries", "keys", "kl"]
    assert alone.select(what).equals(several.select(what))
