"""Dask workers as a pool: processes started here for one run, or a cluster that runs already.

`cluster` gives the address of a scheduler; `DaskPool` sends it functions directly, `PrefectPool` through Prefect's Dask
task runner, so that Prefect shows each share of the work.
"""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

from mi_pipe.core.errors import ConfigError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_CONNECT_S = 20


@contextlib.contextmanager
def cluster(workers: int, address: str | None) -> Generator[str | None]:
    """Yield the address of a Dask scheduler: `address`, or that of `workers` processes started for the while, or None.

    Raises ConfigError if nothing answers at `address`.
    """
    if address is not None:
        yield address
    elif workers > 1:
        from distributed import LocalCluster

        options: Any = {
            "processes": True,
            "host": "127.0.0.1",
            "dashboard_address": "127.0.0.1:0",
            "silence_logs": logging.ERROR,
        }
        logging.getLogger("distributed").setLevel(logging.WARNING)
        local: Any = LocalCluster(n_workers=workers, threads_per_worker=1, **options)
        with local:
            yield local.scheduler_address
    else:
        yield None


class DaskPool:
    """The workers of a Dask scheduler."""

    def __init__(self, address: str) -> None:
        """Connect; raises ConfigError if nothing answers."""
        self._client = connect(address)

    @property
    def n_workers(self) -> int:
        """Number of worker processes now."""
        return len(self._client.scheduler_info(n_workers=-1)["workers"])

    def run(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        """Yield results as they come; an item whose worker is lost goes to another."""
        from distributed import as_completed

        futures = self._client.map(function, list(items), pure=False)
        try:
            for _, result in as_completed(futures, loop=self._client.loop, with_results=True):
                yield result
        finally:
            self._client.cancel(futures)

    def close(self) -> None:
        """Disconnect."""
        self._client.close()


class PrefectPool:
    """The same workers by Prefect's Dask task runner: each share of the work is a task run of the running flow."""

    def __init__(self, address: str, name: str) -> None:
        """Use the scheduler at `address`; task runs are called after `name`."""
        self._address = address
        self._name = name
        with contextlib.closing(DaskPool(address)) as dask:
            self.n_workers = dask.n_workers

    def run(self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
        """Yield results as they come; an item whose worker is lost goes to another."""
        from prefect import Task
        from prefect.cache_policies import NO_CACHE
        from prefect.client.orchestration import get_client
        from prefect.futures import as_completed
        from prefect.settings import PREFECT_API_URL, temporary_settings
        from prefect_dask.task_runners import DaskTaskRunner

        task: Any = Task(_run_share, name=f"{self._name} share", cache_policy=NO_CACHE, persist_result=False)
        # The workers report to the server that this flow runs on; left to themselves each would start one of its own.
        with get_client(sync_client=True) as client:
            api = str(client.api_url)
        with temporary_settings({PREFECT_API_URL: api}), DaskTaskRunner(address=self._address) as runner:
            futures: list[Any] = [runner.submit(task, parameters={"share": _Share(function, item)}) for item in items]
            for future in as_completed(futures):
                yield future.result()

    def close(self) -> None:
        """Nothing stays open between runs."""


class _Share:
    """A function and its item; a plain class, which neither Prefect nor Dask looks into for futures to replace."""

    def __init__(self, function: Callable[[Any], Any], item: Any) -> None:
        self.function = function
        self.item = item


def _run_share(share: _Share) -> Any:
    return share.function(share.item)


def connect(address: str) -> Any:
    """Return a client of a Dask scheduler; raises ConfigError if nothing answers."""
    from distributed import Client

    try:
        return Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"No Dask scheduler answers at {address!r} ({type(error).__name__}). "
            "Give the address that `dask scheduler` prints, such as tcp://host:8786, or use --workers."
        ) from error
