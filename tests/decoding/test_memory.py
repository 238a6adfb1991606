"""Free memory under the limits of control groups, whose files are written here as Linux has them."""

from pathlib import Path

import psutil
import pytest
import torch

from fusionroute.decoding import memory

GIB = 1 << 30


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def own(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "own"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_container_sees_its_limit_at_the_top(tmp_path: Path) -> None:
    stat = f"anon {2 * GIB}\ninactive_file {GIB}\nactive_file 5"
    write(tmp_path / "groups", max=8 * GIB, current=3 * GIB, stat=stat)
    assert memory.left_by_limits(tmp_path / "groups", own(tmp_path, "0::/")) == [6 * GIB]


def test_limits_above_count_and_none_is_none(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    write(groups / "service", max=5 * GIB, current=GIB, stat="inactive_file 0")
    write(groups / "service" / "worker", max="max", current=GIB, stat="inactive_file 0")
    assert memory.left_by_limits(groups, own(tmp_path, "0::/service/worker")) == [4 * GIB]


def test_version_1(tmp_path: Path) -> None:
    files = {
        "limit_in_bytes": 4 * GIB,
        "usage_in_bytes": 3 * GIB,
        "stat": f"inactive_file 7\ntotal_inactive_file {GIB}",
    }
    write(tmp_path / "groups" / "memory" / "docker", **files)
    lines = ("5:cpu,cpuacct:/docker", "4:memory:/docker", "0::/")
    assert memory.left_by_limits(tmp_path / "groups", own(tmp_path, *lines)) == [2 * GIB]


def test_a_group_that_holds_more_than_its_limit_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "groups", max=GIB, current=2 * GIB, stat="inactive_file 0")
    assert memory.left_by_limits(tmp_path / "groups", own(tmp_path, "0::/")) == [0]


def test_a_system_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert memory.left_by_limits(tmp_path, tmp_path / "none") == []
    assert memory.left_by_limits(tmp_path, own(tmp_path, "0::/")) == []


@pytest.mark.parametrize(("limits", "free"), [([3 * GIB, 5 * GIB], 3 * GIB), ([9 * GIB], 7 * GIB), ([], 7 * GIB)])
def test_the_least_counts(limits: list[int], free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "left_by_limits", lambda: limits)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Found", (), {"available": 7 * GIB}))
    assert memory.free_memory(torch.device("cpu")) == free
