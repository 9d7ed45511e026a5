"""Folders that the peers' own savers wrote do what the peers did.

They lie in tests/export/peer_saes, made by `bench/sae_formats/peer.py save` with SAELens 6.54.12 and sparsify 1.3.3.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.sae_formats.samples import READ, RESIDUAL, WRITTEN, every_sae, inputs_of, publish_saes
from mi_pipe.core.errors import ArtifactDamagedError, ConfigError
from mi_pipe.core.store import Store
from mi_pipe.export.sae_formats.exporting import SAE_FORMATS, export_saes
from mi_pipe.export.sae_formats.importing import check_sae_folder, read_sae_folder
from mi_pipe.export.sae_formats.packed import Form
from mi_pipe.saes.inference import InferenceRule

OWN = Path(__file__).parent / "peer_saes"
FOLDERS = sorted(path for peer in ("saelens", "sparsify") for path in (OWN / peer).iterdir())
THROUGH = f"{READ} -> {WRITTEN}"
RULES = {
    "standard": "threshold",
    "flat_topk": "topk",
    "topk_by_norm": "topk",
    "jumprelu": "threshold",
    "trained_batchtopk": "threshold",
    "gated": "gated",
    "skip_transcoder": "threshold",
    "layers.4.mlp": "topk",
}


def hooks_for(folder: Path) -> str:
    return THROUGH if folder.name.endswith("mlp") else ""


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_peers_folder_gives_the_peers_features_and_output(folder):
    found = read_sae_folder(folder, hooks_for(folder))
    expected = load_file(folder / "expected.safetensors")
    assert float((expected["features"] > 0).sum()) > 0
    torch.testing.assert_close(found.sae.encode(expected["input"]), expected["features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sae(expected["input"]), expected["output"], rtol=1e-5, atol=1e-5)
    assert found.kind == folder.parent.name
    assert found.config == json.loads((folder / "cfg.json").read_text())
    if folder.name in RULES:
        assert found.sae.rule.kind == RULES[folder.name]


def test_there_is_a_folder_of_every_architecture_that_can_be_read():
    found = {json.loads((path / "cfg.json").read_text()).get("architecture") for path in FOLDERS}
    assert found >= {"standard", "topk", "jumprelu", "gated", "transcoder", "skip_transcoder"}
    assert found >= {"jumprelu_transcoder", "jumprelu_skip_transcoder", None}


def test_where_an_sae_belongs_is_read_or_said():
    sae = read_sae_folder(OWN / "saelens" / "jumprelu_transcoder").sae
    assert (sae.hook, sae.hook_out, sae.sites.kind, sae.model) == (READ, WRITTEN, "transcoder", "toy")
    assert not sae.subtract_b_dec
    assert read_sae_folder(OWN / "saelens" / "flat_topk").sae.hook == "blocks.3.hook_resid_pre"
    assert read_sae_folder(OWN / "sparsify" / "layers.3").sae.hook == RESIDUAL
    said = read_sae_folder(OWN / "saelens" / "topk", "blocks.0.hook_mlp_out", "mine").sae
    assert (said.hook, said.model) == ("blocks.0.hook_mlp_out", "mine")
    assert check_sae_folder(OWN / "sparsify" / "layers.3.mlp", THROUGH).label == THROUGH


def test_what_training_called_it_and_its_k_come_along():
    sae = read_sae_folder(OWN / "saelens" / "trained_matryoshka").sae
    assert (sae.architecture, sae.k) == ("matryoshka", 3)
    assert sae.rule.threshold is not None
    assert sae.rule.threshold.ndim == 0
    assert read_sae_folder(OWN / "saelens" / "jumprelu").sae.rule.threshold.shape == (16,)


def test_rows_are_made_unit_where_selection_goes_by_decoder_norm():
    sae = read_sae_folder(OWN / "saelens" / "topk_by_norm").sae
    torch.testing.assert_close(torch.linalg.vector_norm(sae.W_dec, dim=1), torch.ones(16))


def test_a_feature_whose_decoder_row_is_0_stays_silent(tmp_path):
    folder = copied("saelens/topk_by_norm", tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"][5] = 0
    save_file(tensors, folder / "sae_weights.safetensors")
    sae = read_sae_folder(folder).sae
    z = sae.encode(torch.randn(200, 6, generator=torch.Generator().manual_seed(0)))
    assert bool(torch.isfinite(sae.decode(z)).all())
    assert float(z[:, 5].abs().max()) == 0.0


def test_our_own_exports_come_back_as_they_were(tmp_path):
    saes = publish_saes(Store(tmp_path / "store"), every_sae(12, 40, 4))
    for peer in ("saelens", "sparsify"):
        chosen = [name for name in saes if SAE_FORMATS[peer].holds(Form.of(saes[name]))]
        folder = export_saes(saes, peer, tmp_path / peer, chosen)
        for name in chosen:
            sae, again = saes[name], read_sae_folder(folder / name).sae
            x = inputs_of(sae, 30)
            torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=0, atol=0)
            torch.testing.assert_close(again(x), sae(x), rtol=0, atol=0)
            assert again.architecture == sae.architecture
            same = ("sites", "k", "model", "subtract_b_dec")
            assert [getattr(again, key) for key in same] == [getattr(sae, key) for key in same]


def test_half_precision_weights_are_read_in_float32(tmp_path):
    folder = copied("saelens/jumprelu", tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    sae = read_sae_folder(folder).sae
    assert sae.dtype == torch.float32
    torch.testing.assert_close(sae.W_enc.data, tensors["W_enc"].bfloat16().float())


def test_thresholds_below_0_are_as_0(tmp_path):
    folder = copied("saelens/jumprelu", tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, "threshold": -tensors["threshold"]}, folder / "sae_weights.safetensors")
    sae = read_sae_folder(folder).sae
    x = load_file(OWN / "saelens" / "jumprelu" / "expected.safetensors")["input"]
    torch.testing.assert_close(sae.encode(x), sae.pre_activations(x).relu())
    assert sae.rule == InferenceRule("threshold", threshold=sae.threshold)
    assert float(sae.threshold) == 0.0


def copied(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / Path(name).name
    shutil.copytree(OWN / name, folder)
    return folder


def with_config(folder: Path, **changes) -> None:
    content = json.loads((folder / "cfg.json").read_text())
    content |= {key: value for key, value in changes.items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in content.items() if changes.get(k, 0) is not None}))


SAELENS_MISTAKES = [
    ("topk", {"architecture": "batchtopk"}, r"architecture 'batchtopk' is not known. Did you mean .* Known are"),
    ("topk", {"architecture": "abstopk"}, r"'abstopk' cannot be imported: its features have signs"),
    ("topk", {"architecture": "temporal"}, r"several positions"),
    ("topk", {"k": None}, r"a topk SAE needs k"),
    ("topk", {"k": 99}, r"needs k, from 1 to d_sae \(16\)"),
    ("topk", {"k": "many"}, r"cfg.json: k: Input should be a valid integer"),
    ("topk", {"d_in": None}, r"cfg.json: d_in: Field required"),
    ("topk", {"d_in": 7}, r"W_enc has shape \(6, 16\), and by its config a topk of SAELens has \(7, 16\)"),
    ("topk", {"normalize_activations": "expected_average_only_in"}, r"Fold it into the weights with SAELens first"),
    ("topk", {"normalize_activations": "layer_norm"}, r"normalised as it runs \(layer_norm\)"),
    ("topk", {"reshape_activations": "odd"}, r"reshape_activations 'odd'"),
    (
        "topk",
        {"metadata": {"sae_lens_version": "6.0.0"}},
        r"does not say at which hook point an SAE was trained. .*--hook",
    ),
    (
        "topk",
        {"metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.0.attn.hook_z", "hook_head_index": 3}},
        r"reads head 3 of blocks.0.attn.hook_z alone",
    ),
    ("topk", {"metadata": {"sae_lens_version": "6.0.0", "hook_name": "../../up"}}, r"'../../up' is no place"),
    ("jumprelu", {"architecture": "standard"}, r"has threshold, but a standard of SAELens has W_enc"),
    ("standard", {"architecture": "jumprelu"}, r"lacks threshold, but a jumprelu"),
    ("transcoder", {"apply_b_dec_to_input": True}, r"no b_dec to subtract"),
    (
        "transcoder",
        {"metadata": {"sae_lens_version": "6.0.0", "hook_name": "a"}},
        r"a transcoder was trained. Say both",
    ),
    ("flat_standard", {"activation_fn_str": "tanh-relu"}, r"activation function 'tanh-relu'"),
    ("flat_standard", {"normalize_activations": True}, r"normalised as it runs"),
    ("flat_standard", {"finetuning_scaling_factor": True}, r"finetuning scaling factor"),
    # Without its version SAELens takes this for a flat config, and a jumprelu SAE for a standard one.
    ("jumprelu", {"metadata": None, "architecture": None, "hook_name": "a"}, r"has threshold, but a standard"),
]


@pytest.mark.parametrize(("name", "changes", "message"), SAELENS_MISTAKES)
def test_what_saelens_folders_cannot_be_is_one_sentence(tmp_path, name, changes, message):
    folder = copied(f"saelens/{name}", tmp_path)
    with_config(folder, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        check_sae_folder(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


SPARSIFY_MISTAKES = [
    ("layers.3", {"activation": "groupmax"}, r"'groupmax' cannot be imported"),
    ("layers.3", {"signed": True}, r"'signed TopK' cannot"),
    ("layers.3", {"k": 17}, r"k is 17, and there are 16 features"),
    ("layers.3", {"num_latents": 0}, r"encoder.weight has shape \(16, 6\), and by its config .* \(192, 6\)"),
    ("layers.3", {"skip_connection": True}, r"lacks W_skip"),
    ("layers.4.mlp", {"skip_connection": False, "hookpoint": "a -> b"}, r"has W_skip, but"),
    ("layers.3.mlp", {}, r"a transcoder was trained. Say both with --hook"),
    ("layers.3.mlp", {"hookpoint": "a -> b -> c"}, r"'a -> b -> c' is no place for"),
]


@pytest.mark.parametrize(("name", "changes", "message"), SPARSIFY_MISTAKES)
def test_what_sparsify_folders_cannot_be_is_one_sentence(tmp_path, name, changes, message):
    folder = copied(f"sparsify/{name}", tmp_path)
    with_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        check_sae_folder(folder)


def test_a_module_that_has_no_hook_point_has_to_be_named(tmp_path):
    shutil.copytree(OWN / "sparsify" / "layers.3", tmp_path / "layers.3.mlp.act_fn")
    with pytest.raises(ConfigError, match="does not say at which hook point"):
        check_sae_folder(tmp_path / "layers.3.mlp.act_fn")
    assert check_sae_folder(tmp_path / "layers.3.mlp.act_fn", "blocks.3.mlp.hook_post").inputs == (
        "blocks.3.mlp.hook_post",
    )


@pytest.mark.parametrize("hooks", ["a -> b", "a b", "a ->", "-> a", "../up"])
def test_a_place_that_an_sae_cannot_have_is_refused(hooks):
    with pytest.raises(ConfigError, match=r"--hook .* is no place for an SAE"):
        check_sae_folder(OWN / "saelens" / "topk", hooks)


def test_a_transcoder_needs_two_places():
    with pytest.raises(ConfigError, match="reads one hook point and writes another"):
        check_sae_folder(OWN / "saelens" / "transcoder", RESIDUAL)


def test_folders_that_are_none_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match=r"is no folder. Name the folder that holds cfg.json"):
        check_sae_folder(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"needs cfg.json and one of sae_weights.safetensors or sae.safetensors"):
        check_sae_folder(tmp_path)
    with pytest.raises(ConfigError, match=rf"holds 3 folders of SAEs .* such as {OWN / 'sparsify' / 'layers.3'}"):
        check_sae_folder(OWN / "sparsify")
    (tmp_path / "ae.pt").touch()
    with pytest.raises(ConfigError, match=r"ae.pt, which is not read, because unpickling runs code"):
        check_sae_folder(tmp_path)


def test_damage_is_damage(tmp_path):
    folder = copied("saelens/topk", tmp_path)
    weights = (folder / "sae_weights.safetensors").read_bytes()
    (folder / "sae_weights.safetensors").write_bytes(weights[:-5])
    with pytest.raises(ArtifactDamagedError, match="cannot be read as safetensors"):
        check_sae_folder(folder)
    (folder / "sae_weights.safetensors").write_bytes(weights)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(ArtifactDamagedError, match="cannot be read as JSON"):
        check_sae_folder(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(ArtifactDamagedError, match="no JSON object"):
        check_sae_folder(folder)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    folder = copied("saelens/topk", tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["b_enc"][3] = torch.nan
    save_file(tensors, folder / "sae_weights.safetensors")
    with pytest.raises(ConfigError, match="b_enc holds something that is no finite number"):
        read_sae_folder(folder)


def test_a_factor_on_the_features_is_refused_unless_it_is_1(tmp_path):
    folder = copied("saelens/flat_standard", tmp_path)
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file({**tensors, "scaling_factor": torch.ones(16)}, folder / "sae_weights.safetensors")
    assert read_sae_folder(folder).sae.d_sae == 16
    save_file({**tensors, "scaling_factor": torch.full((16,), 2.0)}, folder / "sae_weights.safetensors")
    with pytest.raises(ConfigError, match="finetuning scaling factor"):
        read_sae_folder(folder)


def test_an_export_of_ours_that_was_changed_is_found_out(tmp_path):
    saes = publish_saes(Store(tmp_path / "store"), every_sae(12, 40, 4)[:1])
    folder = export_saes(saes, "saelens", tmp_path / "out") / "topk"
    with_config(folder, k=1)
    with pytest.raises(ArtifactDamagedError, match=r"does not give the outputs that are in its probe.safetensors"):
        read_sae_folder(folder)
