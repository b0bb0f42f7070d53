"""Run checkpoints: written in the background, complete or skipped, never executed; the export."""

import errno
import gc
import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import Evil
from processes import in_processes
from safetensors import safe_open
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from artifacts import student
from artifacts.student import CHECKSUM, check_data, stream_safetensors
from common.files import crc32_of_file, crc32_of_json, write_json
from common.ranks import AgreedError, Ranks, gather_values
from common.weights import LazyTensor, safetensors_metadata
from experts import shard_dit
from model import WanConfig, build_dit
from training import checkpoint
from training.checkpoint import Saver, check_disk, latest_checkpoint, load_checkpoint

SMALL = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def save_checkpoint(folder: Path, step: int, state: dict, meta: dict, ranks, keep: int) -> Path:
    saver = Saver(folder, ranks, keep)
    saver.save(step, state, meta)
    saver.wait()
    return saver.path


def save_steps(folder: Path, ranks, steps: list[int], keep: int = 3) -> None:
    for step in steps:
        state = {"w": torch.full((100,), float(step)), "part/count": torch.tensor(step)}
        save_checkpoint(folder, step, state, {"lr": 1e-5}, ranks, keep)


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    aside, done, replace = tmp_path / ".new.part", [], os.replace
    (aside / "sub").mkdir(parents=True)
    (aside / "sub/file").write_text("new")
    monkeypatch.setattr(checkpoint, "sync_to_disk", lambda path: done.append(path.name))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("renamed") or replace(a, b))
    checkpoint.replace_folder(tmp_path / "new", aside)
    assert done == ["sub", "file", ".new.part", "renamed", tmp_path.name]
    assert (tmp_path / "new/sub/file").read_text() == "new"


def test_the_last_checkpoints_are_kept_and_the_newest_is_resumed(ranks, tmp_path):
    assert latest_checkpoint(tmp_path, ranks) is None
    (tmp_path / ".step_000007.part").mkdir()  # left by a process that was killed
    save_steps(tmp_path, ranks, [100, 200, 300, 400], keep=2)
    assert names_in(tmp_path) == ["step_000300", "step_000400"]
    path, meta = latest_checkpoint(tmp_path, ranks)
    state = {"w": torch.zeros(100), "part/count": torch.tensor(0)}
    load_checkpoint(path, state)
    assert state["part/count"] == meta["step"] == 400 and meta["lr"] == 1e-5
    assert torch.equal(state["w"], torch.full((100,), 400.0))


def test_a_checkpoint_holds_the_state_at_save_though_training_continues(ranks, tmp_path):
    dit = build_dit(SMALL)
    shard_dit(dit, ranks)
    sharded, plain = {name: p.detach() for name, p in dit.named_parameters()}, torch.ones(1000)
    expected = {name: p.full_tensor().clone() for name, p in sharded.items()}
    saver = Saver(tmp_path / "run", ranks, 2)
    saver.save(1, {**sharded, "plain": plain}, {})
    with torch.no_grad():
        for p in (*dit.parameters(), plain):
            p.fill_(7.0)
    saver.wait()
    load_checkpoint(latest_checkpoint(tmp_path / "run", ranks)[0], {**sharded, "plain": plain})
    assert all(torch.equal(p.full_tensor(), expected[name]) for name, p in sharded.items())
    assert torch.equal(plain, torch.ones(1000))


def test_a_checkpoint_s_copy_in_host_memory_is_freed_when_it_is_written(ranks, tmp_path,
                                                                        monkeypatch):
    copies, copy_to_host = [], checkpoint.copy_to_host

    def watched(*args):
        tensors, rows = copy_to_host(*args)
        copies.append(StorageWeakRef(tensors["w"].untyped_storage()))
        return tensors, rows

    monkeypatch.setattr(checkpoint, "copy_to_host", watched)
    state = {"w": torch.ones(1000)}
    saver = Saver(tmp_path, ranks, 2)
    gc.collect()
    gc.disable()  # a late collection would keep the copy alive
    try:
        for step in (1, 2):
            saver.save(step, state, {})
            saver.wait()
        assert len(copies) == 2 and all(copy.expired() for copy in copies)
    finally:
        gc.enable()


def test_a_long_wait_for_a_checkpoint_is_printed(ranks, tmp_path, capsys):
    waits: list[float | None] = []
    saver = Saver(tmp_path, ranks, 2)
    saver.thread = SimpleNamespace(join=lambda seconds=None: waits.append(seconds),
                                   is_alive=lambda: len(waits) < 2)
    saver.wait()
    assert waits == [10, None] and f"waiting until {tmp_path} is on" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "gone", "unreadable", "flipped", "header flipped",
                                    "meta cut", "meta gone", "meta odd", "meta changed"])
