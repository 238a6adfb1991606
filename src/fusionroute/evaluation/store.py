"""Results that are never lost: rows under keys in an append-only file. Knows nothing of models or tasks.

A row is written as it comes and a second one under its key replaces it. A line that a kill has cut short is passed
over, so that only its item runs again.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fusionroute.files import disk_errors


def key_of(*parts: Any) -> str:
    """A key of everything that a result depends on: any values that JSON knows."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class Store:
    """Rows (dicts that JSON knows) by key, in memory and in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        with disk_errors(path):
            text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                self.rows[row.pop("key")] = row
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut short by a kill or a full disk

    def get(self, key: str) -> dict[str, Any] | None:
        return self.rows.get(key)

    def put(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row, on disk before this returns.

        Raises:
            FusionRouteError: it cannot be written; it is not kept in memory either.
        """
        line = json.dumps({"key": key, **row}, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                # In one write, begun on a line of its own whatever stands before it.
                file.write((b"" if self._ends_a_line(file.tell()) else b"\n") + line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self.rows[key] = row

    def _ends_a_line(self, size: int) -> bool:
        if not size:
            return True
        with self.path.open("rb") as file:
            file.seek(size - 1)
            return file.read(1) == b"\n"
