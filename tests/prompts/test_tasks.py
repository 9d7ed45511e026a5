import json
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mi_pipe.core.errors import PromptError
from mi_pipe.models.vocabulary import NumberVocabulary, TokenizerVocabulary
from mi_pipe.prompts.facts import FactsConfig, encode_facts
from mi_pipe.prompts.inputs import read_input
from mi_pipe.prompts.ioi import IOIConfig, encode_ioi, templates
from mi_pipe.prompts.user_pairs import PairsConfig, encode_user_pairs
from tests.models.tiny import SPACE, tiny_tokenizer


def _word_vocabulary(left_out=()) -> TokenizerVocabulary:
    """A byte-level tokenizer in which each word of the input tables, with its space, is one token."""
    table = read_input("ioi.json")
    facts = [row for entry in read_input("facts.json").values() for row in entry["facts"]]
    words = [*table["names"], *(row["answer"] for row in facts)]
    whole = [f"{SPACE}{word}" for word in dict.fromkeys(words) if word not in left_out]
    pieces = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *whole]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<s>", continuing_subword_prefix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TokenizerVocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"))


VOCABULARY = _word_vocabulary()


def _pairs(prompts):
    frame = prompts.prompt_frame()
    for i in range(0, prompts.n_prompts, 2):
        clean, corrupted = (prompts.token_ids[prompts.offsets[k] : prompts.offsets[k + 1]].tolist() for k in (i, i + 1))
        assert len(clean) == len(corrupted)
        yield frame.iloc[i], clean, corrupted


@pytest.mark.parametrize("corruption", ["abc", "flip"])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_ioi_pairs_differ_at_names_alone_and_are_answered_by_the_indirect_object(corruption, prepend_bos):
    prompts = encode_ioi(IOIConfig(n_pairs=60, corruption=corruption, prepend_bos=prepend_bos), VOCABULARY)
    assert prompts.n_prompts == 120
    for row, clean, corrupted in _pairs(prompts):
        assert (clean[0] == VOCABULARY.bos_id) == prepend_bos
        io, subject = row["answer_id"], row["wrong_id"]
        assert [i for i, token in enumerate(clean) if token == io] == [row["pos_io"]]
        assert [i for i, token in enumerate(clean) if token == subject] == [row["pos_s1"], row["pos_s2"]]
        assert (row["pos_io"] < row["pos_s1"]) == row["source"].startswith("ABBA")
        assert row["pos_end"] == len(clean) - 1
        places = [row["pos_io"], row["pos_s1"], row["pos_s2"]] if corruption == "abc" else [row["pos_s2"]]
        assert [i for i in range(len(clean)) if clean[i] != corrupted[i]] == sorted(places)
        new = [corrupted[i] for i in places]
        if corruption == "abc":
            assert len({*new, io, subject}) == 5
        else:
            assert new == [io]


def test_ioi_has_fifteen_templates_of_each_order_that_take_turns():
    assert len(templates("BABA")) == len(templates("ABBA")) == 15
    for (_, abba), (_, baba) in zip(templates("ABBA"), templates("BABA"), strict=True):
        assert abba != baba
        assert abba.index("{IO}") < abba.index("{S}")
        assert baba.index("{S}") < baba.index("{IO}")
        assert Counter(abba.split()).total() == Counter(baba.split()).total()
        assert all(text.count("{S}") == 2 and text.count("{IO}") == 1 for text in (abba, baba))
    sources = encode_ioi(IOIConfig(n_pairs=60), VOCABULARY).table["source"][::2]
    assert set(Counter(sources).values()) == {2}
    assert set(encode_ioi(IOIConfig(n_pairs=9, templates="ABBA"), VOCABULARY).table["source"].str[:4]) == {"ABBA"}


def test_names_of_several_tokens_are_dropped_with_a_count():
    names = read_input("ioi.json")["names"]
    assert len(names) >= 100
    assert len(set(names)) == len(names)
    few = _word_vocabulary(left_out=names[6:])
    prompts = encode_ioi(IOIConfig(n_pairs=5), few)
    assert prompts.dropped == {"names of several tokens": len(names) - 6}
    with pytest.raises(PromptError, match="Only 4 of"):
        encode_ioi(IOIConfig(), _word_vocabulary(left_out=names[4:]))


def test_facts_are_many_and_distinct():
    table = read_input("facts.json")
    assert len(table) >= 6
    assert sum(len(entry["facts"]) for entry in table.values()) >= 120
    for entry in table.values():
        assert entry["template"].count("{subject}") == 1
        subjects = [row["subject"] for row in entry["facts"]]
        assert len(set(subjects)) == len(subjects)


def test_fact_pairs_ask_the_same_of_another_subject_with_another_answer():
    prompts = encode_facts(FactsConfig(n_pairs=400), VOCABULARY)
    table = read_input("facts.json")
    known = {
        (name, tuple(VOCABULARY.encode(entry["template"].replace("{subject}", row["subject"])))): row["answer"]
        for name, entry in table.items()
        for row in entry["facts"]
    }
    seen = set()
    for row, clean, corrupted in _pairs(prompts):
        assert known[row["source"], tuple(clean[1:])] == row["answer"].strip()
        assert known[row["source"], tuple(corrupted[1:])] == row["wrong"].strip() != row["answer"].strip()
        template = table[row["source"]]["template"]
        assert clean[row["pos_subject"] + 1 :] == VOCABULARY.encode(template.partition("{subject}")[2])
        assert (tuple(clean), tuple(corrupted)) not in seen
        seen.add((tuple(clean), tuple(corrupted)))
    assert len(seen) > 150


