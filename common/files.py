"""Files: atomic writing, JSON and logs with checked shapes, checksums, one owner per folder.

Nothing here depends on networks, and nothing is ever unpickled.
"""

import contextlib
import json
import math
import os
import re
import reprlib
import secrets
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:
    raise SystemExit("error: this code runs on Linux and macOS (fcntl is missing)") from None

ROOT = Path(__file__).resolve().parents[1]
TOKEN = secrets.token_hex(4)  # of this process: containers may have the same process ids


# ------------------------------------------------------------------------------------ writing

WRITE_REMEDY = "check the space and the permissions there, or choose another folder"


def replace_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name next to it and rename it, so that it is never partial.

    Args: write, which writes the file at the path that it is given.
    Raises ValueError naming the path when the disk is full or the folder read-only.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{TOKEN}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        sync_to_disk(aside)
        os.replace(aside, path)
        sync_to_disk(path.parent)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path}: cannot be written ({error_summary(e)}): {WRITE_REMEDY}") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk and not only in its cache.
    Disks that cannot sync a folder are accepted."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: str | Path, values: Iterable[Any]) -> None:
    """Write each value as one line of JSON, atomically."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def open_own(path: Path, mode: str) -> IO:
    """Open a lock or log file of this project. Raises OSError ("too many levels of symbolic links")
    for a link in its place, which could lead to any other file."""
    return open(path, mode, opener=lambda name, how: os.open(name, how | os.O_NOFOLLOW, 0o666))


def append_log(path: Path, line: dict) -> None:
    """Append one line of JSON. If the log ends in an incomplete line, start a new one first.

    Raises ValueError naming the file when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_own(path, "ab+") as log:
            if log.tell():
                log.seek(-1, os.SEEK_END)
            incomplete = log.read(1) not in (b"", b"\n")
            log.write(b"\n" * incomplete + json.dumps(line).encode() + b"\n")
    except OSError as e:
        raise ValueError(f"{path}: cannot be written ({e}): {WRITE_REMEDY}") from e


# ------------------------------------------------------------------------------------ reading

def read_text(path: str | Path, largest: int = 1 << 26) -> str:
    """The text of a UTF-8 file. Raises ValueError for another file, or more bytes than `largest`:
    such a file is not what its name claims."""
    path = Path(path)
    if path.stat().st_size > largest or not path.is_file():
        raise ValueError(f"{path}: expected a regular file of at most {largest} bytes: replace it")
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}: line {line} is not UTF-8: save it as UTF-8") from e


def read_json(path: str | Path, shape: Any = dict, remedy: str = "restore or remove it") -> Any:
    """The value of a JSON file; see parse_json."""
    return parse_json(read_text(path), str(path), shape, remedy)


def parse_json(text: str, where: str, shape: Any = dict, remedy: str = "make it again") -> Any:
    """The value of JSON text. Raises ValueError that starts with `where` and ends with `remedy` if
    it is not valid JSON or not of the shape (see shape_error)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: is not valid JSON ({e}): {remedy}") from e
    if error := shape_error(value, shape):
        raise ValueError(f"{where}: {error}: {remedy}")
    return value


NUMBER = int | float
KIND_NAMES = {dict: "a JSON object", list: "a list", str: "text", int: "an integer",
              NUMBER: "a number", dict | str: "text or a JSON object"}


def shape_error(value: Any, shape: Any, name: str = "") -> str:
    """What in a JSON value differs from a shape, as "weight_map: expected …, got [1]"; or "".

    Args: shape, a type or union of types; [shape], a list of such values; {key: shape, …}, an
    object that has these keys and may have others; {str: shape}, an object of such values only.
    """
    kind = type(shape) if isinstance(shape, dict | list) else shape
    # JSON's true is not a number here, nor is a number that Python reads as infinite or NaN.
    infinite = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, kind) or isinstance(value, bool) or infinite:
        where = f"{name}: " if name else ""
        return f"{where}expected {KIND_NAMES.get(kind, kind)}, got {abbreviate(value)}"
    parts: Any = ()
    if isinstance(shape, list):
        parts = ((x, shape[0], f"{name}[{i}]") for i, x in enumerate(value))
    elif isinstance(shape, dict):
        missing = [key for key in shape if key is not str and key not in value]
        if missing:
            return f"{name or 'the object'} has no key {missing[0]}"
        keys = value if str in shape else shape
        parts = ((value[key], shape.get(str, shape.get(key)), f"{name}.{key:.60}".lstrip("."))
                 for key in keys)
    return next((error for part in parts if (error := shape_error(*part))), "")


def read_log(path: Path, *keys: str) -> list[dict]:
    """The lines of a log that are JSON objects with a number for each of `keys`. Other lines, such
    as one that a crash left incomplete, are dropped."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            lines += [line] if not shape_error(line, dict.fromkeys(keys, NUMBER)) else []
    return lines


