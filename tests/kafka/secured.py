"""Brokers that do not let everybody do everything: one asks for TLS and a login, one has access control lists."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from processes import wait_until

from labkit.kafka.cluster import Cluster, admin
from labkit.runtime.broker import HOST, Broker, free_ports, prepare
from labkit.runtime.child import Child
from labkit.runtime.java import find_java

STORE = "of-the-keystore"  # the password of every keystore
USER, PASSWORD = "ada", "corr3ct h0rse's=staple"

# Each listener with the protocol it speaks and the keystore it shows.
LISTENERS = {
    "TLS": ("SSL", "server"),
    "LOGIN": ("SASL_SSL", "server"),
    "BARE": ("SASL_PLAINTEXT", None),  # a login without TLS
    "AGAIN": ("SASL_SSL", "server"),  # asks for the login again, every 3 s (a broker refuses to be asked within 1 s)
    "MUTUAL": ("SSL", "server"),  # asks the client for a certificate too
}
HERE = f"san=ip:{HOST},dns:localhost"


class Certificates:
    """Keystores made by the keytool of labkit's own Java, and the certificate of each authority as PEM."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tool = find_java().path.with_name("keytool")
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._authority, ("ca", "stranger")))
            list(pool.map(self._signed, ("server", "client"), (("-ext", HERE), ())))

    def store(self, name: str) -> Path:
        """A keystore with one key and its certificate."""
        return self.folder / f"{name}.p12"

    def pem(self, name: str) -> Path:
        """The certificate of the authority `ca`, which signed everything, or of `stranger`, which signed nothing."""
        return self.folder / f"{name}.pem"

    def _authority(self, name: str) -> None:
        self._keytool(name, "-genkeypair", "-alias", name, "-dname", f"CN={name}", "-keyalg", "EC", "-ext", "bc:c")
        self._keytool(name, "-exportcert", "-alias", name, "-rfc", "-file", str(self.pem(name)))

    def _signed(self, name: str, options: tuple[str, ...]) -> None:
        shutil.copy(self.store("ca"), self.store(name))
        about = ("-alias", name, "-dname", f"CN={name}", "-keyalg", "EC")
        self._keytool(name, "-genkeypair", *about, "-signer", "ca", *options)
        self._keytool(name, "-delete", "-alias", "ca")  # its key is nobody else's

    def _keytool(self, store: str, *arguments: str) -> None:
        place = ("-keystore", str(self.store(store)), "-storepass", STORE)
        quick = ("-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC")  # halves what is mostly the start of Java
        command = [self._tool, *quick, *arguments, *place]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Secured:
    """The running broker: the address of each listener, `PLAINTEXT` for administration among them."""

    broker: Broker
    certificates: Certificates
    ports: dict[str, int]

    def address(self, listener: str, host: str = HOST) -> str:
        return f"{host}:{self.ports[listener]}"

    def allow(self, user: str, *kinds: ResourceType) -> None:
        """Give a user the rights of docs/own-cluster.md: everything that begins with `labkit.<user>.`, of each kind."""
        everything = (AclOperation.ALL, AclPermissionType.ALLOW)
        rights = [
            AclBinding(kind, f"labkit.{user}.", ResourcePatternType.PREFIXED, f"User:{user}", "*", *everything)
            for kind in kinds
        ]
        for done in admin(self.broker.cluster).create_acls(rights).values():
            done.result(10)

    def set_password(self, user: str, password: str) -> None:
        """Make a user, or change a user's password, for both mechanisms."""
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):  # a user once in a request
            change = UserScramCredentialUpsertion(user, ScramCredentialInfo(mechanism, 4096), password.encode())
            admin(self.broker.cluster).alter_user_scram_credentials([change])[user].result(10)


