"""An export's target: there whole or not at all, and what a killed export left is removed by the next one."""

import os
import signal
import time

import pytest

from mi_pipe.core.errors import ConfigError
from mi_pipe.export.target import new_target


def start(path, is_folder):
    """Begin an export in a process of its own that writes and then waits; return its pid once it has written."""
    child = os.fork()
    if child == 0:
        with new_target(path, 10) as temp:
            if is_folder:
                temp.mkdir()
            (temp / "data" if is_folder else temp).write_bytes(b"half")
            time.sleep(60)
        os._exit(0)
    while not any(path.parent.glob(f".{path.name}.*/{path.name}{'/data' if is_folder else ''}")):
        time.sleep(0.01)
    return child


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_next_export_removes_what_a_killed_one_left_and_nothing_else(tmp_path, is_folder):
    target, other = tmp_path / "acts.h5", tmp_path / "acts.h5.old"
    kill(start(target, is_folder))
    kill(start(other, is_folder))
    (tmp_path / ".acts.h5.notes.tmp").write_text("mine")
    assert len(names(tmp_path)) == 3
    with new_target(target, 10) as temp:
        temp.write_bytes(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    left = names(tmp_path) - {"acts.h5", ".acts.h5.notes.tmp"}
    assert len(left) == 1
    assert left.pop().startswith(".acts.h5.old.")


def test_an_export_that_is_at_work_is_not_taken_for_a_leftover(tmp_path):
    target = tmp_path / "acts.h5"
    working = start(target, False)
    try:
        with new_target(target, 10) as temp:
            temp.write_bytes(b"first")
        (theirs,) = names(tmp_path) - {"acts.h5"}
        assert (tmp_path / theirs / "acts.h5").read_bytes() == b"half"
    finally:
        kill(working)


def test_of_two_at_once_the_first_wins_and_the_other_is_told(tmp_path):
    target = tmp_path / "acts.h5"

    def late():
        with new_target(target, 10) as temp:
            temp.write_bytes(b"late")
            with new_target(target, 10) as early:
                early.write_bytes(b"early")

    with pytest.raises(ConfigError, match="exists already"):
        late()
    assert target.read_bytes() == b"early"
    assert names(tmp_path) == {"acts.h5"}
