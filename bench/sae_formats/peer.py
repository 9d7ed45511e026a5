"""What a peer makes of SAEs: run by the Python of an environment that has the peer, and no mi_pipe.

peer.py load PEER FOLDER INPUTS OUT   load each SAE in FOLDER with the peer's own loader and run it on its input
peer.py save PEER FOLDER SIZES        make an SAE of every architecture and save it with the peer's own saver

INPUTS and OUT are safetensors: `<name>` are inputs, `<name>.features` and `<name>.output` what came of them. `save`
puts `expected.safetensors` (input, features, output) beside each SAE's own files; of dictionary_learning, whose files
are pickles, it writes what tensors there would be, as `state.json`. SIZES is JSON: d_in, d_out, d_sae, k, rows.
"""

import json
import sys
import types
import warnings
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore")
EXPECTED = "expected.safetensors"
N_HEADS = 2


class SAELens:
    """sae_lens: SAE.load_from_disk, save_model, and save_inference_model of what is trained."""

    package = "sae-lens"

    def load(self, folder: Path) -> tuple[Callable, Callable]:
        from sae_lens import SAE

        return self._functions(SAE.load_from_disk(folder))

    def _functions(self, sae: Any) -> tuple[Callable, Callable]:
        if sae.cfg.reshape_activations == "hook_z":
            heads = lambda x: x.reshape(len(x), 1, N_HEADS, -1)  # noqa: E731
            return lambda x: sae.encode(heads(x)).flatten(1), lambda x: sae(heads(x)).flatten(1)
        return sae.encode, sae

    def save(self, folder: Path, sizes: dict[str, int]) -> None:
        import sae_lens

        wide = {"d_in": sizes["d_in"], "d_sae": sizes["d_sae"]}
        through = {**wide, "d_out": sizes["d_out"], "apply_b_dec_to_input": False}
        names = sae_lens.saes.sae.SAEMetadata(model_name="toy", hook_name="blocks.3.hook_resid_post", context_size=64)
        both = sae_lens.saes.sae.SAEMetadata(
            model_name="toy", hook_name="blocks.3.ln2.hook_normalized", hook_name_out="blocks.3.hook_mlp_out"
        )
        heads = sae_lens.saes.sae.SAEMetadata(model_name="toy", hook_name="blocks.3.attn.hook_z")
        k = sizes["k"]
        made = {
            "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig(**wide, metadata=names)),
            "standard_no_b_dec": (
                sae_lens.StandardSAE,
                sae_lens.StandardSAEConfig(**wide, apply_b_dec_to_input=False, metadata=names),
            ),
            "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig(**wide, k=k, metadata=names)),
            "topk_by_norm": (
                sae_lens.TopKSAE,
                sae_lens.TopKSAEConfig(**wide, k=k, rescale_acts_by_decoder_norm=True, metadata=names),
            ),
            "topk_hook_z": (
                sae_lens.TopKSAE,
                sae_lens.TopKSAEConfig(**wide, k=k, reshape_activations="hook_z", metadata=heads),
            ),
            "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig(**wide, metadata=names)),
            "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig(**wide, metadata=names)),
            "transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig(**through, metadata=both)),
            "skip_transcoder": (sae_lens.SkipTranscoder, sae_lens.SkipTranscoderConfig(**through, metadata=both)),
            "jumprelu_transcoder": (
                sae_lens.JumpReLUTranscoder,
                sae_lens.JumpReLUTranscoderConfig(**through, metadata=both),
            ),
            "jumprelu_skip_transcoder": (
                sae_lens.JumpReLUSkipTranscoder,
                sae_lens.JumpReLUSkipTranscoderConfig(**through, metadata=both),
            ),
        }
        for name, (kind, config) in made.items():
            sae = kind(config)
            randomise(sae)
            sae.save_model(folder / name)
            expect(folder / name, sizes, *self.load(folder / name))
        self._save_trained(folder, sizes, wide, names)
        self._save_flat(folder, sizes)

    def _save_flat(self, folder: Path, sizes: dict[str, int]) -> None:
        """Save again with a config as versions before 6.0 wrote it: flat, without a version, other names."""
        topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": sizes["k"]}}
        for name, more in (("standard", {"activation_fn_str": "relu"}), ("topk", topk)):
            to = folder / f"flat_{name}"
            to.mkdir()
            (to / "sae_weights.safetensors").write_bytes((folder / name / "sae_weights.safetensors").read_bytes())
            flat = {
                "model_name": "toy",
                "hook_point": "blocks.3.hook_resid_pre",
                "hook_point_layer": 3,
                "d_in": sizes["d_in"],
                "d_sae": sizes["d_sae"],
                "dtype": "torch.float32",
                "device": "cpu",
                "normalize_activations": False,
                **more,
            }
            (to / "cfg.json").write_text(json.dumps(flat), encoding="utf-8")
            expect(to, sizes, *self.load(to))

    def _save_trained(self, folder: Path, sizes: dict[str, int], wide: dict[str, int], names: Any) -> None:
        """Save SAEs whose training class is another than that of inference, as SAELens saves them after training."""
        import sae_lens

        d_sae, k = sizes["d_sae"], sizes["k"]
        trained = {
            "trained_batchtopk": sae_lens.BatchTopKTrainingSAE(
                sae_lens.BatchTopKTrainingSAEConfig(**wide, k=k, metadata=names)
            ),
            "trained_matryoshka": sae_lens.MatryoshkaBatchTopKTrainingSAE(
                sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
                    **wide, k=k, matryoshka_widths=[d_sae // 4, d_sae], metadata=names
                )
            ),
            "trained_topk": sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**wide, k=k, metadata=names)),
        }
        for name, sae in trained.items():
            randomise(sae)
            sae.save_inference_model(folder / name)
            expect(folder / name, sizes, *self.load(folder / name))


