"""Files that are whole, and places that are no files."""

import errno
import os

import pytest

from nanotoolrl.files import check_writable, replacing, write_atomically


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    write_atomically(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"


def test_what_is_no_file_is_written_into(tmp_path):
    """A pipe, as /dev/stdout may be one, is there afterwards."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_writable(pipe)
    write_atomically(pipe, "new")
    assert os.read(reader, 10) == b"new" and pipe.is_fifo()
    os.close(reader)
    with pytest.raises(IsADirectoryError):
        check_writable(tmp_path)


def test_the_check_tries_what_is_written(tmp_path):
    """The new file beside the old one; nothing is left behind."""
    (tmp_path / "old").write_text("old")
    check_writable(tmp_path / "old")
    check_writable(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    (tmp_path / "old.tmp").mkdir()
    with pytest.raises(OSError, match=r"old\.tmp"):
        check_writable(tmp_path / "old")


@pytest.mark.parametrize("number, kept", [(errno.EIO, "old"), (errno.ENOSPC, "old"), (errno.EINVAL, "new")])
def test_what_did_not_reach_the_disk_takes_no_place(tmp_path, monkeypatch, number, kept):
    """But where a file system cannot be told to write, nothing is known to be wrong."""

    def fails(_):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fails)
    try:
        with replacing(path) as half:
            half.write_text("new")
    except OSError as error:
        assert error.errno == number
    assert path.read_text() == kept and [one.name for one in tmp_path.iterdir()] == ["file"]
