"""What the jobs ask for: nearly all are small, so that many flow; the heavy kinds come at fixed places among them."""

import random
from collections.abc import Mapping
from typing import Any

Shape = Mapping[str, Any]

# by weight. On the laptop profile each takes about a tenth of a second of CPU
COMMON: tuple[tuple[int, Shape], ...] = (
    (9, {"job_type": "sdxl_image_fast"}),
    (4, {"job_type": "sdxl_image_high"}),
    (1, {"job_type": "sdxl_image_fast", "num_images": 3}),
    (1, {"job_type": "image_fast"}),
)
COMMON_STEPS = (1, 3)
LARGE: Shape = {"job_type": "sdxl_image_high", "width": 1024, "height": 1024, "steps": 6}
"""Some 6 s of CPU, to be hit in the middle."""

# one in so many jobs, beginning with the job of that number
PLACED: tuple[tuple[int, int, Shape], ...] = (
    (170, 7, {**LARGE, "steps": 3}),
    (20, 3, {"job_type": "sdxl_image_high", "num_images": 3, "enhance": True, "steps": 2}),
    (40, 11, {"job_type": "video_fast", "frames": 17, "steps": 2}),
    (80, 29, {"job_type": "video7b_fast_enhanced", "frames": 17, "steps": 2}),
)


def shape_of(number: int, chance: random.Random) -> dict[str, Any]:
    """What the job of this number asks for, apart from its prompt."""
    for every, first, shape in PLACED:
        if number % every == first:
            return dict(shape)
    (shape,) = chance.choices([kind for _, kind in COMMON], [weight for weight, _ in COMMON])
    return {"steps": chance.randint(*COMMON_STEPS), **shape}
