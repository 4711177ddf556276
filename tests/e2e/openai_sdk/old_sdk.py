"""A program for an older OpenAI SDK: makes the calls that come in on standard input, answers with their results.

In: {"base_url", "api_key", "calls": [{"method", "arguments", "files": {argument: [name, base64, media type]}}]}.
Out: a list of {"sent": the request's content type, "result"} or {"sent", "status", "error"}.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

import httpx
import openai


def main() -> None:
    asked = json.load(sys.stdin)
    sent: list[str] = []
    hooks = {"request": [lambda request: sent.append(request.headers.get("content-type", ""))]}
    with (
        httpx.Client(event_hooks=hooks, follow_redirects=True) as http,
        openai.OpenAI(base_url=asked["base_url"], api_key=asked["api_key"], http_client=http) as client,
    ):
        json.dump([_call(client, call) | {"sent": sent[-1].partition(";")[0]} for call in asked["calls"]], sys.stdout)


def _call(client: openai.OpenAI, call: dict[str, Any]) -> dict[str, Any]:
    files = {
        argument: (name, base64.b64decode(data), media_type)
        for argument, (name, data, media_type) in call.get("files", {}).items()
    }
    try:
        result = getattr(client.videos, call["method"])(**call["arguments"], **files)
    except openai.APIStatusError as exc:
        return {"status": exc.status_code, "error": exc.body}
    if call["method"] == "download_content":
        return {"result": base64.b64encode(result.read()).decode()}
    if call["method"] == "list":
        return {"result": [video.model_dump(mode="json") for video in result]}
    return {"result": result.model_dump(mode="json")}


main()
