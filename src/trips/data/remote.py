"""Where shards come from: patterns of paths and URLs, and a bounded folder of local copies of remote tars.

Feeds pre-training (4.1). Samples are read at random places, which a network does not serve well; so a remote shard is
copied as a whole, once per machine, and stays until the room is needed. fsspec knows the protocols: http(s) comes with
the extra "train", others with their own package (s3fs, gcsfs, ...).

A copy is complete or absent: it is written under another name, its length compared with the server's, and then
renamed; a lock file keeps processes that want the same shard from fetching it twice. fsspec objects are made anew in
each process, which makes this safe in forked workers.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from trips.data.shards import INDEX_SUFFIX, ShardIndex, index_tar, load_index, write_index
from trips.errors import ConfigError, DataError, MissingDependencyError

logger = logging.getLogger("trips")

_HINT = 'pip install "trips-vlm[train]"'
_PERMANENT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_HELPERS = (".lock", ".partial", INDEX_SUFFIX)  # files beside the copies that do not count as room


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URL of another machine; ``file://`` is not."""
    return "://" in str(location) and not str(location).startswith("file://")


def expand_patterns(patterns: str | Path | Sequence[str | Path], item: str = "patterns") -> list[str]:
    """Locations of shards, in the order of the patterns, those of a wildcard sorted.

    Args:
        patterns: one or several of: a path, a URL, each with braces (``{000..127}``, ``{a,b}``) or wildcards (``*``,
            ``?``, ``[0-9]``, ``**``; in URLs ``*`` only, where the protocol can list: a web server's folder page, s3).
        item: how messages call them.
    Raises:
        DataError: a pattern that matches nothing, a file that is missing, a shard that is named twice.
        ConfigError: no pattern, unbalanced braces, an unknown protocol.
        MissingDependencyError: the package of a protocol is not installed.
    """
    single = isinstance(patterns, (str, Path))
    locations: list[str] = []
    for pattern in [patterns] if single else patterns:
        for expanded in _expand_braces(str(pattern), item):
            locations += _glob_remote(expanded, item) if is_remote(expanded) else _glob_local(expanded, item)
    if not locations:
        raise ConfigError("no shards named", item=item, expected="paths, URLs or patterns of WebDataset tars")
    place, times = Counter(locations).most_common(1)[0]
    if times > 1:
        raise DataError("shard is named twice", item=item, found=place)
    return locations


def _expand_braces(pattern: str, item: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from braceexpand import braceexpand
    except ImportError as error:
        raise MissingDependencyError("needed to expand braces", item="braceexpand", hint=_HINT) from error
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(f"braces cannot be expanded: {error}", item=item, found=pattern) from error


def _glob_local(pattern: str, item: str) -> list[str]:
    path = unquote(urlsplit(pattern).path) if pattern.startswith("file://") else pattern
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path] * Path(path).is_file()
    if not found:
        raise DataError("no file matches", item=item, found=pattern, hint="paths start at the working directory")
    return found


def _glob_remote(pattern: str, item: str) -> list[str]:
    if "*" not in pattern:
        return [pattern]
    system, path = _file_system(pattern)
    try:
        found = sorted(system.unstrip_protocol(name) for name in system.glob(path))
    except Exception as error:  # each protocol raises types of its own
        raise DataError(f"cannot be listed: {_reason(error)}", item=item, found=pattern) from error
    if not found:
        raise DataError("no file matches", item=item, found=pattern)
    return found


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's object for the protocol of a URL, and the path inside it."""
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise MissingDependencyError("needed for URLs", item="fsspec", hint=_HINT) from error
    try:
        return url_to_fs(url)
    except ImportError as error:
        raise MissingDependencyError(f"protocol needs a package: {error}", item=url, hint=_HINT) from error
    except ValueError as error:
        raise ConfigError(f"protocol is not known: {error}", item=url) from error


