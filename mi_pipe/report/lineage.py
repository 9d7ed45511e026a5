"""Lineage: which artifact was made from which, laid out in columns from sources to the report's other end."""

from collections.abc import Sequence
from dataclasses import dataclass

from mi_pipe.core.artifact import Artifact
from mi_pipe.report.naming import short_name

_WIDTH, _HEIGHT = 168, 44
_GAP_X, _GAP_Y = 56, 16
_MARGIN = 8


@dataclass(frozen=True)
class Box:
    """An artifact, or a model from outside, and its place in pixels."""

    id: str
    stage: str
    label: str
    x: int
    y: int
    width: int = _WIDTH
    height: int = _HEIGHT


@dataclass(frozen=True)
class Lineage:
    """Boxes, the curves between them, and the size of the whole."""

    boxes: list[Box]
    curves: list[tuple[Box, Box]]
    width: int
    height: int

    @staticmethod
    def path(source: Box, target: Box) -> str:
        """Return the SVG path of an arrow from the right of one box to the left of another."""
        x0, y0 = source.x + source.width, source.y + source.height / 2
        x1, y1 = target.x, target.y + target.height / 2
        bend = max((x1 - x0) / 2, _GAP_X / 2)
        return f"M{x0} {y0:g}C{x0 + bend:g} {y0:g} {x1 - bend:g} {y1:g} {x1} {y1:g}"


def lineage(artifacts: Sequence[Artifact]) -> Lineage:
    """Lay out artifacts and their inputs; an artifact stands right of all its inputs."""
    parents = {artifact.id: [ref.id for ref in artifact.inputs.values()] for artifact in artifacts}
    outside = dict.fromkeys(ref for refs in parents.values() for ref in refs if ref not in parents)
    parents |= {ref: [] for ref in outside}
    depths = _depths(parents)
    known = {artifact.id: artifact for artifact in artifacts}
    columns: dict[int, int] = {}
    boxes: dict[str, Box] = {}
    for name in sorted(parents, key=lambda name: (depths[name], list(parents).index(name))):
        row = columns.get(depths[name], 0)
        columns[depths[name]] = row + 1
        stage, label = (
            (known[name].manifest.stage, short_name(known[name])) if name in known else (_outside(name), name)
        )
        x, y = _MARGIN + depths[name] * (_WIDTH + _GAP_X), _MARGIN + row * (_HEIGHT + _GAP_Y)
        boxes[name] = Box(name, stage, label, x, y)
    curves = [(boxes[ref], boxes[name]) for name, refs in parents.items() for ref in dict.fromkeys(refs)]
    width = 2 * _MARGIN + (max(columns, default=0) + 1) * (_WIDTH + _GAP_X) - _GAP_X
    height = 2 * _MARGIN + max(columns.values(), default=1) * (_HEIGHT + _GAP_Y) - _GAP_Y
    return Lineage(list(boxes.values()), curves, width, height)


def _depths(parents: dict[str, list[str]]) -> dict[str, int]:
    depths: dict[str, int] = {}

    def depth(name: str) -> int:
        if name not in depths:
            depths[name] = 1 + max((depth(ref) for ref in parents[name]), default=-1)
        return depths[name]

    for name in parents:
        depth(name)
    return depths


def _outside(name: str) -> str:
    return "model" if name.startswith("model") else name.rpartition("-")[0] or name
