"""Masking of passwords and tokens in addresses and texts that are printed, logged or stored."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import quote, quote_plus, unquote, unquote_plus

MASK = "***"

# An address: scheme, user, password, and the rest with host, path and query. An unquoted password may have any
# character, so that the last @ counts. The bounds keep the time of a search proportional to the length of the text.
_ADDRESS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,40}://)(?:(?P<user>[^\s:@/?#'\"]*)(?P<password>:[^\s'\"]*)?@)?(?P<rest>[^\s'\"]*)"
)
_LOCAL = re.compile(r"(file|s3|gs|models|runs|sqlite[+\w]*)://", re.IGNORECASE)  # an @ in them is part of a name
_SECRET = (
    r"(?:pass|password|passwd|passphrase|pwd|secret|token|api_?key|access_?key|account_?key|secret_?key|sig|signature"
    r"|credentials?|auth)(?![a-z])"
)
_PAIR = re.compile(
    rf"(?P<name>{_SECRET}[\w-]{{0,40}})(?P<equals>\s?=\s?|%3D)"
    r"(?P<value>\{[^}]{0,4000}\}|'[^']{0,4000}'|\"[^\"]{0,4000}\"|[^\s&;,'\")\]]+)",
    re.IGNORECASE,
)
_WHOLE = re.compile(r"(odbc_connect=)[^\s&]+", re.IGNORECASE)  # a connection string within another
_HEADER = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{6,}")
_NAMES = re.compile(r"(PASSWORD|PASSWD|TOKEN|SECRET|AUTH_STRING|SECRET_ACCESS_KEY|API_KEY|_PASS|_PWD)$", re.IGNORECASE)
_SHORTEST = 4  # characters of a secret that is looked for in texts; a shorter one would tear words to pieces
_LONGEST_USER = 24  # characters; services give tokens that take a user's place
_PLACEHOLDERS = ("", "x", "x-oauth-basic", "oauth2", "token")  # passwords beside a token as the user's name


def address(uri: str) -> str:
    """Returns the address with all passwords and tokens in it masked."""
    return _ADDRESS.sub(_masked, _WHOLE.sub(rf"\g<1>{MASK}", uri))


def text(words: object, *addresses: str) -> str:
    """Returns the text with secrets masked: those of addresses in it, of `addresses`, and of environment variables.

    Args:
        addresses: addresses whose passwords may stand in the text by themselves, quoted or not.
    """
    found = str(words)
    for uri in addresses:
        found = found.replace(uri, address(uri))
    found = address(found)
    for secret in sorted({*_environment(), *(s for uri in addresses for s in secrets_of(uri))}, key=len, reverse=True):
        found = found.replace(secret, MASK)
    found = _PAIR.sub(lambda pair: f"{pair['name']}{pair['equals']}{MASK}", found)
    return _HEADER.sub(rf"\1 {MASK}", found)


def secrets_of(uri: str) -> set[str]:
    """Returns the secrets in an address: as written, unquoted, and quoted as in messages of servers."""
    plain: set[str] = set()
    for match in _ADDRESS.finditer(uri):
        if _LOCAL.match(match["scheme"]):
            continue
        if match["password"]:
            plain.add(match["password"][1:])
        if match["user"] and _is_token(match["user"], match["password"]):
            plain.add(match["user"])
    plain |= {pair["value"] for pair in _PAIR.finditer(unquote(uri))}
    plain |= {value for value in _by_sqlalchemy(uri) if value}
    every = {way(each) for each in plain for way in (str, unquote, unquote_plus, quote, quote_plus)}
    return {each for each in every if len(each) >= _SHORTEST and each != MASK}


def _by_sqlalchemy(uri: str) -> Iterator[str]:
    """Yields the secrets that SQLAlchemy, if it is installed, finds in the address of a database."""
    if not re.match(r"(postgresql|postgres|mysql|mariadb|mssql|oracle)\b", uri):
        return
    try:
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError
    except ImportError:
        return
    try:
        url = make_url(uri)
    except (ArgumentError, ValueError):
        return
    yield url.password or ""
    for name, value in url.query.items():
        for each in (value,) if isinstance(value, str) else value:
            if re.search(_SECRET, name, re.IGNORECASE):
                yield each
            yield from (pair["value"] for pair in _PAIR.finditer(each))


def _masked(match: re.Match[str]) -> str:
    user, password, rest = match["user"], match["password"], match["rest"]
    rest = _PAIR.sub(lambda pair: f"{pair['name']}{pair['equals']}{MASK}", rest)
    if user is None or _LOCAL.match(match["scheme"]):
        kept = match[0][len(match["scheme"]) : len(match[0]) - len(match["rest"])]
        return f"{match['scheme']}{kept}{rest}"
    if password is None or _is_token(user, password):
        return f"{match['scheme']}{MASK}@{rest}"
    return f"{match['scheme']}{user}:{MASK}@{rest}"


def _is_token(user: str, password: str | None) -> bool:
    return password is None or len(user) > _LONGEST_USER or password[1:].lower() in _PLACEHOLDERS


def _environment() -> set[str]:
    """Returns the secrets in environment variables: in those with telling names, and in addresses."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _NAMES.search(name) and len(value) >= _SHORTEST:
            found |= {value, *(part for part in value.split(":", 1)[1:] if len(part) >= _SHORTEST)}
        elif "://" in value:
            found |= secrets_of(value)
    return found
