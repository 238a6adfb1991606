import contextlib
import errno
import os
from pathlib import Path

import pytest

from fusionroute.errors import FusionRouteError
from fusionroute.files import disk_errors, read_json, staged_file, staged_folder, write_json


def test_a_file_appears_whole(tmp_path: Path) -> None:
    with staged_file(tmp_path / "deep" / "a.txt") as scratch:
        scratch.write_text("all of it")
        assert not (tmp_path / "deep" / "a.txt").exists()
    assert (tmp_path / "deep" / "a.txt").read_text() == "all of it"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.txt"]


def test_a_failed_file_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with contextlib.suppress(ZeroDivisionError), staged_file(tmp_path / "a.txt") as scratch:
        scratch.write_text("half")
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_file_can_be_read_by_others(tmp_path: Path) -> None:
    with staged_file(tmp_path / "a.txt") as scratch:
        scratch.write_text("x")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), staged_folder(tmp_path / "c") as scratch:
        (scratch / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_the_old_one_whole(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "old").write_text("x")
    with staged_folder(tmp_path / "c", replace=True) as scratch:
        (scratch / "new").write_text("y")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_folder_with_something_in_it_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").write_text("x")
    with pytest.raises(FusionRouteError, match="exists already"), staged_folder(tmp_path / "c"):
        pass
    assert (tmp_path / "c" / "mine").read_text() == "x"


def test_what_came_into_a_folder_meanwhile_is_not_replaced_unasked(tmp_path: Path) -> None:
    def come() -> None:
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "theirs").write_text("x")

    with pytest.raises(FusionRouteError, match="exists already"), staged_folder(tmp_path / "c"):
        come()
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_link_to_a_folder_stays_and_leads_to_the_new_one(tmp_path: Path, replace: bool) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "disk")
    with staged_folder(tmp_path / "c", replace=replace) as scratch:
        (scratch / "new").write_text("y")
    assert (tmp_path / "c").is_symlink()
    assert (tmp_path / "disk" / "new").read_text() == "y"


@pytest.mark.parametrize("name", [".", "../c"])
def test_the_working_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "c").mkdir()
    monkeypatch.chdir(tmp_path / "c")
    with pytest.raises(FusionRouteError, match="is the working folder"), staged_folder(Path(name)):
        pass


def test_a_folder_that_cannot_be_exchanged_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "old").write_text("x")
    rename = os.replace

    def fail(source: Path, target: Path) -> None:
        if (source / "new").exists():
            raise OSError(errno.EIO, "as if")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="as if"), staged_folder(tmp_path / "c", replace=True) as scratch:
        (scratch / "new").write_text("y")
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left")])
def test_a_full_disk_is_one_line(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(FusionRouteError, match=r"no space left to write .*/big \(\d+ MB free\)"),
        disk_errors(tmp_path / "big"),
    ):
        raise error


def test_a_forbidden_place_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match=r"cannot write .*: Permission denied"), disk_errors(tmp_path / "x"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(KeyError), disk_errors(tmp_path):
        raise KeyError("x")


def test_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, None]})
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}


@pytest.mark.parametrize("content", ['{"a": ', "", "\xff"])
def test_half_written_json_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(FusionRouteError, match=r"a\.json is not whole JSON"):
        read_json(tmp_path / "a.json")


def test_missing_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FusionRouteError, match=r"a\.json is missing"):
        read_json(tmp_path / "a.json")


def test_json_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(FusionRouteError, match=r"a\.json cannot be read: Is a directory"):
        read_json(tmp_path / "a.json")
