"""placeholder"""
from pathlib import Path
from typing import Any


def write_card(folder: Path, config: Any) -> None:
    (folder / "README.md").write_text("x")
