import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mi_pipe.prompts.packing import pack

_DOCUMENTS = st.lists(st.lists(st.integers(10, 99), max_size=25), max_size=12)
_SEPARATORS = st.lists(st.integers(2, 3), max_size=2)


@given(_DOCUMENTS, _SEPARATORS, st.integers(2, 9), st.sampled_from([None, 1]))
def test_windows_hold_the_joined_documents_once_and_in_order(documents, separator, window, bos_id):
    windows = pack([np.array(tokens, np.int32) for tokens in documents], separator, window, bos_id)
    joined, owners = [], []
    for i, tokens in enumerate(documents):
        if i:
            joined += separator
            owners += [i - 1] * len(separator)
        joined += tokens
        owners += [i] * len(tokens)
    n_bos = 0 if bos_id is None else 1
    n_body = window - n_bos
    assert windows.tokens.dtype == np.int32
    assert windows.tokens.shape == (len(joined) // n_body, window)
    assert windows.tokens[:, n_bos:].flatten().tolist() == joined[: len(joined) // n_body * n_body]
    assert (windows.tokens[:, :n_bos] == bos_id).all()
    assert windows.document.tolist() == [owners[i * n_body] for i in range(len(joined) // n_body)]
