"""Permissively licensed Python source, split into what the model learns from and what it never saw.

Everything comes from the machine at hand: the running interpreter's standard library, and (to learn
from only) installed packages whose metadata states a permissive licence.  A standard library file
is held out by a hash of its path, so every Python version holds out nearly the same files, and
whatever shares a passage with a held-out file (packages vendor the standard library) is dropped.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path, PurePosixPath

HELD_OUT_ONE_IN = 30
MAX_BYTES = 300_000  # a longer source file is a table, not a program
SHINGLE = 64  # bytes; a copy is recognised in passages of this length
MAX_SHARED = 8  # passages (512 bytes) that a training file may have in common with held-out files

# What some builds of Python lack or fill differently, and generated tables; then what is not the
# hand-written source of the package that ships it.
_NOT_STDLIB = re.compile(
    r"tests?|idlelib|lib2to3|distutils|ensurepip|tkinter|turtledemo|encodings|pydoc_data|__phello__"
    r"|site-packages|dist-packages|lib-dynload|__pycache__|config-.*|_sysconfigdata.*"
)
_NOT_PACKAGE = re.compile(
    r"tests?|testing|_?vendor|vendored|_vendored_packages|externals|extern|third_party|thirdparty"
    r"|node_modules|__pycache__"
)

_PERMISSIVE = re.compile(r"\b(MIT|BSD|0BSD|Apache|PSF|Python Software Foundation|ISC|HPND)\b")
_RESTRICTED = re.compile(r"GPL|GNU|MPL|Mozilla|Eclipse|EPL|CDDL|Proprietary", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """One source file: where it comes from, as `stdlib/json/decoder.py`, and its bytes."""

    name: str
    text: bytes


def standard_library() -> list[Document]:
    """The running interpreter's hand-written standard library modules, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        Document(f"stdlib/{relative}", path.read_bytes())
        for path in sorted(root.rglob("*.py"))
        if _belongs(relative := PurePosixPath(path.relative_to(root).as_posix()), _NOT_STDLIB)
        and not path.is_symlink()
    ]


def package(name: str) -> list[Document]:
    """The sources of an installed distribution, sorted by path, without tests and vendored code.

    Raises PackageNotFoundError if it is not installed, ValueError if its metadata does not state
    a permissive licence.
    """
    installed = distribution(name)
    stated = licence(installed)
    if not _PERMISSIVE.search(stated) or _RESTRICTED.search(stated):
        raise ValueError(f"{name}: no permissive licence in its metadata, found {stated!r}")
    paths = sorted(PurePosixPath(entry) for entry in installed.files or ())
    files = [
        (path, Path(str(installed.locate_file(path))))
        for path in paths
        if path.suffix == ".py" and ".." not in path.parts and _belongs(path, _NOT_PACKAGE)
    ]
    return [
        Document(path.as_posix(), file.read_bytes())
        for path, file in files
        if file.is_file() and 0 < file.stat().st_size <= MAX_BYTES
    ]


def licence(installed: Distribution) -> str:
    """What a distribution's metadata says of its licence: SPDX expression, classifiers or name."""
    metadata = installed.metadata
    if "License-Expression" in metadata:
        return metadata["License-Expression"]
    classifiers = [c for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    if classifiers:
        return "; ".join(classifier.rpartition(" :: ")[2] for classifier in classifiers)
    return metadata["License"].partition("\n")[0] if "License" in metadata else ""


def is_held_out(document: Document) -> bool:
    """Whether the model must never see this standard library file; decided by its path alone."""
    digest = hashlib.sha256(document.name.removeprefix("stdlib/").encode()).hexdigest()
    return int(digest, 16) % HELD_OUT_ONE_IN == 0


def passages(held_out: Iterable[Document]) -> set[bytes]:
    """Every passage of SHINGLE bytes in the held-out text, at any offset.

    One of fewer than eight different bytes, such as indentation or a line of dashes, is common to
    files that copied nothing, and left out.
    """
    return {
        passage
        for document in held_out
        for start in range(len(document.text) - SHINGLE + 1)
        if len(set(passage := document.text[start : start + SHINGLE])) >= 8
    }


def without_leaks(documents: Iterable[Document], secret: set[bytes]) -> list[Document]:
    """The documents that share at most MAX_SHARED of the `passages` that were held out.

    They are cut every SHINGLE bytes, so any copy of 2 * SHINGLE bytes is met, wherever it stands.
    """
    return [
        document
        for document in documents
        if sum(
            document.text[start : start + SHINGLE] in secret
            for start in range(0, len(document.text), SHINGLE)
        )
        <= MAX_SHARED
    ]


def _belongs(path: PurePosixPath, excluded: re.Pattern[str]) -> bool:
    """Whether no part of the path is excluded."""
    return not any(excluded.fullmatch(part) for part in path.parts)
