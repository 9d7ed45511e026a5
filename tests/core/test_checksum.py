"""A checksum finds every altered byte, tells files of equal structure apart, and is computed once a process."""

import os

import google_crc32c
import numpy as np
import pytest

from mi_pipe.core import checksum
from mi_pipe.core.checksum import chunked_checksum, data_matches, is_same_file, matches, matches_once
from mi_pipe.core.place import LocalPlace

CHUNK_BYTES, N_CHUNKS, TAIL_BYTES = 68, 5, 30


def chunked_file(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    chunks = [rng.integers(0, 256, CHUNK_BYTES - 4, np.uint8).tobytes() for _ in range(N_CHUNKS)]
    sealed = [chunk + google_crc32c.value(chunk).to_bytes(4, "little") for chunk in chunks]
    return b"".join(sealed) + bytes(TAIL_BYTES)


def checksum_of(data: bytes) -> str:
    return chunked_checksum(np.frombuffer(data, np.uint8), CHUNK_BYTES, N_CHUNKS)


def test_crc32c_of_chunks_that_end_in_theirs_is_the_same_for_any_content():
    assert google_crc32c.value(chunked_file(0)) == google_crc32c.value(chunked_file(1)), "why shards need another"
    assert checksum_of(chunked_file(0)) != checksum_of(chunked_file(1))


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    data = chunked_file(0)
    value, place, path = checksum_of(data), LocalPlace(tmp_path), tmp_path / "file"
    path.write_bytes(data)
    assert matches(place, "file", value)
    assert data_matches(data, value)
    rng = np.random.default_rng(0)
    for bit in rng.permutation(8 * len(data))[:300]:
        altered = bytearray(data)
        altered[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(altered)
        assert not matches(place, "file", value), bit
        assert not data_matches(bytes(altered), value), bit
    for cut in (0, 1, CHUNK_BYTES, len(data) - TAIL_BYTES, len(data) - 1):
        path.write_bytes(data[:cut])
        assert not matches(place, "file", value), cut
    path.write_bytes(data + b"\0")
    assert not matches(place, "file", value)
    path.unlink()
    assert not matches(place, "file", value)


def test_another_file_of_the_same_structure_is_told_apart_without_its_rows(tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed)).write_bytes(chunked_file(seed))
    value = checksum_of(chunked_file(0))
    with LocalPlace(tmp_path).open("0") as file:
        assert is_same_file(file, value)
    with LocalPlace(tmp_path).open("1") as file:
        assert not is_same_file(file, value)


@pytest.mark.parametrize("value", ["sha256:" + "0" * 64, "crc32c:00000000", f"crc32c-chunks:8x1:{'0' * 64}"])
def test_a_file_with_another_checksum_does_not_match(tmp_path, value):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert not matches(LocalPlace(tmp_path), "file", value)


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    path, read = tmp_path / "file", []
    data = chunked_file(0)
    path.write_bytes(data)
    monkeypatch.setattr(checksum, "matches", lambda *given: (read.append(given), matches(*given))[1])
    place, value = LocalPlace(tmp_path), checksum_of(data)
    assert matches_once(place, "file", value)
    assert matches_once(place, "file", value)
    assert len(read) == 1
    path.write_bytes(b"1" + data[1:])
    assert not matches_once(place, "file", value)
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    assert matches_once(place, "file", value)
    assert len(read) == 3
    checksum.forget()
    assert matches_once(place, "file", value)
    assert len(read) == 4
