"""A published artifact of the stage `steer`, made of the samples' hostile text."""

import numpy as np
import pandas as pd
import torch

from mi_pipe.core.workspace import Workspace
from mi_pipe.steering import steering as files
from mi_pipe.steering.steering import effects_dataset

COEFFICIENTS = [-1.0, 0.0, 1.0]
STEERING_CONFIG = {"coefficients": COEFFICIENTS, "positions": "all", "metric": "logit_diff"}


def write_steering(work: Workspace, hostile: str, n_pairs: int) -> None:
    names = [hostile, f"{hostile}~random0"]
    table = pd.DataFrame({"direction": names, "kind": ["contrast", "random"], "hook": hostile, "layer": np.int32(1)})
    table = table.assign(scale=[2.0, 2.0], source=hostile, control_of=["", hostile])
    work.write_table(files.DIRECTIONS_FILE, table)
    work.write_tensors(files.UNITS_FILE, {name: torch.ones(4) / 2 for name in names})
    moved = np.array([[-1.0, 0.0, 2.0], [0.5, 0.0, -0.5]])[..., None] + np.linspace(3, 4, n_pairs)
    axes = ("direction", "coefficient")
    metric = {"metric": ((*axes, "pair"), moved.astype(np.float32))}
    loss = {"loss": ((*axes, "prompt"), np.abs(moved).astype(np.float32))}
    loss["n_tokens"] = (("prompt",), np.arange(1, n_pairs + 1, dtype=np.int32))
    numbers = np.arange(n_pairs, dtype=np.int32)
    measures = {
        f"{files.TASKS_FOLDER}/ioi.zarr": effects_dataset(metric, names, COEFFICIENTS, {}, pair=numbers),
        files.LOSS_FOLDER: effects_dataset(loss, names, COEFFICIENTS, {}, prompt=numbers),
    }
    for folder, dataset in measures.items():
        dataset.to_zarr(work.path(folder), mode="w", zarr_format=3, consolidated=False)
    rows = [
        {"direction": hostile if coefficient else "", "coefficient": coefficient, "prompt": prompt, "sample": sample}
        | {"prompt_text": hostile, "token_ids": np.array([1, 2], np.int32), "text": f"{coefficient:g} {hostile}\n"}
        for coefficient in COEFFICIENTS
        for prompt in range(5)
        for sample in (-1, 0)
    ]
    work.write_table(files.GENERATIONS_FILE, pd.DataFrame(rows))
