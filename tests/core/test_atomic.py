"""What is durable when: a power cut keeps what was synced, so the order of syncs, names and records is the protocol."""

import os
from pathlib import Path

import pytest

from mi_pipe.core import atomic
from tests.activations.harvests import harvest_toy


@pytest.fixture
def events(monkeypatch):
    """Record every sync of a file or folder, and every name that a file gets, in order, as (what, path)."""
    found: list[tuple[str, Path]] = []
    originals = {name: getattr(os, name) for name in ("fsync", "link", "replace", "rename", "mkdir")}

    def fsync(handle):
        found.append(("sync", Path(f"/proc/self/fd/{handle}").readlink()))
        originals["fsync"](handle)

    def named(name):
        def give(source, target, *rest, **options):
            found.append(("name", Path(target)))
            return originals[name](source, target, *rest, **options)

        return give

    def mkdir(path, *rest, **options):
        originals["mkdir"](path, *rest, **options)
        found.append(("folder", Path(path)))

    for name, function in {
        "fsync": fsync,
        "mkdir": mkdir,
        **{n: named(n) for n in ("link", "replace", "rename")},
    }.items():
        monkeypatch.setattr(os, name, function)
    return found


@pytest.mark.parametrize("write", [atomic.write_bytes, atomic.create_bytes])
def test_bytes_are_synced_before_the_name_and_the_folder_after_it(events, tmp_path, write):
    write(tmp_path / "new" / "below" / "file", b"data")
    (folders, (_, temp), *rest) = events[:4], events[4], *events[5:]
    assert folders[2:] == [("sync", tmp_path), ("sync", tmp_path / "new")]
    assert {what for what, _ in folders[:2]} == {"folder"}
    assert temp.name.startswith(".file.")
    assert rest == [("name", tmp_path / "new/below/file"), ("sync", tmp_path / "new/below")]


def test_a_shards_record_comes_after_its_files_are_durable(events, store):
    acts = harvest_toy(store, [20] * 20)
    steps = {path: i for i, (what, path) in enumerate(events) if what == "name"}
    for shard in range(-(-acts.n_rows // acts.shard_rows)):
        record = steps[acts.path / f"commits/{shard:06d}.json"]
        for hook in acts.hooks:
            file = acts.group_path / hook / f"c/{shard}/0"
            before = events[:record]
            named = before.index(("name", file))
            assert any(what == "sync" and path.name.startswith(".0.") for what, path in before[:named])
            assert ("sync", file.parent) in before[named:]
            assert ("sync", file.parent.parent) in before, "or the shard's own folder could be lost"
    manifest = steps[acts.path / "manifest.json"]
    assert all(step < manifest for path, step in steps.items() if "commits" in path.parts)
    assert ("sync", acts.path) in events[manifest:]
