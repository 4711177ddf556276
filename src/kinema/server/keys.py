"""API keys. A job remembers a digest of the key that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from kinema.errors import Unauthorized

# 128 bits: nobody finds another key with the same digest.
_DIGEST_CHARS = 32


class Keys:
    """The accepted keys. Without keys all callers are the same client, which has no name."""

    def __init__(self, text: str) -> None:
        """``text`` has the keys separated by commas."""
        keys = [key.strip() for key in text.split(",") if key.strip()]
        self._ids = {key_id(key) for key in keys}

    def identify(self, headers: Mapping[str, str]) -> str:
        """Return the id of the key in the headers; an empty text on a server without keys. Raises Unauthorized.

        OpenAI's SDKs send a bearer token, and their variant for Azure sends an ``api-key``.
        """
        if not self._ids:
            return ""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("api-key", "")
        if not given:
            raise Unauthorized
        found = key_id(given)
        if found not in self._ids:
            raise Unauthorized(
                "this API key is not known here; send one of this server's as 'Authorization: Bearer KEY'"
            )
        return found

    def accepts(self, owner: str) -> bool:
        """Tell whether this is the id of an accepted key."""
        return owner in self._ids


def key_id(key: str) -> str:
    """Return the digest by which a key is remembered. Nobody can find the key from it."""
    return hashlib.sha256(key.encode()).hexdigest()[:_DIGEST_CHARS]
