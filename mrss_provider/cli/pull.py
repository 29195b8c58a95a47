"""`mrss pull`: fetch a checkpoint from the Hugging Face hub; an interrupted one resumes.

Decides which files of a repository are meant, and tells what went wrong in one sentence.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from mrss_provider.cli.download import download
from mrss_provider.cli.output import CommandError, note, size, table
from mrss_provider.replacing import replace_file

_G1 = "BlinkDL/rwkv7-g1"
_WORLD7 = "BlinkDL/rwkv-7-world"
_WORLD6 = "BlinkDL/rwkv-6-world"

# The official repositories replace files as training goes on, so an alias is a pattern; of the
# files that match it, the one with the latest date in its name is meant.
ALIASES: dict[str, tuple[str, str]] = {
    **{
        f"rwkv7-g1-{b}": (_G1, f"rwkv7-g*-{b}-*.pth")
        for b in ("0.1b", "0.4b", "1.5b", "2.9b", "7.2b", "13.3b")
    },
    **{
        f"rwkv7-world-{b.lower()}": (_WORLD7, f"RWKV-x070-World-{b}-*.pth")
        for b in ("0.1B", "0.4B", "1.5B", "2.9B")
    },
    **{
        f"rwkv6-world-{b.lower().replace('1b6', '1.6b')}": (_WORLD6, f"RWKV-x060-World-{b}-*.pth")
        for b in ("1B6", "3B", "7B", "14B")
    },
}

_CHECKPOINT_SUFFIXES = (".pth", ".safetensors")
_TOKENIZER_FILES = ("rwkv_vocab*.txt", "vocab.txt", "tokenizer.json")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `sha256` is known for the large ones."""

    path: str
    num_bytes: int
    sha256: str | None = None

    @property
    def date(self) -> str:
        """The YYYYMMDD in its name, or ''."""
        found = re.findall(r"(?<!\d)20\d{6}(?!\d)", self.path)
        return found[-1] if found else ""


def aliases_table() -> str:
    """Return what `mrss pull --list` prints."""
    return table(
        ("ALIAS", "REPOSITORY", "FILE"),
        [(alias, repo, pattern) for alias, (repo, pattern) in ALIASES.items()],
    )


def pull(
    what: str, *, file: str | None = None, to: Path = Path("models"), revision: str = "main"
) -> Path:
    """Download the checkpoint that `what` (an alias or a repository) means, to a folder of its own.

    A `card.toml` that says which chat template goes with it is added, unless there is one.

    Args:
        what: an alias of `ALIASES`, or `owner/name`.
        file: a file's path in the repository, or a pattern such as `*0.4b*.pth`.
        to: folder of the models' folders.
        revision: branch, tag or commit.

    Returns:
        The folder, which is what `--model` takes.

    Raises:
        CommandError: an unknown repository or file, no room, no network, a damaged download.
    """
    repo, pattern = _resolve(what, file)
    with _translated(repo, revision):
        files = _list_files(repo, revision)
    chosen = choose(files, pattern, repo)
    stem = PurePosixPath(chosen[0].path).stem
    folder = to / (stem if chosen[0].path.endswith(".pth") else repo.split("/")[1])
    _check_room(chosen, folder)
    for remote in chosen:
        note(f"{repo}: {remote.path} ({size(remote.num_bytes)}) -> {folder}")
        with _translated(repo, revision):
            download(
                repo,
                remote.path,
                folder,
                revision,
                num_bytes=remote.num_bytes,
                sha256=remote.sha256,
            )
    _write_card(folder, f"{repo}/{chosen[0].path}")
    return folder


