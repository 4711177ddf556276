"""How the process logs: structlog over the standard library's handlers, to standard error."""

from __future__ import annotations

import logging
import sys

import structlog

# Libraries whose own chatter says nothing to whoever runs a server.
_QUIET = ("alembic", "diffusers", "transformers", "httpx", "httpcore", "huggingface_hub", "libav", "PIL", "uvicorn")

# Without the values of local variables: they hold prompts and images, and rendering them stops the event loop for
# seconds.
_TRACEBACKS = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))


def configure_logs(*, is_json: bool, level: str = "info") -> None:
    """Call once, at the start of the process."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    ending: list[structlog.typing.Processor]
    if is_json:
        ending = [_TRACEBACKS, structlog.processors.JSONRenderer()]
    else:
        ending = [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
