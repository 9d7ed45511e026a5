"""The artifact of the stage `probes`: figures, weights, predictions and causal checks of every probe."""

from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mi_pipe.core.artifact import Artifact
from mi_pipe.core.bootstrap import draw_weights, interval
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.models.hook_points import layer_of
from mi_pipe.probes.causal import reading_direction

PROBES_FILE = "probes.parquet"
CURVES_FILE = "l2.parquet"
PREDICTIONS_FILE = "predictions.parquet"
CAUSAL_FILE = "causal.parquet"
WEIGHTS_FILE = "probes.safetensors"
CLASSES_FILE = "classes.parquet"
SKIPPED_FILE = "skipped.json"
KEYS = ("label", "hook", "position", "kind")


class ProbeSet(Artifact):
    """Probes of some labels by hook point and position."""

    @cached_property
    def _probes(self) -> pd.DataFrame:
        return self.read_table(PROBES_FILE)

    def table(self) -> pd.DataFrame:
        """Return one row a probe: `probe` (its number), label, hook, layer, position, kind, and its figures."""
        return self._probes.copy()

    @property
    def labels(self) -> list[str]:
        """What is read."""
        return list(dict.fromkeys(self._probes["label"]))

    @property
    def hooks(self) -> list[str]:
        """Where it is read from."""
        return list(dict.fromkeys(self._probes["hook"]))

    @property
    def positions(self) -> list[str]:
        """At which positions."""
        return list(dict.fromkeys(self._probes["position"]))

    def find(self, label: str, hook: str, position: str, kind: str = "linear") -> pd.Series:
        """Return the row of one probe; raises ConfigError naming what there is."""
        frame = self._probes
        for key, wanted in zip(KEYS, (label, hook, position, kind), strict=True):
            known = list(dict.fromkeys(frame[key]))
            if wanted not in known:
                near = near_names(wanted, known)
                raise ConfigError(f"{self.id} has no probe of {key} {wanted!r}.{near} It has {', '.join(known)}.")
            frame = frame.loc[frame[key] == wanted]
        return frame.iloc[0]

    def weights(self, label: str, hook: str, position: str, kind: str = "linear") -> dict[str, Tensor]:
        """Return a probe's tensors for raw activations: weight and bias, or w1, b1, w2 and b2."""
        number = self.find(label, hook, position, kind)["probe"]
        prefix = f"{number}."
        return {name.removeprefix(prefix): value for name, value in self._tensors.items() if name.startswith(prefix)}

    def scores(
        self, x: Float[Tensor, "row d"], label: str, hook: str, position: str, kind: str = "linear"
    ) -> Float[Tensor, "row output"]:
        """Return logits (one for two classes, that of the second) or the predicted number of raw activations."""
        tensors = self.weights(label, hook, position, kind)
        if kind == "linear":
            return x.float() @ tensors["weight"].T + tensors["bias"]
        return (x.float() @ tensors["w1"].T + tensors["b1"]).relu() @ tensors["w2"].T + tensors["b2"]

    def direction(self, label: str, hook: str, position: str) -> Float[np.ndarray, " d"]:
        """Return the unit vector along which a linear probe's reading grows, in raw activations; float32."""
        tensors = self.weights(label, hook, position)
        return reading_direction(tensors["weight"], tensors["bias"], tensors["pair"]).unit.numpy()

    def classes(self, label: str, position: str) -> list[str]:
        """Return the names of the classes that a label has at a position, in the order of outputs."""
        table = self.read_table(CLASSES_FILE)
        chosen = (table["label"] == label) & (table["position"] == position)
        return table.loc[chosen, "name"].astype(str).tolist()

    def grid(self, figure: str, label: str, kind: str = "linear") -> xr.DataArray:
        """Return one figure of the table (test, auc, selectivity, …) as (hook, position), NaN where there is none."""
        frame = self._probes.loc[(self._probes["label"] == label) & (self._probes["kind"] == kind)]
        if frame.empty or figure not in frame:
            self.find(label, self.hooks[0], self.positions[0], kind)
            raise ConfigError(f"{self.id} has no figure {figure!r}.{near_names(figure, self._probes.columns)}")
        values = frame.set_index(["hook", "position"])[figure].to_xarray()
        named = values.reindex(hook=list(dict.fromkeys(frame["hook"])), position=list(dict.fromkeys(frame["position"])))
        return named.assign_coords(layer=("hook", [_layer(hook) for hook in named["hook"].values]))

    def predictions(self, label: str, hook: str, position: str, kind: str = "linear") -> pd.DataFrame:
        """Return the test rows of one probe: row of the store, prompt_idx, pos, target, predicted, score."""
        number = self.find(label, hook, position, kind)["probe"]
        table = pd.read_parquet(self.file(PREDICTIONS_FILE), filters=[("probe", "==", int(str(number)))])
        return table.drop(columns="probe").reset_index(drop=True)

    @cached_property
    def curves(self) -> pd.DataFrame:
        """`l2.parquet`: loss on training and validation rows of every penalty tried."""
        return self.read_table(CURVES_FILE)

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Labels and positions without a probe, and why."""
        return self.read_json(SKIPPED_FILE)

    @property
    def metric(self) -> str:
        """Name of the metric of causal checks, "" without them."""
        return (self.manifest.config.get("causal") or {}).get("metric", "")

    @property
    def has_causal(self) -> bool:
        """Say whether activations were moved."""
        return CAUSAL_FILE in self.manifest.files

    @cached_property
    def causal(self) -> pd.DataFrame:
        """`causal.parquet`: reading and metric of every run, prompt by prompt."""
        return self.read_table(CAUSAL_FILE)

    def causal_effects(self, label: str, hook: str, position: str) -> pd.DataFrame:
        """Return mean changes against the model left alone, with 95% intervals by prompt.

        One row a direction ("probe", "random"), amount and later hook point: `reading`, `metric`, `…_low`, `…_high`.
        """
        self.find(label, hook, position)
        table = self.causal
        chosen = table.loc[(table["label"] == label) & (table["hook"] == hook) & (table["position"] == position)]
        keys = ["read_hook", "prompt_idx"]
        alone = chosen.loc[chosen["amount"] == 0].drop_duplicates(keys).set_index(keys)[["reading", "metric"]]
        moved = chosen.loc[chosen["amount"] != 0].join(alone, on=keys, rsuffix="_alone")
        return pd.DataFrame(
            {"direction": direction, "amount": amount, "read_hook": read_hook, **_changes(rows)}
            for (direction, amount, read_hook), rows in moved.groupby(["direction", "amount", "read_hook"], sort=False)
        )

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return self.read_tensors(WEIGHTS_FILE)


def _changes(rows: pd.DataFrame) -> dict[str, float]:
    found: dict[str, float] = {}
    weights = _shares(len(rows))
    for name in ("reading", "metric"):
        change = rows[name].to_numpy(float) - rows[f"{name}_alone"].to_numpy(float)
        found[name] = float(change.mean())
        found[f"{name}_low"], found[f"{name}_high"] = interval(weights @ change)
    return found


@lru_cache(maxsize=2)
def _shares(n_prompts: int) -> Float[np.ndarray, "draw prompt"]:
    """Return the share of each prompt in each draw; all runs of a check are of the same prompts."""
    return draw_weights(n_prompts) / n_prompts


def _layer(hook: str) -> int:
    layer = layer_of(hook)
    return -1 if layer is None else layer
