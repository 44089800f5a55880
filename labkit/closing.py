"""What a `with` statement needs of an object that has a `close`."""

from __future__ import annotations

from typing import Self


class Closing:
    """An object that `with` closes at its end."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
