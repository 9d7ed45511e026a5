"""Random pairs of prompts, and patching done the slow way."""

import numpy as np
import torch

from mi_pipe.models.model import Model
from mi_pipe.patching.sweep import hook_of
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


def brute_force(model: Model, group: PairGroup, unit: str, direction: str = "denoising") -> np.ndarray:
    """Patch each (pair, layer, column) alone with a plain hook and a whole forward pass."""
    base, donor = (group.corrupted, group.clean) if direction == "denoising" else (group.clean, group.corrupted)
    n_heads = model.info.n_heads
    n_columns = n_heads if unit == "head_out" else group.n_pos
    out = np.zeros((len(base), model.info.n_layers, n_columns), np.float32)
    for layer in range(model.info.n_layers):
        hook = hook_of(unit, layer)
        for b in range(len(base)):
            seen = []
            with model.edited({hook: lambda v, s=seen: s.append(v.clone())}):
                model.logits(donor[b : b + 1])
            for column in range(n_columns):

                def edit(value, donated=seen[0], column=column):
                    value = value.clone()
                    if unit == "head_out":
                        width = value.shape[-1] // n_heads
                        part = slice(column * width, (column + 1) * width)
                        value[:, :, part] = donated[:, :, part]
                    else:
                        value[:, column] = donated[:, column]
                    return value

                with model.edited({hook: edit}):
                    logits = model.logits(base[b : b + 1])[0, -1]
                out[b, layer, column] = float(logits[group.answer[b]] - logits[group.wrong[b]])
    return out
