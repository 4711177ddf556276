"""Secrets in a text are masked before it is shown, logged or put into an error.

A URL may hold a password before its host, and tokens in its query; both are masked. What looks like a secret and is
none is masked too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MASK = "***"
# A setting may have several URLs, separated by commas.
_NEXT_URL = re.compile(r",(?=\w[\w+.-]*://)")
# A user and a password before a host, where the scheme was forgotten.
_NO_SCHEME = re.compile(r"([^\s:/@]+):[^\s@]+@")
# A name alone before the host is a token in these; elsewhere it is the name of a user or of a container.
_TOKEN_SCHEMES = ("http", "https")
# Parameters of a database's URL that say nothing secret. All others are masked, whatever their names are.
_PLAIN_PARAMETERS = frozenset(
    {"user", "host", "port", "dbname", "sslmode", "sslkey", "sslcert", "sslrootcert", "target_session_attrs"}
    | {"connect_timeout", "tcp_user_timeout", "application_name", "mode", "cache", "uri"}
    | {"keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count"}
)


def masked(text: str) -> str:
    """Return the text with the secrets of its URLs masked."""
    return ",".join(_masked_url(url) for url in _NEXT_URL.split(text))


def masked_value(value: object) -> str:
    """Return a value of a setting as Python writes it, with secrets masked; of a list or a table only its kind."""
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, dict):
        return "a table"
    return repr(masked(value) if isinstance(value, str) else value)


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """Return the text with these words masked, and with the secrets of its URLs."""
    for secret in sorted(set(secrets), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, text) if secret else text
    return masked(text)


def is_plain(parameter: str) -> bool:
    """Tell whether this parameter of a database's URL says nothing secret."""
    return parameter in _PLAIN_PARAMETERS


def _masked_url(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return _NO_SCHEME.sub(rf"\1:{MASK}@", url)
    # A password that is not quoted as it should be may itself have an @, a slash or a question mark.
    before, at, after = rest.rpartition("@")
    user, colon, _ = before.partition(":")
    if colon:
        return f"{scheme}://{user}:{MASK}@{_masked_query(after)}"
    if at and "/" not in before and "?" not in before and scheme.rpartition(" ")[2] in _TOKEN_SCHEMES:
        return f"{scheme}://{MASK}@{_masked_query(after)}"
    return f"{scheme}://{_masked_query(rest)}"


def _masked_query(text: str) -> str:
    place, mark, query = text.partition("?")
    return place + mark + "&".join(_masked_parameter(part) for part in query.split("&"))


def _masked_parameter(part: str) -> str:
    name, equals, value = part.partition("=")
    if not part or (equals and (is_plain(name) or not value)):
        return part
    return f"{name}={MASK}" if equals else MASK
