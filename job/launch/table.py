"""Runs as a table for people or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

COLUMNS = ("job", "state", "alive", "step", "loss", "rate", "left", "restarts", "run")


def show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print rows that have what COLUMNS name, numbers as numbers, and a reason below."""
    if as_json:
        print(json.dumps(rows))
        return
    table = [COLUMNS, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    for number, line in enumerate(table):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number and rows[number - 1]["reason"]:
            print(f"    {rows[number - 1]['reason']}")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    left = row["seconds_left"]
    return (
        row["job"] or "-",
        row["state"],
        "yes" if row["alive"] else "no",
        f"{row['step']}/{row['steps'] or '?'}",
        f"{row['loss']:.4g}" if row["loss"] is not None else "-",
        f"{row['tokens_per_second']:.0f}/s" if row["tokens_per_second"] else "-",
        f"{left // 3600}:{left % 3600 // 60:02}:{left % 60:02}" if left is not None else "-",
        "-" if row["restarts"] is None else str(row["restarts"]),
        row["run"],
    )
