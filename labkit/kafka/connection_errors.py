"""Why a cluster refuses a client: from librdkafka's error texts to the settings to look at."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from confluent_kafka import KafkaError

# Each pattern is searched in an error's name and text; the first match says what to do. The last one names several
# causes: a broker that expects another protocol closes the connection silently, and so does one that stops.
MEANINGS = {
    "Broker: Unsupported SASL mechanism": "the broker does not take this sasl.mechanism: set one that it names here",
    "Unsupported SASL mechanism": "the client knows no such sasl.mechanism: set SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN",
    "SASL state": (
        "this port asks for no login: set security.protocol to SSL (with TLS) or PLAINTEXT, or use the port that does"
    ),
    "SASL mechanism GSSAPI": (
        "sasl.mechanism is not set, or GSSAPI: set it to what the cluster asks for, SCRAM-SHA-512 or PLAIN"
    ),
    "_AUTHENTICATION.*Local: ": (
        "the connection broke in the middle of the login: is the broker up, and security.protocol right?"
    ),
    "_AUTHENTICATION": "the login was refused: check sasl.username, sasl.password and sasl.mechanism",
    "certificate verify failed": (
        "the broker's certificate could not be verified: set ssl.ca.location to the file (PEM) of the authority that "
        "signed it. If that is right, the certificate has expired, or was made for another host name"
    ),
    "SSL alert number": (
        "the broker does not accept this client's certificate, or demands one that it was not given: set "
        "ssl.certificate.location and ssl.key.location, or ssl.keystore.location and ssl.keystore.password"
    ),
    "_RESOLVE": "nobody knows this host name: is it spelled right, and reachable from here (a VPN)?",
    "Connect to|timed out in state CONNECT": (
        "nothing answers there: is the broker up, and are host and port right and reachable from here?"
    ),
    "_TRANSPORT|_ALL_BROKERS_DOWN|PLAINTEXT broker": (
        "the connection broke. Does security.protocol fit this port? With TLS, set SSL or SASL_SSL. With a login, "
        "set SASL_SSL or SASL_PLAINTEXT, and sasl.mechanism, sasl.username and sasl.password. "
        "If it fits, the broker is starting or stopping"
    ),
}
# Why a group refuses a member, by the error's code. The client would try again for ever.
NOT_JOINED = {
    KafkaError.INCONSISTENT_GROUP_PROTOCOL: (
        "one of its members assigns partitions in another way, or is no consumer. All members need the same "
        "partition.assignment.strategy, here {strategy}, and the same guarantee: set it there, end that member, or use "
        "another group"
    ),
    KafkaError.GROUP_MAX_SIZE_REACHED: (
        "it has as many members as the broker allows: run fewer, or raise the broker's group.max.size"
    ),
    KafkaError.INVALID_SESSION_TIMEOUT: (
        "the broker does not allow its session.timeout.ms of 6000: set the broker's group.min.session.timeout.ms to no "
        "more, and group.max.session.timeout.ms to no less"
    ),
}
SHOWN = ("security.protocol", "sasl.mechanism", "sasl.mechanisms", "sasl.username", "ssl.ca.location")


def is_final(error: KafkaError) -> bool:
    """Whether trying again cannot help: a login or a certificate was refused, by either side."""
    words = error.str()
    if error.code() == KafkaError._AUTHENTICATION:
        return "Local: " not in words  # else the connection broke while logging in, and nothing was refused
    return error.code() == KafkaError._SSL or "certificate verify failed" in words or "SSL alert number" in words


def explain(error: KafkaError, security: Mapping[str, str]) -> str:
    """What is wrong and what to do about it, with the present settings and the client's own words in brackets."""
    words = error.str()
    for pattern, meaning in MEANINGS.items():
        if re.search(pattern, f"{error.name()}: {words}"):
            settings = {"security.protocol": "PLAINTEXT", **security}
            now = ", ".join(f"{name}={settings[name]}" for name in SHOWN if name in settings)
            return f"{meaning} [now {now}; librdkafka: {words}]"
    for name, value in security.items():
        if name.endswith(".location") and name in words:  # the client cannot even start
            try:
                Path(value).open("rb").close()
            except OSError as reason:
                return f"{name} names {Path(value).absolute()}, which cannot be read: {reason.strerror}"
            return f"{name} names {Path(value).absolute()}, which cannot be used: {words}"
    return words
