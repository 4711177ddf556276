"""A frontend process in a call that lasts: python -m tests.integration.cluster.caller_process SETTINGS INSTANCE."""

from __future__ import annotations

import asyncio
import sys

from kinema.cluster.dynamo import connect
from tests.integration.cluster.settings import Settings


async def main(settings: Settings, instance: int) -> None:
    connection = await connect(settings)
    while instance not in connection.instances():
        await connection.wait_for_change(1.0)
    call = connection.call(instance, "run", {"name": "long", "n": 1_000_000, "every_s": 0.05})
    await anext(call)
    print("called", flush=True)
    async for _ in call:
        pass


if __name__ == "__main__":
    asyncio.run(main(Settings.from_json(sys.argv[1]), int(sys.argv[2])))
