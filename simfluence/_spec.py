"""The base of frozen, validated specifications: every bad field is reported at once, by name."""

from __future__ import annotations

from typing import Any

import pydantic

from simfluence.errors import InvalidInput, did_you_mean


class Spec(pydantic.BaseModel):
    """A frozen pydantic model that raises ``InvalidInput`` and refuses unknown fields."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise InvalidInput(_explain(type(self), error)) from None

    def replace(self, **changes: Any) -> Any:
        """A copy with some fields changed, validated like a new one."""
        return type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | changes)


def _explain(spec: type[Spec], error: pydantic.ValidationError) -> str:
    problems = [_problem(spec, dict(detail)) for detail in error.errors(include_url=False)]
    return f"{spec.__name__}: " + "; ".join(problems)


def _problem(spec: type[Spec], detail: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown field {where!r}, {did_you_mean(where, spec.model_fields)}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{where}: {message} (got {detail['input']!r})" if where else message
