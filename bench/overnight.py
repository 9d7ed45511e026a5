"""A night's worth of SAE training in little: python -m bench.overnight [--tokens N]

An SAE of 1,024 features is trained through the stage on a synthetic store of 2 million rows of width 128, streamed
several times over. JSON lines: `tokens`; `memory_growth`, the peak of resident memory in the last tenth of the training
over that in the second tenth (1 means flat); `speed_ratio`, the median tokens a second of the last fifth over that of
the second fifth; `waiting_share`, the share of the time that waited for data; `log_lines` and `minutes`: one line a
minute.
"""

import argparse
import json
import logging
import statistics
import threading
import time
from dataclasses import dataclass, field

import psutil

from bench.synthetic_store import HOOK, SyntheticConfig, synthetic_store
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.sae_set import SAESet
from stages import train_saes

_WIDTH = 128
_SAMPLE_S = 0.5


@dataclass
class Memory:
    """Resident memory of this process over time, sampled by a thread."""

    samples: list[int] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Sample until told to stop."""
        process = psutil.Process()
        while not self._stop.wait(_SAMPLE_S):
            self.samples.append(process.memory_info().rss)

    def stop(self) -> None:
        """Sample no more."""
        self._stop.set()

    def growth(self) -> float:
        """Return the peak of the last tenth over that of the second tenth."""
        tenth = max(1, len(self.samples) // 10)
        return max(self.samples[-tenth:]) / max(self.samples[tenth : 2 * tenth])


class Lines(logging.Handler):
    """Counts the lines that the training writes to the log."""

    def __init__(self) -> None:
        """Begin at none."""
        super().__init__(logging.INFO)
        self.n = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a line that says how far the training is."""
        self.n += "tokens/s" in record.getMessage()


def main() -> None:
    """Train and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    asked = parser.parse_args()
    lines, memory = Lines(), Memory()
    logger = logging.getLogger("mi_pipe")
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    logger.propagate = False
    with synthetic_store(SyntheticConfig(n_prompts=16_384, n_ctx=128, width=_WIDTH)) as store:
        config = TrainSAEsConfig(hooks=[HOOK], d_sae=1024, k=16, n_tokens=asked.tokens, checkpoint_s=20)
        inputs = train_saes.Inputs(None, None, store)
        watcher = threading.Thread(target=memory.watch, daemon=True)
        watcher.start()
        started = time.monotonic()
        made = execute(train_saes.STAGE, config, inputs, Store(store.path.parents[1])).artifact
        minutes = (time.monotonic() - started) / 60
        memory.stop()
        watcher.join()
        timing = SAESet(made.path).timing
    fifth = max(1, len(timing) // 5)
    speeds = timing["tokens_per_s"].tolist()
    ratio = statistics.median(speeds[-fifth:]) / statistics.median(speeds[fifth : 2 * fifth])
    seconds = timing["seconds"].to_numpy()
    waited = float(timing["waiting_share"].to_numpy() @ seconds / seconds.sum())
    print(json.dumps({"tokens": config.n_steps * config.batch_rows, "tokens_per_s": round(statistics.median(speeds))}))
    print(json.dumps({"memory_growth": round(memory.growth(), 4), "peak_mb": max(memory.samples) >> 20}))
    print(json.dumps({"speed_ratio": round(ratio, 3)}))
    print(json.dumps({"waiting_share": round(waited, 4)}))
    print(json.dumps({"log_lines": lines.n, "minutes": round(minutes, 2)}))


if __name__ == "__main__":
    main()