def test_a_damaged_checkpoint_is_reported_and_skipped(damage, ranks, tmp_path, capsys):
    save_steps(tmp_path, ranks, [100, 200])
    assert '"step": 200' in (tmp_path / "step_000200/meta.json").read_text()
    newest = tmp_path / "step_000200"
    data = newest / "rank_00000.safetensors"
    if damage == "cut":
        os.truncate(data, data.stat().st_size // 2)
    elif damage == "gone":
        data.unlink()
    elif damage == "unreadable":
        data.unlink()
        data.mkdir()
    elif "flipped" in damage:
        raw = bytearray(data.read_bytes())
        raw[20 if "header" in damage else -20] ^= 1
        data.write_bytes(raw)
    elif damage == "meta changed":
        text = (newest / "meta.json").read_text()
        (newest / "meta.json").write_text(text.replace('"step": 200', '"step": 201'))
    elif damage == "meta gone":
        (newest / "meta.json").unlink()
    else:
        (newest / "meta.json").write_text("[1]" if damage == "meta odd" else '{"step": 2')
    path, meta = latest_checkpoint(tmp_path, ranks)
    assert path.name == "step_000100" and meta["step"] == 100
    said = capsys.readouterr().out
    assert "skipping" in said and "step_000200" in said
    assert ("meta.json" if "meta" in damage else data.name) in said


def test_a_new_checkpoint_is_never_pruned_for_a_damaged_later_one_nor_copies_of_the_user_s(
        ranks, tmp_path):
    save_steps(tmp_path, ranks, [100, 200])
    (tmp_path / "step_000200/rank_00000.safetensors").unlink()
    (tmp_path / "step_000100_best").mkdir()
    assert latest_checkpoint(tmp_path, ranks)[1]["step"] == 100
    save_steps(tmp_path, ranks, [150], keep=1)  # the next start may be able to read 200
    assert names_in(tmp_path) == ["step_000100_best", "step_000150", "step_000200"]
    assert latest_checkpoint(tmp_path, ranks)[1]["step"] == 150
    save_steps(tmp_path, ranks, [200, 250], keep=1)
    assert names_in(tmp_path) == ["step_000100_best", "step_000250"]


def test_a_failed_checkpoint_is_tried_once_more_and_then_ends_the_run(ranks, small_disk, capsys):
    small, large = {"w": torch.ones(100)}, {"w": torch.ones(100_000)}
    saver = Saver(small_disk, ranks, keep=2)
    for step, state in ((1, small), (2, large), (3, small), (4, large), (5, large)):
        saver.save(step, state, {})
    said = capsys.readouterr().out
    assert said.count("trying once more") == 2 and "step_000002: the checkpoint cannot be" in said
    with pytest.raises(ValueError, match="step_000005: the checkpoint cannot be written"):
        saver.save(6, small, {})
    assert names_in(small_disk) == ["step_000001", "step_000003"]


def test_a_disk_too_small_for_a_run_is_an_error_before_it_begins(small_disk):
    check_disk(small_disk / "run/distill", 3_000, 2, keep=2, export=12_000)  # 120 of 256 KiB
    with pytest.raises(ValueError, match="3 checkpoints of 0.00012 GB and 4e-05 GB of .*`keep`"):
        check_disk(small_disk / "run/distill", 10_000, 2, keep=2, export=40_000)


def listing_process(ranks: Ranks, folder: Path) -> None:
    """One of two processes; the second one's view of the folder is stale: it lists no checkpoint,
    and sees a file of the newest one only when it looks again."""
    save_steps(folder / "run", ranks, [1, 2])
    checkpoint.SIGHT, late, real = 0, [1], Path.stat

    def stat(path: Path, **kwargs):
        if path.suffix == ".safetensors" and late:
            raise FileNotFoundError(late.pop())
        return real(path, **kwargs)

    if ranks.rank == 1:
        checkpoint.checkpoints = lambda folder: {}
        Path.stat = stat
    path, meta = latest_checkpoint(folder / "run", ranks)
    found = {"path": path.name, "step": meta["step"]}
    write_json(folder / f"rank{ranks.rank}.json", found)
    assert ranks.rank == 0 or not late
    dist.barrier()


def test_a_rank_with_a_stale_view_of_the_folder_looks_twice_and_resumes_with_the_first(tmp_path):
    in_processes(2, listing_process, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found == {"path": "step_000002", "step": 2}


def test_a_streamed_file_is_the_one_that_safetensors_reads_and_its_checksum_the_file_s(tmp_path):
    value = torch.arange(6.0).view(2, 3)
    tensors = {"a": LazyTensor((2, 3), torch.float32, tmp_path, lambda rows=None: value),
               "b": LazyTensor((), torch.bfloat16, tmp_path,
                               lambda rows=None: torch.tensor(3.0).bfloat16())}
    path = tmp_path / "some.safetensors"
    sums = stream_safetensors(path, tensors, {"accvideo": "é"})
    assert sums == [path.stat().st_size, crc32_of_file(path)]
    with safe_open(path, "pt") as f:
        assert f.metadata() == {"accvideo": "é"} and set(f.keys()) == {"a", "b"}
        assert torch.equal(f.get_tensor("a"), value) and f.get_tensor("b") == 3
        assert f.get_tensor("b").dtype == torch.bfloat16


def test_a_long_file_is_synced_part_by_part_so_that_no_rank_waits_long_for_another(
        tmp_path, monkeypatch):
    path, ends, fsync = tmp_path / "f.safetensors", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: ends.append(path.stat().st_size) or fsync(file))
    monkeypatch.setattr(student, "SYNC_BYTES", 10_000)
    part = LazyTensor((1000,), torch.float32, path, lambda rows=None: torch.ones(1000))
    size, crc = stream_safetensors(path, {str(i): part for i in range(20)}, {})
    assert ends[-1] == size == path.stat().st_size and crc == crc32_of_file(path)
    assert all(b - a < 10_000 + 4_000 for a, b in itertools.pairwise([0, *ends])) and len(ends) < 20


def test_on_a_full_disk_every_tensor_is_still_gathered(small_disk):
    reads = []

    def part(i: int) -> LazyTensor:
        return LazyTensor((50_000,), torch.float32, small_disk,
                          lambda rows=None: reads.append(i) or torch.zeros(50_000))

    with pytest.raises(OSError):
        stream_safetensors(small_disk / "f.safetensors", {str(i): part(i) for i in range(4)}, {})
    assert reads == [0, 1, 2, 3]


def export_where_no_folder_can_be(ranks: Ranks, folder: Path) -> None:
    """One of two processes that gather the tensors of an export to a path below a file."""
    (folder / "file").touch()
    part = LazyTensor((2,), torch.float32, folder,
                      lambda rows=None: torch.ones(2) * len(gather_values(0)))
    with pytest.raises(AgreedError) as caught:
        student.write_together(folder / "file/student.safetensors", {"a": part}, {}, ranks)
    assert ("File exists" in str(caught.value)) == (ranks.rank == 0)


def test_ranks_do_not_wait_for_an_export_whose_folder_cannot_be_made(tmp_path):
    in_processes(2, export_where_no_folder_can_be, tmp_path)


def test_an_export_is_tried_once_more_though_the_disk_of_the_log_is_full_too(
        ranks, tmp_path, monkeypatch):
    class FullDisk(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    tries, real = [], student.replace_file

    def replace_file(*args) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise ValueError("cannot be written")
        real(*args)

    monkeypatch.setattr(student, "replace_file", replace_file)
    monkeypatch.setattr(sys, "stdout", FullDisk())
    student.write_together(tmp_path / "a.safetensors", {}, {}, ranks)
    assert len(tries) == 2 and (tmp_path / "a.safetensors").exists()


def test_when_no_checkpoint_is_intact_resuming_is_an_error_that_names_them(ranks, tmp_path):
    save_steps(tmp_path, ranks, [100, 200])
    for folder in tmp_path.iterdir():
        (folder / "rank_00000.safetensors").unlink()
    with pytest.raises(ValueError, match="no intact checkpoint.*step_000200.*step_000100"):
        latest_checkpoint(tmp_path, ranks)


def as_torch_saves(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize("attack", ["a table of contents that runs", "a rank's own table",
                                    "a complete old checkpoint", "a pickle for a rank's file",
                                    "a file of torch.save for a rank's file", "another path"])
def test_nothing_in_a_checkpoint_folder_from_somebody_else_is_run(attack, ranks, tmp_path):
    mark, run = tmp_path / "mark", tmp_path / "run"
    evil, state = Evil(str(mark)), {"w": torch.ones(3)}
    path = save_checkpoint(run, 1, state, {}, ranks, keep=1)
    data, meta = path / "rank_00000.safetensors", json.loads((path / "meta.json").read_text())
    if attack == "a table of contents that runs":
        (path / ".metadata").write_bytes(pickle.dumps(evil))
    elif attack == "a rank's own table":
        (path / ".metadata").write_bytes(pickle.dumps([]))
        (path / "__0.metadata").write_bytes(pickle.dumps(evil))
    elif attack == "a complete old checkpoint":
        dcp.save({**state, "count": evil}, checkpoint_id=str(path))
    elif attack == "a pickle for a rank's file":
        data.write_bytes(pickle.dumps(evil))
    elif attack == "a file of torch.save for a rank's file":
        data.write_bytes(as_torch_saves(evil))
    else:
        (tmp_path / "elsewhere.pt").write_bytes(as_torch_saves(evil))
        data = tmp_path / "elsewhere.pt"
        meta["files"] = {"../../elsewhere.pt": meta["files"].pop("rank_00000.safetensors")}
    sums = [data.stat().st_size, crc32_of_file(data)]  # the folder agrees with itself
    meta["files"] = dict.fromkeys(meta["files"], sums)
    del meta["crc32"]
    write_json(path / "meta.json", {**meta, "crc32": crc32_of_json(meta)})
    for read in (lambda: latest_checkpoint(run, ranks), lambda: load_checkpoint(path, state)):
        try:
            read()
        except ValueError as e:
            assert "step_000001" in str(e)
    if "rank's file" in attack or attack == "another path":  # of the others nothing is read
        with pytest.raises(ValueError, match="step_000001: the checkpoint cannot be read"):
            load_checkpoint(path, state)
    assert not mark.exists()


def test_a_file_swapped_between_check_and_load_is_not_run_either(ranks, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    path = save_checkpoint(tmp_path / "run", 1, {"w": torch.ones(3)}, {}, ranks, keep=1)
    read_meta = checkpoint.read_meta

    def swapped(folder: Path) -> dict | str:
        meta = read_meta(folder)
        (folder / "rank_00000.safetensors").write_bytes(pickle.dumps(Evil(str(mark))))
        (folder / ".metadata").write_bytes(pickle.dumps(Evil(str(mark))))
        return meta

    monkeypatch.setattr(checkpoint, "read_meta", swapped)
    with pytest.raises(ValueError, match="step_000001: the checkpoint cannot be read"):
        load_checkpoint(path, {"w": torch.ones(3)})
    assert not mark.exists()


def test_the_attacks_of_these_tests_do_run_where_a_pickle_is_read(tmp_path):
    evil = Evil(str(tmp_path / "0"))
    pickle.loads(pickle.dumps(evil)).close()
    assert (tmp_path / "0").exists()
    evil.target = str(tmp_path / "1")
    torch.load(io.BytesIO(as_torch_saves(evil)), weights_only=False).close()
    assert (tmp_path / "1").exists()


def test_no_product_file_unpickles():
    root = Path(checkpoint.__file__).parents[1]
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=root, capture_output=True, text=True)
    found = [p for p in map(Path, listed.stdout.split()) if p.parts[0] != "tests"]
    assert len(found) > 20 and Path("small_world/fit.py") in found
    for name in found:
        text = (root / name).read_text()
        for call in ("pickle.load", "Unpickler(", "weights_only=False", "checkpoint.load(",
                     "dcp.load", "np.load("):
            assert call not in text, (name, call)
        assert text.count("torch.load(") == text.count("weights_only=True"), name


@pytest.mark.parametrize("state", [{"w": torch.zeros(7)}, {"v": torch.zeros(100)}])
def test_a_checkpoint_of_another_network_is_an_error_that_names_it(state, ranks, tmp_path):
    save_steps(tmp_path, ranks, [1])
    with pytest.raises(ValueError, match="step_000001: the checkpoint cannot be read"):
        load_checkpoint(tmp_path / "step_000001", state)


def test_a_file_whose_data_do_not_match_their_checksum_is_damaged(tmp_path):
    path, value = tmp_path / "a.safetensors", torch.arange(6.0)
    tensors = {"a": LazyTensor((6,), torch.float32, tmp_path, lambda rows=None: value)}
    stream_safetensors(path, tensors, {"crc32": CHECKSUM})
    check_data(path)
    assert safetensors_metadata(path)["crc32"] == f"{zlib.crc32(value.numpy().tobytes()):08x}"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a.safetensors: is damaged: its data have CRC-32 .*again"):
        check_data(path)
    save_file({"a": value}, path)  # of a program that says nothing
    check_data(path)
