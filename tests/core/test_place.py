"""A folder and an object store keep one contract; server errors are retried, and told in one sentence."""

import threading
from pathlib import Path

import pytest

from mi_pipe.core import object_place
from mi_pipe.core.errors import ConfigError, PlaceError
from mi_pipe.core.place import LocalPlace, open_place


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    if request.param == "folder":
        return open_place(tmp_path / "place")
    return open_place(request.getfixturevalue("bucket"))


def test_what_is_written_is_read_whole_and_in_parts(place):
    data = bytes(range(256)) * 40
    place.write("a/b.bin", data)
    assert place.read("a/b.bin") == data
    assert place.size("a/b.bin") == len(data)
    with place.open("a/b.bin") as file:
        assert file.size == len(data)
        first, second = bytearray(5), bytearray(300)
        assert file.read_into([memoryview(first), memoryview(second)], 250) == 305
        assert bytes(first + second) == data[250:555]
        beyond = bytearray(100)
        assert file.read_into([memoryview(beyond)], len(data) - 30) == 30
        assert file.read_into([memoryview(beyond)], len(data)) == 0


def test_what_is_not_there_is_said(place):
    assert place.size("none") is None
    for ask in (place.read, lambda key: place.open(key).__enter__()):
        with pytest.raises(FileNotFoundError):
            ask("none")
    place.remove("none")


def test_keys_are_those_of_the_folder_and_below(place):
    for key in ("x/1", "x/y/2", "z", "xx/3"):
        place.write(key, b"1")
    assert sorted(place.keys()) == ["x/1", "x/y/2", "xx/3", "z"]
    assert sorted(place.keys("x")) == ["x/1", "x/y/2"]
    assert sorted(place.within("x").keys()) == ["1", "y/2"]
    place.remove("x/1")
    assert sorted(place.keys("x")) == ["x/y/2"]


def test_of_many_writers_who_create_exactly_one_wins(place):
    answers: dict[int, bool] = {}
    barrier = threading.Barrier(8)

    def create(i: int) -> None:
        barrier.wait()
        answers[i] = place.create("record", str(i).encode())

    threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [i for i, won in answers.items() if won]
    assert place.read("record") == str(winner).encode()
    assert place.create("record", str(winner).encode()), "the same data again is no conflict"


def test_a_folder_holds_no_temporary_files_afterwards(tmp_path):
    place = LocalPlace(tmp_path)
    place.write("a", b"1")
    assert not place.create("a", b"2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_large_object_goes_up_in_parts(bucket, monkeypatch):
    monkeypatch.setattr(object_place, "_MOST_PUT_BYTES", 1 << 20)
    monkeypatch.setattr(object_place, "_PART_BYTES", 5 << 20)
    data = bytes(7 << 20)
    place = open_place(bucket)
    place.write("large", data)
    assert place.read("large") == data


def test_server_errors_and_slow_answers_are_survived(faulty_bucket):
    url, faults = faulty_bucket
    place = open_place(url)
    faults.share_500, faults.delay_s = 0.2, 0.02
    for i in range(20):
        place.write(f"k/{i}", str(i).encode())
        assert place.create(f"record/{i}", str(i).encode()), "an attempt that a lost answer hid is our own"
    assert [place.read(f"k/{i}") for i in range(20)] == [str(i).encode() for i in range(20)]
    assert faults.n_500 > 5


def test_a_server_that_never_answers_well_is_one_sentence(faulty_bucket, monkeypatch):
    monkeypatch.setitem(object_place.RETRY, "max_retries", 1)
    url, faults = faulty_bucket
    faults.share_500 = 1.0
    with pytest.raises(PlaceError, match=r"cannot be reached .* give the same command again"):
        open_place(url).read("a")


def test_a_url_that_nothing_answers_to_is_refused():
    with pytest.raises(ConfigError, match="no place that can be opened"):
        open_place("nonsense://here")


def test_a_file_url_is_a_folder(tmp_path):
    place = open_place(f"file://{tmp_path}/a")
    assert isinstance(place, LocalPlace)
    assert place.root == Path(tmp_path / "a")