def test_facts_come_round_only_after_all_have_come():
    prompts = encode_facts(FactsConfig(n_pairs=60, relations=("capital",)), VOCABULARY)
    cleans = [tuple(clean) for _, clean, _ in _pairs(prompts)]
    n_facts = len(set(cleans))
    assert n_facts < 60
    assert len(set(cleans[:n_facts])) == n_facts


def test_answers_of_several_tokens_are_dropped_with_a_count():
    prompts = encode_facts(FactsConfig(relations=("capital",)), _word_vocabulary(left_out=["Paris", "Rome"]))
    assert prompts.dropped["answer of several tokens"] == 2
    assert not prompts.table["answer"].isin([" Paris", " Rome"]).any()
    with pytest.raises(PromptError, match="every answer takes several tokens"):
        encode_facts(FactsConfig(), TokenizerVocabulary(tiny_tokenizer()))


def test_an_unknown_relation_is_answered_with_the_nearest():
    with pytest.raises(ValidationError, match=r"no relation 'captial'\. Did you mean 'capital'"):
        FactsConfig(relations=("captial",))


def _pairs_file(tmp_path, *entries) -> PairsConfig:
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries), encoding="utf-8")
    return PairsConfig(path=path)


GOOD = {"clean": " a b c", "corrupted": " a d c", "answer": " b", "wrong": " d"}


def test_pairs_of_the_users_own_are_read_as_they_stand(tmp_path):
    vocabulary = TokenizerVocabulary(tiny_tokenizer())
    prompts = encode_user_pairs(_pairs_file(tmp_path, GOOD, {**GOOD, "name": "mine"}), vocabulary)
    ((row, clean, corrupted), _) = _pairs(prompts)
    assert clean == [0, *vocabulary.encode(" a b c")]
    assert corrupted == [0, *vocabulary.encode(" a d c")]
    assert (row["answer"], row["wrong"], row["pos_end"]) == (" b", " d", 3)
    assert prompts.table["source"].tolist() == ["pairs", "pairs", "mine", "mine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": " bd"}, r"line 2: the answer ' bd' is 2 tokens \(' b', 'd'\) and must be one"),
        ({"wrong": ""}, "line 2: the field 'wrong' is missing or no text"),
        ({"corrupted": " a d"}, "line 2: clean has 4 tokens and corrupted 3"),
        ({"corrupted": " a b c"}, "line 2: clean and corrupted are the same tokens"),
        ({"wrong": " b"}, "line 2: answer and wrong are the same token"),
        ({"answr": " b"}, "line 2: unknown field 'answr'"),
    ],
)
def test_a_pair_that_cannot_be_asked_is_an_error_with_its_line(tmp_path, change, message):
    config = _pairs_file(tmp_path, GOOD, {**GOOD, **change})
    with pytest.raises(PromptError, match=message):
        encode_user_pairs(config, TokenizerVocabulary(tiny_tokenizer()))


def test_pairs_of_numbers_work_for_a_toy_and_wrong_numbers_name_the_line(tmp_path):
    entry = {"clean": "1 2 1", "corrupted": "1 3 1", "answer": "2", "wrong": "3"}
    prompts = encode_user_pairs(_pairs_file(tmp_path, entry), NumberVocabulary(8))
    assert prompts.token_ids.tolist() == [1, 2, 1, 1, 3, 1]
    with pytest.raises(PromptError, match="line 1: tokens of this toy vocabulary are 0 to 7"):
        encode_user_pairs(_pairs_file(tmp_path, {**entry, "answer": "9"}), NumberVocabulary(8))


def test_a_pairs_file_is_known_by_its_content(tmp_path):
    first = _pairs_file(tmp_path, GOOD)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(first.path.read_bytes())
    assert PairsConfig(path=copy).identity() == first.identity()
    assert str(tmp_path) not in json.dumps(first.identity())
    with pytest.raises(PromptError, match="does not exist"):
        PairsConfig(path=tmp_path / "none.jsonl").identity()


@pytest.mark.real_model
@pytest.mark.parametrize("corruption", ["abc", "flip"])
def test_smollm2_identifies_the_indirect_object(smollm2, corruption):
    from mi_pipe.models.source import load_source

    model = load_source(smollm2)
    prompts = encode_ioi(IOIConfig(n_pairs=60, corruption=corruption), model.vocabulary)
    differences = []
    for row, clean, _ in _pairs(prompts):
        with torch.no_grad():
            logits = model.logits(torch.tensor([clean]))[0, -1]
        differences.append((logits[row["answer_id"]] - logits[row["wrong_id"]]).item())
    assert sum(difference > 0 for difference in differences) >= 58
    assert sum(differences) / len(differences) > 4
