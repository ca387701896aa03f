"""A certificate authority of the test's own, by openssl: EC keys, valid for two days."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


@dataclass(frozen=True, slots=True)
class Identity:
    """Files in PEM."""

    certificate: Path
    key: Path


class Pki:
    """`authority` is the CA's certificate, `tokens` the key that service account tokens have."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(mode=0o700)
        self._directory = directory
        self.authority, self._key = directory / "ca.crt", directory / "ca.key"
        self._request("/CN=pointsman-test", self.authority, self._key, "CA:TRUE")
        self.tokens = directory / "tokens.key"
        _openssl("genpkey", "-algorithm", "RSA", "-out", self.tokens)

    def client(self, user: str, *groups: str) -> Identity:
        """What the API server takes for this user and these groups."""
        return self._issue(user, groups)

    def server(self, *names: str) -> Identity:
        """For these DNS names and addresses."""
        sorts = [f"{'IP' if ':' in n or n[-1].isdigit() else 'DNS'}:{n}" for n in names]
        return self._issue(names[0], (), f"subjectAltName={','.join(sorts)}")

    def _issue(self, name: str, organisations: tuple[str, ...], *extensions: str) -> Identity:
        safe = "".join(
            c if c.isalnum() or c in ".-" else "_" for c in "+".join((name, *organisations))
        )
        made = Identity(self._directory / f"{safe}.crt", self._directory / f"{safe}.key")
        if not made.certificate.exists():
            subject = "".join(f"/O={_escaped(o)}" for o in organisations) + f"/CN={_escaped(name)}"
            by = ("-CA", self.authority, "-CAkey", self._key)
            more = [part for extension in extensions for part in ("-addext", extension)]
            self._request(subject, made.certificate, made.key, "CA:FALSE", *by, *more)
        return made

    def _request(self, subject: str, out: Path, key: Path, kind: str, *more: str | Path) -> None:
        constraint = ("-addext", f"basicConstraints=critical,{kind}")
        where = ("-subj", subject, "-keyout", key, "-out", out)
        _openssl("req", "-x509", "-config", "/dev/null", *_EC, *where, *constraint, *more)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("/", "\\/").replace("+", "\\+")


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")
