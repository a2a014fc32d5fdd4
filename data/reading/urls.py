"""Names of tars: files, folders, brace patterns and addresses behind fsspec, in order; never a command in a pipe."""

from __future__ import annotations

from pathlib import Path

import braceexpand
import fsspec

from data.schema import DataError


def is_remote(path: str) -> bool:
    """Whether `path` is a URL and not a local path."""
    return "://" in path


def refuse_pipe(path: str) -> None:
    """Raise DataError for `pipe:` addresses, which WebDataset would hand to a shell."""
    if path.strip().lower().startswith("pipe:"):
        raise DataError(
            f"{path[:80]!r} would run a command; give a path or a URL that fsspec opens, as s3:// or https://"
        )


def tar_urls(paths: tuple[str, ...]) -> list[str]:
    """Return the tars that paths name: files, folders (also below train/ and val/), URLs, brace ranges, and globs.

    Raises:
        DataError: a `pipe:` address.
    """
    urls: list[str] = []
    for given in paths:
        refuse_pipe(given)
        for path in braceexpand.braceexpand(given):
            if is_remote(path):
                urls += _remote(path)
            elif Path(path).is_dir():
                urls += [str(p) for p in sorted(Path(path).rglob("*.tar"))]
            elif any(c in path for c in "*?["):
                urls += [str(p) for p in sorted(Path(path).parent.glob(Path(path).name))]
            elif path.endswith((".tar", ".tar.gz", ".tgz")):
                urls.append(path)
    return urls


def _remote(url: str) -> list[str]:
    if url.endswith((".tar", ".tar.gz", ".tgz")) and not any(c in url for c in "*?["):
        return [url]
    files, _, _ = fsspec.get_fs_token_paths(url if "*" in url else url.rstrip("/") + "/**/*.tar")
    pattern = url.split("://", 1)[1] if "*" in url else url.split("://", 1)[1].rstrip("/") + "/**/*.tar"
    return sorted(str(files.unstrip_protocol(path)) for path in files.glob(pattern))
