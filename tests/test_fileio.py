"""Atomic writes of files and folders."""

import pytest

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