def choose(files: Sequence[RemoteFile], pattern: str | None, repo: str) -> list[RemoteFile]:
    """Pick the checkpoint (all of its parts), and the tokenizer files that stand beside it.

    Raises:
        CommandError: none or several checkpoints; the message lists them.
    """
    checkpoints = [f for f in files if PurePosixPath(f.path).suffix in _CHECKPOINT_SUFFIXES]
    if pattern is not None:
        checkpoints = [f for f in checkpoints if fnmatchcase(f.path, pattern)]
        checkpoints = _latest(checkpoints)
    if not checkpoints:
        wanted = f"file matches {pattern!r}" if pattern else "checkpoint (.pth or .safetensors)"
        raise CommandError(f"no {wanted} in {repo}; it holds: {_listing(files)}")
    parts = [f for f in checkpoints if re.search(r"-\d{5}-of-\d{5}\.safetensors$", f.path)]
    if pattern is None and parts and len(parts) == len(checkpoints):
        index = [f for f in files if f.path.endswith(".safetensors.index.json")]
        return [*parts, *index, *_beside(files)]
    if len(checkpoints) > 1:
        raise CommandError(
            f"{repo} holds {len(checkpoints)} checkpoints, choose one with --file: "
            f"{_listing(checkpoints)}"
        )
    is_safetensors = checkpoints[0].path.endswith(".safetensors")
    return [*checkpoints, *(_beside(files) if is_safetensors else [])]


def _resolve(what: str, file: str | None) -> tuple[str, str | None]:
    if what.lower() in ALIASES:
        repo, pattern = ALIASES[what.lower()]
        return repo, file or pattern
    if re.fullmatch(r"[\w.-]+/[\w.-]+", what):
        return what, file
    raise CommandError(
        f"{what!r} is neither an alias (mrss pull --list) nor a repository such as {_G1}"
    )


def _latest(files: list[RemoteFile]) -> list[RemoteFile]:
    newest = max((f.date for f in files), default="")
    return [f for f in files if f.date == newest]


def _beside(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    return [f for f in files if any(fnmatchcase(f.path, name) for name in _TOKENIZER_FILES)]


def _listing(files: Sequence[RemoteFile], limit: int = 12) -> str:
    names = [f"{f.path} ({size(f.num_bytes)})" for f in files[:limit]]
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return (", ".join(names) or "nothing") + more


def _list_files(repo: str, revision: str) -> list[RemoteFile]:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    return [
        RemoteFile(f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else None)
        for f in info.siblings or []
    ]


def _write_card(folder: Path, origin: str) -> None:
    path = folder / "card.toml"
    if path.exists():
        return
    template = "g1" if re.search(r"[-_/]g\d", origin.lower()) else "world"
    context = re.search(r"-ctx(\d+)", origin)
    lines = [f'template = "{template}"', f'description = "{origin}"']
    lines += [f"context_length = {context[1]}"] if context else []
    # A part of one would be taken for the user's own, and kept.
    replace_file(path, ("\n".join(lines) + "\n").encode())


def _check_room(files: Sequence[RemoteFile], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    missing = [f for f in files if not (folder / f.path).is_file()]
    needed = sum(f.num_bytes for f in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CommandError(
            f"{size(needed)} are needed in {folder} and {size(free)} are free; "
            "choose another folder with --to"
        )


@contextmanager
def _translated(repo: str, revision: str) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into one sentence."""
    import httpx
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError as exc:
        raise CommandError(
            f"{repo} is gated: accept its terms on its page, then set HF_TOKEN to your token"
        ) from exc
    except hub.RepositoryNotFoundError as exc:
        raise CommandError(
            f"the hub has no model repository {repo}, or it is private (set HF_TOKEN for those)"
        ) from exc
    except hub.RevisionNotFoundError as exc:
        raise CommandError(f"{repo} has no revision {revision!r}") from exc
    except (hub.OfflineModeIsEnabled, hub.LocalEntryNotFoundError) as exc:
        raise CommandError(
            f"the hub cannot be reached for {repo}; check the network and HF_HUB_OFFLINE, what "
            "was downloaded so far is kept"
        ) from exc
    except hub.HfHubHTTPError as exc:
        raise CommandError(f"the hub refused {repo}: {str(exc).splitlines()[0]}") from exc
    except httpx.TransportError as exc:
        raise CommandError(
            f"the line to the hub broke ({str(exc) or type(exc).__name__}); run the command again "
            "to resume"
        ) from exc
    except httpx.HTTPStatusError as exc:
        raise CommandError(
            f"the hub answered with status {exc.response.status_code} for {repo}"
        ) from exc
