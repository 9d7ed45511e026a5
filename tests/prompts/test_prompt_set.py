import numpy as np
import pandas as pd
import pytest
import torch

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.errors import PromptError
from mi_pipe.core.stage import execute
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.vocabulary import NumberVocabulary, TokenizerVocabulary
from mi_pipe.opening import open_artifact
from mi_pipe.prompts.encoded import encode_rows, text_column
from mi_pipe.prompts.pairs import Pair, encode_pairs
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.prompts.repeated import InductionConfig, RepeatedConfig
from stages.generate_prompts import STAGE, Inputs
from tests.models.tiny import save_tiny_llama, tiny_tokenizer


@pytest.fixture
def inputs(tmp_path, store):
    return Inputs(resolve_model(str(save_tiny_llama(tmp_path / "llama")), store))


def _made(config, inputs, store) -> PromptSet:
    return open_artifact(execute(STAGE, config, inputs, store).artifact.id, store)


def test_a_prompt_set_gives_back_tokens_offsets_and_texts(inputs, store):
    made = _made(RepeatedConfig(n_prompts=5, length=12, min_period=3, max_period=6), inputs, store)
    assert isinstance(made, PromptSet)
    assert made.family == "repeated"
    assert made.n_prompts == 5
    assert made.offsets.tolist() == [0, 13, 26, 39, 52, 65]
    assert made.offsets.dtype == np.int64
    assert made.token_ids.dtype == np.int32
    table = made.token_table()
    assert table.columns.tolist() == ["prompt_idx", "pos", "token_id", "text"]
    vocabulary = TokenizerVocabulary(tiny_tokenizer())
    for i in range(5):
        rows = table[table["prompt_idx"] == i]
        assert rows["pos"].tolist() == list(range(13))
        assert rows["token_id"].tolist() == made.prompt(i).tolist()
        assert rows["text"].tolist() == made.texts(i) == [vocabulary.text(t) for t in made.prompt(i)]
    assert made.texts(0)[0] == "<s>"
    with pytest.raises(IndexError):
        made.prompt(5)


def test_pair_groups_hold_pairs_of_one_length_in_order(tmp_path, store):
    vocabulary = NumberVocabulary(16)
    pairs = [
        Pair("a", [1, 2, 3], [1, 5, 3], 4, 6, {"end": 2}),
        Pair("b", [7, 8], [9, 8], 10, 11),
        Pair("a", [2, 3, 4], [2, 6, 4], 5, 7, {"end": 2}),
    ]
    prompts = encode_pairs(pairs, vocabulary, {"two tokens": 3})
    made = _as_artifact(tmp_path / "made", prompts, vocabulary)
    short, long = made.pair_groups()
    assert short.pairs.tolist() == [1]
    assert short.labels == [" 7", " 8"]
    assert long.pairs.tolist() == [0, 2]
    assert long.n_pos == 3
    assert long.clean.dtype == torch.int64
    assert long.clean.tolist() == [[1, 2, 3], [2, 3, 4]]
    assert long.corrupted.tolist() == [[1, 5, 3], [2, 6, 4]]
    assert (long.answer.tolist(), long.wrong.tolist()) == ([4, 5], [6, 7])
    assert made.prompts["pos_end"].tolist() == [2, 2, pd.NA, pd.NA, 2, 2]
    assert made.prompts["role"].tolist() == ["clean", "corrupted"] * 3
    assert made.dropped == {"two tokens": 3}


def _as_artifact(folder, prompts, vocabulary) -> PromptSet:
    from mi_pipe.core.manifest import MadeOf
    from mi_pipe.core.workspace import Workspace

    work = Workspace("generate_prompts-0000000000000000", folder, folder.parent / "scratch")
    work.write_table("tokens.parquet", prompts.token_frame(vocabulary))
    work.write_table("prompts.parquet", prompts.prompt_frame())
    work.write_json("dropped.json", prompts.dropped)
    work.publish(MadeOf("generate_prompts", 1, {"family": "pairs"}))
    return PromptSet(folder)


def test_a_corpus_has_no_pairs_and_says_so(inputs, store):
    made = _made(RepeatedConfig(n_prompts=2, length=12, min_period=3, max_period=6), inputs, store)
    with pytest.raises(PromptError, match="without clean and corrupted pairs"):
        made.pair_groups()


def test_tokens_that_share_a_text_share_a_category():
    class Bytes(NumberVocabulary):
        def text(self, token_id: int) -> str:
            return "\ufffd" if token_id > 1 else super().text(token_id)

    column = text_column(np.array([0, 2, 3, 1], np.int32), Bytes(4))
    assert column.tolist() == [" 0", "\ufffd", "\ufffd", " 1"]
    assert len(column.categories) == 3


def test_the_token_table_equals_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 16, n) for n in (3, 1, 7)]
    frame = encode_rows(rows, pd.DataFrame({"source": ["x"] * 3}), {}).token_frame(NumberVocabulary(16))
    expected = [(i, pos, token, f" {token}") for i, row in enumerate(rows) for pos, token in enumerate(row.tolist())]
    assert list(frame.itertuples(index=False, name=None)) == expected


def test_making_prompts_again_gives_the_same_digest(inputs, store, tmp_path):
    from mi_pipe.core.store import Store

    config = InductionConfig(n_pairs=4, period=5)
    first = execute(STAGE, config, inputs, store)
    other = execute(STAGE, config, inputs, Store(tmp_path / "other"))
    assert isinstance(first.artifact, Artifact)
    assert (first.artifact.id, first.artifact.digest) == (other.artifact.id, other.artifact.digest)
    assert execute(STAGE, config, inputs, store).outcome == "Cached"


def test_prompts_longer_than_the_model_reads_are_refused(inputs, store):
    with pytest.raises(PromptError, match=r"101 tokens do not fit .* 64 at most"):
        execute(STAGE, RepeatedConfig(n_prompts=1, length=100), inputs, store)
