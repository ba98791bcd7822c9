"""`types.tsv`: one line a type, as it was last recorded; what is worse than that, and what is better."""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TABLE = Path(__file__).with_name("types.tsv")
OUTCOMES = ("cone", "layers", "full", "refused", "crash", "not built")
"""From the best to the worst."""
COLUMNS = ("type", "outcome", "exact", "seen", "wrong", "unchecked", "why")
SEE = "see "
"""What the name of a captured site begins with."""


@dataclass
class Line:
    """What is known of a type."""

    type: str
    outcome: str
    """One of `OUTCOMES`: how its ablations are measured, or why they are not."""
    exact: set[str] = field(default_factory=set)
    """Compared, visible and equal: `knockouts`, `fired`, `empty`, edited sites, and captured ones (`see ...`).

    A site that is not at every layer that could have it says at how many of them it is: `hook_attn_out(2/4)`.
    """
    wrong: dict[str, str] = field(default_factory=dict)
    """Compared and not equal, with how far it is off, as a share of the scale, or what was raised."""
    unchecked: dict[str, str] = field(default_factory=dict)
    """What raymi offers and nothing here can tell, with the reason."""
    why: str = ""
    """Why it is not `cone`, in raymi's or transformers' words; never compared."""

    @property
    def runs(self) -> bool:
        return self.outcome in ("cone", "layers", "full")


def read(path: Path = TABLE) -> dict[str, Line]:
    """By type; empty where there is no such file."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return {row["type"]: _line(row) for row in rows}


def write(lines: Iterable[Line], head: Iterable[str], path: Path = TABLE) -> None:
    """In the order of the types; `head` goes before them as comments."""
    rows = ["\t".join(COLUMNS), *("\t".join(_row(line)) for line in sorted(lines, key=lambda line: line.type))]
    path.write_text("".join(f"{line}\n" for line in [*(f"# {line}" for line in head), *rows]))


def _line(row: Mapping[str, str]) -> Line:
    exact = {*row["exact"].split(), *(SEE + name for name in row["seen"].split())}
    return Line(row["type"], row["outcome"], exact, _pairs(row["wrong"]), _pairs(row["unchecked"]), row["why"])


def _row(line: Line) -> list[str]:
    exact = sorted(item for item in line.exact if not item.startswith(SEE))
    seen = sorted(item.removeprefix(SEE) for item in line.exact if item.startswith(SEE))
    pairs = ("; ".join(f"{item}: {said}" for item, said in sorted(of.items())) for of in (line.wrong, line.unchecked))
    cells = [line.type, line.outcome, " ".join(exact), " ".join(seen), *pairs, line.why]
    return [" ".join(cell.split()) for cell in cells]


def _pairs(text: str) -> dict[str, str]:
    return dict(part.split(": ", 1) for part in text.split("; ")) if text else {}


# -- what changed ------------------------------------------------------------------------------------------------------


def changes(old: Line, new: Line) -> tuple[list[str], list[str]]:
    """What became worse, and what became better."""
    worse, better = list[str](), list[str]()
    if old.outcome != new.outcome:
        fell = OUTCOMES.index(new.outcome) > OUTCOMES.index(old.outcome)
        (worse if fell else better).append(f"{old.outcome} -> {new.outcome}" + (f" ({new.why})" if new.why else ""))
    before, after = _shares(old.exact), _shares(new.exact)
    for item in sorted(before.keys() | after.keys()):
        was, now = before.get(item, 0.0), after.get(item, 0.0)
        if now < was and item not in _bare(new.wrong):
            reason = {_name(key): said for key, said in new.unchecked.items()}.get(item, "not offered")
            worse.append(f"{item} was exact, and is {reason if now == 0 else 'so at fewer layers'}")
        elif now > was:
            better.append(f"{item} is exact" if was == 0 else f"{item} is exact at more layers")
    wrong, known = _bare(new.wrong), _bare(old.wrong)
    worse += [f"{item} is wrong: {new.wrong[wrong[item]]}" for item in sorted(wrong.keys() - known.keys())]
    better += [
        f"{item} was wrong, and is not offered" for item in sorted(known.keys() - wrong.keys()) if item not in after
    ]
    return worse, better


def _name(item: str) -> str:
    return re.sub(r"\(.*\)$", "", item)


def _bare(items: Iterable[str]) -> dict[str, str]:
    return {_name(item): item for item in items}


def _shares(items: Iterable[str]) -> dict[str, float]:
    """Item -> at which share of the layers."""
    found = dict[str, float]()
    for item in items:
        count = re.search(r"\((\d+)/(\d+)\)$", item)
        found[_name(item)] = int(count[1]) / int(count[2]) if count else 1.0
    return found


def summary(lines: Iterable[Line]) -> list[str]:
    """How many types there are of each kind, and how many of those that run have which sites."""
    lines = list(lines)
    counts = {outcome: sum(line.outcome == outcome for line in lines) for outcome in OUTCOMES}
    running = [line for line in lines if line.runs]
    found = [f"{len(lines)} types: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n)]
    sound = [line for line in running if "knockouts" in line.exact]
    found.append(f"knockouts exact in {len(sound)} of the {len(running)} types that run")
    for site in ("hook_attn_out", "hook_mlp_out", "attn.hook_z"):
        exact = sum(site in _shares(line.exact) for line in running)
        wrong = sum(site in _bare(line.wrong) for line in running)
        found.append(f"{site}: exact in {exact}, wrong in {wrong}, not offered in {len(running) - exact - wrong}")
    off = [line.type for line in lines if line.wrong]
    found.append(f"{len(off)} types with something wrong: {' '.join(off)}" if off else "nothing wrong")
    return found
