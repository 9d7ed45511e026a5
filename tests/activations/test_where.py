"""Conditions on rows: pandas' own query is the independent implementation; nothing but choosing rows is possible."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_pipe.activations.where import Condition, Texts
from mi_pipe.core.errors import ConfigError

MASSIVE = "massive:blocks.0.hook_resid_post"
TEXTS = [" Paris", " a`b&c", "it's", "\n", " x|y", '"']
RNG = np.random.default_rng(0)
FRAME = pd.DataFrame(
    {
        "pos": RNG.integers(0, 9, 200),
        "token_id": RNG.integers(-3, 4, 200),
        "text": pd.Categorical.from_codes(RNG.integers(0, len(TEXTS), 200), TEXTS),
        MASSIVE: RNG.random(200) < 0.3,
    }
)


def columns() -> dict:
    text = Texts(FRAME["text"].cat.codes.to_numpy(np.int64), list(TEXTS))
    return {name: FRAME[name].to_numpy() for name in FRAME if name != "text"} | {"text": text}


def mask(condition: str) -> np.ndarray:
    return Condition(condition, list(FRAME), {"token": "text"}).mask(columns(), len(FRAME))


computed = st.one_of(
    st.sampled_from(["pos", "token_id"]),
    st.tuples(st.sampled_from(["pos", "token_id"]), st.sampled_from("+-*"), st.integers(0, 9)).map(
        "({0[0]} {0[1]} {0[2]})".format
    ),
    st.tuples(st.sampled_from(["pos", "token_id"]), st.sampled_from(["%", "//"]), st.integers(1, 5)).map(
        "({0[0]} {0[1]} {0[2]})".format
    ),
)
numbers = st.one_of(computed, st.integers(-9, 9).map(str))
comparisons = st.one_of(
    st.tuples(computed, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), numbers).map(" ".join),
    st.tuples(numbers, st.sampled_from(["<", "<="]), computed, st.sampled_from(["<", "<="]), numbers).map(" ".join),
    st.tuples(st.sampled_from(["token", "text"]), st.sampled_from(["==", "!="]), st.sampled_from(TEXTS).map(repr)).map(
        " ".join
    ),
    st.tuples(
        st.just("token"), st.sampled_from(["in", "not in"]), st.lists(st.sampled_from(TEXTS), min_size=1).map(repr)
    ).map(" ".join),
    st.tuples(st.just("pos"), st.sampled_from(["in", "not in"]), st.lists(st.integers(0, 9), min_size=1).map(repr)).map(
        " ".join
    ),
    st.just(f"`{MASSIVE}`"),
)
conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or", "&", "|"]), inner).map("({0[0]}) {0[1]} ({0[2]})".format),
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join),
        inner.map("not ({})".format),
        inner.map("~({})".format),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(conditions)
def test_any_condition_picks_the_rows_that_pandas_picks(condition):
    text = FRAME["text"].astype(str)
    expected = FRAME.assign(token=text, text=text).query(condition, engine="python")
    np.testing.assert_array_equal(np.flatnonzero(mask(condition)), expected.index)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("token.str.startswith(' ')", FRAME["text"].astype(str).str.startswith(" ")),
        ("text.str.endswith('c')", FRAME["text"].astype(str).str.endswith("c")),
        ("token.str.contains('|')", FRAME["text"].astype(str).str.contains("|", regex=False)),
        ("pos.isin([1, 2]) and token.isin([' Paris'])", FRAME["pos"].isin([1, 2]) & (FRAME["text"] == " Paris")),
        ("pos / 2 == 1.5", FRAME["pos"] == 3),
        ("2 <\n pos  # a remark", FRAME["pos"] > 2),
        ("`token` == ' Paris'", FRAME["text"] == " Paris"),
        ("True", FRAME["pos"] > -1),
    ],
)
def test_what_else_has_a_meaning(condition, expected):
    np.testing.assert_array_equal(mask(condition), expected)


def test_only_the_columns_named_are_asked_for():
    condition = Condition(f"`{MASSIVE}` or pos > 1 or pos < 0", list(FRAME))
    assert condition.columns == [MASSIVE, "pos"]


def test_missing_values_fulfil_nothing_but_being_different():
    texts = {"text": Texts(np.array([0, -1]), [" a"]), "pos": np.array([np.nan, 1.0])}
    for condition, expected in [
        ("text == ' a'", [True, False]),
        ("text != ' a'", [False, True]),
        ("text.str.startswith(' ')", [True, False]),
        ("pos > 0", [False, True]),
        ("pos in [1]", [False, True]),
    ]:
        assert Condition(condition, list(texts)).mask(texts, 2).tolist() == expected


REFUSED = [
    "__import__('os').system('touch CANARY')",
    "().__class__.__bases__[0].__subclasses__()",
    "token.__class__ == 1",
    "token.str.__class__('a')",
    "token.str.encode('a')",
    "text.str.startswith(pos)",
    "text.str.startswith('a', 'b')",
    "text.str.contains(pat='a')",
    "pos.isin(token)",
    "pos.apply(open)",
    "open('CANARY', 'w')",
    "@os.system('touch CANARY')",
    "[open('CANARY', 'w') for pos in [1]]",
    "{pos: 1}",
    "lambda: pos",
    "(pos := 3) > 1",
    'f\'{open("CANARY", "w")}\' == token',
    "pos if pos else pos",
    "pos[0] == 1",
    "pos ** 9 ** 9 > 1",
    "'a' * 10**10 == token",
    "pos << 3 > 1",
    "pos > None",
    "token == b'x'",
    "pos == 1j",
    "await pos",
    "pos is 3",
    "pos = 3",
    "pos; pos",
    "import os",
    "",
    "   ",
    "(",
    "pos >",
    "not " * 5000 + "True",
    "(" * 500 + "pos" + ")" * 500,
    "pos == " + "9" * 5000,
    "pos\x00 > 1",
    "pos // 0 == 1",
    "1 / 0 > 1",
    "pos * 99999999999999999999 > 1",
    "pos",
    "pos + 1",
    "token",
    "'Paris'",
    "token > 'a'",
    "token == 3",
    "pos == '3'",
    "pos + token == 1",
    "not pos",
    "pos and token == 'a'",
    "token in 'abc'",
    "token in [1, 2]",
    "token in [text]",
    f"`{MASSIVE}` > 3",
    "nonsense == 3",
    "`massive:blocks.1` == True",
]


@pytest.mark.parametrize("condition", REFUSED, ids=range(len(REFUSED)))
def test_anything_else_is_refused_in_a_sentence_or_two_and_does_nothing(condition, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot be evaluated") as caught:
        mask(condition)
    assert len(str(caught.value)) < 700
    assert not list(tmp_path.iterdir())


def test_a_misspelt_column_is_answered_with_near_names():
    with pytest.raises(ConfigError, match="Did you mean 'token_id'"):
        mask("token_ids == 3")
