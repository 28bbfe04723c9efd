"""Atomic writes of files and folders."""

import threading
import time

import pytest

from mmsoft.conversion import write_once
from mmsoft.fileio import write_whole


def test_the_old_file_is_kept_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with write_whole(path) as partial:
            assert not path.exists() or path.read_text() == "first"
            assert partial.suffix == ".txt"
            partial.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with write_whole(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folders_without_remains_of_a_killed_process(tmp_path):
    path = tmp_path / "folder"
    (tmp_path / ".partial-folder").mkdir()
    (tmp_path / ".partial-folder/stale").touch()
    with write_whole(path) as partial:
        partial.mkdir()
        (partial / "file").touch()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == [
        "folder",
        "folder/file",
    ]


def test_a_data_set_that_two_write_at_once_is_written_once(tmp_path):
    """A lock is an opened file's, so that threads show what processes do."""
    out, found = tmp_path / "new" / "data", []

    def write(folder):
        for i in range(5):
            (folder / str(i)).touch()
            time.sleep(0.02)

    def run():
        found.append(write_once(out, dict(seed=0), write))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False, False, True]
    assert {path.name for path in out.iterdir()} == {*"01234", "parameters.json"}
