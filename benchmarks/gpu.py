"""All that a machine with a GPU has to show, in one command and eight minutes: `make gpu`.

It needs torch, transformers, numpy and pyarrow. What else it needs lies in a folder of wheels (`make gpu-wheels`, where
there is a network), or is done without, by name. No part can take the others along: each is a process with a limit.
What came of them is printed as a section for `benchmarks/RESULTS.md`.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "numpy", "pyarrow", "safetensors", "pytest", "hypothesis")
CASES = ("heads-128", "heads-1000", "prompts")
ROOMS = ("tests/model", "tests/sae")


@dataclass
class Visit:
    """What is left of the time, and what was found so far."""

    device: str
    shape: str
    seconds: float
    wheels: Path
    folder: Path
    cases: Sequence[str]
    started: float = field(default_factory=time.monotonic)
    lines: list[str] = field(default_factory=list[str])
    sound: bool = True
    """Whether all that was begun came to a good end."""

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def say(self, *lines: str) -> None:
        self.lines += lines
        print("\n".join(lines), flush=True)

    def run(self, *arguments: str, seconds: float, **environment: str) -> tuple[int | None, str]:
        """Runs a module of Python's; its exit code (None: it took too long) and the end of what it said."""
        paths = [str(ROOT), str(self.folder / "wheels")]
        known = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RAYMI_TESTS_DEVICE": self.device}
        limit = max(5.0, min(seconds, self.left))
        try:
            done = subprocess.run(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env=known | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as expired:
            said = expired.stdout or b""
            return None, said.decode(errors="replace") if isinstance(said, bytes) else said
        return done.returncode, done.stdout


# ---- what is missing is brought --------------------------------------------------------------------------------------


def unpack(wheels: Path, into: Path) -> list[str]:
    """Unpacks the wheels of what is not installed and fits this Python; says which."""
    here = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    brought: list[str] = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, number, *tags = wheel.stem.split("-")
        with zipfile.ZipFile(wheel) as archive:
            tops = {path.partition("/")[0].removesuffix(".py") for path in archive.namelist()}
            modules = [top for top in tops if top.isidentifier()]
            if all(importlib.util.find_spec(module) for module in modules):
                continue
            if not tags[-3].startswith("py") and here not in tags[-3]:
                continue
            archive.extractall(into)
            brought.append(f"{name} {number}")
    return brought


def _versions(brought: Sequence[str]) -> Iterator[str]:
    carried = dict(each.split() for each in brought)
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            if package in carried:
                yield f"{package} {carried[package]}"


def setting(visit: Visit, brought: Sequence[str]) -> list[str]:
    import torch

    if visit.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        machine = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        machine = f"{visit.device}: no GPU, nothing to be quoted"
    return [
        f"## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: make gpu",
        "",
        f"- machine: {machine}; {os.cpu_count()} cores",
        f"- versions: Python {platform.python_version()}, {', '.join(_versions(brought))}",
        f"- brought as wheels: {', '.join(brought) or 'nothing'}",
    ]


# ---- the parts -------------------------------------------------------------------------------------------------------


def tests(visit: Visit, title: str, seconds: float, *which: str) -> None:
    """A part of the tests on the device; all that fails is named."""
    outcome = visit.folder / "outcome.json"
    outcome.unlink(missing_ok=True)
    begin = min(seconds, visit.left) - 20  # none begins in the last seconds
    options = (
        "-p",
        "tests.bare",
        "--outcome",
        str(outcome),
        "--seconds",
        str(max(5.0, begin)),
        "-q",
        "-p",
        "no:cacheprovider",
    )
    code, said = visit.run("pytest", *options, *which, seconds=seconds + 10)
    if not outcome.exists():
        visit.sound = False
        why = "took too long" if code is None else f"exit code {code}"
        visit.say("", f"### {title}", "", f"did not end ({why}):", "", "```", *said.splitlines()[-15:], "```")
        return
    found: dict[str, Any] = json.loads(outcome.read_text())
    visit.sound &= not found["failed"]
    visit.say("", f"### {title}", "")
    visit.say(
        f"{found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped, "
        f"{found['not_begun']} not begun for want of time, in {found['seconds']} s"
    )
    if found["missing"]:
        visit.say("", f"not installed, and what needs it left out: {', '.join(sorted(found['missing']))}")
    if found["findings"]:
        visit.say("", *(f"- {finding}" for finding in found["findings"]))
    if found["failed"]:
        visit.say("", *(f"- failed: `{name}`" for name in found["failed"]))
        (visit.folder / "said.txt").write_text(said)
        print(said[-6000:], file=sys.stderr)


def ablations(visit: Visit, dtype: str, seconds: float) -> None:
    """The cone's benchmark."""
    section = visit.folder / f"{dtype}.md"
    cases = [part for case in visit.cases for part in ("--only", case)]
    options = ("--device", visit.device, "--dtype", dtype, "--shape", visit.shape, "--quick", *cases)
    code, said = visit.run("benchmarks.ablations", *options, "--markdown", str(section), seconds=seconds)
    visit.say("", f"### the cone, shape {visit.shape}, {dtype}", "")
    if code or not section.exists():
        visit.sound = False
        visit.say(f"did not end ({'took too long' if code is None else f'exit code {code}'}):", "")
        visit.say("```", *said.splitlines()[-15:], "```")
        return
    text, _, aims = section.read_text().strip().partition("### aims")  # which are the demo model's, on two cores
    explained = aims.rpartition("\n\n")[2]
    visit.say(*(f"##{line}" if line.startswith("#") else line for line in (text + explained).splitlines()[2:]))


def half(visit: Visit, seconds: float) -> None:
    """The bars of half precision."""
    heads = "40" if visit.device == "cuda" else "4"
    options = ("--device", visit.device, "--shape", visit.shape, "--heads", heads)
    code, said = visit.run("benchmarks.half", *options, seconds=seconds)
    visit.sound &= code == 0
    visit.say("", "### half precision", "", *said.splitlines()[-60:])
    if code != 0:
        visit.say("", f"did not end well ({'took too long' if code is None else f'exit code {code}'})")


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    made.add_argument("--device", default="cuda", help="cuda; cpu is a rehearsal")
    made.add_argument("--shape", help="of the benchmark's model (default: 1b, on a CPU tiny)")
    made.add_argument("--seconds", type=float, default=470, help="all of it ends by then")
    made.add_argument("--wheels", type=Path, default=ROOT / ".wheels", help="where `make gpu-wheels` has put them")
    made.add_argument("--markdown", type=Path, metavar="FILE", help="append the section to this file")
    made.add_argument("--cases", nargs="*", default=CASES, help="of the benchmark")
    made.add_argument("--dtypes", nargs="*", default=("float32", "bfloat16"), help="of the benchmark")
    made.add_argument("--tests", nargs="*", default=ROOMS, help="what is run last, as long as there is time")
    options = made.parse_args(arguments)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            print("There is no CUDA device here. A rehearsal without one: make gpu DEVICE=cpu", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory(prefix="raymi-gpu-") as folder:
        shape = options.shape or ("1b" if options.device == "cuda" else "tiny")
        visit = Visit(options.device, shape, options.seconds, options.wheels, Path(folder), options.cases)
        brought = unpack(options.wheels, Path(folder, "wheels"))
        visit.say(*setting(visit, brought))
        if visit.run("pytest", "--version", seconds=60)[0] != 0:
            print(
                "pytest is missing: run `make gpu-wheels` where there is a network, and bring .wheels", file=sys.stderr
            )
            return 2
        tests(visit, "on the device: numbers, the proof in three dtypes, memory", 120, "-m", "gpu", *ROOMS)
        for dtype in options.dtypes:
            ablations(visit, dtype, 90)
        half(visit, 80)
        if options.tests:
            tests(
                visit,
                "the tests of the model and sae rooms",
                visit.left - 15,
                "-m",
                "not gpu and not slow",
                *options.tests,
            )
        visit.say(
            "",
            f"{'all ended well' if visit.sound else 'NOT all ended well'}, after {options.seconds - visit.left:.0f} s",
        )
        if options.markdown:
            with options.markdown.open("a") as stream:
                stream.write("\n" + "\n".join(visit.lines) + "\n")
        return 0 if visit.sound else 1


if __name__ == "__main__":
    sys.exit(main())
