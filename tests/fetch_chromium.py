"""Puts a headless Chromium into .venv/chromium, without root: `python -m tests.fetch_chromium`, which `make test` runs.

Chromium comes from npm's @sparticuz/chromium (built for bare Linux machines, with the libraries it needs), the fonts for
Chinese and emoji from PyPI and npm; each is held against its SHA-512. About 85 MB to load, 250 MB on disk. Does nothing
where there is a Chromium already; exit code 1 where none could be had.
"""

from __future__ import annotations

import base64
import hashlib
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from tests.browser import FETCHED, chromium_environment, find_chromium

CHROMIUM = (
    "@sparticuz/chromium",
    "153.0.0",
    "jiGWqSvPMdu4+P9TilYqAR7yEGPEHINx+lCvE/NqNO/EHYzF/x1hUiI5T6ioVIt7dEy7n88byyT0vk+dnsgQwA==",
)
EMOJI = (
    "@expo-google-fonts/noto-color-emoji",
    "0.4.6",
    "2pAakFka8eSDCHB5d6NNp/7WrOZAiVYcycOqAbccPd8P8zaWUVfQ0N3y84nNPmhCQT9qzM9bpDi6cgMu6fRKEg==",
)
CHINESE = "zhplot==1.0.0"  # a wheel with Noto Sans SC; whole CJK families are ten times as large
FONTS = """\
<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
  <include ignore_missing="yes">/etc/fonts/fonts.conf</include>
  <dir>{folder}/fonts</dir>
  <cachedir>{folder}/font-cache</cachedir>
  <match target="pattern">
    <test name="family"><string>sans-serif</string></test>
    <edit name="family" mode="prepend" binding="strong"><string>Open Sans</string><string>Noto Sans SC</string></edit>
  </match>
</fontconfig>
"""


def main() -> int:
    found = find_chromium()
    if found:
        print(f"Chromium: {found}")
        return 0
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        print(f"no Chromium to fetch for {sys.platform} {platform.machine()}: install one, or set FASTOSS_CHROMIUM", file=sys.stderr)
        return 1
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=FETCHED.parent, prefix="chromium-") as folder:
        made = Path(folder) / "chromium"
        try:
            unpack(made)
        except OSError as error:  # URLError and HTTPError are OSErrors
            print(f"could not fetch Chromium: {error}", file=sys.stderr)
            return 1
        shutil.rmtree(FETCHED, ignore_errors=True)
        made.rename(FETCHED)
    path = FETCHED / "chromium"
    done = subprocess.run([path, "--version"], env=chromium_environment(path), capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(FETCHED)
        print(f"the fetched Chromium does not start here: {done.stderr.strip()}", file=sys.stderr)
        return 1
    print(f"{done.stdout.strip()}: {path}, {time.monotonic() - begun:.0f} s")
    return 0


def unpack(folder: Path) -> None:
    """Chromium, its libraries and the fonts into `folder`."""
    import brotli

    fonts = folder / "fonts"
    fonts.mkdir(parents=True)
    with npm_package(*CHROMIUM) as package:
        for name in ("al2023", "fonts"):
            with tarfile.open(fileobj=io.BytesIO(brotli.decompress(member(package, f"bin/{name}.tar.br")))) as archive:
                archive.extractall(folder, filter="data")
        program = folder / "chromium"
        program.write_bytes(brotli.decompress(member(package, "bin/chromium.br")))
        program.chmod(0o755)
    with npm_package(*EMOJI) as package:
        (fonts / "NotoColorEmoji.ttf").write_bytes(member(package, "400Regular/NotoColorEmoji_400Regular.ttf"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder), CHINESE]
    if subprocess.run(command).returncode:
        raise OSError(f"pip could not download {CHINESE}")
    wheel = next(folder.glob("zhplot-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        (fonts / "NotoSansSC.ttf").write_bytes(archive.read("zhplot/fonts/NotoSansSC-Regular.ttf"))
    wheel.unlink()
    (folder / "fonts.conf").write_text(FONTS.format(folder=FETCHED), encoding="utf-8")


def npm_package(name: str, version: str, sha512: str) -> tarfile.TarFile:
    url = f"{npm_registry()}/{name}/-/{name.split('/')[-1]}-{version}.tgz"
    print(f"fetching {url}", flush=True)
    for attempt in (1, 2, 3):
        try:
            with urllib.request.urlopen(url, timeout=120) as answer:
                content = answer.read()
            break
        except (OSError, HTTPException) as error:
            if attempt == 3:
                raise OSError(f"{url}: {error}") from None
            time.sleep(2 * attempt)
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != sha512:
        raise OSError(f"{url} is not the file it should be (SHA-512)")
    return tarfile.open(fileobj=io.BytesIO(content))


def npm_registry() -> str:
    """The registry that npm is configured with, where there is an npm."""
    configured = ""
    if shutil.which("npm"):
        configured = subprocess.run(["npm", "config", "get", "registry"], capture_output=True, text=True).stdout.strip()
    return (configured if configured.startswith("http") else "https://registry.npmjs.org").rstrip("/")


def member(package: tarfile.TarFile, name: str) -> bytes:
    file = package.extractfile(f"package/{name}")
    assert file is not None, name
    return file.read()


if __name__ == "__main__":
    sys.exit(main())
