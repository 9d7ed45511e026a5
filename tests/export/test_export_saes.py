"""SAEs as folders of other programs: the peers' formulas on what is written give what the SAE gives.

The proof with the peers themselves needs an environment for each:

    python -m venv peers && peers/bin/pip install torch==2.13.0 sae-lens
    MI_PIPE_SAELENS_PYTHON=peers/bin/python pytest tests/export/test_export_saes.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bench.sae_formats.samples import READ, RESIDUAL, WRITTEN, every_sae, inputs_of, publish_saes
from mi_pipe.core.errors import ArtifactNotFoundError, ConfigError
from mi_pipe.core.store import Store
from mi_pipe.export.sae_formats import exporting
from mi_pipe.export.sae_formats.exporting import SAE_FORMATS, export_saes
from mi_pipe.export.sae_formats.origin import Origin, origin_of
from mi_pipe.export.sae_formats.packed import PROBE_FILE, Form
from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites
from tests.export.peer_formulas import RUN

D_IN, D_OUT, D_SAE, K = 12, 8, 40, 4
SAES = {sae.name: sae for sae in every_sae(D_IN, D_SAE, K, D_OUT)}
PEERS = {peer: f"MI_PIPE_{peer.upper()}_PYTHON" for peer in SAE_FORMATS}
OWN = Path(__file__).parent / "peer_saes"
ARCHITECTURES = {
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "standard": "standard",
    "p_anneal": "standard",
    "gated": "gated",
    "standard.transcoder": "transcoder",
    "standard.skip_transcoder": "skip_transcoder",
    "batchtopk.transcoder": "jumprelu_transcoder",
    "jumprelu.transcoder": "jumprelu_transcoder",
    "jumprelu.skip_transcoder": "jumprelu_skip_transcoder",
}
CLASSES = {
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "standard": "AutoEncoder",
    "standard.free_rows": "AutoEncoderNew",
    "p_anneal": "AutoEncoder",
    "gated": "GatedAutoEncoder",
}


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    return publish_saes(Store(tmp_path_factory.mktemp("saes")), list(SAES.values()))


def held_by(peer: str) -> list[str]:
    return [name for name, sae in SAES.items() if SAE_FORMATS[peer].holds(Form.of(sae))]


@pytest.fixture(scope="module")
def exported(saes, tmp_path_factory):
    """All that each format holds, written once."""
    root = tmp_path_factory.mktemp("exported")
    return {peer: export_saes(saes, peer, root / peer, held_by(peer)) for peer in SAE_FORMATS}


@pytest.mark.parametrize(("peer", "name"), [(peer, name) for peer in SAE_FORMATS for name in held_by(peer)])
def test_the_peers_formula_gives_the_same_features_and_output(exported, peer, name):
    x = inputs_of(SAES[name], 50)
    features, output = RUN[peer](exported[peer] / name, x)
    expected = SAES[name].encode(x)
    assert 0.5 < float((expected > 0).sum(1).float().mean()) < D_SAE
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output, SAES[name](x), rtol=1e-4, atol=1e-4)


def test_each_format_holds_what_the_table_says():
    assert set(ARCHITECTURES) <= set(held_by("saelens"))
    assert "topk.transcoder" not in held_by("saelens")
    assert held_by("sparsify") == [name for name in SAES if name.startswith("topk")]
    assert held_by("dictionary_learning") == [name for name in SAES if "transcoder" not in name]


@pytest.mark.parametrize(("name", "architecture"), ARCHITECTURES.items())
def test_saelens_folders_are_as_its_own_saver_writes_them(exported, name, architecture):
    """The same tensors with the same axes, and at least the same keys of the config, but for what it takes as read."""
    folder, own = exported["saelens"] / name, OWN / "saelens" / architecture
    cfg, theirs = (json.loads((path / "cfg.json").read_text()) for path in (folder, own))
    assert cfg["architecture"] == theirs["architecture"] == architecture
    assert set(theirs) <= set(cfg)
    assert set(theirs["metadata"]) <= set(cfg["metadata"])
    sizes = {6: D_IN, 4: D_OUT, 16: D_SAE}
    ours = load_file(folder / "sae_weights.safetensors")
    expected = load_file(own / "sae_weights.safetensors")
    assert {name: value.shape for name, value in ours.items()} == {
        name: torch.Size(sizes[n] for n in value.shape) for name, value in expected.items()
    }
    assert all(value.dtype == torch.float32 for value in ours.values())


@pytest.mark.parametrize(("name", "kind"), CLASSES.items())
def test_dictionary_learning_states_are_as_its_own_classes_have_them(exported, name, kind):
    folder = exported["dictionary_learning"] / name
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == kind
    assert (trainer["activation_dim"], trainer["dict_size"], trainer["layer"]) == (D_IN, D_SAE, 3)
    theirs = json.loads((OWN / "dictionary_learning" / "state.json").read_text())[kind]
    sizes = {6: D_IN, 16: D_SAE}
    ours = torch.load(folder / "ae.pt", weights_only=True)
    found = {key: [str(value.dtype).removeprefix("torch."), list(value.shape)] for key, value in ours.items()}
    groups = [len(ours["group_sizes"])] if "group_sizes" in ours else []
    assert found == {
        key: [dtype, groups if key == "group_sizes" else [sizes[n] for n in shape]]
        for key, (dtype, shape) in theirs.items()
    }


@pytest.mark.parametrize(("name", "own"), [("topk", "layers.3"), ("topk.skip_transcoder", "layers.4.mlp")])
def test_sparsify_folders_are_as_its_own_saver_writes_them(exported, name, own):
    folder, theirs = exported["sparsify"] / name, OWN / "sparsify" / own
    cfg, expected = (json.loads((path / "cfg.json").read_text()) for path in (folder, theirs))
    assert set(expected) <= set(cfg)
    same = ("activation", "transcode", "skip_connection", "normalize_decoder", "multi_topk")
    assert {key: cfg[key] for key in same} == {key: expected[key] for key in same}
    with safe_open(folder / "sae.safetensors", "pt") as ours, safe_open(theirs / "sae.safetensors", "pt") as other:
        assert set(ours.keys()) == set(other.keys())
        assert ours.get_slice("encoder.weight").get_shape() == [D_SAE, D_IN]


def test_matryoshka_groups_are_those_of_the_training(saes, tmp_path):
    origin = Origin("x", "y", matryoshka_fractions=(0.1, 0.5))
    folder = export_saes(saes, "dictionary_learning", tmp_path / "out", ["matryoshka"], origin) / "matryoshka"
    assert torch.load(folder / "ae.pt", weights_only=True)["group_sizes"].tolist() == [4, 16, 20]


def test_notes_say_where_an_sae_comes_from(saes, tmp_path):
    origin = Origin(saes.id, saes.digest, "smollm2-135m", context_size=128, prepend_bos=True)
    folder = export_saes(saes, "saelens", tmp_path / "out", ["matryoshka", "jumprelu.transcoder"], origin)
    cfg = json.loads((folder / "matryoshka" / "cfg.json").read_text())
    noted = cfg["metadata"]
    assert (noted["model_name"], noted["hook_name"], noted["context_size"]) == ("smollm2-135m", RESIDUAL, 128)
    assert noted["prepend_bos"] is True
    assert noted["training_architecture"] == "matryoshka_batchtopk"
    assert noted["mi_pipe"]["artifact"] == saes.id
    assert noted["mi_pipe"]["digest"] == saes.digest
    through = json.loads((folder / "jumprelu.transcoder" / "cfg.json").read_text())
    assert (through["metadata"]["hook_name"], through["metadata"]["hook_name_out"]) == (READ, WRITTEN)
    assert through["apply_b_dec_to_input"] is False
    assert through["d_out"] == D_OUT


def test_a_set_without_known_inputs_has_a_known_origin_all_the_same(saes, store):
    assert origin_of(saes, store) == Origin(saes.id, saes.digest)


def test_the_probe_goes_with_the_weights(exported, saes):
    for folder in exported.values():
        probe = load_file(folder / "topk" / PROBE_FILE)
        torch.testing.assert_close(SAES["topk"](probe["input"]), probe["output"])


def test_the_same_set_gives_the_same_bytes(exported, saes, tmp_path):
    for peer, folder in exported.items():
        again = export_saes(saes, peer, tmp_path / peer, held_by(peer))
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        assert len(files) == 3 * len(held_by(peer))
        assert all((again / file).read_bytes() == (folder / file).read_bytes() for file in files)


CROSSCODER = Sites(("a", "b"), ("a", "b"), (6, 6), (6, 6))


def crosscoder() -> SAE:
    rule = InferenceRule("topk", 2)
    weights = torch.ones(12, 8), torch.zeros(8), torch.ones(8, 12), torch.zeros(12)
    return SAE(*weights, rule, name="both", sites=CROSSCODER)


@pytest.mark.parametrize(
    ("name", "peer", "message"),
    [
        ("both", "saelens", r"both is a crosscoder over 2 hook points .* SAELens holds SAEs, and transcoders"),
        ("both", "dictionary_learning", r"crosscoder .* SAEs of every architecture, of one hook point"),
        ("both", "sparsify", r"crosscoder .* TopK SAEs"),
        ("topk.transcoder", "saelens", r"a transcoder whose rule is topk .* transcoders whose rule is a threshold"),
        ("standard.transcoder", "dictionary_learning", r"a transcoder whose rule is threshold"),
        ("jumprelu", "sparsify", r"an SAE whose rule is threshold and cannot be written so: sparsify holds TopK"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(store, tmp_path, name, peer, message):
    saes = publish_saes(store, [crosscoder(), *SAES.values()])
    with pytest.raises(ConfigError, match=message):
        export_saes(saes, peer, tmp_path / "out", ["topk", name])
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_sae_with_a_skip_connection_has_no_place_in_saelens(store, tmp_path):
    sae = SAES["topk"]
    with_skip = SAE(
        *(sae.W_enc.data, sae.b_enc.data, sae.W_dec.data, sae.b_dec.data, sae.rule),
        *(RESIDUAL, "topk", "odd"),
        W_skip=torch.eye(D_IN),
    )
    saes = publish_saes(store, [with_skip])
    with pytest.raises(ConfigError, match="odd is an SAE with a skip connection"):
        export_saes(saes, "saelens", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_an_unknown_name_or_a_target_that_is_there_is_refused(saes, tmp_path):
    with pytest.raises(ArtifactNotFoundError, match="Did you mean 'batchtopk'"):
        export_saes(saes, "saelens", tmp_path / "out", ["batchtopkk"])
    with pytest.raises(ConfigError, match="exists already"):
        export_saes(saes, "saelens", tmp_path, ["topk"])


def test_an_export_that_dies_leaves_nothing(saes, tmp_path, monkeypatch):
    written = []

    def fail_at_third(self, folder, probe):
        written.append(folder)
        if len(written) == 3:
            raise RuntimeError("stop")
        write(self, folder, probe)

    write = exporting.Packed.write
    monkeypatch.setattr(exporting.Packed, "write", fail_at_third)
    with pytest.raises(RuntimeError):
        export_saes(saes, "dictionary_learning", tmp_path / "out", held_by("dictionary_learning"))
    assert len(written) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peers
@pytest.mark.parametrize("peer", SAE_FORMATS)
def test_the_peer_itself_reads_ours_and_we_its_own(peer):
    if PEERS[peer] not in os.environ:
        pytest.skip(f"{PEERS[peer]} names no Python with {peer}")
    words = [sys.executable, "-m", "bench.sae_formats", "--peer", f"{peer}={os.environ[PEERS[peer]]}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, last = map(json.loads, done.stdout.splitlines())
    assert {line["sae"] for line in lines if line["way"] == "ours read by peer"} == set(held_by(peer))
    assert last["relative_to_scale"] < 1e-5
