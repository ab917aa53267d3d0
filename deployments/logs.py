"""Logs: one JSON object a line, an event verb and fields. Prompts, keys and signed URLs never go in."""

import logging
import os
import sys
import traceback
from collections.abc import MutableMapping
from pathlib import PurePath
from typing import Any

import structlog


def configure_logs(level: str | None = None) -> None:
    """Set structlog up for this process. `OURVIDZ_LOG_LEVEL` names the least level, `info` by default."""
    name = (level or os.environ.get("OURVIDZ_LOG_LEVEL") or "info").upper()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            without_message,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping().get(name, logging.INFO)),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


def without_message(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """An exception as its type and the places it came through. Its text stays out: Postgres quotes the row that it
    refuses, and libraries quote their input, either of which may hold a prompt."""
    given = event.pop("exc_info", None)
    error = sys.exc_info()[1] if given is True else given
    if isinstance(error, BaseException):
        frames = traceback.extract_tb(error.__traceback__)
        event["exception"] = type(error).__name__
        event["places"] = [f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return event
