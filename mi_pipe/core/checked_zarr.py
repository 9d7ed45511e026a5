"""A Zarr store that answers nothing but what was published: every key that the manifest lists is compared with it.

zarr-python answers a missing file with fill values, and an exchanged one with what it holds. Through this store both
raise ArtifactDamagedError, for plain zarr-python and xarray too. A file that is read whole is checked as it is read;
one that is read in parts (a shard) is checked as a whole when it is first touched, once a process.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

from zarr.abc.store import ByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from mi_pipe.core.checksum import data_matches, matches_once
from mi_pipe.core.errors import ArtifactDamagedError
from mi_pipe.core.manifest import damage_text
from mi_pipe.core.place import LocalPlace, Place


def plain_store(place: Place) -> Store:
    """Return what zarr-python and xarray read a folder or a prefix by, without looking at checksums."""
    if isinstance(place, LocalPlace):
        return LocalStore(place.root, read_only=True)
    from zarr.storage import ObjectStore

    from mi_pipe.core.object_place import ObjectPlace

    return ObjectStore(cast(ObjectPlace, place).store, read_only=True)


class CheckedStore(WrapperStore[Store]):
    """Read-only; `checksums` has the keys of the group that must be there, None where no checksum is known."""

    def __init__(self, store: Store, place: Place, checksums: Mapping[str, str | None], artifact: str) -> None:
        """Read the group at `place` through `store`; errors name `artifact`."""
        super().__init__(store)
        self._place = place
        self._checksums = checksums
        self._artifact = artifact

    def _with_store(self, store: Store) -> "CheckedStore":
        return type(self)(store, self._place, self._checksums, self._artifact)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the bytes of a key; raises ArtifactDamagedError if it is listed and is not what was published."""
        checksum = self._checksums.get(key)
        if checksum is not None and byte_range is not None and not matches_once(self._place, key, checksum):
            self._refuse(key)
        data = await self._store.get(key, prototype, byte_range)
        if data is None:
            return self._refuse(key) if key in self._checksums else None
        if checksum is not None and byte_range is None and not data_matches(data.as_numpy_array(), checksum):
            self._refuse(key)
        return data

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return the bytes of several keys."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    def _refuse(self, key: str) -> NoReturn:
        what = "differs from its checksum" if self._place.size(key) is not None else "is missing"
        raise ArtifactDamagedError(damage_text(self._artifact, f"{self._place.url}/{key} {what}"))


def checked_store(place: Place, checksums: Mapping[str, str], artifact: str) -> Any:
    """Return the group at `place` as a store for zarr-python and xarray; `checksums` by key of the group."""
    return CheckedStore(plain_store(place), place, checksums, artifact)
