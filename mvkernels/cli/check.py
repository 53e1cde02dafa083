"""``mvkernels check``: the curator's checks alone, on traces that exist: grammar, references to siblings, distance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mvkernels.cli.options import Json, Traces
from mvkernels.model.curator.checks import check_trace, content_distance
from mvkernels.model.curator.trace_files import read_traces


@dataclass
class FileChecks:
    """What was found in one of the named files or folders.

    malformed: traces with an error. dependent: traces with a warning. compared: traces that have their original.
    distance: the mean over those, or None where there is none.
    """

    file: str
    traces: int = 0
    paths: int = 0
    malformed: int = 0
    dependent: int = 0
    warnings: int = 0
    compared: int = 0
    distance: float | None = None


def run(files: Traces, as_json: Json = False) -> None:
    """Check every trace of files and folders: print a line for each finding, then a table; or all of it as JSON.

    Grammar findings are errors, with which the exit status is 1; independence findings are warnings.
    """
    checked = {path: FileChecks(str(path)) for path in files}
    findings: list[dict[str, object]] = []
    distances: dict[Path, list[float]] = {}
    for named, stored in ((path, stored) for path in checked for stored in read_traces([path])):
        counts = checked[named]
        counts.traces += 1
        found: list[tuple[str, str, str, int | None]] = []
        if stored.text is None:
            found.append(("file", "", stored.error or "", None))
        else:
            counts.paths += stored.text.count("</Path>")
            found += [(one.kind, one.path, one.message, one.line) for one in check_trace(stored.text)]
        malformed = any(kind != "independence" for kind, *_ in found)
        counts.malformed += malformed
        counts.warnings += 0 if malformed else len(found)
        counts.dependent += bool(found) and not malformed
        if stored.text is not None and stored.original is not None and not malformed:
            distances.setdefault(named, []).append(content_distance(stored.text, stored.original))
        for kind, path, message, line in found:
            severity = "warning" if kind == "independence" else "error"
            if as_json:
                place = {"file": str(stored.file), "record": stored.record, "line": line, "path": path}
                findings.append({**place, "severity": severity, "kind": kind, "message": message})
                continue
            where = [f"line {line}"] * (line is not None) + [f"path {path}"] * bool(path)
            print(": ".join(part for part in (stored.name, ", ".join(where), severity, message) if part))
    for file, values in distances.items():
        checked[file].compared = len(values)
        checked[file].distance = math.fsum(values) / len(values)
    if as_json:
        rows = [asdict(counts) for counts in checked.values()]
        print(json.dumps({"files": rows, "findings": findings}, indent=1, ensure_ascii=False))
    else:
        Console().print(_table([*checked.values()]))
    if any(counts.malformed for counts in checked.values()):
        raise SystemExit(1)


def _table(rows: Sequence[FileChecks]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=len(rows) > 1, footer_style="bold")
    columns = ("traces", "paths", "malformed", "dependent", "warnings")
    table.add_column("file", "all", overflow="fold")
    for name in columns:
        table.add_column(name, str(sum(getattr(row, name) for row in rows)), justify="right")
    compared = sum(row.compared for row in rows)
    if compared:
        mean = math.fsum(row.distance * row.compared for row in rows if row.distance is not None) / compared
        table.add_column("distance", f"{mean:.3f}", justify="right")
    for row in rows:
        cells = [str(getattr(row, name)) for name in columns]
        if compared:
            cells.append("" if row.distance is None else f"{row.distance:.3f}")
        style = "red" if row.malformed else "yellow" if row.warnings else ""
        table.add_row(Text(row.file), *cells, style=style)
    return table