class Sparsify:
    """sparsify: SparseCoder.load_from_disk and save_to_disk."""

    package = "eai-sparsify"

    def load(self, folder: Path) -> tuple[Callable, Callable]:
        from sparsify import SparseCoder

        return self._functions(SparseCoder.load_from_disk(folder))

    def _functions(self, sae: Any) -> tuple[Callable, Callable]:
        def features(x: torch.Tensor) -> torch.Tensor:
            found = sae.encode(x)
            dense = torch.zeros(len(x), sae.num_latents)
            return dense.scatter_(1, found.top_indices, found.top_acts)

        return features, lambda x: sae(x).sae_out

    def save(self, folder: Path, sizes: dict[str, int]) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        common = {"num_latents": sizes["d_sae"], "k": sizes["k"]}
        configs = {
            "layers.3": SparseCoderConfig(**common),
            "layers.3.mlp": SparseCoderConfig(**common, transcode=True),
            "layers.4.mlp": SparseCoderConfig(**common, transcode=True, skip_connection=True),
        }
        for name, config in configs.items():
            sae = SparseCoder(sizes["d_in"], config)
            randomise(sae)
            sae.save_to_disk(folder / name)
            expect(folder / name, sizes, *self.load(folder / name))


class DictionaryLearning:
    """dictionary_learning: utils.load_dictionary."""

    package = "dictionary-learning"

    def __init__(self) -> None:
        # Its loader lies in modules that import these for other ends.
        for name, wanted in (("nnsight", "LanguageModel"), ("datasets", "load_dataset"), ("zstandard", "none")):
            if util.find_spec(name) is None:
                sys.modules[name] = types.ModuleType(name)
                setattr(sys.modules[name], wanted, type(wanted, (), {}))

    def load(self, folder: Path) -> tuple[Callable, Callable]:
        from dictionary_learning.utils import load_dictionary

        sae, _ = load_dictionary(str(folder), device="cpu")
        return sae.encode, sae

    def save(self, folder: Path, sizes: dict[str, int]) -> None:
        from dictionary_learning import dictionary as kinds
        from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        d_in, d_sae, k = sizes["d_in"], sizes["d_sae"], sizes["k"]
        saes = [
            *(getattr(kinds, name)(d_in, d_sae) for name in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder")),
            kinds.JumpReluAutoEncoder(d_in, d_sae),
            AutoEncoderTopK(d_in, d_sae, k),
            BatchTopKSAE(d_in, d_sae, k),
            MatryoshkaBatchTopKSAE(d_in, d_sae, k, [d_sae // 4, d_sae - d_sae // 4]),
        ]
        state = {
            type(sae).__name__: {
                name: [str(value.dtype).removeprefix("torch."), list(value.shape)]
                for name, value in sae.state_dict().items()
            }
            for sae in saes
        }
        (folder / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def randomise(sae: torch.nn.Module) -> None:
    """Give every tensor other values, so that each of them matters to the output."""
    generator = torch.Generator().manual_seed(0)
    for name, value in sorted([*sae.named_parameters(), *sae.named_buffers()]):
        noise = torch.randn(value.shape, generator=generator).to(value.dtype)
        value.data = noise.abs() * 0.5 if "threshold" in name else noise * (0.3 if value.ndim < 2 else 0.6)


def expect(folder: Path, sizes: dict[str, int], features: Callable, output: Callable) -> None:
    """Put an input and what the peer makes of it beside an SAE that the peer has saved and loaded again."""
    x = torch.randn(sizes["rows"], sizes["d_in"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = {"input": x, "features": features(x), "output": output(x)}
    save_file({name: value.contiguous() for name, value in made.items()}, folder / EXPECTED)


PEERS = {"saelens": SAELens, "sparsify": Sparsify, "dictionary_learning": DictionaryLearning}


def main(words: list[str]) -> None:
    """Do what the words say, and print the version of the peer."""
    assert util.find_spec("mi_pipe") is None, "a peer's environment has no mi_pipe"
    torch.set_num_threads(1)
    peer = PEERS[words[1]]()
    if words[0] == "save":
        Path(words[2]).mkdir(parents=True, exist_ok=True)
        peer.save(Path(words[2]), json.loads(words[3]))
    else:
        found = {}
        for name, x in load_file(words[3]).items():
            features, output = peer.load(Path(words[2]) / name)
            with torch.no_grad():
                found |= {f"{name}.features": features(x).contiguous(), f"{name}.output": output(x).contiguous()}
        save_file(found, words[4])
    print(metadata.version(peer.package))


if __name__ == "__main__":
    main(sys.argv[1:])
