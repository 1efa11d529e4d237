"""The base class of frozen, validated specifications, which report all bad fields at once."""

from __future__ import annotations

from typing import Any

import pydantic

from simfluence.errors import InvalidInput, did_you_mean


class InvalidSpec(InvalidInput):
    """A specification with bad fields; ``problems`` maps the path of each bad field to its message."""

    def __init__(self, name: str, problems: dict[str, str]) -> None:
        self.problems = problems
        messages = [f"{path}: {message}" if path else message for path, message in problems.items()]
        super().__init__(f"{name}: {'; '.join(messages)}")


class Spec(pydantic.BaseModel):
    """A frozen pydantic model that raises ``InvalidInput`` and refuses unknown fields."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise InvalidSpec(type(self).__name__, _problems(type(self), error)) from None

    def replace(self, **changes: Any) -> Any:
        """Return a validated copy with some fields changed."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def _problems(spec: type[Spec], error: pydantic.ValidationError) -> dict[str, str]:
    problems: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        path = ".".join(str(part) for part in detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, InvalidSpec):  # a nested specification: extend its paths
            problems |= {f"{path}.{inner}".rstrip("."): message for inner, message in cause.problems.items()}
        elif detail["type"] == "extra_forbidden":
            problems[path] = f"unknown field, {did_you_mean(path, spec.model_fields)}"
        elif isinstance(detail["input"], dict):
            problems[path] = detail["msg"].removeprefix("Value error, ")
        else:
            problems[path] = f"{detail['msg'].removeprefix('Value error, ')} (got {detail['input']!r})"
    return problems
