"""Certificates for tests, made by ``openssl``: a directory as QEMU, nbdkit and libnbd want it.

ca-cert.pem                        who signed the others
server-cert.pem, server-key.pem    for localhost, 127.0.0.1 and ::1
client-cert.pem, client-key.pem    of "tester"
stranger/                          the same files by another authority
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_DAYS = "30"


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def _key(path: Path) -> None:
    _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path)


def _signed(folder: Path, who: str, subject: str, extensions: str) -> None:
    _key(folder / f"{who}-key.pem")
    request, text = folder / f"{who}.csr", folder / f"{who}.ext"
    text.write_text(extensions)
    _openssl("req", "-new", "-key", folder / f"{who}-key.pem", "-subj", subject, "-out", request)
    _openssl(
        "x509", "-req", "-in", request, "-CA", folder / "ca-cert.pem", "-CAkey", folder / "ca-key.pem",
        "-CAcreateserial", "-days", _DAYS, "-extfile", text, "-out", folder / f"{who}-cert.pem",
    )  # fmt: skip


def _authority(folder: Path, name: str) -> None:
    _key(folder / "ca-key.pem")
    _openssl(
        "req", "-x509", "-new", "-key", folder / "ca-key.pem", "-subj", f"/CN={name}", "-days", _DAYS,
        "-addext", "keyUsage=critical,keyCertSign,cRLSign", "-out", folder / "ca-cert.pem",
    )  # fmt: skip


def _fill(folder: Path, name: str) -> None:
    folder.mkdir(exist_ok=True)
    _authority(folder, name)
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    usage = "keyUsage=critical,digitalSignature\nextendedKeyUsage={}\n"
    _signed(folder, "server", "/CN=localhost", usage.format("serverAuth") + names)
    _signed(folder, "client", "/CN=tester", usage.format("clientAuth"))


def make_pki(folder: Path) -> Path:
    """Fill ``folder``; answers it."""
    _fill(folder, "blocklayer test authority")
    _fill(folder / "stranger", "another authority")
    return folder
