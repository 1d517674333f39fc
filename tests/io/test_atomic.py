"""A file or folder is the old one or the new one, whatever happens on the way."""

from __future__ import annotations

import os
import shutil

import pytest

from mmdlm.io import atomic_folder, atomic_write, atomic_write_json, recover, remove_folder


def names(path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_file_is_written_and_replaced(tmp_path):
    atomic_write(tmp_path / "a", b"one")
    atomic_write(str(tmp_path / "a"), b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a", b"one")

    def fail(*paths):
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(OSError, match="disk full"):
                atomic_write(tmp_path / "a", b"two")
        assert (tmp_path / "a").read_bytes() == b"one"
        assert names(tmp_path) == ["a"]


def test_new_files_have_the_usual_mode(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    atomic_write(tmp_path / "a", b"")
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "x").write_bytes(b"")
    (tmp_path / "d").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "d").stat().st_mode


def test_json_is_strict(tmp_path):
    atomic_write_json(tmp_path / "a.json", {"b": [1, 2.5, None]})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError):
        atomic_write_json(tmp_path / "a.json", float("nan"))
    assert (tmp_path / "a.json").stat().st_size > 10


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "er" / "run"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("one")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("two")
        assert folder.parent == target.parent  # same file system, so that the rename is one step
        assert not target.exists()
    assert (target / "sub" / "b").read_text() == "two"
    assert names(target.parent) == ["run"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for number in range(2):
        with atomic_folder(tmp_path / "run") as folder:
            (folder / f"only{number}").write_text("")
    assert names(tmp_path / "run") == ["only1"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("exists", [False, True])
def test_an_error_in_the_block_changes_nothing(tmp_path, exists):
    if exists:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "old").write_text("old")
    before = names(tmp_path)

    def interrupted() -> None:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "new").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == before
    assert not exists or names(tmp_path / "run") == ["old"]


def test_a_failing_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["old"]


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ValueError, match="a file stands there"), atomic_folder(tmp_path / "run"):
        pass
    assert (tmp_path / "run").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["a"]


def test_a_removed_folder_is_gone_in_one_step(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: None)  # killed right after the rename
        remove_folder(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert recover(tmp_path) == []
    assert names(tmp_path) == []


def test_a_folder_that_was_being_replaced_is_put_back(tmp_path, monkeypatch):
    """Killed between the two renames: the old folder has left, the new one has not come."""
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "old").write_text("old")
    rename = os.rename

    class Killed(BaseException):
        pass

    def dies(source, target):
        rename(source, target)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dies)
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        with pytest.raises(Killed), atomic_folder(tmp_path / "run") as folder:
            (folder / "new").write_text("new")
    assert len(names(tmp_path)) == 2
    assert not (tmp_path / "run").exists()
    assert recover(tmp_path) == [tmp_path / "run"]
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run") == ["old"]


def test_what_killed_writes_left_is_cleared_and_nothing_else(tmp_path):
    kept = ["run", ".hidden", ".run.part", "a.part", ".run.0123456789ab.partial"]
    for name in kept:
        (tmp_path / name).write_text("")
    (tmp_path / ".a.json.0123456789ab.part").write_text("half")
    (tmp_path / ".run.0123456789ab.old").mkdir()  # killed after the second rename: the new one stands
    (tmp_path / ".step-1.ba9876543210.part").mkdir()
    (tmp_path / ".step-1.ba9876543210.part" / "half").write_text("")
    assert recover(tmp_path) == []
    assert names(tmp_path) == sorted(kept)
