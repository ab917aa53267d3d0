"""Qwen, the language model that rewrites prompts: transformers' continuous batching behind a `LanguageBackend`.

Requests join and leave the batch at every token. Prompts that begin alike (the same system message) share what was
computed for the beginning. Greedy answers are those of `model.generate`. A seed gives the same words on the same
device, whatever else is in the batch: its noise depends on nothing else (`models.writing.sampling`). The scores
themselves may differ in their last bits with the shape of the batch, so in half precision two words that are as good as
equally likely may change places, sampled or greedy.

transformers ends its whole loop when one step fails. Then it is started again, and those who were in the batch go on
alone, one after another, each from the word where it was: who fails alone fails for itself.
"""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import Any

import structlog

from models.generation import (
    DeviceBroken,
    GenerationError,
    GenerationFailed,
    ModelLoadFailed,
    as_generation_error,
    release_device_memory,
)
from models.writing.batching import BatchingBackend, Request
from models.writing.sampling import SeededSampling

log = structlog.get_logger()

_PAGE_TOKENS = 32  # the grain in which the cache is taken and beginnings are shared
_STEP_TOKENS = 512  # of prompts that are read in one step; those who are writing wait for it
_POLL_SECONDS = 0.5  # how soon the end of transformers' loop is noticed
_STOP_SECONDS = 30.0
_FRUITLESS_RESTARTS = 3  # failures of an empty batch in a row, after which nothing is expected of another start


