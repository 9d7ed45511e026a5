import json
import os
import shutil
import string
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter, ValidationError

from mi_pipe.core.errors import PromptError
from mi_pipe.core.progress import Progress
from mi_pipe.models.vocabulary import NumberVocabulary, TokenizerVocabulary
from mi_pipe.prompts.builtin_text import builtin_documents, builtin_identity, library_files
from mi_pipe.prompts.corpus import CorpusConfig, encode_corpus
from mi_pipe.prompts.families import AnyPromptConfig
from mi_pipe.prompts.text_files import TextFiles, file_documents
from tests.models.tiny import tiny_tokenizer

WORDS = list(string.ascii_lowercase)


def _config(*paths, **changes) -> CorpusConfig:
    return CorpusConfig(source="files", files={"paths": paths}, **{"window": 5, "n_tokens": 1000, **changes})


def _encoded(config):
    return encode_corpus(config, TokenizerVocabulary(tiny_tokenizer()), Progress())


def _write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def letters(tmp_path):
    return _write(tmp_path / "letters.txt", " ".join(WORDS))


def test_windows_of_a_file_hold_its_tokens_once_after_bos_in_seeded_order(letters):
    prompts = _encoded(_config(letters))
    windows = prompts.token_ids.reshape(-1, 5)
    assert (windows[:, 0] == 0).all()
    expected = TokenizerVocabulary(tiny_tokenizer()).encode(" ".join(WORDS))
    pieces = [tuple(expected[i : i + 4]) for i in range(0, 24, 4)]
    assert sorted(map(tuple, windows[:, 1:].tolist())) == sorted(pieces)
    assert windows[:, 1:].tolist() != [list(piece) for piece in pieces]
    assert (_encoded(_config(letters)).token_ids == prompts.token_ids).all()
    assert (_encoded(_config(letters, seed=1)).token_ids != prompts.token_ids).any()
    assert set(prompts.table["source"]) == {"file 1"}


def test_the_budget_bounds_the_tokens_and_bos_can_be_left_out(letters):
    assert _encoded(_config(letters, n_tokens=12)).n_tokens == 10
    assert not (_encoded(_config(letters, prepend_bos=False)).token_ids == 0).any()


