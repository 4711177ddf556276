"""API keys, and links that open without one.

A job remembers a digest of the key that made it. A link to a video carries a signature made with that key, so that the
link opens in a browser. It opens only this video, and only as long as the server accepts the key.
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
    """The accepted keys. Without keys all callers are the same client, which has no name."""

    def __init__(self, text: str) -> None:
        """``text`` has the keys separated by commas."""
        keys = [key.strip() for key in text.split(",") if key.strip()]
        self._by_id = {key_id(key): key for key in keys}

    def identify(self, headers: Mapping[str, str]) -> str:
        """Return the id of the key in the headers; an empty text on a server without keys. Raises Unauthorized.

        OpenAI's SDKs send a bearer token, and their variant for Azure sends an ``api-key``.
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
        """Return the signature of a link to this job's video; None when the server does not accept its key."""
        key = self._by_id.get(owner)
        if key is None:
            return None
        return hmac.new(key.encode(), f"content {job_id}".encode(), hashlib.sha256).hexdigest()[:_DIGEST_CHARS]

    def is_signed(self, owner: str, job_id: JobId, signature: str) -> bool:
        """Tell whether the signature of a link is right."""
        expected = self.sign(owner, job_id)
        return expected is not None and hmac.compare_digest(expected.encode(), signature.encode())


def key_id(key: str) -> str:
    """Return the digest by which a key is remembered. Nobody can find the key from it."""
    return hashlib.sha256(key.encode()).hexdigest()[:_DIGEST_CHARS]
