"""Why a cluster does not let a client in: what librdkafka says, put as what is wrong and which setting to look at."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Mapping
from pathlib import Path

from confluent_kafka import KafkaError

ASK = 2.0  # seconds for one look at what speaks at an address
FILES = ("ssl.ca.location", "ssl.certificate.location", "ssl.key.location", "ssl.keystore.location")
WITH_TLS = {"PLAINTEXT": "SSL", "SASL_PLAINTEXT": "SASL_SSL"}
WITHOUT_TLS = {tls: plain for plain, tls in WITH_TLS.items()}
# OpenSSL's numbers for: no issuer found, self-signed (alone, in the chain), and a chain that does not end in one.
UNKNOWN_ISSUER = (2, 18, 19, 20, 21)
NOT_YET, EXPIRED, OTHER_NAMES = 9, 10, (62, 64)


def is_final(error: KafkaError) -> bool:
    """Whether trying again cannot help: a login or a certificate was refused, by either side."""
    words = error.str()
    if error.code() == KafkaError._AUTHENTICATION:
        return "Local: " not in words  # else the connection broke while logging in, and nothing was refused
    return error.code() == KafkaError._SSL or "certificate verify failed" in words or "SSL alert number" in words


def says_why(error: KafkaError) -> bool:
    """Whether this is a reason, and not only the news that no broker is left."""
    return error.code() != KafkaError._ALL_BROKERS_DOWN


def who(error: KafkaError) -> str:
    """The broker an error is about, as the client calls it: `ssl://127.0.0.1:9093/bootstrap`."""
    return error.str().partition(": ")[0]


def explain(error: KafkaError, bootstrap: str, security: Mapping[str, str]) -> str:
    """What is wrong and what to do about it, with the client's own words in brackets.

    May ask the address once more, by TLS, for what the client does not tell: at most ASK seconds.
    """
    words = error.str()
    found = re.match(r"(?:\w+://)?([^/\s]+):(\d+)/", words)
    host, port = (found[1].strip("[]"), int(found[2])) if found else _first(bootstrap)
    protocol = security.get("security.protocol", "PLAINTEXT").upper()
    if error.code() == KafkaError._AUTHENTICATION:
        meaning = _login(words, protocol, security)
    elif "certificate verify failed" in words:
        meaning = _certificate(host, port, security)
    elif error.code() == KafkaError._RESOLVE:
        meaning = "nobody knows this host name: is it spelled right, and reachable from here (a VPN)?"
    elif "Connection refused" in words:
        meaning = "nothing listens there: is the broker up, and the port right?"
    elif "SSL alert number" in words:
        meaning = (
            "the broker does not accept this client's certificate, or demands one that it was not given: set "
            "ssl.certificate.location and ssl.key.location, or ssl.keystore.location and ssl.keystore.password"
        )
    elif not says_why(error) or "isconnected" in words:
        meaning = _closed(host, port, protocol)
    else:
        return words
    return f"{meaning} [librdkafka: {words}]"


def explain_setting(error: KafkaError, security: Mapping[str, str]) -> str:
    """Why the client does not even start with these settings."""
    words = error.str()
    for name in FILES:
        if name in words and (value := security.get(name)):
            try:
                Path(value).open("rb").close()
            except OSError as reason:
                return f"{name} names {Path(value).absolute()}, which cannot be read: {reason.strerror}"
            return f"{name} names {Path(value).absolute()}, which cannot be used: {words}"
    if "GSSAPI" in words and not {"sasl.mechanism", "sasl.mechanisms"} & security.keys():
        return f"sasl.mechanism is not set: set it to what the cluster asks for, SCRAM-SHA-512 or PLAIN [{words}]"
    return words


def _login(words: str, protocol: str, security: Mapping[str, str]) -> str:
    mechanism = security.get("sasl.mechanism") or security.get("sasl.mechanisms", "")
    if "Unsupported SASL mechanism" in words:
        known = re.search(r"supported mechanisms: ([\w,-]+)", words)
        return f"the broker takes no sasl.mechanism={mechanism}: set {known[1] if known else 'another one'}"
    if "SASL state" in words:
        plain = protocol.removeprefix("SASL_").replace("PLAINTEXT", "PLAINTEXT (the default)")
        return f"this port asks for no login: set security.protocol={plain}, or use the port that asks for one"
    if "Local: " in words:
        return "the connection broke in the middle of the login: is the broker up, and security.protocol right?"
    user = security.get("sasl.username")
    return f"the login of {user!r} was refused: check sasl.username, sasl.password and sasl.mechanism ({mechanism})"


def _certificate(host: str, port: int, security: Mapping[str, str]) -> str:
    authorities = security.get("ssl.ca.location")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if authorities and Path(authorities).is_file():
            context.load_verify_locations(authorities)
        elif authorities and Path(authorities).is_dir():
            context.load_verify_locations(capath=authorities)
        elif pem := security.get("ssl.ca.pem"):
            context.load_verify_locations(cadata=pem)
        else:
            context.load_default_certs()
        _handshake(host, port, context)
    except ssl.SSLCertVerificationError as refused:
        code = refused.verify_code
        if code == EXPIRED:
            return "the broker's certificate has expired: whoever runs the cluster must renew it (or set this clock)"
        if code == NOT_YET:
            return "the broker's certificate is not valid yet: is this machine's clock right?"
        if code in OTHER_NAMES:
            return f"the broker's certificate is not for {host}: use the host name that it was made for"
        if code in UNKNOWN_ISSUER and authorities:
            return (
                f"no authority in ssl.ca.location ({authorities}) has signed the broker's certificate: "
                "set it to the file of the one that has"
            )
        if code in UNKNOWN_ISSUER:
            return (
                "no authority known to this machine has signed the broker's certificate: "
                "set ssl.ca.location to the file (PEM) of the one that has"
            )
        return f"the broker's certificate does not hold ({refused.verify_message}): check ssl.ca.location"
    except (OSError, ValueError):
        pass
    return "the broker's certificate could not be verified: check ssl.ca.location"


def _closed(host: str, port: int, protocol: str) -> str:
    """A broker that closes the connection without a word mostly expects another protocol."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only a look: nothing is sent
    try:
        _handshake(host, port, context)
    except ConnectionRefusedError:
        return "nothing listens there: is the broker up, and the port right?"
    except OSError:
        tls = False
    else:
        tls = True
    if tls != protocol.endswith("SSL"):
        other = (WITH_TLS if tls else WITHOUT_TLS).get(protocol, "")
        return (
            f"this port speaks {'TLS' if tls else 'no TLS'}, and the client, with security.protocol={protocol}, "
            f"{'does not' if tls else 'does'}: set security.protocol={other}, or use another port"
        )
    if protocol.startswith("SASL"):
        return "the broker closes the connection: is it starting or stopping?"
    return (
        f"the broker closes the connection. If it asks for a login, set security.protocol=SASL_{protocol} with "
        "sasl.mechanism, sasl.username and sasl.password; else it may be starting or stopping"
    )


def _handshake(host: str, port: int, context: ssl.SSLContext) -> None:
    with socket.create_connection((host, port), ASK) as bare, context.wrap_socket(bare, server_hostname=host):
        pass


def _first(bootstrap: str) -> tuple[str, int]:
    """Host and port of the first address; Kafka's usual port where none is told."""
    host, _, port = bootstrap.split(",")[0].strip().rpartition("://")[2].partition(":")
    return host, int(port) if port.isdecimal() else 9092
