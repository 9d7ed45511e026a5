"""sparsify's Trainer with Adam, run by the python of a virtual environment that has sparsify.

sparsify trains on what a language model's module gives out. Its model here is an embedding whose table holds the rows,
so that a forward pass is the gathering of a batch. Optimiser: Adam, as the others have (signum, its default, is as
fast).
"""

import contextlib
import tempfile

import torch
from datasets import Dataset
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from transformers import PretrainedConfig, PreTrainedModel
from turns import Turns

_N_CTX = 128
_N_EPOCHS = 64


class NoMoreTurnsError(Exception):
    """Ends the training."""


class _TableConfig(PretrainedConfig):
    model_type = "rows"
    num_hidden_layers = 1


class _Table(PreTrainedModel):
    """A model whose only module gives out stored rows."""

    config_class = _TableConfig

    def __init__(self, config: _TableConfig, turns: Turns) -> None:
        super().__init__(config)
        n_rows, width = turns.rows.shape
        self.table = torch.nn.Embedding(n_rows, width)
        self.post_init()
        self.table.weight.data.copy_(turns.rows)
        self._turns = turns
        self._is_training = False

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    def train_from_here(self) -> None:
        """Count forward passes from now on: those before only look up widths."""
        self._is_training = True

    def forward(self, input_ids: torch.Tensor, **_options: object) -> torch.Tensor:
        if self._is_training and not self._turns.has_next():
            raise NoMoreTurnsError
        return self.table(input_ids)


def main() -> None:
    """Train for as long as turns come."""
    turns = Turns()
    asked = turns.options
    random = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(turns.rows), generator=random) for _ in range(_N_EPOCHS)])
    prompts = Dataset.from_dict({"input_ids": order.view(-1, _N_CTX).numpy()}).with_format("torch")
    model = _Table(_TableConfig(), turns)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=asked["d_sae"], k=asked["k"]),
            batch_size=asked["batch_rows"] // _N_CTX,
            hookpoints=["table"],
            optimizer="adam",
            log_to_wandb=False,
            save_every=10**9,
            save_dir=folder,
        )
        trainer = Trainer(config, prompts, model)
        model.train_from_here()
        with contextlib.suppress(NoMoreTurnsError):
            trainer.fit()


if __name__ == "__main__":
    main()
