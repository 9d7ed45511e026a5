"""A text corpus in windows: built in, from files, or from the hub.

Steps: take the documents in a seeded random order, tokenise until the budget is reached, pack, shuffle the windows.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from jaxtyping import Int
from pydantic import Field, PositiveInt, model_validator

from mi_pipe.core.errors import PromptError
from mi_pipe.core.progress import Progress
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.prompts.builtin_text import builtin_documents, builtin_identity
from mi_pipe.prompts.config import PromptConfig
from mi_pipe.prompts.documents import Document
from mi_pipe.prompts.encoded import EncodedPrompts, encode_rows, encode_texts
from mi_pipe.prompts.hub_text import HubText, hub_documents
from mi_pipe.prompts.packing import pack
from mi_pipe.prompts.text_files import TextFiles, file_documents

_DOCUMENTS_A_CALL = 256
_SEPARATOR = "\n\n"


class CorpusConfig(PromptConfig):
    """Text in windows of equal length."""

    family: Literal["corpus"] = "corpus"
    """Which family of prompts."""
    source: Literal["documentation", "source_code", "both", "files", "hub"] = "documentation"
    """Documentation or source code of the running Python, both, local files, or a HuggingFace data set."""
    files: TextFiles = TextFiles()
    """The files, for source=files."""
    hub: HubText = HubText()
    """The data set, for source=hub."""
    window: int = Field(default=128, ge=2)
    """Tokens of each window, BOS among them."""
    n_tokens: PositiveInt = 1_000_000
    """Most tokens of all windows, BOS among them; a smaller text gives fewer."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of documents and of windows."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.source == "files" and not self.files.paths:
            raise ValueError("source=files needs files.paths, a list of files")
        if self.source == "hub" and not self.hub.name:
            raise ValueError("source=hub needs hub.name, the name of a data set")
        if self.source != "files" and self.files.paths:
            raise ValueError(f"files.paths are given and source is {self.source}: set source=files, or leave them out")
        if self.window > self.n_tokens:
            raise ValueError(f"n_tokens {self.n_tokens} is less than one window of {self.window}")
        return self

    def identity(self) -> dict[str, Any]:
        """Return what decides the prompts: for files their content, for built-in text the Python it is from."""
        fields = super().identity()
        files, hub = fields.pop("files"), fields.pop("hub")
        if self.source in ("files", "hub"):
            return {**fields, self.source: files if self.source == "files" else hub}
        return {**fields, "builtin": builtin_identity()}

    @property
    def n_tokens_expected(self) -> int:
        """The budget."""
        return self.n_tokens


def encode_corpus(config: CorpusConfig, vocabulary: Vocabulary, progress: Progress) -> EncodedPrompts:
    """Return the windows; raises PromptError if the text cannot be read or is shorter than one window."""
    bos_id = vocabulary.bos_id if config.prepend_bos else None
    rng = np.random.default_rng(config.seed)
    sources, tokens = _tokenised(_documents(config, rng), config.n_tokens, vocabulary, progress)
    windows = pack(tokens, encode_texts(vocabulary, [_SEPARATOR])[0], config.window, bos_id)
    if not len(windows.tokens):
        n_found = sum(map(len, tokens))
        raise PromptError(f"The text has {n_found} tokens, fewer than one window of {config.window}. Ask for less.")
    chosen = rng.permutation(min(len(windows.tokens), config.n_tokens // config.window))
    names = np.array(sources, dtype=object)[windows.document[chosen]]
    return encode_rows(windows.tokens[chosen], pd.DataFrame({"source": names}), {})


def _documents(config: CorpusConfig, rng: np.random.Generator) -> Iterable[Document]:
    if config.source == "hub":
        return hub_documents(config.hub)
    found = file_documents(config.files) if config.source == "files" else builtin_documents(config.source)
    return [found[i] for i in rng.permutation(len(found))]


def _tokenised(
    documents: Iterable[Document], n_tokens: int, vocabulary: Vocabulary, progress: Progress
) -> tuple[list[str], list[Int[np.ndarray, " token"]]]:
    """Return names and tokens of documents until there are `n_tokens`."""
    sources: list[str] = []
    tokens: list[Int[np.ndarray, " token"]] = []
    n_found = 0
    for chunk in _chunks(documents):
        encoded = encode_texts(vocabulary, [document.text for document in chunk])
        sources += [document.source for document in chunk]
        tokens += [np.asarray(ids, np.int32) for ids in encoded]
        n_found += sum(map(len, encoded))
        progress.update(min(n_found, n_tokens), n_tokens, "tokens", "tokenising")
        if n_found >= n_tokens:
            break
    return sources, tokens


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    rest = iter(documents)
    while chunk := list(islice(rest, _DOCUMENTS_A_CALL)):
        yield chunk
