import json

import numpy as np
import pytest

from mi_pipe.report.html import data_script, number, rounded, safe_json, seconds, slug, visible
from tests.report.samples import HOSTILE, TOKENS


def test_embedded_json_has_no_character_that_could_end_a_script():
    text = safe_json({"tokens": TOKENS, HOSTILE: [1, float("nan"), float("inf")]})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"tokens": TOKENS, HOSTILE: [1, None, None]}


def test_numpy_values_become_json():
    value = {"a": np.float32(0.5), "b": np.arange(3), "c": np.bool_(True), "d": np.array([np.nan])}
    assert json.loads(safe_json(value)) == {"a": 0.5, "b": [0, 1, 2], "c": True, "d": [None]}


def test_a_data_script_is_one_call_with_two_arguments():
    text = data_script("a/b", {"x": HOSTILE})
    assert text.startswith('miPipe.receive("a/b",{')
    assert text.endswith("});\n")
    assert "<" not in text


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" a", " a"), ("\n\t", "⏎⇥"), ("\x00", "\\u0000"), ("\u202e", "\\u202e"), ("\u2028", "\\u2028"), ("日", "日")],
)
def test_invisible_characters_are_shown(token, shown):
    assert visible(token) == shown


@pytest.mark.parametrize(("name", "safe"), [("a/../b", "a-..-b"), ("..", "unnamed"), ("<b>", "b"), ("L1.k8", "L1.k8")])
def test_slugs_are_plain_file_names(name, safe):
    assert slug(name) == safe


def test_numbers_and_durations_are_written_for_reading():
    assert [number(x) for x in (1234567, 0.123456, 1.5e-7, float("nan"), None, 3.0)] == [
        "1,234,567", "0.1235", "1.5e-07", "–", "–", "3",
    ]  # fmt: skip
    assert [seconds(x) for x in (0.25, 75, 3720)] == ["0.25 s", "1 min 15 s", "1 h 2 min"]
    assert rounded(np.array([[1.234567, np.nan]])) == [[1.2346, None]]
