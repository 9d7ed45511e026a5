import numpy as np
import pytest
from pydantic import ValidationError

from mi_pipe.core.errors import PromptError
from mi_pipe.models.vocabulary import NumberVocabulary, TokenizerVocabulary
from mi_pipe.prompts.repeated import InductionConfig, RepeatedConfig, encode_induction, encode_repeated
from tests.models.tiny import tiny_tokenizer


def _rows(prompts):
    return np.split(prompts.token_ids, prompts.offsets[1:-1])


def test_each_repeated_sequence_repeats_with_its_own_period_and_distinct_tokens():
    prompts = encode_repeated(
        RepeatedConfig(n_prompts=40, length=50, min_period=5, max_period=12), NumberVocabulary(64)
    )
    periods = prompts.table["period"].tolist()
    assert set(periods) == set(range(5, 13))
    for row, period in zip(_rows(prompts), periods, strict=True):
        assert len(row) == 50
        assert len(set(row[:period].tolist())) == period
        assert (row[period:] == row[:-period]).all()


def test_another_seed_gives_other_tokens_and_the_same_seed_the_same():
    vocabulary = NumberVocabulary(64)
    first, again, other = (encode_repeated(RepeatedConfig(n_prompts=3, seed=s), vocabulary) for s in (0, 0, 1))
    assert (first.token_ids == again.token_ids).all()
    assert (first.token_ids[:20] != other.token_ids[:20]).any()


@pytest.mark.parametrize("vocabulary", [NumberVocabulary(64), TokenizerVocabulary(tiny_tokenizer())])
def test_an_induction_pair_asks_for_the_token_that_followed(vocabulary):
    prompts = encode_induction(InductionConfig(n_pairs=6, period=7), vocabulary)
    rows, table = _rows(prompts), prompts.table
    n_bos = 0 if vocabulary.bos_id is None else 1
    for i in range(0, 12, 2):
        clean, corrupted = rows[i].tolist(), rows[i + 1].tolist()
        assert len(clean) == len(corrupted) == 13 + n_bos
        assert clean[:n_bos] == corrupted[:n_bos] == [vocabulary.bos_id] * n_bos
        answer, wrong = table["answer_id"][i], table["wrong_id"][i]
        earlier = [p for p in range(len(clean) - 1) if clean[p] == clean[-1]]
        assert earlier == [table["pos_earlier"][i]]
        assert clean[earlier[0] + 1] == answer
        assert corrupted[earlier[0] + 1] == wrong != answer
        assert [p for p in range(len(clean)) if clean[p] != corrupted[p]] == [table["pos_answer"][i]]
        assert table["pos_end"][i] == len(clean) - 1
        assert not vocabulary.special_ids & set(clean[n_bos:])


def test_a_corrupted_key_leaves_nothing_to_match():
    config = InductionConfig(n_pairs=5, period=7, corruption="key")
    prompts = encode_induction(config, NumberVocabulary(64))
    rows, table = _rows(prompts), prompts.table
    for i in range(0, 10, 2):
        clean, corrupted = rows[i].tolist(), rows[i + 1].tolist()
        assert clean[-1] in clean[:-1]
        assert corrupted[-1] == clean[-1] not in corrupted[:-1]
        assert [p for p in range(len(clean)) if clean[p] != corrupted[p]] == [table["pos_earlier"][i]]
        assert table["wrong_id"][i] == clean[0] != table["answer_id"][i]


def test_a_period_longer_than_the_vocabulary_is_refused_with_both_numbers():
    with pytest.raises(PromptError, match=r"65 distinct tokens.* has 64"):
        encode_induction(InductionConfig(period=64), NumberVocabulary(64))


def test_periods_that_do_not_fit_the_length_are_refused():
    with pytest.raises(ValidationError, match="max_period 40 < length 30"):
        RepeatedConfig(length=30)
