"""The base class of the parts of records."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A part of a record: frozen, and open to keys that later releases add."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, ser_json_inf_nan="null")
