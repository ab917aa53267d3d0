"""Costs: how long a forward takes by shape and rows, measured on this device, and what follows from it.

A profile is measured once at warm-up and kept in a file for each device and model, and goes on learning from every
forward. From it come the batch cap of a shape, the remaining time of a request, and the predicted time and memory of a
job. Nothing here is assumed: without a measurement the answer is None.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from models.params import GenerationParams

RAISE_AFTER = 64  # forwards at a lowered cap, before one row more is tried
LEARNING = 0.1  # the weight of a new measurement beside those before
WORTHWHILE = 0.95  # of the best throughput: the smallest batch that reaches it is the cap
ROWS = (1, 2, 4, 8, 16)
FORMAT = 1


class Shape(NamedTuple):
    """What a forward's cost depends on beside its rows; sizes in pixels.

    `part` says what else it gets ("composition", "start_frame"), or what is run where that is not the denoiser
    ("controlnet"); images that rows attend to share the forwards of those without, and are no part of it.
    """

    width: int
    height: int
    frames: int
    part: str = ""

    @property
    def name(self) -> str:
        """As text: "1024x1024x1", "1024x1024x1+composition"."""
        size = f"{self.width}x{self.height}x{self.frames}"
        return f"{size}+{self.part}" if self.part else size

    @property
    def volume(self) -> int:
        return self.width * self.height * self.frames


def shape_name(params: GenerationParams) -> str:
    """The shape of a job's denoiser as text, see `Shape.name`."""
    return shape_of(params).name


def shape_of(params: GenerationParams) -> Shape:
    part = next((kind for kind in ("composition", "start_frame") if params.of_kind(kind) is not None), "")
    return Shape(params.width, params.height, params.frames, part)


def shapes_of_step(params: GenerationParams) -> list[Shape]:
    """The forwards that one step is made of."""
    shape = shape_of(params)
    return [shape, shape._replace(part="controlnet")] if shape.part == "composition" else [shape]


def steps_of(params: GenerationParams) -> int:
    """The steps that a run makes: fewer than asked for from an image, and nearly twice as many with Heun's method."""
    image = params.of_kind("image")
    # rounded as for the pipeline, because 1 - 0.8 is a little less than 0.2
    steps = params.steps if image is None else max(1, int(params.steps * round(1 - image.strength, 6)))
    return 2 * steps - 1 if params.scheduler == "heun" else steps


def rows_of(params: GenerationParams) -> int:
    """The rows of one step of a whole request: twice the images where guidance compares with a second branch."""
    return params.num_images * (2 if params.guidance_scale > 1 else 1)


@dataclass
class Decoding:
    """The part of a job that is not denoising, in seconds for a pixel of one picture or frame."""

    seconds_per_pixel: float