def crc32_of_json(value: Any) -> str:
    """Checksum of a JSON value; the order of keys does not matter."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def crc32_of_file(path: Path, start: int = 0) -> str:
    """Checksum of a file's bytes from `start` on."""
    total = 0
    with path.open("rb") as f:
        f.seek(start)
        while chunk := f.read(1 << 24):
            total = zlib.crc32(chunk, total)
    return f"{total:08x}"


# ------------------------------------------------------------------------- words for messages

SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 2, 80, 80, 40


def abbreviate(value: Any) -> str:
    """A value in about 80 characters at most, however large or nested it is."""
    text = " ".join(SHORT.repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def error_summary(error: BaseException) -> str:
    """The first line of an error's text; torch adds pages of advice to it."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    text = re.split(r"(?<=\w)\. |\n", text)[0] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


# ------------------------------------------------------------------------- one owner per folder

GRACE = 5.0  # seconds that a process which was just killed may take to end


@contextlib.contextmanager
def lock_folder(folder: Path, first: int = 0, stop: int = 1) -> Iterator[None]:
    """Own a folder, or the items first … stop - 1 in it, so that no other process works there.

    The owner holds a lock (flock) on a file that contains its process and host. The system frees
    the lock when the process ends, however it ends. On a disk without locks a warning is printed.
    Raises ValueError naming the owner if there is one.
    """
    path, deadline = folder / f".owner.{first:06d}-{stop:06d}", time.monotonic() + GRACE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open_own(folder / ".owners", "a") as turn:  # one process at a time looks for owners
            lock_file(turn, wait=True)
            while owner := find_owner(folder, first, stop):
                if time.monotonic() > deadline:
                    raise ValueError(f"{folder}: {owner}: wait for it, stop it, choose another "
                                     "--run, or remove that file if its host has failed")
                time.sleep(0.2)
            if not find_owner(folder, 0, 1 << 62):
                remove_leftovers(folder)
            handle = open_own(path, "w")
            lock_file(handle)
            print(f"process {os.getpid()} on host {socket.gethostname()}, since {time.ctime()},",
                  end="", file=handle, flush=True)
    except OSError as e:
        raise ValueError(f"{folder}: cannot be written ({e}): {WRITE_REMEDY}") from e
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        handle.close()


def find_owner(folder: Path, first: int, stop: int) -> str:
    """A living owner of any of the items first … stop - 1, as "process 7 on host x, …, works
    here (.owner.000000-000001)"; or ""."""
    for path in folder.glob(".owner.*-*"):
        a, _, b = path.name[7:].partition("-")
        if a.isdecimal() and b.isdecimal() and int(a) < stop and first < int(b):
            with contextlib.suppress(FileNotFoundError), open_own(path, "r+") as handle:
                if not lock_file(handle):
                    return f"{handle.read(200) or 'another process'} works here ({path.name})"
    return ""


def lock_file(handle: IO, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False if another process holds the lock, for which
    `wait` waits. On a disk without locks every file counts as free; then `wait` prints a warning.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as e:
        if wait:
            print(f"warning: {handle.name}: this disk has no file locks ({e.strerror}): make sure "
                  "that no other process works here", flush=True)
    return True


def remove_leftovers(folder: Path, age: float = 0.0) -> None:
    """Remove incomplete files that killed processes left in a folder and one level below it.

    age: only those that were last written to at least so many seconds ago.
    """
    pattern = ".*.*-????????.part*"  # of replace_file
    for part in [*folder.glob(pattern), *folder.glob(f"*/{pattern}")]:
        with contextlib.suppress(OSError):
            if part.is_file() and (not age or time.time() - part.stat().st_mtime >= age):
                part.unlink()