def test_a_file_is_known_by_its_content_and_not_by_its_path(letters, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(letters, tmp_path / "elsewhere" / "renamed.md")
    other = _write(tmp_path / "other.txt", "z y x")
    identity = _config(letters).identity()
    assert _config(moved).identity() == identity
    assert _config(other).identity() != identity
    assert str(tmp_path) not in json.dumps(identity)
    first, second = _encoded(_config(letters)), _encoded(_config(moved))
    pd.testing.assert_frame_equal(first.prompt_frame(), second.prompt_frame())
    _write(letters, "b c d")
    assert _config(letters).identity() != identity


def test_json_lines_and_parquet_give_the_same_documents_as_text(tmp_path):
    texts = ["a b c", "d e"]
    lines = _write(tmp_path / "t.jsonl", "\n".join(json.dumps({"body": text}) for text in texts) + "\n\n")
    table = tmp_path / "t.parquet"
    pd.DataFrame({"body": texts, "n": [1, 2]}).to_parquet(table)
    plain = [_write(tmp_path / f"{i}.txt", text) for i, text in enumerate(texts)]
    found = [file_documents(TextFiles(paths=paths, text_field="body")) for paths in ([lines], [table], plain)]
    assert [[document.text for document in documents] for documents in found] == [texts] * 3
    assert [documents[1].source for documents in found] == ["file 1 line 2", "file 1 row 1", "file 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"ab\xff", r"a.txt is not UTF-8 \(byte 2\)"),
        ("a.txt", b" \n", "hold no text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl, line 2: the field 'text' is missing; it has body"),
        ("a.jsonl", b'{"text": 3}', "line 1: the field 'text' is no text"),
        ("a.jsonl", b'{"text"', "line 1 is not JSON"),
        ("a.jsonl", b"[1]", "line 1 is no JSON object"),
        ("a.parquet", b"PAR0", "a.parquet is not a Parquet file"),
        (None, b"", "does not exist"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence_with_its_place(tmp_path, name, content, message):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=message) as raised:
        _identified_and_encoded(_config(path))
    assert "\n" not in str(raised.value)


def _identified_and_encoded(config):
    return config.identity(), _encoded(config)


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path):
    pd.DataFrame({"body": ["x"]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(PromptError, match="no column 'text'; it has body"):
        file_documents(TextFiles(paths=(tmp_path / "t.parquet",)))


def test_a_text_shorter_than_a_window_and_a_model_of_numbers_are_refused(letters):
    with pytest.raises(PromptError, match="26 tokens, fewer than one window of 40"):
        _encoded(_config(letters, window=40))
    with pytest.raises(PromptError, match="reads numbers, not text"):
        encode_corpus(_config(letters), NumberVocabulary(64), Progress())


def test_configs_that_contradict_themselves_are_refused(tmp_path):
    for fields, message in [
        ({"source": "files"}, "needs files.paths"),
        ({"source": "hub"}, "needs hub.name"),
        ({"files": {"paths": ["x.txt"]}}, "set source=files"),
        ({"window": 10, "n_tokens": 9}, "less than one window"),
    ]:
        with pytest.raises(ValidationError, match=message):
            TypeAdapter(AnyPromptConfig).validate_python({"family": "corpus", **fields})


def test_built_in_documents_are_distinct_named_and_ordered():
    files = dict(library_files())
    assert "argparse.py" in files
    assert "asyncio/tasks.py" in files
    assert not any("site-packages" in name or "/test/" in name or name.startswith("test/") for name in files)
    documents = builtin_documents("documentation")
    assert len({document.text for document in documents}) == len(documents)
    by_source = {document.source: document.text for document in documents}
    assert by_source["python doc argparse"].startswith("Command-line parsing library")
    assert "python topic assert" in by_source
    assert 1.5e6 < sum(map(len, by_source.values())) < 6e6


def test_the_id_of_built_in_text_depends_on_the_python_that_gave_it():
    identity = CorpusConfig().identity()
    assert identity["builtin"] == builtin_identity()
    assert identity["builtin"]["python"].endswith(".".join(map(str, sys.version_info[:3])))
    assert "files" not in identity
    assert "hub" not in identity


def test_a_hub_data_set_offline_is_one_sentence_that_says_what_to_do():
    code = (
        "from mi_pipe.prompts.hub_text import HubText, hub_documents\n"
        "from mi_pipe.core.errors import PromptError\n"
        "try:\n    next(hub_documents(HubText(name='nobody/no-such-data')))\n"
        "except PromptError as error:\n    print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "'nobody/no-such-data' cannot be read" in ran.stdout
    assert "source=documentation" in ran.stdout
    assert len(ran.stdout.splitlines()) == 1


def test_a_hub_data_set_is_streamed_from_its_text_column(tmp_path):
    from mi_pipe.prompts.hub_text import HubText, hub_documents

    pd.DataFrame({"body": ["a b", "c"]}).to_parquet(tmp_path / "train.parquet")
    hub = HubText(name=str(tmp_path), text_field="body")
    assert [(document.source, document.text) for document in hub_documents(hub)] == [("row 0", "a b"), ("row 1", "c")]
    with pytest.raises(PromptError, match="no text column 'text'; its columns are body"):
        next(iter(hub_documents(HubText(name=str(tmp_path)))))


def test_windows_name_the_document_of_their_first_token(tmp_path):
    paths = [_write(tmp_path / f"{i}.txt", " ".join([letter] * 9)) for i, letter in enumerate("pqr")]
    prompts = _encoded(_config(*paths))
    first_letters = np.array(TokenizerVocabulary(tiny_tokenizer()).encode(" p q r"))
    for window, source in zip(prompts.token_ids.reshape(-1, 5), prompts.table["source"], strict=True):
        number = int(source.removeprefix("file ")) - 1
        if window[1] >= first_letters.min():
            assert window[1] == first_letters[number]
