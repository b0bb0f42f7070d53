"""Files: written beside their place and renamed, JSON, logs, checksums, one owner for a folder.

Nothing here knows of networks. Nothing is ever unpickled.
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import reprlib
import secrets
import shutil
import socket
import subprocess
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

def replace_file(path: str | Path, write: Callable[[Path], None], wait: bool = True) -> None:
    """Write a file beside its place and rename it, so that its name never shows a part of it.

    wait: until its name, too, is on the disk; else a power cut may leave what was there before.
    Raises ValueError naming the path when the disk is full or the folder read-only.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{TOKEN}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        sync_to_disk(aside)
        os.replace(aside, path)
        if wait:
            sync_to_disk(path.parent)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path}: cannot be written ({error_summary(e)}): {write_remedy(e)}; "
                         "nothing under this name was changed") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def write_remedy(error: BaseException) -> str:
    """What helps against an error of writing."""
    number, elsewhere = getattr(error, "errno", None), "choose another run folder (`--run`)"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"get the right to write there, or {elsewhere}"
    if number == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return f"move what stands in its place, or {elsewhere}"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "space" in str(error):
        return f"free some space, or {elsewhere}"
    return f"see what it says of the disk or the settings, or {elsewhere}"


def replace_folder(path: Path, aside: Path) -> None:
    """Give a folder that was filled aside its name; what had that name before goes.

    Raises ValueError naming the path if that cannot be done.
    """
    old = path.with_name(f".{path.name}.old")
    try:
        shutil.rmtree(old, ignore_errors=True)
        for part in [*aside.rglob("*"), aside]:
            sync_to_disk(part)
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
        sync_to_disk(path.parent)
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
LARGEST = 1 << 26  # bytes of JSON, settings or facts: what is larger is another file


def read_text(path: str | Path, largest: int = LARGEST) -> str:
    """A UTF-8 text file. Raises ValueError naming it when it is none, or larger than `largest`."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no plain file; wanted a text file: name another one")
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path}: has {size} bytes; wanted {largest} at most: it is another file "
                         "than its name says, name or restore the right one")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: is not UTF-8 ({e.reason} at byte {e.start}): save it as UTF-8, "
                         "or restore it") from e


def read_json(path: str | Path, shape: Any = dict, remedy: str = "restore or remove it") -> Any:
    """A JSON file's value, of a shape as `shape_error` has it. Raises ValueError naming the file."""
    return parse_json(read_text(path), str(path), shape, remedy)


def parse_json(text: str, where: str, shape: Any = dict, remedy: str = "make it anew") -> Any:
    """The value of JSON text, of a shape as `shape_error` has it. Raises ValueError beginning `where`.

    The value is of the shape; what else an object holds is not looked at.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where}: is not valid JSON ({e}): {remedy}") from e
    if fault := shape_error(value, shape):
        raise ValueError(f"{where}: {fault}: {remedy}")
    return value
NUMBER = int | float
KINDS = {dict: "a JSON object", list: "a list", str: "text", int: "a whole number",
         NUMBER: "a number"}


def shape_error(value: Any, shape: Any, name: str = "") -> str:
    """What of a JSON value is of another shape, as "weight_map is [1]; wanted …"; "" if nothing.

    Args: shape, a type or union of types; [shape], a list of such; {key: shape, …}, an object that
    has these keys and may have others; {str: shape}, one whose values all are such.
    """
    kind = type(shape) if isinstance(shape, dict | list) else shape
    # JSON's true is no number, and neither is what it reads as infinite or NaN
    broken = isinstance(value, float) and not math.isfinite(value)
    if not isinstance(value, kind) or isinstance(value, bool) or (broken and kind == NUMBER):
        return f"{name or 'it'} is {abbreviate(value)}; wanted {KINDS.get(kind, kind)}"
    items: Any = ()
    if isinstance(shape, list):
        items = ((f"{name}[{i}]", x, shape[0]) for i, x in enumerate(value))
    elif isinstance(shape, dict) and str in shape:
        items = ((f"{name}.{key:.60}".lstrip("."), x, shape[str]) for key, x in value.items())
    elif isinstance(shape, dict):
        lacking = [key for key in shape if key not in value]
        if lacking:
            return f"{name or 'it'} lacks {lacking[0]}"
        items = ((f"{name}.{key}".lstrip("."), value[key], shape[key]) for key in shape)
    return next((fault for part in items if (fault := shape_error(part[1], part[2], part[0]))), "")


def path_hint(path: Path) -> str:
    """Words for an error: where a file that is not in this directory is in the project's; or ""."""
    home = ROOT / path
    if path.is_absolute() or path.exists() or not home.exists():
        return ""
    return f" (it is in {home}: give that path, or run the command in {ROOT})"
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 2, 80, 80, 40


