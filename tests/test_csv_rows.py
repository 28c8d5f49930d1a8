import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from csv_rows import append_rows, check_csv  # noqa: E402


@dataclass(frozen=True)
class Row:
    name: str
    value: float


@dataclass(frozen=True)
class Other:
    name: str
    model: str


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    append_rows(path, [Row("a", 1 / 3)])
    append_rows(path, [])
    append_rows(path, [Row("b", 2.0)])
    assert path.read_text() == "name,value\na,0.333333\nb,2\n"


def test_rows_of_another_benchmark_are_not_mixed_in(tmp_path):
    path = tmp_path / "rows.csv"
    append_rows(path, [Row("a", 1.0)])
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"rows\.csv holds another benchmark's rows \(name, value, \.\.\.\)"):
        append_rows(path, [Other("b", "c")])
    assert path.read_bytes() == before


def test_no_file_and_an_empty_file_hold_no_other_rows(tmp_path):
    check_csv(None, Row)
    check_csv(tmp_path / "absent.csv", Row)
    (tmp_path / "empty.csv").touch()
    check_csv(tmp_path / "empty.csv", Row)
    append_rows(tmp_path / "empty.csv", [Row("a", 1.0)])
    assert (tmp_path / "empty.csv").read_text().startswith("name,value\n")