@contextmanager
def secured_broker(folder: Path) -> Iterator[Secured]:
    """Start it in `folder`, with a user; it ends with the context."""
    folder.mkdir()
    certificates, kafka = Certificates(folder), prepare()
    numbers: set[int] = set()
    while len(numbers) < len(LISTENERS) + 2:
        numbers.update(free_ports())
    port, controller, *others = numbers
    ports = dict(zip(LISTENERS, others, strict=False))
    broker = Broker.create(
        folder / "broker", kafka, (port, controller), _settings(port, controller, ports, certificates)
    )
    with Child(kafka.command(broker.folder), cwd=broker.folder, output=broker.log) as child:
        broker.wait_until_ready(lambda: child.poll() is None)
        secured = Secured(broker, certificates, {"PLAINTEXT": port, **ports})
        secured.set_password(USER, PASSWORD)
        yield secured


# What no entry is about is allowed to everybody, and what one is about to nobody whom it does not name.
ACLS = """\
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=true
"""


@contextmanager
def broker_with_acls(folder: Path) -> Iterator[Cluster]:
    """Start one in `folder` which has no entries yet; it ends with the context."""
    kafka = prepare()
    broker = Broker.create(folder, kafka, extra=ACLS)
    with Child(kafka.command(folder), cwd=folder, output=broker.log) as child:
        broker.wait_until_ready(lambda: child.poll() is None)
        yield broker.cluster


def allow(
    cluster: Cluster, kind: ResourceType, name: str, *operations: AclOperation, exactly: bool = False
) -> list[AclBindingFilter]:
    """Allow these operations, and no others, on what begins with this name, or has exactly it. Returns the entries."""
    pattern = ResourcePatternType.LITERAL if exactly else ResourcePatternType.PREFIXED
    whole = [(kind, name, pattern, "User:ANONYMOUS", "*", one, AclPermissionType.ALLOW) for one in operations]
    for made in admin(cluster).create_acls([AclBinding(*one) for one in whole]).values():
        made.result(10)
    entries = [AclBindingFilter(*one) for one in whole]
    wait_until(lambda: all(_known(cluster, one) for one in entries), what="the entries")
    return entries


def forbid(cluster: Cluster, entries: list[AclBindingFilter]) -> None:
    """Take entries back."""
    for taken in admin(cluster).delete_acls(entries).values():
        taken.result(10)
    wait_until(lambda: not any(_known(cluster, one) for one in entries), what="no entries")


def _known(cluster: Cluster, entry: AclBindingFilter) -> bool:
    """Whether the broker goes by this entry."""
    return bool(admin(cluster).describe_acls(entry).result(10))


def _settings(port: int, controller: int, ports: dict[str, int], certificates: Certificates) -> str:
    addresses = [f"{name}://{HOST}:{number}" for name, number in {"PLAINTEXT": port, **ports}.items()]
    protocols = [f"{name}:{protocol}" for name, (protocol, _) in LISTENERS.items()]
    lines = [
        f"listeners={','.join(addresses)},CONTROLLER://{HOST}:{controller}",
        f"advertised.listeners={','.join(addresses)}",
        f"listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,{','.join(protocols)}",
        "sasl.enabled.mechanisms=SCRAM-SHA-256,SCRAM-SHA-512",
        "listener.name.mutual.ssl.client.auth=required",
        "listener.name.again.scram-sha-256.connections.max.reauth.ms=3000",
        f"ssl.truststore.location={certificates.pem('ca')}",
        "ssl.truststore.type=PEM",
        # Who is none of these needs rights.
        "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        f"super.users=User:ANONYMOUS;User:{USER};User:bob;User:CN=client",
    ]
    for name, (protocol, store) in LISTENERS.items():
        own = f"listener.name.{name.lower()}"
        if store is not None:
            lines += [
                f"{own}.ssl.keystore.location={certificates.store(store)}",
                f"{own}.ssl.keystore.type=PKCS12",
                f"{own}.ssl.keystore.password={STORE}",
                f"{own}.ssl.key.password={STORE}",
            ]
        if protocol.startswith("SASL"):
            module = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
            lines += [f"{own}.scram-sha-{bits}.sasl.jaas.config={module}" for bits in (256, 512)]
    return "\n".join(lines) + "\n"
