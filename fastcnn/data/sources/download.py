"""Archives from the network, and the checksum without which no byte of one is used."""

import contextlib
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from fastcnn.data.progress import progress_bar
from fastcnn.errors import DataError
from fastcnn.files import check_regular

TIMEOUT_S = 30
BLOCK = 1 << 20


def md5_of(path: Path) -> str:
    """Return the MD5 (hex) of a file. Raises DataError if it cannot be read."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        check_regular(path)
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def check_md5(path: Path, expected: str) -> None:
    """Raise DataError, which names both hashes, for a file with another MD5."""
    if (found := md5_of(path)) != expected:
        raise DataError(f"{path}: MD5 {found}, expected {expected}; remove it to download it again")


def download(title: str, url: str, path: Path, expected: str, otherwise: str) -> None:
    """Fetch `url` to a temporary name beside `path`, check its MD5, then give it its own name.

    title: what it is; otherwise: what else the user may do. Both stand in the DataError that is
    raised for no network, a download that is cut, another MD5 and a folder that cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(title, url, part)
        if (found := md5_of(part)) != expected:
            raise DataError(f"{url}: MD5 {found}, expected {expected}; try again, or {otherwise}")
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"cannot download {title} to {path.parent} ({reason}); {otherwise}"
        ) from error
    finally:
        # it may not exist, nor its folder: the error that says so is already on its way
        with contextlib.suppress(OSError):
            part.unlink()


def _fetch(title: str, url: str, part: Path) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, open(part, "wb") as file:
        total = int(response.headers.get("Content-Length", 0))
        received = 0
        with progress_bar(f"downloading {title}", total, announce=True, unit="bytes") as advance:
            while block := response.read(BLOCK):
                file.write(block)
                received += len(block)
                advance(len(block))
    # a connection that ends early reads as the end of the file
    if received < total:
        raise OSError(f"cut after {received:,} of {total:,} bytes")
