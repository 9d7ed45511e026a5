"""A stage in a child process that SIGKILLs itself at a given unit of work, and its continuation in this process.

`python -m tests.stages.killed MODULE CONFIG STORE AT INPUTS` is the child: MODULE is the stage's, CONFIG and
INPUTS are JSON (each input as its class and its folder).
"""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from mi_pipe.core.progress import Progress, Tick
from mi_pipe.core.stage import Result, execute
from mi_pipe.core.store import Store


def resume_after_kill(module, config, inputs, store: Store, at: float) -> Result:
    """Kill the stage of `module` once `at` units are done, then run it again here; the kill must have happened."""
    arguments = [module.__name__, config.model_dump_json(), str(store.root), str(at), json.dumps(_packed(inputs))]
    command = [sys.executable, "-m", "tests.stages.killed", *arguments]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    result = execute(module.STAGE, config, inputs, store)
    assert result.outcome == "Resumed"
    return result


def _packed(inputs) -> dict:
    """Return each input as [module, class, folder], a list of them for a list, None for none."""

    def pack(value):
        if isinstance(value, list):
            return [pack(item) for item in value]
        if value is None:
            return None
        return {"module": type(value).__module__, "name": type(value).__name__, "path": str(value.path)}

    return {field.name: pack(getattr(inputs, field.name)) for field in dataclasses.fields(inputs)}


def _unpacked(value):
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    if value is None:
        return None
    return getattr(importlib.import_module(value["module"]), value["name"])(Path(value["path"]))


def _run_until_killed(name: str, config: str, root: str, at: str, inputs: str) -> None:
    def kill(tick: Tick) -> None:
        if tick.done >= float(at):
            os.kill(os.getpid(), signal.SIGKILL)

    module = importlib.import_module(name)
    fields = {role: _unpacked(value) for role, value in json.loads(inputs).items()}
    fitted = module.STAGE.config.model_validate_json(config)
    execute(module.STAGE, fitted, module.STAGE.inputs(**fields), Store(Path(root)), Progress(kill, every_s=0))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _run_until_killed(*sys.argv[1:])
