"""Do two independent measures name the same heads? python -m bench.heads MODEL [--store FOLDER] [--seed N] [--pairs N]

For each class of heads, what the stage `heads` describes (attention, what is copied or written) is set against what
exact interventions do: heads exchanged or ablated by the stage `patch`, path patching by the stage `attribute`, and
the attention of induction heads with an earlier head taken away; then the heads of a class are exchanged together.
Prints markdown: docs/heads.md holds what it said
of SmolLM2. Results stay in the store, so that a second call, or one after a kill, goes on. `--pairs 4` is a quick
look.
"""

import argparse

from bench.heads.comparisons import compared
from bench.heads.knock_outs import together
from bench.heads.runs import Runs, Sizes
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a pulled model, a HuggingFace name or a folder")
    parser.add_argument("--models", help="the store that has the model, where it is not in --store")
    parser.add_argument("--store", help="folder of results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    store = Store(asked.store)
    model = resolve_model(asked.model, Store(asked.models) if asked.models else store, device=asked.device)
    runs = Runs(model, store, Sizes(asked.seed, asked.pairs), asked.device)
    for comparison in compared(runs):
        print(comparison.markdown() + "\n", flush=True)
    print(together(runs))


if __name__ == "__main__":
    main()
