"""YAML that is small and means much: it is refused at once, and what is said of it is short."""

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raymi.errors import MOST_QUOTED, MOST_SAID, UserError, quoted
from raymi.job import load_job
from raymi.yamlfile import YamlFile


def bomb(levels: int, *, times: int = 10, leaf: str = "lol") -> str:
    """A billion laughs, each level a list of the one before."""
    lines = [f"a0: &a0 [{', '.join([leaf] * times)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * times)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


def merges(levels: int) -> str:
    """The same by merged keys, which are copied when values are made."""
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


JOB = "name: x\nmodels: '*'\nprompts: [{text: The}]\nexperiments: [{kind: knockout}]\n"
REFUSED = {
    "billion laughs": (bomb(9), "its aliases repeat"),
    "in a field": (bomb(9) + "models: *a8\n", "its aliases repeat"),
    "quadratic": (f"a: &a {'x' * 50_000}\nmodels: [{', '.join(['*a'] * 50_000)}]\n", "its aliases repeat"),
    "merged": (merges(9), "its aliases repeat"),
    "within itself": ("models: &m [*m]\n", "an alias of what it stands in itself"),
    "merged into itself": ("models: &m {<<: *m}\n", "an alias of what it stands in itself"),
    "deep lists": (f"models: {'[' * 5_000}{']' * 5_000}\n", "more than 100 lists or mappings within each other"),
    "very deep lists": (f"models: {'[' * 200_000}", "more than 100 lists or mappings"),
    "deep mappings": ("models: " + "{a: " * 5_000 + "}" * 5_000, "more than 100 lists or mappings"),
    "deep blocks": ("\n".join(" " * n + "a:" for n in range(500)), "more than 100 lists or mappings"),
    "deep by aliases": ("".join(f"a{n}: &a{n} [{f'*a{n - 1}' if n else 1}]\n" for n in range(500)), "more than 100"),
    "half a character": ('name: "\\ud83d"\n', "half of a surrogate pair"),
    "a number without end": (f"seed: 0x{'f' * 5_000}\n", "is too large a number"),
    "a long number": (f"seed: {'9' * 5_000}\n", "is no !!int"),
    "an empty number": ("seed: !!int ''\n", "'' is no !!int"),
    "a truth that is none": ("chat_template: !!bool x\n", "'x' is no !!bool"),
    "a time that is none": ("name: !!timestamp x\n", "'x' is no !!timestamp"),
    "a list for a key": ("? [a]\n: b\n", "a list or a mapping for a key"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_means_too_much_is_refused_at_once(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(REFUSED[text][0])
    since, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        load_job(path)
    assert REFUSED[text][1] in str(error.value)
    assert str(error.value).startswith(f"{path}:")
    assert len(str(error.value)) < MOST_SAID + 200
    assert time.monotonic() - since < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kB"


@pytest.mark.parametrize(
    "text",
    [
        bomb(5),  # just within what may be repeated
        bomb(5) + "models: *a4",
        bomb(5) + JOB.replace("'*'", "*a4"),
        bomb(5) + "experiments: *a4",
        bomb(5) + "prompts: *a4",
        bomb(5) + "dtype: *a4",
        bomb(5) + "device: *a4",
        bomb(5, leaf="{text: x}") + "prompts: *a4",
        JOB + "\n".join(f"field{n}: 1" for n in range(5_000)),
        JOB.replace("The", "The " * 300_000).replace("knockout", "knockout, queries: {text: Paris}"),
        JOB + f"{'k' * 1_000_000}: 1",
        JOB.replace("x", "x" * 1_000_000, 1),
    ],
    ids=str.__len__,
)
def test_what_is_wrong_is_not_quoted_at_length(text: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    since, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as error:
        load_job(path)
    assert len(str(error.value)) < MOST_SAID + 200
    assert time.monotonic() - since < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "kB"


def test_aliases_as_people_use_them(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "base: &base {kind: knockout, layers: &all {each: all}}\n"
        "more:\n  - {<<: *base, heads: *all}\n  - {<<: [*base, {kind: x}], name: b}\n"
    )
    layers = {"each": "all"}
    first = {"kind": "knockout", "layers": layers, "heads": layers}
    second = {"kind": "knockout", "layers": layers, "name": "b"}
    assert YamlFile(path).data()["more"] == [first, second]
    path.write_text(bomb(5))
    assert len(YamlFile(path).data()["a4"]) == 10


def test_fields_within_fields_are_set_so_deep_and_no_deeper(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    file = YamlFile(path)
    file.set(f"a{'.a' * 50}=1")
    assert file.data()["a"]
    with pytest.raises(UserError, match="within each other"):
        file.set(f"a{'.a' * 5_000}=1")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.lists(inner).map(tuple),
    max_leaves=30,
)


@given(VALUES)
def test_short_values_are_quoted_whole(value: Any) -> None:
    whole = repr(value)
    if len(whole) <= MOST_QUOTED:
        assert quoted(value) == whole
    else:
        assert len(quoted(value)) <= len(whole) + 40
        assert len(quoted(value)) < 2 * MOST_QUOTED + 50 or isinstance(value, str)


def test_values_that_are_endless_are_quoted_all_the_same() -> None:
    within: list[Any] = []
    within.append(within)
    many: list[Any] = []
    for _ in range(100):
        many = [many] * 10
    for value in (within, many, 10**10_000, "x" * 10**7, b"x" * 10**7, {"a": 10**10_000}):
        assert len(quoted(value)) < 2 * MOST_QUOTED


TEXT = st.text(st.characters(exclude_characters="\x85", exclude_categories=["Cs"]))  # PyYAML folds a line at NEL


@settings(deadline=None)
@given(st.recursive(TEXT | st.integers() | st.booleans(), lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)))
def test_what_yaml_writes_is_read_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(yaml.safe_dump({"value": value}, allow_unicode=True), encoding="utf-8")
    try:
        read = YamlFile(path).data()
    except UserError:
        assert "\\" in path.read_text(encoding="utf-8") or not -(2**63) <= _largest(value) < 2**63
    else:
        assert read == {"value": value}


def _largest(value: Any) -> int:
    if isinstance(value, dict):
        return max(map(_largest, value.values()), key=abs, default=0)
    if isinstance(value, list):
        return max(map(_largest, value), key=abs, default=0)
    return value if isinstance(value, int) else 0