class Qwen(BatchingBackend):
    """One causal language model with its tokenizer. Its `close` must be called, or the threads live on."""

    _manager: Any = None
    _model: Any = None
    _thread: threading.Thread | None = None
    _ends: frozenset[int] = frozenset()

    def load(self) -> None:
        """Loads tokenizer and weights, downloading them if they are not here. Raises `ModelLoadFailed`."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ModelLoadFailed(f"{self.model_name}: the profile asks for a CUDA device and there is none")
        if isinstance(self.weights, Path) and not self.weights.exists():
            raise ModelLoadFailed(f"{self.model_name}: there is nothing at {self.weights}")
        source, dtype = str(self.weights), getattr(torch, self.spec.dtype)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=self.revision)
            model = AutoModelForCausalLM.from_pretrained(
                source, revision=self.revision, dtype=dtype, attn_implementation="sdpa"
            )
            self._model = model.to(self.device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadFailed(f"{self.model_name}: {type(error).__name__}: {error}") from error
        except RuntimeError as error:
            release_device_memory()
            raise ModelLoadFailed(f"{self.model_name}: {as_generation_error(error).message}") from error
        if not tokenizer.chat_template:
            raise ModelLoadFailed(f"{self.model_name}: the tokenizer has no chat template")
        # What is sampled is asked for with each request; the checkpoint's own settings would only contradict it.
        defaults = model.generation_config
        defaults.do_sample = False
        defaults.temperature = defaults.top_p = defaults.top_k = None
        if defaults.pad_token_id is None:
            defaults.pad_token_id = tokenizer.pad_token_id
        ends = defaults.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.context = int(model.config.max_position_embeddings)
        self._tokenizer = tokenizer
        self._start_thread()
        self.loaded = True

    def _start_thread(self) -> None:
        started = threading.Event()
        failures: list[GenerationError] = []

        def run() -> None:
            try:
                self._start_engine()
            except Exception as error:
                failures.append(as_generation_error(error))
                return
            finally:
                started.set()
            self._deliver_forever()

        # transformers' own thread is started from this one and so is a daemon as well
        self._thread = threading.Thread(target=run, name="language", daemon=True)
        self._thread.start()
        started.wait()
        if failures:
            self._thread.join()
            release_device_memory()
            raise ModelLoadFailed(f"{self.model_name}: {failures[0].message}")

    def _start_engine(self) -> None:
        """A new loop of transformers with an empty cache."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        config = ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=self._room(self.spec.cache_tokens) // _PAGE_TOKENS,
            max_batch_tokens=_STEP_TOKENS,
            max_requests_per_batch=self.spec.sequences,
            max_blocks_per_request=0,
            allow_block_sharing=True,
            safety_margin=0.0,  # who begins has room for everything, so none has to be kept back
            use_async_batching=False,
            use_cuda_graph=False,
            auto_switch_to_flash=False,
            drop_unsupported_processors=False,
        )
        manager = self._model.init_continuous_batching(continuous_batching_config=config)
        manager.logit_processor = SeededSampling(manager.logit_processor.logits_processor)
        manager.warmup()  # takes the cache here and now, where a failure has a name
        manager.start()
        self._manager = manager

    def _room(self, tokens: int) -> int:
        return -(-tokens // _PAGE_TOKENS) * _PAGE_TOKENS

    def _begin(self, request: Request) -> None:
        asked, request.resumed = request.sampling, len(request.written)
        if self._manager.background_thread_status.can_accept_new_requests() is not None:
            return  # its loop is ending; the thread sees that, and everybody who is running begins anew
        self._manager.add_request(
            request.prompt_ids + request.written,
            request_id=request.id,
            max_new_tokens=asked.max_new_tokens - len(request.written),
            streaming=True,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
        )

    def _abort(self, request: Request) -> None:
        self._manager.cancel_request(request.id)

    def _end_engine(self) -> None:
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
        self._model = self._manager = None
        release_device_memory()

    # --- the thread --------------------------------------------------------------------------------------

    def _deliver_forever(self) -> None:
        """Give out what the loop of transformers writes, and start it again when it has ended."""
        fruitless = 0
        try:
            while not self._closing and self.broken is None:
                output = self._manager.get_result(timeout=_POLL_SECONDS)
                if output is not None:
                    fruitless = 0
                    self._deliver(output)
                elif not self._manager.is_running():
                    fruitless = 0 if self._running else fruitless + 1
                    self._recover(fruitless)
        except Exception as fault:  # without this thread nobody would ever be answered
            self._break(as_generation_error(fault).message, [])
        try:
            self._stop_engine()
        except Exception as fault:  # a lost device refuses even to be cleaned up
            log.warning("language_stop_failed", error=type(fault).__name__)

    def _deliver(self, output: Any) -> None:
        with self._lock:
            request = self._running.get(output.request_id)
            if request is None:
                return  # cancelled meanwhile
            if output.error is not None:
                if self._manager.background_thread_status.can_accept_new_requests() is None:
                    self._fail(request, GenerationFailed("the request was refused by the batch"))
                return  # else the loop is ending, and its end says why
            self._wrote(request, output.generated_tokens[len(request.written) - request.resumed :])
            if output.is_finished():
                self._finish(request, "stop" if request.written[-1] in self._ends else "length")

    def _recover(self, fruitless: int) -> None:
        """The loop has ended by a failure: who was in the batch goes on alone, unless it was alone already."""
        failure = _diagnosis(self._manager.background_thread_status.fatal_error)
        log.error("language_batch_failed", code=failure.code, reason=failure.message, requests=len(self._running))
        with self._lock:
            self._paused = True
            stricken = list(self._running.values())
            self._running.clear()
            self._suspects.extend(stricken if len(stricken) > 1 else [])
        if isinstance(failure, DeviceBroken) or fruitless >= _FRUITLESS_RESTARTS:
            self._break(failure.message, stricken)
            return
        if len(stricken) == 1:
            self._fail(stricken[0], failure)
        try:
            self._stop_engine()
            self._start_engine()
        except Exception as fault:
            self._break(as_generation_error(fault).message, [])
            return
        with self._lock:
            self._paused = False
            self._admit()

    def _break(self, reason: str, stricken: list[Request]) -> None:
        self.broken = reason
        for request in stricken:
            request.answer.end(DeviceBroken(reason))
        self._fail_everything(DeviceBroken(reason))

    def _stop_engine(self) -> None:
        self._manager.stop(block=True, timeout=_STOP_SECONDS, hard_stop=True)
        self._manager.destroy()
        release_device_memory()


def _diagnosis(error: BaseException | None) -> GenerationError:
    """What ended the loop. The frames of the error hold the tensors of the step, and are let go."""
    if error is None:
        return GenerationFailed("the batch has ended")
    failure = as_generation_error(error)
    traceback.clear_frames(error.__traceback__)
    return failure
