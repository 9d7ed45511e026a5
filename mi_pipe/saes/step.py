"""What an architecture's training step is given and gives back, and the parts that all architectures share.

Every loss is divided by batch * d_out, and activations are normalised so that E‖x‖² = d: the reconstruction part is
then the FVU to within a batch's chance, whatever the model and layer, and a sparsity coefficient means the same
everywhere.

The encoder's product is made for a chunk of rows at a time. What is selected (or, while a code is dense, used up) of a
chunk is little, so the pre-activations of one chunk are the largest thing that a step holds beside the weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.saes.auxk import AuxK
from mi_pipe.saes.code import SparseCode
from mi_pipe.saes.entries import Code, backward, of_feature, products_at
from mi_pipe.saes.kernels import Precision, decode, pre_activations
from mi_pipe.saes.parameters import Parameters

_CHUNK_BYTES = 1 << 27


class Scratch:
    """Reused memory for pre-activations, shared by trainers that step one after the other."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._buffers: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}

    def matrix(self, n_rows: int, n_columns: int, like: Tensor) -> Tensor:
        """Return an uninitialised matrix, the same one at each call with this shape."""
        key = (n_rows, n_columns, like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = like.new_empty(n_rows, n_columns)
        return self._buffers[key]


@dataclass(frozen=True)
class Batch:
    """Normalised activations: what is read, and what is to be reconstructed (the same, but for transcoders)."""

    x: Float[Tensor, "batch d_in"]
    target: Float[Tensor, "batch d_out"]

    @classmethod
    def of(cls, x: Float[Tensor, "batch d_in"]) -> "Batch":
        """Return the batch of an autoencoder."""
        return cls(x, x)


@dataclass(frozen=True)
class StepContext:
    """Where in training a step is, and how it is to be computed."""

    step: int
    n_steps: int
    dead: Int[Tensor, " dead"]
    """Indices (int64) of the dead features."""
    auxk_coefficient: float = 1 / 32
    precision: Precision = "float32"
    scratch: Scratch | None = field(default=None, repr=False)

    def aux(self, params: Parameters) -> AuxK:
        """Return a fresh AuxK for a batch."""
        return AuxK(self.dead, params.W_dec.shape[1], self.auxk_coefficient)


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward pass found."""

    losses: dict[str, Float[Tensor, ""]]
    """Parts of the loss by name, coefficients included."""
    difference: Float[Tensor, "batch d_out"]
    """x̂ - x."""
    squared_error: Float[Tensor, ""]
    """Σ‖x - x̂‖² over the batch."""
    n_active: Int[Tensor, ""]
    """Active entries of the batch."""
    n_fired: Int[Tensor, " d_sae"]
    """In how many rows each feature is above 0; int64."""
    gradients: Parameters
    noted: dict[str, Tensor] = field(default_factory=dict)
    """What the architecture wants to hear of again in `observe`."""

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The whole loss."""
        return torch.stack(list(self.losses.values())).sum()


def chunks_of(n_rows: int, d_sae: int) -> list[slice]:
    """Return the rows of a batch in equal chunks whose pre-activations take at most 128 MiB in float32."""
    n_chunks = min(n_rows, math.ceil(n_rows * d_sae * 4 / _CHUNK_BYTES))
    size = math.ceil(n_rows / n_chunks)
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def encoded_chunks(
    params: Parameters, inputs: Float[Tensor, "batch d_in"], context: StepContext
) -> Iterator[tuple[slice, Float[Tensor, "chunk d_sae"]]]:
    """Yield chunks of rows and their pre-activations, which hold until the next chunk."""
    for rows in chunks_of(inputs.shape[0], params.d_sae):
        x = inputs[rows]
        out = None
        if context.scratch and context.precision == "float32":
            out = context.scratch.matrix(x.shape[0], params.d_sae, x)
        yield rows, pre_activations(x, params.W_enc, params.b_enc, context.precision, out)


@overload
def exact_values(code: SparseCode, inputs: Tensor, params: Parameters, context: StepContext) -> SparseCode: ...
@overload
def exact_values(code: Code, inputs: Tensor, params: Parameters, context: StepContext) -> Code: ...
def exact_values(code: Code, inputs: Tensor, params: Parameters, context: StepContext) -> Code:
    """Recompute pre-activations at a code's entries in full precision (a dense code's are recomputed whole).

    A narrow product then only decides which entries are looked at.
    """
    if context.precision == "float32":
        return code
    return code.with_values(products_at(code, inputs, params.W_enc) + of_feature(code, params.b_enc))


def with_skip(params: Parameters, batch: Batch, reconstruction: Tensor) -> Tensor:
    """Add b_dec and what a skip connection carries to a decoded batch, in place."""
    reconstruction += params.b_dec
    if params.W_skip is not None:
        reconstruction.addmm_(batch.x, params.W_skip.T)
    return reconstruction


def skip_gradient(params: Parameters, batch: Batch, grad_output: Tensor, gradients: Parameters) -> None:
    """Note the gradient of W_skip, where there is one."""
    if params.W_skip is not None:
        gradients.W_skip = grad_output.T @ batch.x


def selected_outcome(params: Parameters, batch: Batch, inputs: Tensor, code: SparseCode, aux: AuxK) -> Outcome:
    """Return the outcome of reconstructing from a selected code, with gradients at its entries alone."""
    n = batch.target.numel()
    difference = with_skip(params, batch, decode(code, params.W_dec)).sub_(batch.target)
    grad = difference * (2 / n)
    delta = products_at(code, grad, params.W_dec) * (code.values > 0)
    gradients = backward(params, code, delta, inputs, grad)
    skip_gradient(params, batch, grad, gradients)
    squared_error = torch.linalg.vector_norm(difference).square()
    losses = {"reconstruction": squared_error / n}
    add_aux(losses, gradients, aux, params, inputs, difference)
    return Outcome(losses, difference, squared_error, code.n_active(), code.n_fired(), gradients)


def add_aux(
    losses: dict[str, Tensor], gradients: Parameters, aux: AuxK, params: Parameters, inputs: Tensor, difference: Tensor
) -> None:
    """Add AuxK to losses and gradients, if anything is dead; `difference` is x̂ - x."""
    found = None if aux.is_idle else aux.loss(params, inputs, -difference)
    if found is not None:
        losses["auxk"] = found.loss
        gradients.add_(found.gradients)


class ChunkSums:
    """What architectures that use a code up chunk by chunk add together."""

    def __init__(self, params: Parameters, batch: Batch, inputs: Tensor, aux: AuxK) -> None:
        """Begin with zeros; `inputs` are those of the encoder."""
        zeros = {name: torch.zeros_like(value) for name, value in params.named().items()}
        self.gradients = Parameters(**zeros, subtract_b_dec=params.subtract_b_dec)
        self._params = params
        self._batch = batch
        self._inputs = inputs
        self._aux = aux
        self._n_fired = torch.zeros(params.d_sae, dtype=torch.int64, device=params.device)
        self.n_active = torch.zeros((), dtype=torch.int64, device=params.device)
        self._differences: list[Tensor] = []

    def part(self, rows: slice) -> Batch:
        """Return some rows of the batch."""
        return Batch(self._batch.x[rows], self._batch.target[rows])

    def add(self, code: Code, difference: Tensor, grad_output: Tensor, found: Parameters, rows: slice) -> None:
        """Add a chunk: its code, x̂ - x, the gradient by x̂, and its gradients (that of W_skip is made here)."""
        skip_gradient(self._params, self.part(rows), grad_output, found)
        self.gradients.add_(found)
        self._n_fired += code.n_fired()
        self.n_active += code.n_active()
        self._differences.append(difference)

    def outcome(self, penalties: dict[str, Tensor]) -> Outcome:
        """Return the outcome, with penalties beside the reconstruction's loss and AuxK."""
        difference = torch.cat(self._differences)
        squared_error = torch.linalg.vector_norm(difference).square()
        losses = {"reconstruction": squared_error / difference.numel(), **penalties}
        add_aux(losses, self.gradients, self._aux, self._params, self._inputs, difference)
        return Outcome(losses, difference, squared_error, self.n_active, self._n_fired, self.gradients)
