"""Who may come in: names with password hashes, signed-in browsers, and a lock for those who guess."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from fastoss.errors import FastossError

USERS_VARIABLE = "FASTOSS_DEMO_USERS"
_N, _R, _P = 2**14, 8, 1  # scrypt: 16 MiB and about 50 ms a try
MAKE_USER = "python app.py --hash-password NAME makes a line"
_MOST = 10_000  # addresses, names and browsers that are remembered


def hash_password(name: str, password: str) -> str:
    """A line for the file of users: `name:scrypt$N$r$p$salt$hash`."""
    if not name or ":" in name or any(letter.isspace() for letter in name):
        raise FastossError("a user's name has no colon and no spaces", place=name or "name")
    if len(password) < 8:
        raise FastossError("a password has 8 characters or more")
    salt = secrets.token_bytes(16)
    return f"{name}:scrypt${_N}${_R}${_P}${_text(salt)}${_text(_scrypt(password, salt, _N, _R, _P))}"


class Users:
    """Names and hashes. `FastossError` where a line is not one of `hash_password`'s."""

    def __init__(self, lines: list[tuple[str, str]]):
        """`lines`: place (`file:line`) and line."""
        self._users: dict[str, tuple[int, int, int, bytes, bytes]] = {}
        for place, line in lines:
            name, _, told = line.strip().partition(":")
            try:
                kind, n, r, p, salt, digest = told.split("$")
                if kind != "scrypt" or not name:
                    raise ValueError
                self._users[name] = int(n), int(r), int(p), base64.b64decode(salt, validate=True), base64.b64decode(digest, validate=True)
            except ValueError:
                raise FastossError("this is not a user line (name:scrypt$…)", place=place, hint=MAKE_USER) from None
        if not self._users:
            raise FastossError(
                "there is no user in it", place=lines[0][0] if lines else "--auth", hint="python app.py --hash-password NAME makes a line"
            )
        self._trying = threading.Semaphore(2)  # each try takes 16 MiB
        self._nobody = (_N, _R, _P, b"-" * 16, b"-" * 64)

    @classmethod
    def load(cls, file: Path | None) -> Users:
        """From a file, else from the environment (one user a line)."""
        if file is None:
            return cls([(f"${USERS_VARIABLE}", line) for line in os.environ.get(USERS_VARIABLE, "").splitlines() if line.strip()])
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as problem:
            raise FastossError(f"cannot be read: {problem.strerror}", place=str(file)) from None
        lines = enumerate(text.splitlines(), 1)
        return cls([(f"{file}:{number}", line) for number, line in lines if line.strip() and not line.startswith("#")])

    def verify(self, name: str, password: str) -> bool:
        """An unknown name takes as long as a known one."""
        n, r, p, salt, digest = self._users.get(name, self._nobody)
        with self._trying:
            return hmac.compare_digest(_scrypt(password[:1024], salt, n, r, p), digest) and name in self._users


class Lockout:
    """Counts wrong tries by address or name: after `free` of them each further one locks for twice as long, up to `longest` seconds."""

    def __init__(self, free: int, first: float = 30.0, longest: float = 900.0, clock: Callable[[], float] = time.monotonic):
        self.free, self.first, self.longest, self.clock = free, first, longest, clock
        self._tries: OrderedDict[str, tuple[int, float]] = OrderedDict()  # wrong tries, locked until
        self._guard = threading.Lock()

    def seconds_left(self, key: str) -> float:
        with self._guard:
            return max(0.0, self._tries.get(key, (0, 0.0))[1] - self.clock())

    def wrong(self, key: str) -> None:
        with self._guard:
            count, until = self._tries.pop(key, (0, 0.0))
            if count and self.clock() - until > self.longest:
                count = 0  # it has been quiet for long enough
            count += 1
            lock = min(self.longest, self.first * 2 ** min(count - self.free, 20)) if count >= self.free else 0.0
            self._tries[key] = count, self.clock() + lock
            while len(self._tries) > _MOST:
                self._tries.popitem(last=False)

    def right(self, key: str) -> None:
        with self._guard:
            self._tries.pop(key, None)


class Browsers:
    """Cookies: random tokens, the user each belongs to (None where nobody signs in), and the pages opened with each."""

    def __init__(self, hours: float = 12.0, clock: Callable[[], float] = time.monotonic):
        self.hours, self.clock = hours, clock
        self._tokens: OrderedDict[str, tuple[str | None, float]] = OrderedDict()
        self._pages: OrderedDict[str, str] = OrderedDict()  # a page's session → the token that it was opened with

    def open(self, user: str | None) -> str:
        token = secrets.token_urlsafe(32)
        self._tokens[token] = user, self.clock() + self.hours * 3600
        while len(self._tokens) > _MOST:
            self._tokens.popitem(last=False)
        return token

    def known(self, token: str | None) -> bool:
        return token is not None and self._tokens.get(token, (None, 0.0))[1] > self.clock()

    def close(self, token: str | None) -> None:
        self._tokens.pop(token or "", None)

    def owns(self, token: str, page: str) -> bool:
        """Whether this browser may speak for a page's session: the first to name it has it."""
        owner = self._pages.setdefault(page, token)
        self._pages.move_to_end(page)
        while len(self._pages) > _MOST:
            self._pages.popitem(last=False)
        return hmac.compare_digest(owner, token)


def _scrypt(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, n=n, r=r, p=p, maxmem=64 * 2**20, dklen=64)


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
