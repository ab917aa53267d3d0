"""What a text or a picture points to, as the content policy reads it: how clearly, and not by which words."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

ACCOUNT = "content_signs"
"""Where the account of a result has its signs."""


class Sign(IntEnum):
    """How clearly something is pointed to; a weak sign counts only beside one of the other kind."""

    NONE = 0
    WEAK = 1
    STRONG = 2


class Signs(BaseModel):
    """Signs of minors and of sexual content, as numbers of `Sign`.

    They are kept with a picture that a model made, so that whatever is made from it is judged together with what the
    picture was made from: also where no job and no words are left of that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    minors: int = Field(default=0, ge=0, le=2)
    sexual: int = Field(default=0, ge=0, le=2)

    def __or__(self, other: Self) -> Self:
        """Of both together."""
        return type(self)(minors=max(self.minors, other.minors), sexual=max(self.sexual, other.sexual))

    @classmethod
    def told(cls, account: Any) -> Self:
        """As an account has them. None in what was written before there were any."""
        try:
            return cls.model_validate(account)
        except ValidationError:
            return cls()
