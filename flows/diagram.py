"""The pipeline's diagram: which artifact is made from which, for one recipe.

    train_model ──► (model)
    generate_prompts ──► harvest ──► train_saes ──► score_features ──┐
          │                 └──────► lenses, probes ─────────────────┤
          └──────────► heads, patch, attribute, circuits ───────────┼──► report
                              (prompts, probes, SAEs) ──► steer ────┘

Where parts of SAEs are patched, `patch` reads them too.
Instead of a harvest, activations that exist may be given, and instead of a training SAEs; so may a second store of the
same tokens, and a training to go on from.

`diagram` is the only place where stages are wired; `plan` and `run` both read it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Union

from flows.given import Given, given_activations, given_probes, given_saes, given_training, known_prompts
from flows.recipe import Recipe
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.artifact import Artifact
from mi_pipe.core.config import Config
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.stage import Stage, stage_id
from mi_pipe.core.store import Store
from mi_pipe.models.handle import ModelHandle, resolve_model
from stages import (
    attribute,
    circuits,
    generate_prompts,
    harvest,
    heads,
    lenses,
    patch,
    probes,
    report,
    score_features,
    steer,
    train_model,
    train_saes,
)

Source = Union["Step", ModelHandle, Artifact]
"""Where an input comes from: another step, a model outside the store, or an artifact that is there already."""


@dataclass(frozen=True, eq=False)
class Step:
    """One stage with its config and where its inputs come from."""

    stage: Stage[Any, Any]
    config: Config
    inputs: "dict[str, Source | list[Step | Artifact] | None]"
    label: str
    needs_all_inputs: bool = field(default=True)

    @cached_property
    def id(self) -> str:
        """The artifact's id, known before anything has run."""
        return stage_id(self.stage, self.config, {role: source.id for role, source in self.sources()})

    def sources(self) -> Iterator[tuple[str, Source]]:
        """Iterate over (role, source); items of a list have roles `tasks.0`, `tasks.1` and so on."""
        for role, source in self.inputs.items():
            if isinstance(source, list):
                yield from ((f"{role}.{i}", item) for i, item in enumerate(source))
            elif source is not None:
                yield role, source

    @property
    def upstream(self) -> "list[Step]":
        """The steps that this one reads."""
        return [source for _, source in self.sources() if isinstance(source, Step)]


def given_of(steps: list[Step]) -> list[Given]:
    """Return the artifacts that the steps read and no step makes, each once."""
    found: dict[str, Given] = {}
    for role, source in (pair for step in steps for pair in step.sources()):
        if isinstance(source, Artifact):
            found.setdefault(source.id, Given(role, source))
    return list(found.values())


def diagram(recipe: Recipe, store: Store) -> list[Step]:
    """Return the recipe's steps in an order in which each comes after its inputs."""
    steps: list[Step] = []

    def step(stage: Stage[Any, Any], config: Config, label: str, **inputs: Any) -> Step:
        steps.append(Step(stage, config, inputs, label))
        return steps[-1]

    model = _model(recipe, store, step)
    tasks = {
        name: step(generate_prompts.STAGE, config, f"prompts.{name}", model=model)
        for name, config in recipe.tasks.items()
    }
    if recipe.heads:
        step(heads.STAGE, recipe.heads, "heads", model=model, tasks=list(tasks.values()))
    if recipe.patch and not recipe.patch.reads_saes:
        _patches(recipe.patch, step, tasks, {"model": model})
    if recipe.attribution:
        for name in recipe.attribution.tasks or tasks:
            step(attribute.STAGE, recipe.attribution, f"attribution.{name}", model=model, task=tasks[name])
    if recipe.circuits:
        for name in recipe.circuits.tasks or tasks:
            step(circuits.STAGE, recipe.circuits, f"circuits.{name}", model=model, task=tasks[name])
    text = step(generate_prompts.STAGE, recipe.prompts, "prompts", model=model) if recipe.prompts else None
    acts = step(harvest.STAGE, recipe.harvest, "harvest", model=model, prompts=text) if recipe.harvest else None
    if recipe.activations:
        acts = given_activations(recipe.activations, store, model.id if model else None)
        text = text or known_prompts(acts, store)
    readers = _readings(recipe, step, list(tasks.values()), {"model": model, "activations": acts, "prompts": text})
    other = _other(recipe, store)
    saes = given_saes(recipe.trained_saes, store) if recipe.trained_saes else None
    read = {"model": model, "activations": acts, "other": other}
    if recipe.saes:
        # Without a model SAEs are not run on prompts; features are shown in them all the same.
        run_on = text if model else None
        start = given_training(recipe.saes.start_from, store) if recipe.saes.start_from else None
        saes = step(train_saes.STAGE, recipe.saes, "saes", prompts=run_on, start=start, **read)
    if recipe.patch and recipe.patch.reads_saes:
        _patches(recipe.patch, step, tasks, {"model": model, "saes": saes})
    if recipe.features:
        step(score_features.STAGE, recipe.features, "features", prompts=text, **read, saes=saes)
    probed = given_probes(recipe.steering.probes, store) if recipe.steering and recipe.steering.probes else readers
    if recipe.steering:
        _steering(recipe.steering, step, model, {**tasks}, {"prompts": text, "probes": probed, "saes": saes})
    if recipe.report:
        given = [item for item in (text, acts, other, saes, probed) if isinstance(item, Artifact)]
        steps.append(_report(recipe, [*given, *steps]))
    return steps


