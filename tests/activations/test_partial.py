"""An unfinished harvest is refused, or read as far as it is there; no value ever stands for a missing one."""

import pickle

import numpy as np
import pytest

import mi_pipe
from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.activations.partial import PartialStore
from mi_pipe.activations.training.shuffled import ShuffledReader
from mi_pipe.core.errors import ArtifactDamagedError, ArtifactIncompleteError, ArtifactNotFoundError
from mi_pipe.core.store import Store
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy

LENGTHS = [20] * 20 + [33, 7, 7, 20, 64, 1, 40] * 2


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def whole(request, tmp_path_factory):
    return harvest_toy(Store(tmp_path_factory.mktemp("whole")), LENGTHS, store_dtype=request.param)


def interrupted(store, n_batches, monkeypatch, **fields):
    """Stop a harvest after some batches."""
    original, budget = ForwardPass.start, [n_batches]

    def start_within_budget(self, batch):
        budget[0] -= 1
        if budget[0] < 0:
            raise KeyboardInterrupt
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ForwardPass, "start", start_within_budget)
        with pytest.raises(KeyboardInterrupt):
            harvest_toy(store, LENGTHS, **fields)


@pytest.fixture
def partial(store, whole, monkeypatch):
    """A harvest of which some shards are there, one in the middle is not, and none of the last are."""
    interrupted(store, 7, monkeypatch, store_dtype=whole.dtype)
    (store.folder(whole.id) / "commits/000002.json").unlink()
    return mi_pipe.open(whole.id, store, partial=True)


def test_it_is_refused_with_how_far_it_is_and_what_goes_on(store, whole, partial):
    for name in (whole.id, whole.id[:12], store.folder(whole.id)):
        with pytest.raises(
            ArtifactIncompleteError, match=rf"\d+ of \d+ units.*mi-pipe repair {whole.id}.*partial=True"
        ):
            mi_pipe.open(name, store)
    with pytest.raises(ArtifactNotFoundError):
        mi_pipe.open("harvest-0000000000000000", store, partial=True)


def test_available_rows_are_those_of_committed_shards(partial, whole):
    assert isinstance(partial, PartialStore)
    assert partial.is_partial
    assert not whole.is_partial
    assert whole.available.all()
    mask = partial.available
    assert mask[:128].all()
    assert not mask[128:192].any()
    assert mask[192:256].all()
    assert not mask[-64:].any()
    assert "of 12 shards" in repr(partial)


def test_rows_that_are_there_are_those_of_the_whole_store(partial, whole):
    for hook in (RESIDUAL, HEADS):
        for start, stop in ((0, 128), (64, 100), (192, 256)):
            np.testing.assert_array_equal(partial.read_rows(hook, start, stop), whole.read_rows(hook, start, stop))
        rows = np.array([250, 3, 64, 199, 3])
        np.testing.assert_array_equal(partial.take(hook, rows), whole.take(hook, rows))
    np.testing.assert_array_equal(partial.token_id, whole.token_id)


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.read_rows(RESIDUAL, 100, 130),
        lambda store: store.take(RESIDUAL, np.array([3, 130])),
        lambda store: store.array(RESIDUAL).read(128, 129),
        lambda store: store.group[RESIDUAL][120:140],
        lambda store: store.group[RESIDUAL][-1],
        lambda store: store.prompt(store.n_prompts - 1),
        lambda store: store.statistics(RESIDUAL),
        lambda store: store.massive(RESIDUAL),
        lambda store: store.mean(RESIDUAL),
        lambda store: store.by_token(RESIDUAL),
        lambda store: store.by_layer(),
        lambda store: store.rows("massive", RESIDUAL),
        lambda store: ShuffledReader(store, [RESIDUAL], 8),
    ],
)
def test_what_is_not_there_or_not_known_yet_is_refused(partial, read):
    with pytest.raises(ArtifactIncompleteError, match=r"not finished|is finished; \d+ of 12 shards"):
        read(partial)