def abbreviate(value: Any) -> str:
    """A value for an error: in at most about 80 characters, however large or nested it is."""
    text = " ".join(SHORT.repr(value).split())
    return text if len(text) <= 80 else f"{text[:79]}…"


def commit() -> str | None:
    """The commit of this code, with -dirty if files differ from it; None outside a repository."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, check=False,
                              capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def sync_to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk, not only in its cache; there
    are disks that cannot sync a folder."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
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
        raise ValueError(f"{path}: cannot be written ({e}): {write_remedy(e)}; the same command "
                         "then goes on from what was last saved") from e


def read_log(path: Path, *keys: str) -> list[dict]:
    """A log's lines that are JSON objects with a number for all of `keys`; others, as one that a
    crash cut off, are dropped."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            lines += [line] if not shape_error(line, dict.fromkeys(keys, NUMBER)) else []
    return lines


# ---------------------------------------------------------------------------- checksums, errors

def crc32_of_json(value: Any) -> str:
    """Checksum of JSON values, whatever the order of their keys."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def crc32_of_file(path: Path, start: int = 0) -> str:
    """Checksum of a file's bytes from `start` on."""
    total = 0
    with path.open("rb") as f:
        f.seek(start)
        while chunk := f.read(1 << 24):
            total = zlib.crc32(chunk, total)
    return f"{total:08x}"


def error_summary(error: BaseException) -> str:
    """What happened, in one line, out of the pages that torch says."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    text = re.split(r"(?<=\w)\. |\n", text)[0] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


# ------------------------------------------------------------------------- one owner for a folder

HEARTBEAT = 20.0  # seconds between two signs of life
SILENCE = 90.0    # seconds without one, after which an owner on another host counts as dead
GRACE = 5.0       # seconds that a process that was just killed may take to end


@contextlib.contextmanager
def lock_folder(folder: Path, first: int = 0, stop: int = 1) -> Iterator[None]:
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
            if next(living_owners(folder, 0, 1 << 62), None) is None:
                remove_leftovers(folder)
            handle = path.open("w")
            lock(handle)
            handle.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(),
                                     "since": time.strftime("%Y-%m-%d %H:%M:%S")}))
            handle.flush()
    except OSError as e:
        raise ValueError(f"{folder}: cannot be written ({e}): {write_remedy(e)}") from e
    ended = threading.Event()
    threading.Thread(target=show_life, args=(path, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            path.unlink()
        handle.close()
LEFTOVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.part(\.\w+)?", re.DOTALL)  # of replace_file


def remove_leftovers(folder: Path, age: float = 0.0) -> None:
    """Remove what killed processes left half-written in a folder, and one level below, if it was
    not written to for `age` seconds."""
    for part in [*folder.glob(".*.part*"), *folder.glob("*/.*.part*")]:
        with contextlib.suppress(OSError):
            if (LEFTOVER.fullmatch(part.name) and part.is_file()
                    and (not age or time.time() - part.stat().st_mtime >= age)):
                part.unlink()


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


def format_seconds(seconds: float) -> str:
    """Seconds as a short human duration: 45 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def format_bytes(count: float) -> str:
    """Bytes as a short human size."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 100 or unit == "TB" else f"{count:.0f} {unit}"
        count /= 1000