def _patches(config: patch.PatchConfig, step: Any, tasks: dict[str, Step], read: dict[str, Any]) -> None:
    """Wire patching, each task by itself; SAEs are read, and in the ids, only where parts of them are patched."""
    for name in config.tasks or tasks:
        step(patch.STAGE, config, f"patch.{name}", task=tasks[name], **read)


def _readings(recipe: Recipe, step: Any, tasks: list[Step], read: dict[str, Any]) -> Step | None:
    """Wire lenses and probes, and return the probes; what a config does not make them read is not in their ids."""
    if recipe.lenses:
        read_if_tuned = read if recipe.lenses.tuned else {"model": read["model"]}
        step(lenses.STAGE, recipe.lenses, "lenses", tasks=tasks, **read_if_tuned)
    if recipe.probes:
        read_if_moved = read if recipe.probes.causal else {"activations": read["activations"]}
        return step(probes.STAGE, recipe.probes, "probes", **read_if_moved)
    return None


def _steering(
    config: steer.SteeringConfig, step: Any, model: Any, tasks: dict[str, Step], others: dict[str, Any]
) -> None:
    """Wire steering; probes, SAEs and text are in its id only where it uses them."""
    chosen = tasks if config.tasks is None else config.tasks
    sets = [tasks[name] if name in tasks else others[name] for name in config.contrast_sets]
    if None in sets:
        raise ConfigError("steering: the prompts of the activations are not in the store; name them (section prompts).")
    directions = config.directions.values()
    is_used = {
        "prompts": config.perplexity is not None,
        "probes": any(direction.probe for direction in directions),
        "saes": any(direction.feature for direction in directions),
    }
    read = {role: source if is_used[role] else None for role, source in others.items()}
    step(steer.STAGE, config, "steering", model=model, tasks=[tasks[name] for name in chosen], contrasts=sets, **read)


def _model(recipe: Recipe, store: Store, step: Any) -> Step | ModelHandle | None:
    if recipe.train_model:
        return step(train_model.STAGE, recipe.train_model, "model")
    section = recipe.model
    if section.name is None:
        return None
    return resolve_model(
        section.name, store, section.dtype, section.device, section.revision, section.trust_remote_code
    )


def _other(recipe: Recipe, store: Store) -> ActivationStore | None:
    """Return the second store that SAEs read, if there is one, whatever model it is of."""
    name = recipe.saes.other_store if recipe.saes else None
    return given_activations(name, store, None, "saes.other_store") if name else None


def _report(recipe: Recipe, shown: list[Step | Artifact]) -> Step:
    assert recipe.report is not None
    config = recipe.report.for_run(recipe.name, recipe.description, recipe.identity(), recipe.claims)
    return Step(report.STAGE, config, {"artifacts": shown}, "report", needs_all_inputs=False)