def test_arrays_have_nan_where_rows_are_missing_and_say_so(partial, whole):
    found, expected = partial.to_xarray(), whole.to_xarray()
    mask = partial.available
    np.testing.assert_array_equal(found["available"].values, mask)
    np.testing.assert_array_equal(found["token_id"].values, expected["token_id"].values)
    for hook in (RESIDUAL, HEADS):
        values = found[hook].values
        np.testing.assert_array_equal(values[mask], expected[hook].values[mask])
        assert np.isnan(values[~mask]).all()
        piece = partial.to_dask(hook)[120:140:3, 2:5].compute()
        np.testing.assert_array_equal(piece[:3], whole.to_dask(hook)[120:128:3, 2:5].compute())
        assert np.isnan(piece[3:]).all()


def test_frames_and_blocks_leave_missing_rows_out(partial, whole):
    mask = partial.available
    frame, expected = partial.to_pandas(RESIDUAL), whole.to_pandas(RESIDUAL)
    assert frame.index.tolist() == np.flatnonzero(mask).tolist()
    same = [name for name in frame.columns if name in expected.columns]
    assert len(same) == 32 + 4
    assert frame[same].astype({"text": str}).equals(expected.loc[mask, same].astype({"text": str}))
    assert (
        partial.table()
        .astype({"text": str})
        .equals(whole.table()[partial.table().columns].loc[mask].reset_index(drop=True).astype({"text": str}))
    )
    rows = np.concatenate([block.rows for block in partial.blocks(RESIDUAL, 50)])
    assert rows.tolist() == np.flatnonzero(mask).tolist()
    picked = partial.to_pandas([RESIDUAL, HEADS], "pos > 3 and n_tokens == 20", columns=[1])
    assert picked.index.isin(np.flatnonzero(mask)).all()
    assert len(picked) < len(whole.to_pandas(RESIDUAL, "pos > 3 and n_tokens == 20"))
    assert partial.prompt(0)[RESIDUAL].shape == (20, 32)


def test_it_travels_to_other_processes(partial):
    again = pickle.loads(pickle.dumps(partial))
    np.testing.assert_array_equal(again.available, partial.available)


def test_altered_or_lost_files_of_committed_shards_are_not_read(store, whole, partial):
    path = store.folder(whole.id) / "activations.zarr" / RESIDUAL / "c/0/0"
    path.write_bytes((store.folder(whole.id) / "activations.zarr" / RESIDUAL / "c/1/0").read_bytes())
    found = mi_pipe.open(whole.id, store, partial=True)
    for read in (lambda: found.read_rows(RESIDUAL, 0, 3), lambda: found.group[RESIDUAL][:3]):
        with pytest.raises(ArtifactDamagedError):
            read()
    path.unlink()
    assert not mi_pipe.open(whole.id, store, partial=True).available[:64].any()
    (store.folder(whole.id) / "activations.zarr/pos/c/0").unlink()
    found = mi_pipe.open(whole.id, store, partial=True)
    for read in (lambda: found.pos, lambda: found.to_xarray()["pos"].values):
        with pytest.raises((ArtifactDamagedError, ArtifactIncompleteError)):
            read()


def test_before_the_first_shard_nothing_is_opened(store, whole, monkeypatch):
    interrupted(store, 0, monkeypatch, store_dtype=whole.dtype)
    found = mi_pipe.open(whole.id, store, partial=True)
    assert not found.available.any()
    assert len(found.to_pandas(RESIDUAL)) == 0


def test_a_finished_store_opens_as_ever(whole):
    store = Store(whole.path.parent.parent)
    assert not mi_pipe.open(whole.id, store, partial=True).is_partial


def test_an_unfinished_harvest_in_an_object_store(store, whole, monkeypatch, bucket):
    interrupted(store, 7, monkeypatch, store_dtype=whole.dtype, destination=bucket)
    found = mi_pipe.open(whole.id, store, partial=True)
    np.testing.assert_array_equal(found.read_rows(RESIDUAL, 0, 64), whole.read_rows(RESIDUAL, 0, 64))
    with pytest.raises(ArtifactIncompleteError):
        found.read_rows(RESIDUAL, found.n_rows - 1, found.n_rows)
