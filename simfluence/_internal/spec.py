"""The base of frozen, validated specifications: every bad field is reported at once, by its path."""

from __future__ import annotations

from typing import Any

import pydantic

from simfluence.errors import InvalidInput, did_you_mean


class InvalidSpec(InvalidInput):
    """A specification with bad fields: ``problems`` maps the path of each to what is wrong with it."""

    def __init__(self, name: str, problems: dict[str, str]) -> None:
        self.problems = problems
        said = [f"{path}: {message}" if path else message for path, message in problems.items()]
        super().__init__(f"{name}: {'; '.join(said)}")


class Spec(pydantic.BaseModel):
    """A frozen pydantic model that raises ``InvalidInput`` and refuses unknown fields."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise InvalidSpec(type(self).__name__, _problems(type(self), error)) from None

    def replace(self, **changes: Any) -> Any:
        """A copy with some fields changed, validated like a new one."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def _problems(spec: type[Spec], error: pydantic.ValidationError) -> dict[str, str]:
    found: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path = ".".join(str(part) for part in detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, InvalidSpec):  # a specification within this one: its own paths, continued
            found |= {f"{path}.{inner}".rstrip("."): message for inner, message in cause.problems.items()}
        elif detail["type"] == "extra_forbidden":
            found[path] = f"unknown field, {did_you_mean(path, spec.model_fields)}"
        elif isinstance(detail["input"], dict):
            found[path] = detail["msg"].removeprefix("Value error, ")
        else:
            found[path] = f"{detail['msg'].removeprefix('Value error, ')} (got {detail['input']!r})"
    return found
