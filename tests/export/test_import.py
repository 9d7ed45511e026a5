"""Dumps of other programs become activation stores: values bit for bit, mistakes in one sentence before any work."""

import json

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import mi_pipe
from mi_pipe.activations.harvest.writer import ShardWriter, StorageOverflowError
from mi_pipe.core.errors import ConfigError, StageError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from stages import import_activations
from stages.import_activations import ImportConfig, Inputs
from tests.activations.harvests import tree_hashes

HOOK, OTHER = "blocks.3.hook_resid_post", "blocks.4.mlp.hook_post"
N_PROMPTS, N_POS, WIDTH = 40, 10, 6
N_ROWS = N_PROMPTS * N_POS
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(N_ROWS, WIDTH)).astype(np.float32)
WIDE = RNG.normal(size=(N_ROWS, 2, 7)).astype(np.float32)


def table(**columns) -> pd.DataFrame:
    ids = np.random.default_rng(1).integers(0, 30, N_ROWS)
    frame = pd.DataFrame(
        {
            "prompt_idx": np.repeat(np.arange(N_PROMPTS), N_POS),
            "pos": np.tile(np.arange(1, N_POS + 1), N_PROMPTS),
            "token_id": ids,
            "text": [["NA", "null", "", " nan", " Mary"][i % 5] for i in ids],
        }
    )
    return frame.assign(**columns)


@pytest.fixture
def tokens(tmp_path):
    table().to_parquet(tmp_path / "tokens.parquet", index=False)
    return tmp_path / "tokens.parquet"


def bring(store: Store, *files, **fields):
    config = ImportConfig(files=tuple(files), **{"shard_rows": 64, **fields})
    return mi_pipe.open(execute(import_activations.STAGE, config, Inputs(), store).artifact.path)


def as_npy(folder, dtype):
    np.save(folder / "acts.npy", VALUES.astype(dtype))
    return [folder / "acts.npy"], {HOOK: ""}


def as_npy_by_prompt(folder, dtype):
    np.save(folder / "acts.npy", np.asfortranarray(VALUES.astype(dtype).reshape(N_PROMPTS, N_POS, WIDTH)))
    return [folder / "acts.npy"], {HOOK: ""}


def as_npy_parts(folder, dtype):
    for i, part in enumerate(np.array_split(VALUES.astype(dtype), 3)):
        np.save(folder / f"part{i}.npy", part)
    return [folder / f"part{i}.npy" for i in range(3)], {HOOK: ""}


def as_safetensors(folder, dtype):
    values = torch.from_numpy(VALUES).to(getattr(torch, dtype))
    save_file({"layer3": values, "ids": torch.arange(N_ROWS)}, folder / "acts.safetensors")
    return [folder / "acts.safetensors"], {HOOK: "layer3"}


def as_safetensors_parts(folder, dtype):
    values = torch.from_numpy(VALUES).to(getattr(torch, dtype)).reshape(N_PROMPTS, N_POS, WIDTH)
    for i, part in enumerate(values.split(15)):
        save_file({HOOK: part.contiguous()}, folder / f"part{i}.safetensors")
    return sorted(folder.glob("part*.safetensors")), {HOOK: ""}


def as_hdf5(folder, dtype):
    with h5py.File(folder / "acts.h5", "w") as file:
        if dtype == "bfloat16":
            bits = torch.from_numpy(VALUES).bfloat16().view(torch.int16).numpy().view(np.uint16)
            file.create_dataset("deep/acts", data=bits).attrs["logical_dtype"] = "bfloat16"
        else:
            file.create_dataset("deep/acts", data=VALUES.astype(dtype), chunks=(7, WIDTH), compression="gzip")
    return [folder / "acts.h5"], {HOOK: ""}


def as_big_endian_npy(folder, dtype):
    np.save(folder / "acts.npy", VALUES.astype(np.dtype(dtype).newbyteorder(">")))
    return [folder / "acts.npy"], {HOOK: ""}


DUMPS = [as_npy, as_npy_by_prompt, as_npy_parts, as_big_endian_npy]
WITH_BFLOAT16 = [as_safetensors, as_safetensors_parts, as_hdf5]
EVERY_DUMP = [(dump, dtype) for dump in DUMPS + WITH_BFLOAT16 for dtype in ("float16", "float32")]


