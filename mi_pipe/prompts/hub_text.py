"""Documents streamed from a data set on the HuggingFace hub, as many as are needed."""

from collections.abc import Iterator

from mi_pipe.core.config import Config
from mi_pipe.core.errors import PromptError
from mi_pipe.prompts.documents import Document


class HubText(Config):
    """A data set of the HuggingFace hub."""

    name: str = ""
    """Its name, such as `monology/pile-uncopyrighted`."""
    subset: str | None = None
    """Its configuration, where it has several."""
    split: str = "train"
    """Which split."""
    text_field: str = "text"
    """The column with the text."""
    revision: str | None = None
    """Commit or tag. Name one to be sure that the same id always means the same text."""


def hub_documents(hub: HubText) -> Iterator[Document]:
    """Yield documents in the data set's order; raises PromptError if it cannot be had or has no such column."""
    import datasets
    import httpx
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(hub.name, hub.subset, split=hub.split, revision=hub.revision, streaming=True)
        for i, row in enumerate(rows):
            yield Document(f"row {i}", _text(hub, row))
    except PromptError:
        raise
    except (OSError, ValueError, RuntimeError, httpx.HTTPError, DatasetsError) as error:
        raise PromptError(
            f"The data set {hub.name!r} cannot be read from the HuggingFace hub ({type(error).__name__}: "
            f"{_first_line(error)}). Offline, use source=documentation or local files."
        ) from error


def _text(hub: HubText, row: dict[str, object]) -> str:
    text = row.get(hub.text_field)
    if not isinstance(text, str):
        raise PromptError(
            f"The data set {hub.name!r} has no text column {hub.text_field!r}; its columns are {', '.join(row)}."
        )
    return text


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
