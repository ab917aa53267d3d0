"""Which references a model can honour: the check of what a caller gave against how the model runs each kind."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from models.fields import FieldError
from models.guiding.reference import FRAMES, MAX_STRENGTH, Method, Methods, Reference, ReferenceKind

FAMILY_METHODS: Methods = MappingProxyType({"image": "image_to_image", "composition": "image_to_image"})
"""What any checkpoint of a family that starts from images takes."""


def check_references(
    given: Sequence[Reference], methods: Methods, model: str, *, is_video: bool
) -> tuple[tuple[Reference, ...], list[FieldError]]:
    """The references as they will be run, and what is wrong with them, by the place of each in `given`.

    A composition becomes an image where the model has no ControlNet, and says in `asked_as` what it was.
    """
    errors: list[FieldError] = []
    taken: list[Reference] = []
    for place, reference in enumerate(given):
        method = methods.get(reference.kind)
        found = _refusal(reference, method, f"references.{place}", model, is_video=is_video)
        if found is not None:
            errors.append(found)
            continue
        if reference.kind == "composition" and method == "image_to_image":
            reference = reference.model_copy(update={"kind": "image", "asked_as": "composition"})
        if any(other.kind == reference.kind for other in taken):
            message = "there can be one reference of each kind"
            if reference.asked_as is not None:
                message = f"{model} starts from one image, and has no ControlNet to run a composition otherwise"
            errors.append(FieldError(f"references.{place}.kind", message, "conflict"))
            continue
        taken.append(reference)
    return tuple(taken), errors or _frames_together({reference.kind for reference in taken}, methods)


def steps_beside(image: Reference, steps: int, most: int) -> int | None:
    """The fewest steps from `steps` on of which at least one is run; None where even `most` are not enough.

    diffusers runs int(steps * noise) steps of an image-to-image generation and refuses to run none.
    """
    noise = round(1 - image.strength, 6)
    return next((n for n in range(steps, most + 1) if int(n * noise) >= 1), None)


def _refusal(
    reference: Reference, method: Method | None, field: str, model: str, *, is_video: bool
) -> FieldError | None:
    kind = reference.kind
    if method is None:
        return FieldError(field, f"{model} takes no {kind.replace('_', ' ')} reference", "unsupported")
    if kind in FRAMES and not is_video:
        return FieldError(field, f"{model} makes images, which have no frames to start or end with", "unsupported")
    if kind in FRAMES and reference.strength != MAX_STRENGTH:
        return FieldError(f"{field}.strength", "a frame is kept as it is, at strength 1", "unsupported")
    if reference.mask is not None and method != "image_to_image":
        return FieldError(f"{field}.mask", "only an image that the generation starts from has a mask", "unsupported")
    return None


def _frames_together(kinds: set[ReferenceKind], methods: Methods) -> list[FieldError]:
    """An end is nothing without a start; and some checkpoints need both."""
    both = "first_and_last_frame" in methods.values()
    if "end_frame" in kinds and "start_frame" not in kinds:
        return [FieldError("references", "an end frame needs a start frame", "missing")]
    if both and "start_frame" in kinds and "end_frame" not in kinds:
        return [
            FieldError("references", "this model goes from a start frame to an end frame and needs both", "missing")
        ]
    return []
