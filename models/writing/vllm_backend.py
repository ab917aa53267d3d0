"""vLLM as a `LanguageBackend`: the same line, budgets and cache in front of vLLM's own engine.

vLLM pins a transformers that is older than this project's, so it lives in an environment of its own
(docs/howto/vllm.md) and is imported when a profile asks for it, not before. Written after vLLM's published interface
(`vllm.v1.engine.async_llm.AsyncLLM`); the project's tests can't run it. Seeds are vLLM's: they give the same words on
vLLM, but others than `models.qwen` gives.
"""

from __future__ import annotations

import asyncio
import importlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from models.generation import DeviceBroken, GenerationFailed, ModelLoadFailed, OutOfMemory
from models.writing.batching import BatchingBackend, Request

if TYPE_CHECKING:
    from models.profile import ModelSpec

log = structlog.get_logger()

_STOP_SECONDS = 30.0


class VllmBackend(BatchingBackend):
    """One engine of vLLM, which runs in a process of its own, and the asyncio loop that talks to it."""

    _engine: Any = None
    _vllm: Any = None
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None

    def __init__(self, spec: ModelSpec, weights: Path | str) -> None:
        super().__init__(spec, weights)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # touched by the loop's thread only

    def load(self) -> None:
        """Starts the engine, which loads the weights. Raises `ModelLoadFailed`, also where vLLM is not installed."""
        try:
            vllm = importlib.import_module("vllm")
            arguments_of = importlib.import_module("vllm.engine.arg_utils").AsyncEngineArgs
            engine_of = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
        except ImportError as error:
            raise ModelLoadFailed(
                f"{self.model_name}: the profile asks for the backend vllm, and vLLM can't be imported in this "
                f"environment ({error}); docs/howto/vllm.md says how to give it one"
            ) from error
        from transformers import AutoTokenizer

        source = str(self.weights)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(source, revision=self.revision)
            if not self._tokenizer.chat_template:
                raise ModelLoadFailed(f"{self.model_name}: the tokenizer has no chat template")
            arguments = arguments_of(
                model=source,
                revision=self.revision,
                tokenizer_revision=self.revision,
                dtype=self.spec.dtype,
                max_num_seqs=self.spec.sequences,
                # vLLM takes a share of the whole card, and the profile states the model's peak on it
                gpu_memory_utilization=self._share(),
                enable_prefix_caching=True,
                generation_config="vllm",  # nothing of the checkpoint's sampling settings
                disable_log_stats=True,
            )

            async def start() -> Any:
                return engine_of.from_engine_args(arguments)

            self._engine = asyncio.run_coroutine_threadsafe(start(), self._loop).result()
            self.context = int(self._engine.model_config.max_model_len)
        except ModelLoadFailed:
            raise
        except Exception as error:
            raise ModelLoadFailed(f"{self.model_name}: vLLM did not start: {type(error).__name__}") from error
        self._vllm, self.device = vllm, "cuda"
        self.loaded = True

    def _share(self) -> float:
        import torch

        total_gib = float(torch.cuda.get_device_properties(0).total_memory) / 1024**3
        return min(0.95, self.spec.memory_gib / total_gib)

    def _begin(self, request: Request) -> None:
        assert self._loop is not None  # only a loaded backend admits anybody
        asyncio.run_coroutine_threadsafe(self._write(request), self._loop)

    def _abort(self, request: Request) -> None:
        assert self._loop is not None

        def cancel() -> None:
            task = self._tasks.get(request.id)
            if task is not None:
                task.cancel()  # vLLM aborts a request whose reader is cancelled

        self._loop.call_soon_threadsafe(cancel)

    async def _write(self, request: Request) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[request.id] = task
        asked = request.sampling
        try:
            parameters = self._vllm.SamplingParams(
                max_tokens=asked.max_new_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                seed=asked.seed,
                detokenize=False,
                output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
            )
            prompt = self._vllm.TokensPrompt(prompt_token_ids=request.prompt_ids)
            async for output in self._engine.generate(prompt, parameters, request.id):
                told = output.outputs[0]
                with self._lock:
                    if request.id not in self._running:
                        return
                    self._wrote(request, list(told.token_ids))
                    if output.finished:
                        self._finish(request, "length" if told.finish_reason == "length" else "stop")
        except asyncio.CancelledError:
            pass  # whoever cancelled it has ended the answer
        except Exception as error:
            self._broke(request, error)
        finally:
            self._tasks.pop(request.id, None)

    def _broke(self, request: Request, error: Exception) -> None:
        if bool(getattr(self._engine, "errored", False)):
            self.broken = f"vLLM's engine has ended: {type(error).__name__}"
            log.error("language_engine_died", reason=self.broken)
            self._fail_everything(DeviceBroken(self.broken))
        elif "out of memory" in str(error):
            self._fail(request, OutOfMemory("vLLM had not enough memory"))
        else:
            self._fail(request, GenerationFailed(f"{type(error).__name__} in vLLM"))

    def _end_engine(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_STOP_SECONDS)
