"""SAELens' CacheActivationsRunner, run by the python of a virtual environment that has SAELens (and no mi_pipe).

Loads the model once; then, for each line on its input, caches the activations into the folder that the line names
and answers with a JSON line: wall and CPU seconds.
"""

import json
import os
import sys
import time


def main() -> None:
    """Serve measurements until the input ends."""
    options = json.loads(sys.argv[1])
    import numpy as np
    import torch
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    torch.set_num_threads(options["n_threads"])
    tokens = np.load(options["tokens"])
    n_tokens, width = tokens.size, options["d_model"]
    dataset = Dataset.from_dict({"tokens": tokens.tolist()})

    def runner(folder: str) -> CacheActivationsRunner:
        config = CacheActivationsRunnerConfig(
            dataset_path="unused",
            model_name="gpt2",
            hook_name=options["hook"],
            d_in=width,
            training_tokens=n_tokens,
            context_size=tokens.shape[1],
            model_batch_size=options["batch_prompts"],
            buffer_size_gb=n_tokens * width * 4 / 1e9,
            new_cached_activations_path=folder,
            shuffle=False,
            streaming=False,
            prepend_bos=False,
            device="cpu",
        )
        return CacheActivationsRunner(config, override_dataset=dataset)

    model = None
    for line in sys.stdin:
        made = runner(line.strip())
        # Loading is not what is measured, and the model of the first call serves the others.
        model = model or made.model
        made.model = made.activations_store.model = model
        wall, cpu = time.perf_counter(), time.process_time()
        n_cached = len(made.run()) * tokens.shape[1]
        seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "tokens": n_cached}
        os.write(options["answers"], (json.dumps(seconds) + "\n").encode())


if __name__ == "__main__":
    main()
