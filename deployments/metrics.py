"""Every metric that is counted inside a process, once. Ray exports each as `ray_<name>`.

What can be read from Postgres (states, ages, callbacks due) is not counted here but read at scrape time by the
ingress, so that every replica of it says the same.
"""

from collections.abc import Mapping
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

# One ladder for all models, so that they add up; a service-level objective should be one of its edges.
RUN_SECONDS = [0.5, 1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 300, 420, 600, 900]
WAIT_SECONDS = [0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600]
LOAD_SECONDS = [1, 2, 5, 10, 20, 30, 60, 120, 180, 300, 600]
CALL_SECONDS = [0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 30]


class Metrics:
    """The counters of one process. Labels are few and never name a user, a job or a prompt."""

    def __init__(self) -> None:
        self._finished = Counter(
            "ourvidz_jobs_finished_total", "Runs by how they ended.", ("model", "job_type", "outcome")
        )
        self._run = Histogram(
            "ourvidz_run_seconds",
            "From claim to end.",
            boundaries=RUN_SECONDS,
            tag_keys=("model", "job_type", "outcome"),
        )
        self._wait = Histogram(
            "ourvidz_queue_wait_seconds",
            "From acceptance to first claim.",
            boundaries=WAIT_SECONDS,
            tag_keys=("model",),
        )
        self._failures = Counter("ourvidz_failures_total", "Failed runs by code.", ("model", "code", "outcome"))
        self._lost = Counter("ourvidz_leases_lost_total", "Leases that a replica lost.", ("model",))
        self._load = Histogram(
            "ourvidz_model_load_seconds", "Load and warm-up of a model.", boundaries=LOAD_SECONDS, tag_keys=("model",)
        )
        self._callbacks = Counter("ourvidz_callbacks_total", "Delivery attempts by outcome.", ("outcome",))
        self._callback = Histogram(
            "ourvidz_callback_seconds", "One delivery attempt.", boundaries=CALL_SECONDS, tag_keys=("outcome",)
        )
        self._forwards = Counter("ourvidz_forwards_total", "Forwards of the denoiser.", ("model",))
        self._rows = Counter(
            "ourvidz_forward_rows_total", "Rows of these forwards; their mean is the batch that is reached.", ("model",)
        )
        self._busy = Counter("ourvidz_forward_seconds_total", "Time in these forwards.", ("model",))
        self._loras = Counter("ourvidz_loras_total", "LoRAs by what happened: load, hit, eviction.", ("model", "event"))
        self._lora_bytes = Gauge("ourvidz_lora_bytes", "What the loaded LoRAs take on the device.", ("model",))
        self._previews = Counter("ourvidz_previews_total", "Previews by outcome.", ("model", "outcome"))
        self._templates = Counter("ourvidz_template_lookups_total", "Look-ups of templates: hit or miss.", ("outcome",))
        self._enhancements = Counter("ourvidz_enhancements_total", "Enhanced prompts.", ("strategy", "reason"))

    def job_ended(self, model: str, job: Mapping[str, Any], outcome: str, seconds: float) -> None:
        """A run of a job has ended, one way or another."""
        tags = {"model": model, "job_type": job["job_type"], "outcome": outcome}
        self._finished.inc(1, tags)
        self._run.observe(seconds, tags)
        if job["attempts"] == 1 and job["queue_wait_ms"] is not None:
            self._wait.observe(job["queue_wait_ms"] / 1000, {"model": model})

    def job_failed(self, model: str, code: str, outcome: str) -> None:
        """A run has ended with an error."""
        self._failures.inc(1, {"model": model, "code": code, "outcome": outcome})

    def lease_lost(self, model: str) -> None:
        """A job was taken from us while we held it."""
        self._lost.inc(1, {"model": model})

    def forwarded(self, model: str, forwards: int, rows: int, seconds: float) -> None:
        """So many forwards since it was last said."""
        self._forwards.inc(forwards, {"model": model})
        self._rows.inc(rows, {"model": model})
        self._busy.inc(seconds, {"model": model})

    def loras(self, model: str, events: Mapping[str, int], loaded_bytes: int) -> None:
        """What happened to LoRAs since it was last said, and what they take now."""
        for event, count in events.items():
            self._loras.inc(count, {"model": model, "event": event})
        self._lora_bytes.set(loaded_bytes, {"model": model})

    def previewed(self, model: str, outcome: str) -> None:
        """A preview was shown, or could not be: then `outcome` is the code."""
        self._previews.inc(1, {"model": model, "outcome": outcome})

    def model_loaded(self, model: str, seconds: float) -> None:
        """A model is loaded and warm."""
        self._load.observe(seconds, {"model": model})

    def callback_sent(self, outcome: str, seconds: float) -> None:
        """A delivery attempt has ended."""
        self._callbacks.inc(1, {"outcome": outcome})
        self._callback.observe(seconds, {"outcome": outcome})

    def enhanced(self, strategy: str, reason: str | None) -> None:
        """A prompt was enhanced; `reason` says why it fell back, if it did."""
        self._enhancements.inc(1, {"strategy": strategy, "reason": reason or "none"})

    def template_looked_up(self, hit: bool) -> None:
        """Templates were looked up, in memory or in the database."""
        self._templates.inc(1, {"outcome": "hit" if hit else "miss"})
