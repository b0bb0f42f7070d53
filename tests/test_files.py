"""Files: one owner per folder, atomic writing, logs with incomplete lines, JSON of a shape."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import files
from common.config import Shared, announce
from common.files import (
    NUMBER, ROOT, append_log, lock_folder, read_json, read_log, replace_file)
from tools import runs


@pytest.fixture(autouse=True)
def no_grace(monkeypatch):
    monkeypatch.setattr(files, "GRACE", 0.3)


HOLDER = """
import sys, time
from pathlib import Path
from common.files import lock_folder
with lock_folder(Path(sys.argv[1]), *map(int, sys.argv[2:])):
    print("held", flush=True)
    time.sleep(1800)
"""


def holder(folder: Path, *items: int) -> subprocess.Popen:
    """Another process that holds a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *map(str, items)],
                               cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_owner_and_the_error_of_a_second_names_it(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"process {process.pid} on host "
                                             f"{socket.gethostname()}, since .* works here "
                                             r"\(.owner.000000-000001\): .* remove that file"):
            with lock_folder(tmp_path):
                pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_owner_leaves_the_folder_free_at_once(tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob(".owner.*"))
    with lock_folder(tmp_path):
        pass
    assert not list(tmp_path.glob(".owner.*"))


def test_two_jobs_share_a_folder_if_their_items_do_not_overlap(tmp_path):
    process = holder(tmp_path, 0, 10)
    try:
        with lock_folder(tmp_path, 10, 20):
            pass
        with pytest.raises(ValueError, match="works here"), lock_folder(tmp_path, 9, 12):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_disk_without_locks_gives_one_warning_line(tmp_path, monkeypatch, capsys):
    def no_locks(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with lock_folder(tmp_path):
        assert capsys.readouterr().out == (
            f"warning: {tmp_path}/.owners: this disk has no file locks (No locks available): make "
            "sure that no other process works here\n")
        with lock_folder(tmp_path):
            pass
    assert not list(tmp_path.glob(".owner.*"))


def test_a_system_without_fcntl_gets_one_line():
    done = subprocess.run([sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; "
                           "import common.files"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: this code runs on Linux and macOS")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/run: cannot be written"), lock_folder(
            tmp_path / "file/run"):
        pass


def test_a_cut_line_of_a_log_is_dropped_and_the_next_one_is_not_lost_with_it(tmp_path):
    log = tmp_path / "sub/log.jsonl"
    append_log(log, {"step": 1})
    with log.open("a") as f:
        f.write('{"step": 2, "lo')
    append_log(log, {"step": 3})
    with log.open("ab") as f:
        f.write(b'[1]\n{"other": 4}\n\xff\n' + b"[" * 100_000 + b"\n")
    append_log(log, {"step": 5})
    assert read_log(log, "step") == [{"step": 1}, {"step": 3}, {"step": 5}]
    assert read_log(tmp_path / "none.jsonl") == []


def test_names_aside_differ_between_processes_of_the_same_id(tmp_path, monkeypatch):
    names = []
    for token in ("a", "b"):
        monkeypatch.setattr(files, "TOKEN", token)
        replace_file(tmp_path / "x.json", lambda aside: names.append(aside.name)
                     or aside.write_text("{}"))
    assert len(set(names)) == 2 and all(".part" in name for name in names)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


JSON = [  # text, shape, message
    ("[1]", dict, r"expected a JSON object, got \[1\]"), ("null", dict, "object, got None"),
    ("3", dict, "expected a JSON object, got 3"), ('"a"', list, "expected a list, got 'a'"),
    ("[" * 100_000, dict, "is not valid JSON .*recursion"),
    ("1" * 100_000, int, "is not valid JSON .*limit"), ("1e999999999", NUMBER, "a number, got inf"),
    ("NaN", NUMBER, "expected a number, got nan"), ("true", int, "expected an integer, got True"),
    ('{"a": 1}', {"b": int}, "the object has no key b"),
    ('{"a": {}}', {"a": {"b": int}}, "a has no key b"),
    ('{"a": null}', {"a": int}, "a: expected an integer, got None"),
    ('{"a": [1, "x"]}', {"a": [int]}, r"a\[1\]: expected an integer, got 'x'"),
    ('{"a": {"b": {}}}', {"a": {str: NUMBER}}, r"a\.b: expected a number, got {}"),
    (json.dumps([list(range(100))] * 100_000), dict, "expected a JSON object, got .*…"),
    ("\xff", dict, "line 1 is not UTF-8: save")]


@pytest.mark.parametrize("text, shape, message", JSON, ids=range(len(JSON)))
def test_json_of_another_shape_is_refused_in_a_short_line_that_names_the_file(text, shape, message,
                                                                              tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / "a.json", shape)
    line = str(error.value)
    assert str(tmp_path / "a.json") in line and "\n" not in line and len(line) < 400
    assert line.endswith(("restore or remove it", "save it as UTF-8"))


def test_json_of_the_shape_is_read_back(tmp_path):
    value = {"a": [1, 2.5], "b": {"c": "x"}, "more": None}
    files.write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json", {"a": [NUMBER], "b": {str: str}}) == value


@pytest.mark.parametrize("kind", ["pipe", "folder", "large"])
def test_reading_text_never_waits_for_a_pipe_and_reads_no_huge_file(kind, tmp_path):
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as f:
            f.truncate(10 ** 12)  # a sparse file
    with pytest.raises(ValueError, match="expected a regular file of at most .* bytes: replace"):
        read_json(path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG])
def test_an_error_of_writing_is_the_system_s_with_a_remedy(number, tmp_path):
    def write(aside):
        raise OSError(number, os.strerror(number))

    with pytest.raises(ValueError, match=f"a.json: cannot be written .*{os.strerror(number)}.*: "
                                         "check the space and the permissions"):
        replace_file(tmp_path / "a.json", write)


def test_a_symbolic_link_in_place_of_a_log_or_lock_file_is_refused(tmp_path):
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("weeks of work")
    folder.mkdir()
    for name in (".owners", ".owner.000000-000001", "log.jsonl", "log.txt"):
        (folder / name).symlink_to(precious)
        with pytest.raises((ValueError, OSError), match=f"levels of symbolic links: .*{name}"):
            if name == "log.jsonl":
                append_log(folder / name, {"step": 1})
            elif name == "log.txt":
                runs.start(("true",), folder / name, False)
            else:
                with lock_folder(folder):
                    pass
        (folder / name).unlink()
    assert precious.read_text() == "weeks of work"


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    done, replace = [], os.replace
    monkeypatch.setattr(files, "sync_to_disk", lambda path: done.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("renamed") or replace(a, b))
    files.write_text(tmp_path / "a.txt", "a")
    assert done[0].startswith(".a.txt.") and done[1:] == ["renamed", tmp_path.name]


def test_a_new_owner_removes_leftovers_of_killed_processes_and_a_second_job_does_not(tmp_path):
    (tmp_path / "sub").mkdir()
    left = [tmp_path / name for name in (".config.yaml.7-0a1b2c3d.part.yaml",
                                         ".log.jsonl.7-0a1b2c3d.part.jsonl",
                                         "sub/.x.mp4.7-0a1b2c3d.part.mp4")]
    others = [tmp_path / name for name in ("config.yaml", ".other.part", ".owners")]
    for path in [*left, *others]:
        path.touch()
    with lock_folder(tmp_path, 0, 5):
        assert not any(path.exists() for path in left) and all(p.exists() for p in others)
        left[0].touch()
        with lock_folder(tmp_path, 5, 9):
            assert left[0].exists()


def test_a_stage_without_an_owner_removes_only_old_leftovers(tmp_path):
    """sample.py and evaluate.py may run twice at once in a folder."""
    old, new = (tmp_path / f"samples/.{name}.mp4.7-0a1b2c3d.part.mp4" for name in "ab")
    old.parent.mkdir()
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    announce(Shared(run=str(tmp_path)), "samples")
    assert not old.exists() and new.exists()
