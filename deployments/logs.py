"""Logs: one JSON object a line, an event verb and fields. Prompts, keys and signed URLs never go in."""

import logging
import os
import sys

import structlog


def configure_logs(level: str | None = None) -> None:
    """Set structlog up for this process. `OURVIDZ_LOG_LEVEL` names the least level, `info` by default."""
    name = (level or os.environ.get("OURVIDZ_LOG_LEVEL") or "info").upper()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping().get(name, logging.INFO)),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
