"""What is measured twice is limited to what there is."""

import pytest

from raymi.experiments.knockout.spec import KnockoutSpec, ablations
from raymi.plan.verification import drawn
from tests.test_plan import job, model, prompt

EVERY = {"layers": "all", "heads": {"each": "all"}}


@pytest.mark.parametrize("verify", [1, 5, 269, 270, 271, 100_000, 2**62])
def test_nothing_is_drawn_twice_and_no_more_than_there_is(verify: int) -> None:
    one = job({"layers": {"each": "all"}, "heads": {"each": "all"}}, verify=verify)
    texts = [prompt("a"), prompt("b", start=3)]
    [spec] = one.experiments
    assert isinstance(spec, KnockoutSpec)
    measured = {(p.prompt.id, a) for p in texts for a in ablations(spec, p, 30, 9)}
    found = [(p.prompt.id, a) for _, p, a in drawn(one, model(), texts)]
    assert len(found) == min(verify, len(measured))
    assert len(set(found)) == len(found)
    assert set(found) <= measured


def test_every_experiment_and_every_text_has_its_turn() -> None:
    one = job(EVERY | {"name": "many"}, {"layers": 3, "name": "one"}, verify=8)
    texts = [prompt(f"p{i}", start=i) for i in range(3)]
    found = drawn(one, model(), texts)
    of = [(spec.name, p.prompt.id) for spec, p, _ in found]
    assert [name for name, _ in of].count("one") == 3, "all that it has, on each text once"
    assert {text for name, text in of if name == "many"} == {"p0", "p1", "p2"}


def test_how_much_is_verified_is_no_part_of_a_run() -> None:
    assert job(EVERY, verify=5).run_name == job(EVERY, verify=100_000, strict=True).run_name
