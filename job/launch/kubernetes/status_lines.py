"""Lines of a pod's log that are for programs: JSON objects with the key "cyclevae".

With the variable CYCLEVAE_STATUS_LINES=1 the first rank prints one per log interval:
{"cyclevae": "progress", "step": 480, "steps": 700, "loss": 6.3, "tokens_per_second": 1360.0, "seconds_left": 77}
A pod's log is what a launcher can read of a run whose metrics it cannot reach; people are not shown these lines.
"""

from __future__ import annotations

import json
from typing import Any

STATUS_LINES_VARIABLE = "CYCLEVAE_STATUS_LINES"
_KEY = "cyclevae"


def parse(line: str) -> dict[str, Any] | None:
    """The object of a status line; None for any other line."""
    if not line.startswith(f'{{"{_KEY}"'):  # spares every other line the parser
        return None
    try:
        return dict(json.loads(line))
    except json.JSONDecodeError:  # one that was cut short
        return None


def last_progress(log: str) -> dict[str, Any]:
    """The last progress that a log tells of; empty without any."""
    found = (parse(line) for line in reversed(log.splitlines()))
    return next((values for values in found if values and values[_KEY] == "progress"), {})


def for_people(log: str) -> list[str]:
    """The lines of a log without status lines."""
    return [line for line in log.splitlines() if parse(line) is None]
