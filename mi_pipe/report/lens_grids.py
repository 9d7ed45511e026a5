"""Prompts read token by token: the likeliest token of a lens at each depth and position (nostalgebraist 2020)."""

from typing import Any

import numpy as np

from mi_pipe.lenses.lens_readings import LensReadings

_N_PROMPTS = 3
_MAX_POS = 24
_N_SHADES = 10


def grids(found: LensReadings, task: str) -> list[dict[str, Any]]:
    """Return the first prompts of a task, each with a table for every lens; long prompts only their last tokens."""
    data = found.to_xarray(task)
    return [_grid(found, task, int(prompt)) for prompt in data["prompt"].to_numpy()[:_N_PROMPTS]]


def _grid(found: LensReadings, task: str, prompt: int) -> dict[str, Any]:
    data = found.to_xarray(task).sel(prompt=prompt)
    tokens = found.labels(task, prompt)
    first = max(0, len(tokens) - _MAX_POS)
    shown = data.isel(pos=slice(first, len(tokens)))
    lenses = {
        lens: rows
        for lens in shown["lens"].values.tolist()
        if (rows := _rows(found, shown.sel(lens=lens).isel(top=0), shown["depth"].to_numpy()))
    }
    [answer] = found.texts(data["answer_id"].to_numpy()[None])
    return {"prompt": prompt, "tokens": tokens[first:], "first": first, "answer": answer, "lenses": lenses}


def _rows(found: LensReadings, data: Any, depths: np.ndarray) -> list[dict[str, Any]]:
    """Return one row a depth that this lens has: its tokens with their probability, and whether they come next."""
    ids, log_prob = data["top_id"].to_numpy(), data["top_log_prob"].to_numpy()
    is_next = data["rank"].sel(choice="next").to_numpy() == 0
    kl = data["kl"].to_numpy()
    return [
        {
            "depth": int(depth),
            "cells": [
                {
                    "text": text,
                    "probability": float(p),
                    "kl": float(k),
                    "is_next": bool(right),
                    "shade": shade(float(p)),
                }
                for text, p, k, right in zip(found.texts(ids[i]), np.exp(log_prob[i]), kl[i], is_next[i], strict=True)
            ],
        }
        for i, depth in enumerate(depths)
        if np.isfinite(log_prob[i]).all()
    ]


def shade(probability: float) -> int:
    """Return which of ten shades a probability has.

    >>> shade(0.0), shade(0.55), shade(1.0)
    (0, 5, 9)
    """
    return min(int(probability * _N_SHADES), _N_SHADES - 1)
