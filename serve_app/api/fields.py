"""The fields of a body that may stand at its top or in its metadata, read with their types checked."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.api.problems import Problem


@dataclass(frozen=True)
class Fields:
    """One body and its metadata. What has the wrong type raises a `Problem` that names it."""

    body: Mapping[str, Any]
    metadata: Mapping[str, Any]

    def either(self, *names: str) -> Any:
        """The first of these that is given, at the top level before the metadata. A seed of 0 is given."""
        for place in (self.body, self.metadata):
            for name in names:
                if place.get(name) is not None:
                    return place[name]
        return None

    def text(self, *names: str) -> str | None:
        """A string under one of these names."""
        return text(names[0], self.either(*names))

    def inner_text(self, name: str) -> str | None:
        """A string of which the metadata's goes first."""
        value = self.metadata.get(name)
        return text(name, value if value not in (None, "") else self.body.get(name))

    def flag(self, name: str) -> bool:
        """A switch of the metadata."""
        value = self.metadata.get(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise Problem(400, "type", "must be true or false", field=f"metadata.{name}")

    def share(self, name: str) -> float | None:
        """A number from 0 to 1."""
        value = self.either(name)
        if value is None:
            return None
        if not is_number(value) or not 0 <= value <= 1:
            raise Problem(400, "range", "must be between 0 and 1", field=name)
        return float(value)

    def choice(self, name: str, values: tuple[str, ...], field: str | None = None) -> str | None:
        """One of these strings. An empty one says nothing."""
        value = self.either(name)
        if value in (None, ""):
            return None
        if not isinstance(value, str) or value not in values:
            raise Problem(400, "choice", f"must be one of {', '.join(values)}", field=field or name)
        return value


def text(name: str, value: Any) -> str | None:
    """A string, or nothing."""
    if value is None or isinstance(value, str):
        return value
    raise Problem(400, "type", "must be a string", field=name)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that can be counted with and stored. true and false are none, nor is what
    Python reads although JSON has no such number (`NaN`) or it is too large for one (`1e999`)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
