"""Rows of a benchmark's CSV, for benchmarks that need neither torch nor a GPU (harness.py has them for the others)."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path


def append_rows(path: Path | None, rows: Iterable) -> None:
    """Append dataclasses of one kind to the CSV at once, so that a run that is cut off keeps what it measured."""
    rows = list(rows)
    if path is None or not rows:
        return
    check_csv(path, type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0].__dataclass_fields__)
        if is_new:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def check_csv(path: Path | None, kind: type) -> None:
    """To be asked before measuring. Raises: SystemExit if the file holds rows of another kind than this dataclass"""
    if path is None or not path.exists():
        return
    with path.open(newline="") as file:
        columns = next(csv.reader(file), None)
    if columns not in (None, list(kind.__dataclass_fields__)):
        raise SystemExit(f"{path} holds another benchmark's rows ({', '.join(columns[:4])}, ...); give another file")


def git_commit() -> str:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
