"""The states of a running job: stored now and then, so that another replica can go on where this one died.

A job has one file of them, overwritten whole. It belongs to the job and not to an attempt: every attempt of a job makes
the same latents. It goes with the job's end; what a dead replica left of a job that has ended is found by the sweep.
"""

import asyncio
from uuid import UUID

import structlog

from db.blobs import BlobNotFound, BlobStore, StorageUnavailable
from deployments.held import Held
from deployments.storing import BUCKET
from models.denoising.resumption import DenoisingState, States, StateUnusable

log = structlog.get_logger()

FOLDER = "states"


def state_key(user_id: object, job_id: UUID) -> str:
    """Where the state of a job lies in the bucket `workspace-temp`."""
    return f"{user_id}/{job_id}/{FOLDER}/latest.safetensors"


def job_of_state(key: str) -> UUID | None:
    """The job of such a key; None for any other."""
    parts = key.split("/")
    try:
        return UUID(parts[1]) if len(parts) == 4 and parts[2] == FOLDER else None
    except ValueError:
        return None


class RunStates:
    """The states of one run, every `every` steps; with 0 there are none. Nothing raises but `resume`: what fails is
    logged, and the job goes on."""

    def __init__(self, held: Held, every: int, blobs: BlobStore) -> None:
        self._held, self._blobs = held, blobs
        self._key = state_key(held.claim.job["user_id"], held.claim.job_id)
        self.states = States(every) if every else None
        self.resumed = False  # this run goes on from what another has left
        self._task: asyncio.Task[None] | None = None

    async def resume(self) -> bytes | None:
        """What an earlier attempt has left. Raises `StorageUnavailable`: to begin anew would be the dearer way."""
        if self.states is None or self._held.claim.attempt == 1:
            return None
        try:
            state = await self._blobs.get(BUCKET, self._key)
        except BlobNotFound:
            return None
        self.resumed = True
        return state

    def look(self) -> None:
        """Begin to store the next state, if there is one and none is being stored. Returns at once."""
        if self.states is not None and (self._task is None or self._task.done()):
            state = self.states.take()
            if state is not None:
                self._task = asyncio.create_task(self._store(state))

    async def end(self, job_is_over: bool) -> None:
        """The run has ended; with the job its state goes. `job_is_over` also for a run that failed on what it went on
        from: the next one had better begin anew."""
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        if self.states is None or not job_is_over:
            return
        try:
            await self._blobs.delete(BUCKET, [self._key])
        except StorageUnavailable as error:
            self._failed(error)  # the sweep will find it

    async def _store(self, state: DenoisingState) -> None:
        try:
            data = await asyncio.to_thread(state.to_bytes)
            if self._held.stop_reason is None:
                await self._blobs.put(BUCKET, self._key, data, "application/octet-stream")
        except (StateUnusable, StorageUnavailable) as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        claim = self._held.claim
        log.warning("state_not_kept", job_id=str(claim.job_id), attempt=claim.attempt, reason=str(error))
