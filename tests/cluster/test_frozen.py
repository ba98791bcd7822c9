"""Prompts as a run first saw them, in manifests that were damaged and in such as were not."""

import json
from typing import Any

import pytest

from raymi.cluster.frozen import freeze_prompts
from raymi.errors import UserError
from raymi.job import Job, make_job
from raymi.prompts import Prompt
from raymi.store.manifest import Driver, Issue, Manifest, NoManifest, parse


def job(**texts: str) -> Job:
    prompts = [{"id": name, "text": text} for name, text in texts.items()]
    return make_job({"name": "j", "prompts": prompts, "experiments": [{"kind": "knockout", "layers": "all"}]})


def manifest(*jobs: Job) -> Manifest:
    """Of a run on which these were issued."""
    found = Manifest(run="r", epoch=1, driver=Driver(heartbeat=1))
    for each in jobs:
        found.follow(Issue(written="", resolved=each.model_dump(mode="json")), {})
        freeze_prompts(each, found, {})
    return found


def test_what_was_measured_is_settled_and_the_rest_may_be_mended() -> None:
    first, second = job(a="one", b="two ", c="three"), job(a="one", b="two", c="three")
    found = manifest(first)
    assert found.generations == [["a", "b", "c"]]
    found.follow(Issue(written="", resolved=second.model_dump(mode="json")), {})
    settled = {name: Prompt(name, text) for name, text in (("a", "one"), ("c", "three"))}
    assert freeze_prompts(second, found, settled) == ()
    assert found.generations == [["a", "c"], ["b"]], "it would change the units of those that it came with"
    with pytest.raises(UserError, match="'b' is not what it was"):
        freeze_prompts(first, found, settled | {"b": Prompt("b", "two")})


def test_former_prompts_are_what_was_measured_of_them() -> None:
    found = manifest(job(a="one", b="two "), job(a="one", b="two"), job(a="one"))
    assert freeze_prompts(job(a="one"), found, {"b": Prompt("b", "two")}) == (Prompt("b", "two"),)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"generations": [["a", "nobody's"]]}, "no job of the run has the prompt"),
        ({"jobs": [{"written": "", "resolved": {}}]}, "the prompts of the job issued at .* are none"),
        ({"jobs": [{"written": "", "resolved": {"prompts": [{"id": "a"}]}}]}, "are none"),
    ],
)
def test_a_damaged_manifest_is_named(damage: dict[str, Any], says: str) -> None:
    found = manifest(job(a="one"))
    damaged = Manifest.model_validate(found.model_dump(mode="json") | damage)
    with pytest.raises(UserError, match=f"the manifest of the run r is damaged: .*{says}"):
        freeze_prompts(job(a="one"), damaged, {})


@pytest.mark.parametrize(
    "resolved", [{"prompts": 5}, {"prompts": [5]}, {"prompts": [{"id": 5}]}, {"experiments": [{}]}]
)
def test_jobs_that_are_none_make_no_manifest(resolved: dict[str, Any]) -> None:
    text = manifest(job(a="one")).model_copy(update={"jobs": []}).model_dump(mode="json")
    with pytest.raises(NoManifest, match=r"jobs\.0\.resolved"):
        parse(json.dumps(text | {"jobs": [{"written": "", "resolved": resolved}]}).encode(), "m.json")