@pytest.mark.parametrize(("dump", "dtype"), EVERY_DUMP + [(dump, "bfloat16") for dump in WITH_BFLOAT16])
def test_values_are_stored_bit_for_bit(dump, dtype, tmp_path, tokens):
    files, hooks = dump(tmp_path, dtype)
    acts = bring(Store(tmp_path / "store"), *files, hooks=hooks, tokens=tokens)
    expected = torch.from_numpy(VALUES).to(getattr(torch, dtype)).float().numpy()
    assert (acts.dtype, acts.n_rows, acts.n_prompts) == (dtype, N_ROWS, N_PROMPTS)
    np.testing.assert_array_equal(acts.read_rows(HOOK, 0, N_ROWS), expected)
    acts.check()


def test_the_store_is_like_a_harvests(tmp_path, tokens):
    files, hooks = as_npy(tmp_path, "float32")
    np.save(tmp_path / "wide.npy", WIDE)
    acts = bring(Store(tmp_path / "store"), *files, tmp_path / "wide.npy", hooks={**hooks, OTHER: ""}, tokens=tokens)
    assert acts.hooks == [HOOK, OTHER]
    assert acts.array(OTHER).layout.token_shape == (2, 7)
    np.testing.assert_array_equal(acts.read_rows(OTHER, 0, N_ROWS), WIDE.reshape(N_ROWS, 14))
    norms = np.linalg.norm(VALUES.astype(np.float64), axis=1)
    found = acts.statistics(HOOK)
    kept = VALUES[~acts.massive(HOOK)].astype(np.float64)
    np.testing.assert_allclose(found.mean, kept.mean(0), rtol=1e-9, atol=1e-12)
    assert found.median_norm == pytest.approx(np.median(norms), rel=1e-6)
    names = set(acts.manifest.files)
    assert {"tokens.parquet", "prompts.parquet", "statistics.safetensors", "precision.json"} <= names
    assert len([name for name in names if name.startswith("commits/")]) == -(-N_ROWS // 64)
    assert acts.prompts["n_tokens"].tolist() == [N_POS + 1] * N_PROMPTS
    frame = acts.to_pandas(HOOK, where="token == ' Mary' and pos > 3")
    picked = table().query("text == ' Mary' and pos > 3")
    assert frame.index.tolist() == picked.index.tolist()
    np.testing.assert_array_equal(frame[list(range(WIDTH))], VALUES[picked.index])
    assert acts.by_layer()["layer"].tolist() == [3, 4]
    dataset = acts.to_xarray()
    np.testing.assert_array_equal(dataset[HOOK], VALUES)
    train, held_out = acts.prompt_split(0.2, seed=0)
    assert (train ^ held_out).all()


def test_training_batches_come_from_it(tmp_path, tokens):
    from mi_pipe.activations.training.shuffled import ShuffledReader

    files, hooks = as_npy(tmp_path, "float32")
    acts = bring(Store(tmp_path / "store"), *files, hooks=hooks, tokens=tokens)
    reader = ShuffledReader(acts, [HOOK], batch_rows=32)
    batch = next(iter(reader.batches(0, 1)))[HOOK].numpy()
    assert {row.tobytes() for row in batch} <= {row.tobytes() for row in VALUES}


@pytest.mark.parametrize("suffix", [".parquet", ".csv", "columns.h5", "compound.h5"])
def test_token_tables_of_every_kind_are_read_as_they_are(suffix, tmp_path):
    frame = table(extra=1.5)
    path = tmp_path / f"tokens{suffix}"
    if suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        with h5py.File(path, "w") as file:
            if suffix == "columns.h5":
                for name in ("prompt_idx", "pos", "token_id"):
                    file[f"tokens/{name}"] = frame[name].to_numpy()
                file["tokens/text"] = frame["text"].to_list()
            else:
                kind = [("prompt_idx", "i4"), ("pos", "i8"), ("token_id", "u2"), ("text", "S8")]
                rows = [tuple(row) for row in frame[[name for name, _ in kind]].itertuples(index=False)]
                file["tokens"] = np.array(rows, kind)
    files, hooks = as_npy(tmp_path, "float16")
    acts = bring(Store(tmp_path / "store"), *files, hooks=hooks, tokens=path)
    found = acts.table()
    for name in ("prompt_idx", "pos", "token_id"):
        np.testing.assert_array_equal(found[name], frame[name])
    assert found["text"].astype(str).tolist() == frame["text"].tolist()


def test_an_hdf5_file_with_its_own_table_needs_no_other(tmp_path):
    with h5py.File(tmp_path / "acts.h5", "w") as file:
        file["x"] = VALUES
        for name in ("prompt_idx", "pos", "token_id"):
            file[f"tokens/{name}"] = table()[name].to_numpy()
    acts = bring(Store(tmp_path / "store"), tmp_path / "acts.h5", hooks={HOOK: "x"})
    assert acts.table()["text"].astype(str).tolist() == table()["token_id"].astype(str).tolist()


def test_mixed_dtypes_are_stored_in_one_that_holds_both(tmp_path, tokens):
    np.save(tmp_path / "a.npy", VALUES.astype(np.float16))
    save_file({"b": torch.from_numpy(WIDE).bfloat16()}, tmp_path / "b.safetensors")
    np.save(tmp_path / "b.npy", WIDE)
    acts = bring(
        Store(tmp_path / "store"), tmp_path / "a.npy", tmp_path / "b.npy", hooks={HOOK: "", OTHER: ""}, tokens=tokens
    )
    assert acts.dtype == "float32"
    np.testing.assert_array_equal(acts.read_rows(HOOK, 0, N_ROWS), VALUES.astype(np.float16).astype(np.float32))


def test_its_id_is_of_contents_not_of_paths(tmp_path, tokens):
    files, hooks = as_npy(tmp_path, "float32")
    first = bring(Store(tmp_path / "store"), *files, hooks=hooks, tokens=tokens)
    moved = files[0].rename(tmp_path / "moved.npy")
    second = bring(Store(tmp_path / "other"), moved, hooks=hooks, tokens=tokens)
    assert (first.id, first.digest) == (second.id, second.digest)
    assert tree_hashes(first) == tree_hashes(second)
    for path in (tmp_path, moved):
        assert str(path) not in json.dumps(second.manifest.config)
    assert second.manifest.execution["files"] == [str(moved)]
    np.save(moved, VALUES + 1)
    assert bring(Store(tmp_path / "other"), moved, hooks=hooks, tokens=tokens).id != first.id


class _Stop(Exception):
    pass


def test_stopped_anywhere_it_goes_on_and_ends_with_the_same_bytes(tmp_path, tokens, monkeypatch):
    files, hooks = as_npy(tmp_path, "float32")
    whole = tree_hashes(bring(Store(tmp_path / "whole"), *files, hooks=hooks, tokens=tokens))
    original, budget, written = ShardWriter._write, [0], []

    def write_within_budget(self, shard, buffers):
        budget[0] -= 1
        if budget[0] < 0:
            raise _Stop
        written.append(shard)
        original(self, shard, buffers)

    monkeypatch.setattr(ShardWriter, "_write", write_within_budget)
    store = Store(tmp_path / "stopped")
    for _ in range(20):
        budget[0] = 2
        try:
            acts = bring(store, *files, hooks=hooks, tokens=tokens)
            break
        except _Stop:
            assert store.published_ids() == []
    assert tree_hashes(acts) == whole
    assert acts.manifest.n_launches > 2
    assert written == list(range(-(-N_ROWS // 64))), "no shard was written twice"


def test_files_that_change_meanwhile_are_refused(tmp_path, tokens, monkeypatch):
    files, hooks = as_npy(tmp_path, "float32")
    original = ShardWriter._write

    def write_and_meddle(self, shard, buffers):
        original(self, shard, buffers)
        table(pos=table()["pos"] + 1).to_parquet(tokens, index=False)

    monkeypatch.setattr(ShardWriter, "_write", write_and_meddle)
    with pytest.raises(StageError, match="changed while"):
        bring(Store(tmp_path / "store"), *files, hooks=hooks, tokens=tokens)
    assert Store(tmp_path / "store").published_ids() == []


def test_values_that_do_not_fit_are_refused(tmp_path, tokens):
    np.save(tmp_path / "big.npy", np.where(np.arange(N_ROWS)[:, None] == 70, 1e6, VALUES).astype(np.float64))
    np.save(tmp_path / "nan.npy", np.where(np.arange(N_ROWS)[:, None] == 70, np.nan, VALUES).astype(np.float32))
    store = Store(tmp_path / "store")
    with pytest.raises(ConfigError, match="float64"):
        bring(store, tmp_path / "big.npy", hooks={HOOK: ""}, tokens=tokens)
    with pytest.raises(StorageOverflowError, match="rows 64 to 128"):
        bring(store, tmp_path / "big.npy", hooks={HOOK: ""}, tokens=tokens, store_dtype="float16")
    with pytest.raises(StorageOverflowError, match="not finite"):
        bring(store, tmp_path / "nan.npy", hooks={HOOK: ""}, tokens=tokens)
    rounded = bring(store, tmp_path / "big.npy", hooks={HOOK: ""}, tokens=tokens, store_dtype="float32")
    assert rounded.read_rows(HOOK, 70, 71)[0, 0] == 1e6


def spoilt(frame: pd.DataFrame, row: int, **values) -> pd.DataFrame:
    frame = frame.copy()
    for name, value in values.items():
        frame.loc[row, name] = value
    return frame


TABLES = [
    (table().drop(columns="pos"), "no column 'pos'"),
    (table(pos=0.5), "whole numbers"),
    (spoilt(table(), 5, token_id=-1), "token_id .* is -1 at row 5"),
    (spoilt(table(), 5, token_id=2**40), "at row 5"),
    (spoilt(table(), 12, prompt_idx=0), "Row 12 .* is of prompt 0 after prompt 1"),
    (table(prompt_idx=table()["prompt_idx"] * 2), "Row 10 .* is of prompt 2 after prompt 0"),
    (table(prompt_idx=table()["prompt_idx"] + 1), "Row 0 .* is of prompt 1"),
    (table(pos=1), "Row 1 .* is position 1 of prompt 0 after position 1"),
    (table(row=np.arange(N_ROWS)[::-1]), "does not count 0, 1, 2"),
    (table().iloc[:50], "shape"),
    (table().iloc[:0], "no rows"),
]


@pytest.mark.parametrize(("frame", "message"), TABLES, ids=range(len(TABLES)))
def test_a_wrong_token_table_is_one_sentence(frame, message, tmp_path):
    files, hooks = as_npy(tmp_path, "float32")
    frame.to_parquet(tmp_path / "wrong.parquet", index=False)
    store = Store(tmp_path / "store")
    with pytest.raises(ConfigError, match=message):
        bring(store, *files, hooks=hooks, tokens=tmp_path / "wrong.parquet")
    assert store.published_ids() == store.unfinished_ids() == []


def test_wrong_files_and_names_are_one_sentence(tmp_path, tokens):
    store = Store(tmp_path / "store")
    np.save(tmp_path / "a.npy", VALUES)
    np.save(tmp_path / "b.npy", VALUES[:, :3])
    np.save(tmp_path / "ints.npy", VALUES.astype(int))
    np.save(tmp_path / "flat.npy", VALUES[:, 0])
    (tmp_path / "junk.npy").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    (tmp_path / "junk.h5").write_bytes(b"junk")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    np.save(tmp_path / "objects.npy", np.array([{}] * N_ROWS, object), allow_pickle=True)
    save_file({"x": torch.zeros(N_ROWS, 2), "y": torch.zeros(N_ROWS, 2)}, tmp_path / "two.safetensors")
    cases = [
        (["a.npy"], {}, "--hook"),
        (["two.safetensors"], {}, "holds x, y"),
        (["two.safetensors"], {HOOK: ""}, f"--hook {HOOK}=NAME"),
        (["two.safetensors"], {HOOK: "z"}, "no array|No file has an array 'z'"),
        (["a.npy"], {HOOK: "x"}, "without a name"),
        (["a.npy", "b.npy"], {HOOK: ""}, "does not continue"),
        (["a.npy"], {HOOK: "", OTHER: ""}, "2 hook points and 1 .npy files"),
        (["ints.npy"], {HOOK: ""}, "no floating-point"),
        (["flat.npy"], {HOOK: ""}, "two or more axes"),
        (["junk.npy"], {HOOK: ""}, "cannot be read as npy"),
        (["junk.safetensors"], {HOOK: ""}, "cannot be read as safetensors"),
        (["junk.h5"], {HOOK: ""}, "cannot be read as hdf5"),
        (["junk.pt"], {HOOK: ""}, "none of .npy"),
        (["objects.npy"], {HOOK: ""}, "cannot be read as npy"),
        (["gone.npy"], {HOOK: ""}, "no file"),
        (["a.npy"], {"token_id": ""}, "cannot be the name"),
        (["a.npy"], {"../up": ""}, "cannot be the name"),
        ([], {HOOK: ""}, "at least one file"),
    ]
    for names, hooks, message in cases:
        with pytest.raises(ConfigError, match=message):
            bring(store, *(tmp_path / name for name in names), hooks=hooks, tokens=tokens)
    with pytest.raises(ConfigError, match="--tokens"):
        bring(store, tmp_path / "a.npy", hooks={HOOK: ""})
    with pytest.raises(ConfigError, match="power of two"):
        bring(store, tmp_path / "a.npy", hooks={HOOK: ""}, tokens=tokens, shard_rows=100)
    assert store.published_ids() == store.unfinished_ids() == []
