"""The one base of all configuration: frozen pydantic models whose field docstrings are the help text.

A field marked `Execution` changes only how a result is computed (device, workers, batch rows), never the
result, and is left out of `identity()`, from which artifact ids are made.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Execution:
    """Marks a field that does not change the result: `rows: Annotated[int, Execution()] = 8`."""


class Config(BaseModel):
    """A frozen set of documented, validated fields; an unknown field is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the result, as JSON values; nested configs likewise."""
        return {
            name: _identity(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not any(isinstance(mark, Execution) for mark in field.metadata)
        }


def _identity(value: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, list | tuple):
        return [_identity(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
