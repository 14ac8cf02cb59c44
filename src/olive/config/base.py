"""The base of every typed part of the document: frozen and closed."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

Dtype = Literal["float32", "float16", "bfloat16"]
type_of_json = str | int | float | bool | None | list[Any] | dict[str, Any]


class Frozen(BaseModel):
    """A frozen model that accepts no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PassParams(Frozen):
    """Base of the parameters of a pass: frozen, closed, defaults resolved.

    A field that names a data config carries ``json_schema_extra={"reference": "data_configs"}``, so that the
    loader resolves the name and says which names exist.
    """

    @classmethod
    def references(cls) -> dict[str, str]:
        """Field name -> the document section its value names."""
        found: dict[str, str] = {}
        for name, field in cls.model_fields.items():
            section = _extra(field).get("reference")
            if isinstance(section, str):
                found[name] = section
        return found

    @classmethod
    def inherited(cls) -> dict[str, str]:
        """Field that is left out -> the field of a pass before it whose value it takes then.

        Declared with ``json_schema_extra={"inherits": "train_data_config"}``.
        """
        found: dict[str, str] = {}
        for name, field in cls.model_fields.items():
            source = _extra(field).get("inherits")
            if isinstance(source, str):
                found[name] = source
        return found


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
