"""API keys: who asks, and links that open without one.

A job remembers a digest of the key that made it. A link to a video carries a signature made with that key, so that it
opens in a browser; it opens this one video and nothing else, and no longer than its key is accepted.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from kinema.errors import Unauthorized
from kinema.ids import JobId

# 128 bits: nobody finds another key with the same digest, or guesses a signature.
_DIGEST_CHARS = 32


class Keys:
    """The accepted keys; without any, everybody is the same nameless client."""

    def __init__(self, text: str) -> None:
        """``text`` has the keys separated by commas."""
        keys = [key.strip() for key in text.split(",") if key.strip()]
        self._by_id = {key_id(key): key for key in keys}

    def identify(self, headers: Mapping[str, str]) -> str:
        """The id of the key in the headers, empty where none is asked for. Raises Unauthorized.

        OpenAI's SDKs send a bearer token, Azure's variant of them an ``api-key``.
        """
        if not self._by_id:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("api-key", "")
        if not given:
            raise Unauthorized
        found = key_id(given)
        if found not in self._by_id:
            raise Unauthorized(
                "this API key is not known here; send one of this server's as 'Authorization: Bearer KEY'"
            )
        return found

    def sign(self, owner: str, job_id: JobId) -> str | None:
        """What lets a link to this job's video open; None where no key is asked for, or its key is no longer known."""
        key = self._by_id.get(owner)
        if key is None:
            return None
        return hmac.new(key.encode(), f"content {job_id}".encode(), hashlib.sha256).hexdigest()[:_DIGEST_CHARS]

    def is_signed(self, owner: str, job_id: JobId, signature: str) -> bool:
        """Whether the signature of a link is right."""
        expected = self.sign(owner, job_id)
        return expected is not None and hmac.compare_digest(expected.encode(), signature.encode())


def key_id(key: str) -> str:
    """How a key is remembered: a digest, from which the key cannot be found."""
    return hashlib.sha256(key.encode()).hexdigest()[:_DIGEST_CHARS]
