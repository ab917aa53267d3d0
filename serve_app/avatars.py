"""Avatars: which characters are drawn, from what words, and under which name their pictures are stored."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from db.destinations import Destinations, Drawn
from deployments.placing import AVATAR_BUCKET
from serve_app.api.problems import Problem

MOST = 20  # at a time
LONGEST_SLUG = 60
LONGEST_PROMPT = 1000


@dataclass(frozen=True)
class Avatar:
    """One picture to make. `key` is in the bucket `avatars`."""

    character_id: UUID
    name: str
    prompt: str
    key: str

    @property
    def path(self) -> str:
        """What the character's row will say."""
        return f"{AVATAR_BUCKET}/{self.key}"


async def avatars_of(rows: Destinations, names: Sequence[str] | None) -> list[Avatar]:
    """The avatars of the characters of these names; without names, of the installation's own that have no picture, at
    most `MOST` of them. Raises `Problem` for a name that no character has, or several have."""
    characters = await rows.characters_to_draw(names, 10 * MOST if names is not None else MOST)
    for number, name in enumerate(names or ()):
        found = sum(character.name == name for character in characters)
        if not found:
            raise Problem(404, "character_not_found", "there is no character of this name", field=f"names.{number}")
        if found > 1:
            raise Problem(409, "character_ambiguous", f"{found} characters have this name", field=f"names.{number}")
    plain = {character.id: f"characters/{_slug(character)}.png" for character in characters}
    taken = await rows.avatars_taken([f"{AVATAR_BUCKET}/{key}" for key in plain.values()])
    made: dict[str, UUID] = {}
    avatars = []
    for character in characters:
        key = plain[character.id]
        owner = taken.get(f"{AVATAR_BUCKET}/{key}", character.id)
        if made.setdefault(key, character.id) != character.id or owner != character.id:
            key = f"{key.removesuffix('.png')}-{character.id.hex[:8]}.png"  # another one's of the same slug
        avatars.append(Avatar(character.id, character.name, _prompt(character), key))
    return avatars


def _slug(character: Drawn) -> str:
    """The name in lower-case letters and digits without accents; of a name that has none, a part of the id."""
    plain = unicodedata.normalize("NFKD", character.name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:LONGEST_SLUG].strip("-") or character.id.hex[:8]


def _prompt(character: Drawn) -> str:
    about = character.base_prompt or character.description
    parts = ("portrait of a character", about, *character.appearance_tags, "head and shoulders", "plain background")
    text = ", ".join(" ".join(part.split()) for part in parts if part and part.strip())
    return text[:LONGEST_PROMPT]
