"""A document, and errors that name where one came from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text and what it is called in `prompts.parquet`."""

    source: str
    text: str
