import pytest

from raymi.answers import Answer, runs_on, warning, without_blank
from raymi.prompts import Prompt


@pytest.mark.parametrize(
    ("text", "answer", "glued"),
    [
        ("The mouse was eaten by the", "cat", True),
        ("The mouse was eaten by the", " cat", False),
        ("Two plus two is", "4", False),
        ("He said: ", "yes", False),
        ("Die Hauptstadt von Österreich heißt", "Wien", True),
        ("法国的首都是", "巴黎", False),
        ("prefix", "es", False),  # one word may well be completed
        ("The capital of France is", None, False),
    ],
)
def test_an_answer_that_runs_on(text: str, answer: str | None, glued: bool):
    assert runs_on(text, answer) is glued


def test_a_thousand_answers_make_one_line():
    prompts = [Prompt(f"p{i}", "The mouse was eaten by the", "cat") for i in range(1000)]
    said = without_blank(prompts)
    assert said is not None
    assert "\n" not in said
    assert "1,000 prompts" in said
    assert "and 997 more" in said
    assert len(said) < 400
    assert without_blank([Prompt("p", "The mouse was eaten by the", " cat")]) is None


def test_only_unlikely_answers_are_said():
    cat = Prompt("cat", "The mouse was eaten by the", "cat")
    dog = Prompt("dog", "The bone was eaten by the", " dog")
    assert warning([Answer(dog, 0, 0.4), Answer(dog, 4, 0.01)]) is None
    said = warning([Answer(cat, 812, 7e-5), Answer(dog, 0, 0.4)])
    assert said is not None
    assert "'cat'" in said
    assert "7.0e-05" in said
    assert "blank" in said
    assert "'dog'" not in said
    rare = warning([Answer(dog, 812, 7e-5)])
    assert rare is not None
    assert "blank" not in rare
