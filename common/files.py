"""Files: written beside their place and renamed, JSON, logs, checksums, one owner for a folder.

Nothing here knows of networks. Nothing is ever unpickled.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parents[1]
TOKEN = secrets.token_hex(4)  # of this process: containers may have the same process ids


# ------------------------------------------------------------------------------------ writing

def replace_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file beside its place and rename it, so that its name never shows a part of it.

    Raises ValueError naming the path when the disk is full or the folder read-only.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{TOKEN}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path}: cannot be written ({e}): free some space, or choose another run "
                         "folder (`--run`); nothing under this name was changed") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def replace_folder(path: Path, aside: Path) -> None:
    """Give a folder that was filled aside its name; what had that name before goes.

    Raises ValueError naming the path if that cannot be done.
    """
    old = path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise ValueError(f"{path}: cannot be replaced by {aside} ({e}): choose another run folder "
                         "(`--run`)") from e


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file aside and rename it."""
    replace_file(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, aside and renamed."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ValueError naming it when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: is not valid JSON ({e}): restore or remove it") from e


def sync_to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk, not only in its cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_log(path: Path, line: dict) -> None:
    """Append one line of JSON; after a line that was cut off it begins a new one.

    Raises ValueError naming the file when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as log:
            if log.tell():
                log.seek(-1, os.SEEK_END)
            cut = log.read(1) not in (b"", b"\n")
            log.write(b"\n" * cut + json.dumps(line).encode() + b"\n")
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({e}): free some space; the same command then "
                         "goes on from what was last saved") from e


def read_log(path: Path, *keys: str) -> list[dict]:
    """A log's lines that are JSON objects with all of `keys`; what a crash cut off is dropped."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            lines += [line] if isinstance(line, dict) and line.keys() >= set(keys) else []
    return lines


# ---------------------------------------------------------------------------- checksums, errors

def crc32_of_json(value: Any) -> str:
    """Checksum of JSON values, whatever the order of their keys."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def crc32_of_file(path: Path) -> str:
    """Checksum of a file's bytes."""
    total = 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 24):
            total = zlib.crc32(chunk, total)
    return f"{total:08x}"


def short_reason(error: BaseException) -> str:
    """What happened, in one line, out of the pages that torch says."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return re.split(r"(?<=\w)\. |\n", text)[0] or type(error).__name__


# ------------------------------------------------------------------------- one owner for a folder

HEARTBEAT = 20.0  # seconds between two signs of life
SILENCE = 90.0    # seconds without one, after which an owner on another host counts as dead
GRACE = 5.0       # seconds that a process that was just killed may take to end


@contextlib.contextmanager
def own_folder(folder: Path, first: int = 0, stop: int = 1) -> Iterator[None]:
    """Hold a folder, or the items first … stop - 1 in it, so that no other process works there.

    The owner's file names host, process and start. A lock of the operating system holds it, which
    a killed process loses at once; and it is touched every HEARTBEAT seconds, which tells hosts
    whose shared disk does not share locks.
    Raises ValueError naming the owner if there is one.
    """
    path = folder / f".owner.{first:06d}-{stop:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".owners"):
            deadline = time.monotonic() + GRACE
            while owner := next(living_owners(folder, first, stop), None):
                if time.monotonic() > deadline:
                    raise ValueError(f"{folder}: {owner} works here: wait for it, stop it, or "
                                     "choose another --run")
                time.sleep(0.2)
            handle = path.open("w")
            lock(handle)
            handle.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(),
                                     "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
            handle.flush()
    except OSError as e:
        raise ValueError(f"{folder}: cannot be written ({e}): choose another run folder "
                         "(`--run`)") from e
    ended = threading.Event()
    threading.Thread(target=show_life, args=(path, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            path.unlink()
        handle.close()


def living_owners(folder: Path, first: int, stop: int) -> Iterator[str]:
    """Owners of any of the items first … stop - 1, as "process 7 on host x, since …"."""
    for path in folder.glob(".owner.*"):
        a, _, b = path.name[7:].partition("-")
        if not (a.isdecimal() and b.isdecimal() and int(a) < stop and first < int(b)):
            continue
        with contextlib.suppress(FileNotFoundError), path.open("r+") as handle:
            free, text = lock(handle), handle.read()
            try:
                owner = json.loads(text)
                host, known = owner["host"], f"process {owner['process']} on host {owner['host']}"
                known += f", since {owner['since']},"
            except (ValueError, LookupError, TypeError):
                host, known = None, "another process"
            silent = time.time() - path.stat().st_mtime
            lock_tells = free is not None and host in (None, socket.gethostname())
            if free is False or (not lock_tells and silent < SILENCE):
                yield known


def lock(handle: Any) -> bool | None:
    """Lock an open file if no other process has it locked; it is unlocked when it is closed.

    None on a disk that has no locks, where signs of life must do.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock for a moment; others wait for it."""
    with path.open("a") as handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def show_life(path: Path, ended: threading.Event) -> None:
    """Touch an owner's file from time to time until `ended`."""
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
