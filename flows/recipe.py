"""Recipes: one YAML file says which model and which stages; `key.path=value` overrides change it.

A section that is there is a stage that runs (with defaults where it is empty); one that is absent, or set to
null by an override, is skipped. Mistakes are answered with the line and the nearest name.
"""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from flows.patch_checks import check_patched
from flows.recipe_errors import explain, key_lines
from flows.steering_checks import check_sources
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.models.device import DType
from mi_pipe.report.claims import Claim
from stages.attribute import AttributionConfig
from stages.circuits import CircuitsConfig
from stages.generate_prompts import AnyPromptConfig
from stages.harvest import HarvestConfig
from stages.heads import HeadsConfig
from stages.lenses import LensesConfig
from stages.patch import PatchConfig
from stages.probe_plan import ProbesConfig
from stages.report import ReportConfig
from stages.score_features import ScoreFeaturesConfig
from stages.steer import SteeringConfig
from stages.train_model import TrainModelConfig
from stages.train_saes import TrainSAEsConfig

DEFAULT_RECIPE = "tiny"
_PACKAGED = Path(__file__).parent / "configs"
_CHECKOUT = Path(__file__).parent.parent / "configs"
_NEEDS = {
    "harvest": ("prompts",),
    "saes": ("harvest", "activations"),
    "features": ("saes", "trained_saes"),
    "trained_saes": ("harvest", "activations", "patch"),
    "probes": ("harvest", "activations"),
    "heads": ("tasks",),
    "patch": ("tasks",),
    "attribution": ("tasks",),
    "circuits": ("tasks",),
}
"""What each section needs: one of these."""
_PLAIN = ("name", "description", "store", "activations", "trained_saes")
"""Keys that are no sections."""
_NEEDING_MODEL = ("prompts", "tasks", "harvest", "lenses", "steering")
"""Sections that need a model; `heads`, `patch` and `circuits` need tasks, and the others only activations."""


class ModelSection(Config):
    """Which model the recipe is about."""

    name: str | None = None
    """A pulled model (smollm2-135m), a HuggingFace name, a folder, or a .gguf file; none if the recipe trains it."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: DType = "float32"
    """Dtype of the weights. Harvest chooses its own compute precision."""
    device: Annotated[str, Execution()] = "auto"
    """auto, cuda, cuda:1, mps or cpu."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights. Only for sources you trust."""


class Recipe(Config):
    """One night's work."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """What the run is called."""
    description: str = ""
    """One or two sentences for the report."""
    store: Annotated[str | None, Execution()] = None
    """Folder of results; default: the variable MI_PIPE_STORE, or data/store."""
    model: ModelSection = ModelSection()
    """Which model."""
    train_model: TrainModelConfig | None = None
    """Train a small model, and use it."""
    prompts: AnyPromptConfig | None = None
    """The text that activations are harvested on."""
    tasks: dict[str, AnyPromptConfig] = Field(default_factory=dict)
    """Tasks with clean and corrupted prompts, by a name of your choice."""
    harvest: HarvestConfig | None = None
    """Store activations."""
    activations: str | None = Field(None, min_length=1)
    """Instead of a harvest, activations that are there: the id of an artifact, or the beginning of it, or its URL."""
    saes: TrainSAEsConfig | None = None
    """Train sparse autoencoders on them."""
    trained_saes: str | None = Field(None, min_length=1)
    """Instead of a training, SAEs that are there: the id of a training or an import, or the beginning of it."""
    features: ScoreFeaturesConfig | None = None
    """Score the features."""
    heads: HeadsConfig | None = None
    """Score attention heads and store patterns."""
    lenses: LensesConfig | None = None
    """Read task prompts through the logit lens, and through a tuned lens trained on the activations."""
    probes: ProbesConfig | None = None
    """Train probes on the activations."""
    patch: PatchConfig | None = None
    """Patch activations."""
    attribution: AttributionConfig | None = None
    """Attribute a task's metric to nodes and paths."""
    circuits: CircuitsConfig | None = None
    """Find circuits."""
    steering: SteeringConfig | None = None
    """Add directions to activations: what that does to metrics and to the loss on text, and what is written then."""
    report: ReportConfig | None = None
    """Write the report."""
    claims: tuple[Claim, ...] = ()
    """Statements that the report checks against measured figures."""

    @property
    def needs_model(self) -> bool:
        """Say whether there is a section that can do nothing without a model."""
        runs_probes = self.probes is not None and self.probes.causal is not None
        return self.activations is None or runs_probes or any(getattr(self, name) for name in _NEEDING_MODEL)