class Costs:
    """The profile of one model on one device. Written by the denoising thread alone."""

    def __init__(self) -> None:
        self.measured: dict[Shape, dict[int, float]] = {}  # at warm-up: caps come from these alone
        self.seen: dict[Shape, dict[int, float]] = {}  # measured and learnt
        self.caps: dict[Shape, int] = {}  # lowered by a want of memory
        self._at_cap: dict[Shape, int] = {}  # forwards with as many rows as a lowered cap allows, since it was set
        self.forwards = self.rows = 0  # that were run in this process
        self.busy_seconds = 0.0  # that they took together
        self.decoding: Decoding | None = None
        self.guidance_interval: tuple[float, float] | None = None  # of the profile, for requests that name none
        self.branches_apart = False  # whether guidance makes two forwards of a step, instead of one of twice the rows
        self.bytes_per_row_pixel: float | None = None
        self.room_bytes: int | None = None  # on the device beside the weights, when the models were loaded

    def measure(self, shape: Shape, forward: Callable[[int], float], budget_seconds: float) -> None:
        """Take the curve of a shape: `forward(rows)` runs one forward and returns its seconds.

        Ends early where more rows bring no more throughput, and when the budget is used up. Where a forward fails, what
        was measured before it is kept.
        """
        curve: dict[int, float] = {}
        used = 0.0
        for rows in ROWS:
            seconds = min(forward(rows) for _ in range(2))
            curve[rows] = seconds
            self.measured[shape], self.seen[shape] = curve, dict(curve)
            used += 2 * seconds
            before = curve.get(rows // 2)
            if used + 4 * seconds > budget_seconds or (before is not None and seconds >= 2 * before):
                break

    def observe(self, shape: Shape, rows: int, seconds: float) -> None:
        """A forward took so long."""
        self.forwards += 1
        self.rows += rows
        self.busy_seconds += seconds
        self._raise_cap(shape, rows)
        curve = self.seen.setdefault(shape, {})
        before = curve.get(rows)
        if (
            before is None or seconds < before / 2
        ):  # a first forward may have compiled or paused: a much better one counts
            curve[rows] = seconds
        else:
            curve[rows] = before + LEARNING * (seconds - before)

    def decoded(self, shape: Shape, pictures: int, seconds: float) -> None:
        """Decoding and conversion of so many pictures or videos took so long."""
        each = seconds / (shape.volume * pictures)
        before = self.decoding
        self.decoding = Decoding(
            each if before is None else before.seconds_per_pixel * (1 - LEARNING) + LEARNING * each
        )

    def seconds(self, shape: Shape, rows: int) -> float | None:
        """What a forward takes: as seen, or in proportion to what was seen; None before any measurement."""
        curve = self.seen.get(shape)
        if curve:
            return _at(curve, rows)
        near = self._nearest(shape)
        if near is None:
            return None
        return _at(self.seen[near], rows) * shape.volume / near.volume

    def cap(self, shape: Shape) -> int:
        """The most rows that are worth a forward; 1 before any measurement."""
        lowered = self.caps.get(shape)
        near = shape if shape in self.measured else self._nearest(shape, self.measured)
        if near is None:
            return lowered or 1
        curve = self.measured[near]
        # a larger shape fills the device with fewer rows
        scale = 1.0 if near == shape else shape.volume / near.volume
        throughput = {rows: rows / seconds for rows, seconds in curve.items()}
        best = max(throughput.values())
        cap = min(rows for rows, value in throughput.items() if value >= WORTHWHILE * best)
        cap = max(1, round(cap / scale)) if scale > 1 else cap
        room = self._rows_within(shape, self.room_bytes)
        if room is not None:
            cap = max(1, min(cap, room))
        return cap if lowered is None else min(cap, lowered)

    def most_rows(self, shape: Shape, free_bytes: int | None) -> int | None:
        """The rows of one step, see `rows_of`, that so much free memory has room for; None where it is not known."""
        room = self._rows_within(shape, free_bytes)
        return room * 2 if room is not None and self.branches_apart else room

    def _rows_within(self, shape: Shape, free_bytes: int | None) -> int | None:
        """The rows of one forward that so much memory has room for; None where nothing was measured."""
        if free_bytes is None or not self.bytes_per_row_pixel:
            return None
        return int(free_bytes // (self.bytes_per_row_pixel * shape.volume))

    def lower_cap(self, shape: Shape, rows: int) -> None:
        """A forward of so many rows had no room: at most half for now. What took the room may go away again."""
        self.caps[shape] = max(1, min(self.caps.get(shape, rows), rows) // 2)
        self._at_cap[shape] = 0

    def _raise_cap(self, shape: Shape, rows: int) -> None:
        lowered = self.caps.get(shape)
        if lowered is None or rows < lowered:
            return
        self._at_cap[shape] += 1
        if self._at_cap[shape] >= RAISE_AFTER:
            self.caps[shape], self._at_cap[shape] = lowered + 1, 0

    def job_seconds(self, params: GenerationParams) -> float | None:
        """How long a job takes when it has the device for itself: its steps and its decoding."""
        shape = shape_of(params)
        step = self.step_seconds(params)
        if step is None:
            return None
        decoding = self.decoding.seconds_per_pixel * shape.volume * params.num_images if self.decoding else 0.0
        return step * steps_of(params) + decoding

    def step_seconds(self, params: GenerationParams) -> float | None:
        """What one step of a whole request takes, the mean of guided and other steps; None before any measurement."""
        guided, unguided = self._step(params, rows_of(params)), self._step(params, params.num_images)
        if guided is None or unguided is None:
            return None
        share = self._guided_share(params)
        return share * guided + (1 - share) * unguided

    def _step(self, params: GenerationParams, rows: int) -> float | None:
        """What a step of so many rows takes, by the forwards that it is made of."""
        forwards, each = (rows, 1) if self.branches_apart else (1, rows)
        seconds = [self.seconds(shape, each) for shape in shapes_of_step(params)]
        return None if None in seconds else forwards * sum(one for one in seconds if one is not None)

    def _guided_share(self, params: GenerationParams) -> float:
        """The part of the steps that are guided, by the rule of `models.denoising.guidance`."""
        interval = params.guidance_interval or self.guidance_interval
        if params.guidance_scale <= 1 or interval is None:
            return 1.0
        steps = steps_of(params)
        start, stop = (round(part * steps, 6) for part in interval)
        return sum(start <= step < stop for step in range(steps)) / steps

    def forward_bytes(self, params: GenerationParams, rows: int) -> int | None:
        """The device memory that a forward of so many rows needs beside the weights; None where it was not measured."""
        if self.bytes_per_row_pixel is None:
            return None
        return round(self.bytes_per_row_pixel * rows * shape_of(params).volume)

    def has_room(self, params: GenerationParams, rows: int) -> bool:
        """Whether a job's forwards can fit the device at all; True where nothing is known that speaks against it."""
        needed = self.forward_bytes(params, rows)
        return needed is None or self.room_bytes is None or needed <= self.room_bytes

    def _nearest(self, shape: Shape, among: dict[Shape, dict[int, float]] | None = None) -> Shape | None:
        known = self.seen if among is None else among
        return min(known, key=lambda other: (other.part != shape.part, abs(other.volume - shape.volume)), default=None)

    def document(self) -> dict[str, Any]:
        """The profile as JSON: what was measured, and nothing of what was learnt since."""
        return {
            "format": FORMAT,
            "measured": [[*shape, sorted(curve.items())] for shape, curve in self.measured.items()],
            "seconds_per_pixel": self.decoding.seconds_per_pixel if self.decoding else None,
            "bytes_per_row_pixel": self.bytes_per_row_pixel,
            "guidance_interval": self.guidance_interval,
            "branches_apart": self.branches_apart,
        }

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> Costs:
        """The profile from its document. Raises `ValueError`, `KeyError` or `TypeError` where it is none."""
        if document["format"] != FORMAT:
            raise ValueError("another format")
        costs = cls()
        for *shape, curve in document["measured"]:
            times = {int(rows): float(seconds) for rows, seconds in curve}
            if not times or not all(rows > 0 and math.isfinite(s) and s > 0 for rows, s in times.items()):
                raise ValueError("no curve of times")
            costs.measured[Shape(*shape)] = times
        costs.seen = {shape: dict(curve) for shape, curve in costs.measured.items()}
        if document["seconds_per_pixel"] is not None:
            costs.decoding = Decoding(float(document["seconds_per_pixel"]))
        if document["bytes_per_row_pixel"] is not None:
            costs.bytes_per_row_pixel = float(document["bytes_per_row_pixel"])
        # a profile that an earlier version has published has neither
        if document.get("guidance_interval") is not None:
            start, stop = document["guidance_interval"]
            costs.guidance_interval = float(start), float(stop)
        costs.branches_apart = bool(document.get("branches_apart", False))
        return costs

    def save(self, path: Path, identity: dict[str, Any]) -> None:
        """Write the profile beside who it is of; whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self.document() | {"identity": identity}, file)
        Path(name).replace(path)

    @classmethod
    def read(cls, path: Path, identity: dict[str, Any]) -> Costs | None:
        """The profile in a file; None where there is none, or where it is of another device, model or version."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_document(document) if document["identity"] == identity else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None


def _at(curve: dict[int, float], rows: int) -> float:
    """The curve at a number of rows: linear between two known points, and in proportion to the rows outside."""
    if rows in curve:
        return curve[rows]
    below = max((known for known in curve if known < rows), default=None)
    above = min((known for known in curve if known > rows), default=None)
    if below is None and above is not None:
        return curve[above]  # fewer rows never cost more
    if below is not None and above is None:
        return curve[below] * rows / below
    assert below is not None
    assert above is not None
    share = (rows - below) / (above - below)
    return curve[below] + share * (curve[above] - curve[below])
