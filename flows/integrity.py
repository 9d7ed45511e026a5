"""What the commands verify and repair do; imported when one of them runs."""

from rich.console import Console

from flows.terminal import Screen, results_console
from mi_pipe.core.artifact import format_size
from mi_pipe.core.progress import Progress
from mi_pipe.core.store import Store
from mi_pipe.verifying import Verification, verify
from stages.repair.repair import repair

DONE, FAILED = 0, 1


def verify_command(artifact_id: str, store: str | None, deep: bool) -> int:
    """Say what is damaged of one artifact; returns the exit code."""
    with Screen() as screen:
        screen.begin("verify")
        found = verify(artifact_id, store, deep, Progress(screen.tick))
    out = results_console()
    print_damage(out, found)
    how = "compared byte by byte" if deep else "of the right sizes and in agreement (--deep reads every byte)"
    size = format_size(found.size_bytes)
    if found.is_whole:
        out.print(f"{found.id}: whole; {found.n_files:,} files, {size}, {how}", markup=False)
        return DONE
    out.print(
        f"{found.id}: {len(found.damage):,} of {found.n_files:,} files damaged; `mi-pipe repair {found.id}` mends it",
        markup=False,
    )
    return FAILED


def repair_command(artifact_id: str, store: str | None, model: str | None) -> int:
    """Make one artifact whole again; returns the exit code."""
    with Screen() as screen:
        screen.begin("repair")
        done = repair(artifact_id, Store(store), Progress(screen.tick), model)
    out = results_console()
    for name in done.mended:
        out.print(f"mended: {name}", markup=False)
    said = {"whole": "was whole", "mended": "is what was published again", "finished": "is finished"}
    out.print(f"{done.id}: {said[done.outcome]}", markup=False)
    return DONE


def print_damage(out: Console, found: Verification) -> None:
    """Print one line for each damaged file."""
    for damage in found.damage:
        out.print(f"damaged: {damage}", markup=False)