def recipe_path(name: str) -> Path:
    """Return the file of a recipe given by path or by the name of one that ships; raises ConfigError."""
    if Path(name).is_file():
        return Path(name)
    for folder in (_CHECKOUT, _PACKAGED):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    known = sorted(path.stem for path in (_CHECKOUT if _CHECKOUT.is_dir() else _PACKAGED).glob("*.yaml"))
    raise ConfigError(f"There is no recipe {name!r}.{near_names(name, known)} Recipes that ship: {', '.join(known)}.")


def load_recipe(recipe: str | Mapping[str, Any] = DEFAULT_RECIPE, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, a file or its sections as a mapping, and apply `key.path=value` overrides (values are YAML).

    Raises ConfigError with file, line and near names for anything that is not right.
    """
    if isinstance(recipe, str):
        content, lines, place = _read(recipe_path(recipe))
    else:
        content, lines, place = {"name": "recipe", **copy.deepcopy(dict(recipe))}, {}, "the recipe"
    content = {key: _as_section(key, value) for key, value in content.items()}
    for override in overrides:
        _apply(content, override, lines)
    try:
        found = Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain(error, Recipe, lines, place)) from error
    _check_sections(found, place)
    return found


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str], str]:
    """Return a file's sections, where each key stands, and the file's name."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{place} is not YAML: {getattr(error, 'problem', error)}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections such as `model:` and `harvest:`, got {type(content).__name__}.")
    lines = {key: f"{path}, line {line}" for key, line in key_lines(text).items()}
    return {"name": path.stem, **content}, lines, str(path)


def _as_section(key: Any, value: Any) -> Any:
    """A bare `heads:` in a file is the section with its defaults."""
    return {} if value is None and key in Recipe.model_fields and key not in _PLAIN else value


def _apply(content: dict[str, Any], override: str, lines: dict[tuple[str, ...], str]) -> None:
    key, equals, text = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise ConfigError(f"An override is written key.path=value, got {override!r}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of the override {override!r} is not YAML.") from error
    target: Any = content
    for depth, part in enumerate(path[:-1], start=1):
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(f"The override {override!r} goes below {'.'.join(path[:depth])!r}, which is no section.")
    if value is None and len(path) == 1:
        target.pop(path[0], None)
    else:
        target[path[-1]] = value
    for length in range(1, len(path) + 1):
        lines.setdefault(path[:length], f"override {override!r}")
    lines[path] = f"override {override!r}"


def _check_sections(recipe: Recipe, place: str) -> None:
    """Say which section is missing for another, or is one too many, and which tasks there are."""
    for section, needed in _NEEDS.items():
        if getattr(recipe, section) is not None and not any(getattr(recipe, name) for name in needed):
            raise ConfigError(f"{place}: section {section!r} needs a section {' or '.join(map(repr, needed))}.")
    for section, given in (("harvest", "activations"), ("saes", "trained_saes")):
        if getattr(recipe, section) and getattr(recipe, given):
            raise ConfigError(
                f"{place} has both {section!r} and {given!r} ({getattr(recipe, given)}); leave out one of them."
            )
    _check_lenses(recipe, place)
    check_patched(recipe, place)
    check_sources(recipe, place)
    _check_model(recipe, place)
    for section in ("patch", "attribution", "circuits", "steering"):
        chosen = getattr(getattr(recipe, section), "tasks", None) or []
        for task in chosen:
            if task not in recipe.tasks:
                known = ", ".join(recipe.tasks)
                raise ConfigError(
                    f"{place}: {section}.tasks names {task!r}, which is no task of the recipe "
                    f"({known}).{near_names(task, recipe.tasks)}"
                )


def _check_lenses(recipe: Recipe, place: str) -> None:
    """Say what lenses have nothing to be trained on, or to read."""
    if recipe.lenses is None:
        return
    has_activations = bool(recipe.harvest or recipe.activations)
    if recipe.lenses.tuned and not has_activations:
        raise ConfigError(f"{place}: lenses.tuned is trained on activations; add a section 'harvest' or 'activations'.")
    if not recipe.lenses.tuned and not recipe.tasks:
        raise ConfigError(f"{place}: section 'lenses' needs a section 'tasks' to read, or lenses.tuned to train.")


def _check_model(recipe: Recipe, place: str) -> None:
    """Say that there is no model, or are two."""
    n_models = (recipe.model.name is not None) + (recipe.train_model is not None)
    if n_models > 1 or (n_models == 0 and recipe.needs_model):
        have = "both" if n_models else "neither"
        raise ConfigError(f"{place} must name a model (model.name) or train one (train_model); it has {have}.")
