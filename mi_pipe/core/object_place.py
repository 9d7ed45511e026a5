"""A prefix of an object store (S3, Google Cloud Storage, Azure), through obstore.

A PUT is atomic for its key, so whole files need no temporary name; `create` is a conditional PUT, which exactly one of
several writers wins. Credentials, region and endpoint are those of the environment, as for every tool of the store
(for S3 AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on). Server errors and lost connections are retried with growing
pauses before one sentence says what is wrong.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import from_url

from mi_pipe.core.errors import ConfigError, PlaceError
from mi_pipe.core.place import Bytes

RETRY: Any = {"max_retries": 8, "retry_timeout": timedelta(minutes=3)}
CLIENT: Any = {"timeout": timedelta(seconds=120), "connect_timeout": timedelta(seconds=15)}
_PART_BYTES = 16 << 20
"""Parts of a large upload."""
_MOST_PUT_BYTES = 64 << 20
"""Files up to this size go up in one request; larger ones in parts."""

ResultT = TypeVar("ResultT")


class ObjectPlace:
    """A prefix of a bucket."""

    def __init__(self, url: str) -> None:
        """Use a URL such as `s3://bucket/prefix`; raises ConfigError if it is none that obstore knows."""
        self._url = url.rstrip("/")
        client: Any = {**CLIENT, "allow_http": os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")}
        try:
            self.store: Any = from_url(self._url, config=None, client_options=client, retry_config=RETRY)
        except (BaseError, ValueError) as error:
            raise ConfigError(f"{url} is no place that can be opened ({_reason(error)}).") from error
        self._sizes: dict[str, int] = {}

    @property
    def url(self) -> str:
        """The URL."""
        return self._url

    def within(self, folder: str) -> "ObjectPlace":
        """Return the place of a folder within this one."""
        return ObjectPlace(f"{self._url}/{folder}")

    def open(self, key: str) -> "nullcontext[ObjectFile]":
        """Open an object for reading; its size is asked for once."""
        if key not in self._sizes:
            self._sizes[key] = int(self._ask(key, lambda: obstore.head(self.store, key))["size"])
        return nullcontext(ObjectFile(self, key, self._sizes[key]))

    def read(self, key: str) -> bytes:
        """Return the bytes of an object."""
        return bytes(self._ask(key, lambda: obstore.get(self.store, key).bytes()))

    def read_range(self, key: str, start: int, stop: int) -> memoryview:
        """Return bytes `start` to `stop` of an object."""
        return memoryview(self._ask(key, lambda: obstore.get_range(self.store, key, start=start, end=stop)))

    def read_ranges(self, key: str, starts: Sequence[int], n_bytes: int) -> list[bytes]:
        """Return `n_bytes` from each start, which are asked for at once."""
        lengths = [n_bytes] * len(starts)
        pieces = self._ask(key, lambda: obstore.get_ranges(self.store, key, starts=starts, lengths=lengths))
        return [bytes(piece) for piece in pieces]

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes, or None if there is none."""
        try:
            return int(self._ask(key, lambda: obstore.head(self.store, key))["size"])
        except FileNotFoundError:
            return None

    def write(self, key: str, data: Bytes) -> None:
        """Put an object whole."""
        self._sizes.pop(key, None)
        in_parts = memoryview(data).nbytes > _MOST_PUT_BYTES
        self._ask(key, lambda: obstore.put(self.store, key, data, use_multipart=in_parts, chunk_size=_PART_BYTES))

    def create(self, key: str, data: Bytes) -> bool:
        """Put an object unless there is one (a conditional PUT); say whether `data` is what lies there now."""
        try:
            self._ask(key, lambda: obstore.put(self.store, key, data, mode="create", use_multipart=False))
        except FileExistsError:
            return self.read(key) == bytes(data)
        return True

    def keys(self, folder: str = "") -> Iterator[str]:
        """Yield the keys of the objects in a folder and below."""
        pages = self._ask(folder, lambda: obstore.list(self.store, prefix=folder or None))
        while page := self._ask(folder, lambda: next(pages, None)):
            yield from (item["path"] for item in page)

    def remove(self, key: str) -> None:
        """Remove an object if it is there."""
        self._sizes.pop(key, None)
        try:
            self._ask(key, lambda: obstore.delete(self.store, key))
        except FileNotFoundError:
            return

    def _ask(self, key: str, request: Callable[[], ResultT]) -> ResultT:
        """Make a request; raises FileNotFoundError, FileExistsError or PlaceError."""
        try:
            return request()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self._url}/{key} does not exist.") from error
        except (AlreadyExistsError, PreconditionError) as error:
            raise FileExistsError(f"{self._url}/{key} exists.") from error
        except (BaseError, OSError) as error:
            raise PlaceError(
                f"{self._url}/{key} cannot be reached ({_reason(error)}). "
                "Check the URL, the credentials and the network, and give the same command again."
            ) from error


class ObjectFile:
    """An object, read by ranges."""

    def __init__(self, place: ObjectPlace, key: str, size: int) -> None:
        """Read `key` of `place`."""
        self.size = size
        self._place = place
        self._key = key

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> int:
        """Fill buffers with the bytes from `offset` on, by one request; return how many came."""
        wanted = sum(buffer.nbytes for buffer in buffers)
        stop = min(offset + wanted, self.size)
        if stop <= offset:
            return 0
        data = self._place.read_range(self._key, offset, stop).cast("B")
        at = 0
        for buffer in buffers:
            part = data[at : at + buffer.nbytes]
            buffer.cast("B")[: len(part)] = part
            at += len(part)
        return at

    def read_pieces(self, offsets: Sequence[int], n_bytes: int) -> list[bytes]:
        """Return `n_bytes` from each offset; raises PlaceError beyond the object's end."""
        return self._place.read_ranges(self._key, list(offsets), n_bytes)


def _reason(error: BaseException) -> str:
    """Return the first line of an error, cut to what helps."""
    limit = 160
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}…"
