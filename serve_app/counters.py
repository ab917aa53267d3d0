"""The tokenizers of the models that read prompts, each read once and then kept."""

import asyncio
import time

import structlog

from deployments.prompting import load_counter
from deployments.settings import Settings
from models.catalog import Family
from models.profile import weights_present
from models.prompting.prompts import TokenCounter

log = structlog.get_logger()

CLIP = (Family.SDXL, Family.RV51)  # checkpoints of both have the same tokenizer
WAIT_SECONDS = 30.0  # that a request gives a tokenizer that is being fetched; one that is here is only read
RETRY_SECONDS = 60.0  # after which one that could not be read is tried again


class Counters:
    """One process' tokenizers. They are for the thread of its event loop: two at a time must not use one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._reading: dict[Family, asyncio.Task[TokenCounter]] = {}
        self._failed: dict[Family, float] = {}

    async def of(self, family: Family) -> TokenCounter | None:
        """What counts the tokens of a family's prompts. None where the profile has no model whose tokenizer it is, or
        where that can't be read now, which the log tells."""
        installed = self._settings.loaded_profile.models
        kin = (family, *CLIP) if family in CLIP else (family,)
        source = next((one for one in kin if one in installed), None)
        return None if source is None else await self._read(source)

    async def _read(self, family: Family) -> TokenCounter | None:
        if time.monotonic() - self._failed.get(family, -RETRY_SECONDS) < RETRY_SECONDS:
            return None
        if family not in self._reading:
            task = asyncio.create_task(asyncio.to_thread(load_counter, self._settings, family))
            self._reading[family] = task
        reading = self._reading[family]
        if reading.done() and reading.exception() is None:
            return reading.result()
        # whoever waits may leave; the tokenizer is read all the same
        is_here = weights_present(self._settings.loaded_profile.models[family]) is not None
        await asyncio.wait({reading}, timeout=None if is_here else WAIT_SECONDS)
        if not reading.done():
            log.warning("tokenizer_unavailable", family=family.value, error="TimeoutError")
            return None
        error = reading.exception()
        if error is None:
            return reading.result()
        if self._reading.get(family) is reading:
            del self._reading[family]
            self._failed[family] = time.monotonic()
            log.warning("tokenizer_unavailable", family=family.value, error=type(error).__name__)
        return None
