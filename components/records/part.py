"""What every part of a record is."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Frozen, and open to keys that came later."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, ser_json_inf_nan="null")
