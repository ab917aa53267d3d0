"""The pictures of a body of `queue-job`: which references they are, how much of each stays, and in which mode.

For an image there is one, `reference_image_url`; for a video a start and an end, of which a single one is the start.
"""

from typing import cast

from models.catalog import Format, JobType
from models.guiding.reference import ReferenceKind
from models.profile import ModelSpec
from serve_app.api.fields import Fields
from serve_app.api.problems import Problem
from serve_app.api.wire import Adjusted
from serve_app.modes import VIDEO_MODES, Mode, Wish, nearest_strength
from serve_app.references import SINGLE, AskedReference

KINDS = ("image", "style", "character", "composition")
START, END = "metadata.start_reference_url", "metadata.end_reference_url"
NO_PICTURE = "there is no reference image"
Read = tuple[tuple[AskedReference, ...], Mode]


class PictureReading:
    """Reads the pictures of one body. `notes` are of what it said without effect."""

    def __init__(self, fields: Fields, job_type: JobType, spec: ModelSpec, wish: Wish) -> None:
        self._fields, self._job_type, self._spec, self._wish = fields, job_type, spec, wish
        self.notes: list[Adjusted] = []

    def read(self, copied: float, changed: float) -> Read:
        """The references, and the mode; `copied` and `changed` are the strengths where none is given."""
        fields = self._fields
        picture = fields.inner_text("reference_image_url") or None
        start, end = fields.text("start_reference_url") or None, fields.text("end_reference_url") or None
        kind = cast(ReferenceKind | None, fields.choice("reference_type", KINDS))
        said = fields.choice("video_reference_mode", tuple(dict.fromkeys(VIDEO_MODES.values())))
        if self._job_type.format is Format.VIDEO:
            return self._frames(picture, start, end, said, kind)
        for url, field in ((start, START), (end, END)):
            if url:
                message = f"{self._job_type.name} makes images, which have no frames to start or end with"
                raise Problem(400, "unsupported", message, field=field)
        if picture is None:
            self._note_wish("none", NO_PICTURE)
            self._note_kind(kind, "none", NO_PICTURE)
            self._strength(NO_PICTURE)
            return (), Mode.TEXT
        return self._picture(picture, kind, {Mode.COPY: copied, Mode.MODIFY: changed})

    def _picture(self, picture: str, kind: ReferenceKind | None, presets: dict[Mode, float]) -> Read:
        names = dict(SINGLE)
        if self._fields.either("denoise_strength") is not None:
            names["strength"] = "denoise_strength"
        strength = self._strength(starts=not self._only_steers(kind))
        if self._only_steers(kind):
            return (AskedReference(image=picture, kind=kind, strength=strength, names=names),), Mode.TEXT
        mode = self._wish.mode()
        if self._wish.copy and mode is not Mode.COPY:
            reason = "an exact copy has neither a prompt nor a description"
            self._note("metadata.exact_copy_mode", "true", mode.value, reason)
        if kind is not None and self._wish.starts_from_picture:
            self._note_kind(kind, "image", "a copy or a change starts from the picture itself")
            kind = None
        strength = presets.get(mode) if strength is None else strength
        return (AskedReference(image=picture, kind=kind, strength=strength, names=names),), mode

    def _only_steers(self, kind: ReferenceKind | None) -> bool:
        """Whether a picture of this kind is nothing that the job starts from. Who says that it is copied or changed
        says that it is; older clients send a kind beside it."""
        if kind is None or kind == "image" or self._wish.starts_from_picture:
            return False
        return kind != "composition" or self._spec.reference_methods.get(kind) == "controlnet"

    def _frames(
        self, picture: str | None, start: str | None, end: str | None, said: str | None, kind: ReferenceKind | None
    ) -> Read:
        if picture and start and picture != start:
            raise Problem(400, "conflict", f"is another picture than {START}", field="reference_image_url")
        single = picture if start is None else None
        found = VIDEO_MODES[bool(single), bool(start), bool(end)]
        if said is not None and said != found:
            message = f"the pictures that are given make it {found}"
            raise Problem(400, "conflict", message, field="metadata.video_reference_mode")
        reason = "a frame is kept as it is" if found != "none" else NO_PICTURE
        self._note_wish("none", "a video starts from its frames")
        self._note_kind(kind, "none" if found == "none" else "start_frame", reason)
        self._strength(reason)
        frames: tuple[tuple[str | None, str, ReferenceKind], ...] = (
            (single, "reference_image_url", "start_frame"),
            (start, START, "start_frame"),
            (end, END, "end_frame"),
        )
        references = (
            AskedReference(image=url, kind=of, names=dict.fromkeys(SINGLE, field)) for url, field, of in frames if url
        )
        return tuple(references), Mode.TEXT

    def _strength(self, unused: str | None = None, *, starts: bool = False) -> float | None:
        """How much of the picture stays, `starts` saying that it is what is generated from. Clients send both numbers,
        always: what is without effect is noted, `unused` saying why both are."""
        strength, noise = self._fields.share("reference_strength"), self._fields.share("denoise_strength")
        if unused is not None:
            for name, value in (("reference_strength", strength), ("denoise_strength", noise)):
                if value is not None:
                    self._note(name, value, "none", unused)
            return None
        asked = strength if noise is None else round(1 - noise, 6)
        if asked is None:
            return None
        used, reason = nearest_strength(asked, starts=starts)
        if noise is not None and used != asked:
            self._note("denoise_strength", noise, round(1 - used, 6), reason)
        if strength is not None and abs(strength - used) >= 1e-6:
            if abs(strength - asked) >= 1e-6:
                reason = "denoise_strength goes first, and is 1 less the strength"
            self._note("reference_strength", strength, used, reason)
        return used

    def _note_wish(self, used: str, reason: str) -> None:
        if self._wish.copy:
            self._note("metadata.exact_copy_mode", "true", used, reason)
        if self._wish.modify:
            self._note("metadata.reference_mode", "modify", used, reason)
        if self._wish.described:
            given = f"{len(self._wish.described)} characters"
            self._note("metadata.originalEnhancedPrompt", given, used, reason)

    def _note_kind(self, kind: ReferenceKind | None, used: str, reason: str) -> None:
        if kind is not None and kind != used:
            self._note("reference_type", kind, used, reason)

    def _note(self, field: str, given: float | str, used: float | str, reason: str) -> None:
        self.notes.append(Adjusted(field=field, given=given, used=used, reason=reason))
