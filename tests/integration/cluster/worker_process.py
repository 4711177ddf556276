"""A worker process: python -m tests.integration.cluster.worker_process SETTINGS, with SIGTERM to close it."""

from __future__ import annotations

import asyncio
import signal
import sys

from kinema.cluster.dynamo import serve
from tests.integration.cluster.handlers import Handlers
from tests.integration.cluster.settings import Settings


async def main(settings: Settings) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    serving = await serve(settings, Handlers().all(), None, None)
    print("ready", flush=True)
    await stopped.wait()
    await serving.close()
    print("closed", flush=True)


if __name__ == "__main__":
    asyncio.run(main(Settings.from_json(sys.argv[1])))
