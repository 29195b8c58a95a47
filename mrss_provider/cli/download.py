"""Download one file of the hub; what an earlier run left is continued, not fetched again.

`huggingface_hub` finds the file and signs the request; its own download starts anew in each
process, which is no way to fetch 15 GB over a line that drops.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mrss_provider.cli.output import CommandError

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_MAX_FRUITLESS_TRIES = 5
_RETRY_WAIT_S = 1.0

Advance = Callable[[int], object]


def download(
    repo: str, path: str, folder: Path, revision: str, *, num_bytes: int, sha256: str | None
) -> Path:
    """Fetch `path` of `repo` into `folder` and return where it is.

    The bytes gather in `<name>.<etag>.part`, which is kept when the download breaks off.

    Raises:
        CommandError: a damaged download (it is removed), or another process at the same file.
        httpx.HTTPError: the line stays down; huggingface_hub's errors, as it raises them.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    target = folder / path
    if target.is_file() and target.stat().st_size == num_bytes and _matches(target, sha256):
        return target
    url = hf_hub_url(repo, path, revision=revision)
    etag = get_hf_file_metadata(url).etag or "unknown"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{etag[:16]}.part")
    with _locked(part) as file, _progress(path, num_bytes, file.tell()) as advance:
        _fill(file, url, num_bytes, advance)
    if not _matches(part, sha256):
        part.unlink()
        raise CommandError(
            f"{path} arrived damaged (its sha256 is not the hub's) and was removed; "
            "run the command again"
        )
    part.replace(target)
    return target


def _fill(file: BinaryIO, url: str, num_bytes: int, advance: Advance) -> None:
    """Append to `file` (modified) until it holds `num_bytes`, over as many tries as it takes."""
    import httpx

    fruitless = 0
    while (before := file.tell()) < num_bytes:
        try:
            _fetch(file, url, advance)
        except httpx.TransportError:
            fruitless = 0 if file.tell() > before else fruitless + 1
            if fruitless == _MAX_FRUITLESS_TRIES:
                raise
            time.sleep(_RETRY_WAIT_S)


def _fetch(file: BinaryIO, url: str, advance: Advance) -> None:
    import httpx
    from huggingface_hub import get_token

    headers = {"User-Agent": "mrss-provider", "Accept-Encoding": "identity"}
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"
    start = file.tell()
    if start:
        headers["Range"] = f"bytes={start}-"
    with httpx.stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S
    ) as response:
        response.raise_for_status()
        if start and response.status_code == 200:
            # The server does not know ranges: begin again.
            file.seek(0)
            file.truncate()
            advance(-start)
        for chunk in response.iter_bytes(_CHUNK_BYTES):
            file.write(chunk)
            file.flush()
            advance(len(chunk))


def _matches(path: Path, sha256: str | None) -> bool:
    if sha256 is None:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


@contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """Open `part` for appending, alone."""
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise CommandError(f"another process is downloading {part.name}") from exc
        yield file


@contextmanager
def _progress(name: str, num_bytes: int, done: int) -> Iterator[Advance]:
    """Show a bar on stderr, if that is a terminal; yield what moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=num_bytes, completed=done)
        yield lambda num: bar.advance(task, num)
