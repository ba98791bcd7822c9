"""Every causal type of transformers, checked; what is worse than `types.tsv` says is a failure.

python -m tests.conformance [TYPE ...] [--write] [--processes N] [--seconds S]
"""

import argparse
import os
import sys
import time

from tests.conformance import table
from tests.conformance.running import check_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="only these, in place of all")
    parser.add_argument("--write", action="store_true", help="record what was found in types.tsv")
    parser.add_argument("--processes", type=int, default=2, help="types checked at a time (2)")
    parser.add_argument("--seconds", type=float, default=120, help="what a type may take before it is a crash (120)")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    import transformers

    from tests.conformance import configs

    started, recorded = time.monotonic(), table.read()
    every = [*configs.types(), *configs.VARIANTS]
    unknown = set(asked.types) - set(every)
    if unknown:
        parser.error(f"no causal type of transformers {transformers.__version__}: {' '.join(sorted(unknown))}")
    found = check_all(asked.types or every, asked.processes, asked.seconds, recorded)
    print(f"\n{time.monotonic() - started:.0f} s, transformers {transformers.__version__}")
    print("\n".join(table.summary(found.values())))
    worse = [of for of, line in found.items() if of in recorded and table.changes(recorded[of], line)[0]]
    wrong = [of for of, line in found.items() if of not in recorded and line.wrong]
    if asked.write:
        gone = {} if not asked.types else {of: line for of, line in recorded.items() if of not in found}
        lines = [*gone.values(), *found.values()]
        table.write(lines, [f"transformers {transformers.__version__}; `make conformance`", *table.summary(lines)])
        print(f"recorded in {table.TABLE.name}")
        return 0
    if missing := sorted(recorded.keys() - found.keys()) if not asked.types else []:
        print(f"recorded, and not types of this transformers: {' '.join(missing)}")
    if worse or wrong:
        print(f"worse than recorded: {' '.join(worse + wrong)}", file=sys.stderr)
    return int(bool(worse or wrong))


if __name__ == "__main__":
    raise SystemExit(main())
