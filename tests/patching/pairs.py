"""Random pairs of prompts, and patching done the slow way."""

import numpy as np
import torch

from mi_pipe.models.model import Model
from mi_pipe.patching.units import axes_of, hook_of, layers_of, part_of
from mi_pipe.prompts.prompt_set import PairGroup

SHARED = 2


def random_pairs(n_pairs: int = 3, n_pos: int = 8, d_vocab: int = 97, shared: int = SHARED, seed: int = 0) -> PairGroup:
    """Make pairs that differ from position `shared` on, the first of them only from one later."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, d_vocab, (n_pairs, n_pos), generator=generator)
    corrupted = torch.randint(3, d_vocab, (n_pairs, n_pos), generator=generator)
    corrupted[:, :shared] = clean[:, :shared]
    corrupted[0, shared] = clean[0, shared]
    for b in range(n_pairs):
        first = shared + (b == 0)
        if corrupted[b, first] == clean[b, first]:
            corrupted[b, first] = (clean[b, first] - 3 + 1) % (d_vocab - 3) + 3
    answer = torch.randint(3, d_vocab, (n_pairs,), generator=generator)
    wrong = (answer - 3 + 7) % (d_vocab - 3) + 3
    return PairGroup(np.arange(n_pairs), clean, corrupted, answer, wrong, [f"w{t}" for t in clean[0].tolist()])


def token_pairs(clean: list[int], corrupted: list[int], answer: int, wrong: int) -> PairGroup:
    """Make a group of one pair."""
    return PairGroup(
        np.arange(1),
        torch.tensor([clean]),
        torch.tensor([corrupted]),
        torch.tensor([answer]),
        torch.tensor([wrong]),
        [str(token) for token in clean],
    )


@torch.no_grad()
def brute_force(model: Model, group: PairGroup, unit: str, direction: str = "denoising") -> np.ndarray:
    """Patch each (pair, layer, cell) alone with plain hooks and a whole forward pass: logit differences."""
    base, donor = (group.corrupted, group.clean) if direction == "denoising" else (group.clean, group.corrupted)
    n_parts = {"head": model.info.n_heads, "kv_head": model.info.n_kv_heads}.get(part_of(unit) or "", 1)
    n_pos = group.n_pos if "pos" in axes_of(unit) else 1
    layers = layers_of(unit, model.info)
    out = np.zeros((len(base), len(layers), n_parts, n_pos), np.float32)
    for layer in layers:
        hook = hook_of(unit, layer)
        for b in range(len(base)):
            given, own = (_seen(model, hook, prompts[b : b + 1]) for prompts in (donor, base))
            for part, pos in np.ndindex(n_parts, n_pos):
                width = given.shape[-1] // n_parts
                columns = slice(part * width, (part + 1) * width)
                rows = slice(pos, pos + 1) if n_pos > 1 else slice(None)
                edits = _edits(hook, given, own, rows, columns)
                with model.edited(edits):
                    logits = model.logits(base[b : b + 1])[0, -1]
                out[b, layer, part, pos] = float(logits[group.answer[b]] - logits[group.wrong[b]])
    sizes = [group.n_pos if axis == "pos" else n_parts for axis in axes_of(unit)]
    return out.reshape(len(base), len(layers), *sizes)


def _seen(model: Model, hook: str, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    with model.edited({hook: lambda value: seen.append(value.clone())}):
        model.logits(tokens)
    return seen[0].view(len(tokens), -1, seen[0].shape[-1])  # OPT's MLPs know no batch


def _edits(hook: str, given: torch.Tensor, own: torch.Tensor, rows: slice, columns: slice):
    """Put the donor's value into rows and columns; between attention and MLP, into what the block adds up as well."""

    def put(value):
        new = value.reshape(given.shape).clone()
        new[:, rows, columns] = given[:, rows, columns]
        return new.view(value.shape)

    if not hook.endswith("hook_resid_mid"):
        return {hook: put}

    def add(value):
        value = value.clone()
        value[:, rows] += given[:, rows] - own[:, rows]
        return value

    return {hook: put, hook.replace("resid_mid", "resid_post"): add}
