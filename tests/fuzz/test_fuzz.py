"""What was found by `python -m tests.fuzz` stays mended, and the fuzzer finds what is planted."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import guard
from tests.fuzz.inputs import Input, parse
from tests.fuzz.planted import PLANTED
from tests.fuzz.targets import targets

CORPUS = Path(__file__).parent / "corpus"
ENOUGH = 1_500
"""Inputs in which a planted fault has to be found; a run has 100,000."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Libraries warn of what they are given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def run(input: Input) -> guard.Result:
    target = targets()[input.target]
    return guard.run(input, dict(target.bases()[input.base]), target.check)


@pytest.mark.parametrize("name", targets())
def test_valid_files_are_taken(name: str) -> None:
    for base in targets()[name].bases():
        result = run(Input(name, base, {}))
        assert result.accepted
        assert result.fault is None, result.fault.trace


@pytest.mark.parametrize("name", targets())
def test_nothing_of_the_corpus_does_harm(name: str) -> None:
    kept = [parse(line) for line in (CORPUS / f"{name}.jsonl").read_text().splitlines()]
    assert kept
    for input in kept:
        result = run(input)
        assert result.fault is None, f"{input.about}: {result.fault and result.fault.trace}"


def test_inputs_are_the_same_whenever_they_are_drawn_and_written_down() -> None:
    for target in targets().values():
        for number in range(20):
            input = target.draw(1, number)
            again = parse(target.draw(1, number).line)
            assert (again.base, again.changed) == (input.base, input.changed)


@pytest.mark.parametrize("name", ["job", "prompts", "model", "sae", "store"])
def test_most_inputs_get_past_parsing(name: str) -> None:
    drawn = [targets()[name].draw(0, number) for number in range(200)]
    assert sum(input.structured for input in drawn) > 100


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SECONDS", 0.5)
    planted = PLANTED[name]
    planted.plant(monkeypatch)
    target = targets()[planted.target]
    assert any(run(target.draw(0, number)).fault for number in range(ENOUGH))
