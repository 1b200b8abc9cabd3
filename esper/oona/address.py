"""The URL that says where the bus is: what redis-py takes, and ``?namespace=`` besides."""

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urlsplit

_SCHEMES = ("redis", "rediss", "unix")
_SECRETS = ("password",)


@dataclass(frozen=True)
class Address:
    """``url`` is for redis-py, ``shown`` for people: it holds no password."""

    url: str
    shown: str
    namespace: str


def parse_address(url: str) -> Address:
    """Split a bus URL, such as ``redis://host:6379/0?namespace=run-7``.

    Programs in different namespaces (by default ``esper``) hear nothing of each other. Raises
    ``ValueError`` for what is not a Redis URL.
    """
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    namespace = query.pop("namespace", "esper")
    public = {key: "***" if key in _SECRETS else value for key, value in query.items()}
    shown = parts._replace(
        netloc=f"{name}{colon and ':***'}{at}{host}", query=urlencode(public, safe="*/")
    ).geturl()
    if parts.scheme not in _SCHEMES:
        raise ValueError(
            f"the bus is at redis://, rediss:// or unix://, got {shown or 'an empty URL'!r}"
        )
    if not namespace or set(namespace) & set("{}"):
        raise ValueError(f"a namespace is not empty and holds no braces, got {namespace!r}")
    return Address(parts._replace(query=urlencode(query)).geturl(), shown, namespace)
