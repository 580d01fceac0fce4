"""The gate: which of the things that an image's own header names may be opened.

An image is data, often somebody else's. Its backing file name, data file name or ``json:`` string may name any file
of the host; image services have given such files away again and again (SEMANTICS: CVE-2015-5163, CVE-2024-32498,
CVE-2024-4467). So a reference found in an image passes a ``Gate`` that the caller chose:

    Gate()                       the default: plain file names that lie in the directory of the image that names them
    Gate.within("/srv/images")   plain file names below these directories
    Gate.deny()                  nothing: one image, no chain
    Gate.permissive()            everything, also ``json:`` strings; formats may be guessed from content

Names are judged after symbolic links are resolved. What the caller names in options is trusted and passes no gate.
A format is never guessed from the content of what a reference names, unless ``probe`` says so: a guest can write any
header into its raw disk. Everything here is pure but for ``os.path.realpath``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocklayer.base.errors import ReferenceRefusedError
from blocklayer.base.options import JSON_PREFIX

if TYPE_CHECKING:
    from typing import Self

REFERENCE_LENGTH_MAX = 4096
"""Longer names are refused outright (PATH_MAX)."""


@dataclass(frozen=True, slots=True)
class Gate:
    """``roots``: directories that may be opened from; None means anywhere. ``siblings``: also the image's own directory.

    ``json``: whether ``json:`` references are followed. ``probe``: whether a format that the image does not record may
    be guessed from content.
    """

    roots: tuple[str, ...] | None = ()
    siblings: bool = True
    json: bool = False
    probe: bool = False

    @classmethod
    def within(cls, *roots: str | os.PathLike[str], siblings: bool = False, probe: bool = False) -> Self:
        """Allow plain file names below ``roots``."""
        return cls(tuple(os.path.realpath(root) for root in roots), siblings=siblings, probe=probe)

    @classmethod
    def anywhere(cls, *, probe: bool = False) -> Self:
        """Allow plain file names wherever they point, but no ``json:``."""
        return cls(None, probe=probe)

    @classmethod
    def deny(cls) -> Self:
        """Allow nothing."""
        return cls((), siblings=False)

    @classmethod
    def permissive(cls) -> Self:
        """Allow everything: only for images that you made yourself."""
        return cls(None, json=True, probe=True)

    def check(self, reference: str, *, image: str | None, role: str) -> str:
        """Answer the path to open for ``reference`` in ``image`` (its file name), or raise ``ReferenceRefusedError``.

        Relative names are relative to the directory of ``image``; a leading ``file:`` is dropped.
        """
        if len(reference) > REFERENCE_LENGTH_MAX or "\0" in reference:
            raise self._refusal(reference[:64], image, role, "it is no file name")
        name = reference.removeprefix("file:")
        scheme, colon, _ = name.partition(":")
        if colon and "/" not in scheme and not os.path.lexists(resolve(name, image)):
            raise self._refusal(reference, image, role, f"it uses the protocol {scheme!r}")
        path = resolve(name, image)
        if not self._allows(os.path.realpath(path), image):
            raise self._refusal(reference, image, role, "it lies outside the directories that may be opened from")
        return path

    def allows_json(self, reference: str) -> bool:
        """Whether ``reference`` is a ``json:`` string and may be followed."""
        return self.json and reference.startswith(JSON_PREFIX)

    def _allows(self, path: str, image: str | None) -> bool:
        if self.roots is None:
            return True
        roots = [os.path.realpath(root) for root in self.roots]
        if self.siblings and image is not None:
            roots.append(os.path.dirname(os.path.realpath(image)))
        return any(os.path.commonpath((root, path)) == root for root in roots)

    def _refusal(self, reference: str, image: str | None, role: str, why: str) -> ReferenceRefusedError:
        message = f"its header names {reference!r} as {role} file, which was not opened: {why}"
        hint = "; allow it with gate=Gate.within(DIRECTORY) or open the chain with explicit options"
        return ReferenceRefusedError(message + hint, reference=reference, filename=image)


def resolve(name: str, image: str | None) -> str:
    """``name`` as the image means it: relative to the image's own directory."""
    return os.path.join(os.path.dirname(image or ""), name)
