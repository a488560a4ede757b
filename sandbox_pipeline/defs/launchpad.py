"""The configuration as Dagster's launchpad shows it: same fields, descriptions and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import dagster as dg
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sandbox_pipeline.config import OrchestrationConfig

_SCALARS: dict[type, Any] = {str: str, int: int, float: float, bool: bool}


def launchpad_schema(defaults: Mapping[str, Any]) -> dict[str, dg.Field]:
    """Dagster's config schema of `OrchestrationConfig`.

    Bounds and patterns are checked by the model itself, when a run is launched.

    Args:
        defaults: what the launchpad is prefilled with, over the model's own defaults.
    """
    return _fields(OrchestrationConfig, defaults)


def _fields(model: type[BaseModel], defaults: Mapping[str, Any]) -> dict[str, dg.Field]:
    return {
        name: _field(name, info, defaults.get(name, ...))
        for name, info in model.model_fields.items()
    }


def _field(name: str, info: FieldInfo, default: Any) -> dg.Field:
    inner, optional = _without_none(info.annotation)
    if isinstance(inner, type) and issubclass(inner, BaseModel):
        given: Mapping[str, Any] = {} if default is ... else default
        return dg.Field(_fields(inner, given), description=(inner.__doc__ or "").strip())
    config_type = _config_type(name, inner)
    if optional:
        config_type = dg.Noneable(config_type)
    if default is ... and not info.is_required():
        default = info.get_default(call_default_factory=True)
    extra: dict[str, Any] = {} if default is ... else {"default_value": default}
    return dg.Field(config_type, description=info.description, **extra)


def _config_type(name: str, annotation: Any) -> Any:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return dg.Enum(f"{name}_choice", [dg.EnumValue(value) for value in arguments])
    if origin is list:
        return dg.Array(_SCALARS[arguments[0]])
    if origin is dict:
        return dg.Map(_SCALARS[arguments[0]], _SCALARS[arguments[1]])
    return _SCALARS[annotation]


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) in (Union, UnionType):
        left = [part for part in get_args(annotation) if part is not NoneType]
        return left[0], True
    return annotation, False