class ShardCache:
    """Local copies of remote files.

    Args:
        folder: where; None takes ``trips/shards`` in the user's cache folder. Processes share it.
        max_bytes: room for copies; the least recently used are removed for a new one. A single larger file is kept.
        max_tries: attempts at one file before it counts as unreachable.
        backoff: seconds before the second attempt; doubled before each further one, up to a minute.
        sleep: how to wait.
    Attributes:
        retries: attempts of this process that failed and were repeated.
    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        max_bytes: int = 64 * 2**30,
        max_tries: int = 6,
        backoff: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        for name, value, least in (("max_bytes", max_bytes, 1), ("max_tries", max_tries, 1), ("backoff", backoff, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
                raise ConfigError("out of range", item=name, found=value, expected=f"{least} or more")
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = home / "trips" / "shards" if folder is None else Path(folder)
        self.max_bytes, self.max_tries, self.backoff, self.sleep = max_bytes, max_tries, backoff, sleep
        self.retries = 0

    def path(self, url: str) -> Path:
        """Where the copy of a file lies or would lie; the name ends as the URL's does."""
        name = re.sub(r"[^\w.-]", "_", urlsplit(url).path.rsplit("/", 1)[-1])[-100:]
        return self.folder / f"{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}-{name}"

    def open(self, location: str, size: int | None = None) -> BinaryIO:
        """Open a local file, or the copy of a remote one, for reading.

        Args:
            location: path or URL.
            size: bytes that a remote file has to have, where known.
        Raises:
            DataError: as `fetch`; a local file that is missing or cannot be read.
        """
        try:
            if not is_remote(location):
                return open(location, "rb")
            while True:
                path = self.fetch(location, size)
                try:
                    return path.open("rb")
                except FileNotFoundError:  # another process needed the room in this moment
                    continue
        except OSError as error:
            raise DataError(f"file cannot be read: {error}", item=location) from error

    def fetch(self, url: str, size: int | None = None) -> Path:
        """Copy of a remote file, fetched if there is none.

        Args:
            url: of the file.
            size: bytes that it has to have, where known; a copy of another size is fetched anew.
        Raises:
            DataError: the file does not exist or may not be read, is of another size than asked, or could not be
                fetched in `max_tries` attempts.
            MissingDependencyError, ConfigError: see `expand_patterns`.
        """
        path = self.path(url)
        if self._has(path, size):
            return path
        try:
            from filelock import FileLock
        except ImportError as error:
            raise MissingDependencyError("needed for remote shards", item="filelock", hint=_HINT) from error
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not self._has(path, size):  # else another process fetched it while this one waited
                    self._download(url, path, size)
            with FileLock(self.folder / "room.lock"):
                self._make_room(keep=path)
        except OSError as error:
            raise DataError(f"cannot keep a copy: {error}", item=str(self.folder), found=url) from error
        return path

    def _has(self, path: Path, size: int | None) -> bool:
        try:
            os.utime(path)  # the time of last use
            return size is None or path.stat().st_size == size
        except OSError:  # none, or a folder that cannot be used, which making it will tell
            return False

    def _download(self, url: str, path: Path, size: int | None) -> None:
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        for attempt in range(1, self.max_tries + 1):
            try:
                self._transfer(url, partial, size)
                os.replace(partial, path)
                return
            except (DataError, ConfigError, MissingDependencyError):
                raise
            except Exception as error:  # each protocol raises types of its own
                reason = _reason(error)
                if _is_permanent(error) or attempt == self.max_tries:
                    tried = f" in {attempt} attempts" if attempt > 1 else ""
                    raise DataError(f"cannot be fetched{tried}: {reason}", item=url) from error
                pause = min(60.0, self.backoff * 2 ** (attempt - 1))
                self.retries += 1
                logger.warning(
                    "%s: attempt %d of %d failed, next in %.3g s: %s", url, attempt, self.max_tries, pause, reason
                )
                self.sleep(pause)
            finally:
                partial.unlink(missing_ok=True)

    def _transfer(self, url: str, partial: Path, size: int | None) -> None:
        from fsspec.callbacks import Callback

        system, remote = _file_system(url)
        announced = Callback()  # told by the answer that carries the bytes, so the length is theirs
        # A compressed answer would tell the length of something else.
        plain = {"headers": {"Accept-Encoding": "identity"}} if url.startswith(("http://", "https://")) else {}
        system.get_file(remote, str(partial), callback=announced, **plain)
        received = partial.stat().st_size
        if announced.size is not None and received != announced.size:
            raise OSError(f"{received} of {announced.size} bytes arrived")
        if size is not None and received != size:
            raise DataError(
                "has another size than its index says",
                item=url,
                found=received,
                expected=f"{size} bytes",
                hint="renew the index beside it, and remove the local copies",
            )

    def _make_room(self, keep: Path) -> None:
        files = []
        for path in self.folder.iterdir():
            if not path.name.endswith(_HELPERS):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                files.append((status.st_mtime, path, status.st_size))
        used = sum(size for _, _, size in files)
        for _, path, size in sorted(files):
            if used <= self.max_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)  # whoever reads it goes on reading
                used -= size


def locate_samples(location: str, cache: ShardCache, write: bool = False) -> ShardIndex:
    """Index of a shard; that of a remote one stays beside the place of its copy, and outlives the copy.

    Args:
        location: path or URL.
        cache: for remote tars: the sidecar beside the tar is fetched, or for want of it the tar.
        write: as in `load_index`.
    Raises:
        DataError: see `index_tar` and `ShardCache.fetch`.
    """
    if not is_remote(location):
        return load_index(location, write)
    kept = Path(f"{cache.path(location)}{INDEX_SUFFIX}")
    if not kept.exists():
        path, _, query = location.partition("?")
        sidecar = f"{path}{INDEX_SUFFIX}?{query}".removesuffix("?")
        try:
            index = ShardIndex.from_json(cache.fetch(sidecar).read_text(encoding="utf-8", errors="replace"), sidecar)
        except DataError as error:  # none beside it, or one of no use
            logger.info("%s is fetched to index it: %s", location, error)
            index = index_tar(cache.fetch(location))
        write_index(cache.path(location), index)
    return ShardIndex.from_json(kept.read_text(encoding="utf-8", errors="replace"), str(kept))


def _is_permanent(error: Exception) -> bool:
    status = getattr(error, "status", None)  # of an HTTP answer
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    missing = isinstance(error, (FileNotFoundError, PermissionError))
    return refused or missing or (isinstance(error, OSError) and error.errno in _PERMANENT)


def _reason(error: Exception) -> str:
    """With the name of its type, because some texts are empty or a bare number."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
