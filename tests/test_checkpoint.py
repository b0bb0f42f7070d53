"""Run checkpoints: written in the background, whole or passed over, never executed; the export."""

import gc
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.multiprocessing.reductions import StorageWeakRef

from conftest import Evil, in_processes
import checkpoint
import model
from checkpoint import Saver, check_disk, latest_checkpoint, load_checkpoint, write_one_by_one

SMALL = model.WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=4)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def save_checkpoint(folder: Path, step: int, state: dict, meta: dict, ranks, keep: int) -> Path:
    saver = Saver(folder, ranks, keep)
    saver.save(step, state, meta)
    saver.wait()
    return saver.path


def save_steps(folder: Path, ranks, steps: list[int], keep: int = 3) -> None:
    for step in steps:
        state = {"w": torch.full((100,), float(step)), "count": step}
        save_checkpoint(folder, step, state, {"lr": 1e-5}, ranks, keep)


def test_the_last_checkpoints_are_kept_and_the_newest_is_resumed(ranks, tmp_path):
    assert latest_checkpoint(tmp_path, ranks) is None
    (tmp_path / ".step_000007.part").mkdir()  # left by a process that was killed
    save_steps(tmp_path, ranks, [100, 200, 300, 400], keep=2)
    assert names_in(tmp_path) == ["step_000300", "step_000400"]
    path, meta = latest_checkpoint(tmp_path, ranks)
    state = {"w": torch.zeros(100), "count": 0}
    load_checkpoint(path, state)
    assert state["count"] == meta["step"] == 400 and meta["lr"] == 1e-5
    assert torch.equal(state["w"], torch.full((100,), 400.0))


def test_a_checkpoint_is_of_the_moment_it_was_asked_for_though_training_goes_on(ranks, tmp_path):
    dit = model.build_dit(SMALL)
    model.shard(dit, ranks)
    weights = {"dit": {name: p.detach() for name, p in dit.named_parameters()},
               "plain": {"w": torch.ones(1000)}, "step": 1}
    want = {name: p.full_tensor().clone() for name, p in weights["dit"].items()}
    saver = Saver(tmp_path / "run", ranks, 2)
    saver.save(1, weights, {})
    with torch.no_grad():
        for p in (*dit.parameters(), weights["plain"]["w"]):
            p.fill_(7.0)
    saver.wait()
    load_checkpoint(latest_checkpoint(tmp_path / "run", ranks)[0], weights)
    assert all(torch.equal(p.full_tensor(), want[name]) for name, p in weights["dit"].items())
    assert torch.equal(weights["plain"]["w"], torch.ones(1000))


def test_a_checkpoint_s_copy_in_host_memory_is_let_go_when_it_is_written(ranks, tmp_path,
                                                                         monkeypatch):
    copies, stage = [], checkpoint.DefaultStager.stage

    def watched(self, state, **options):
        copy = stage(self, state, **options)
        copies.append(StorageWeakRef(copy["w"].untyped_storage()))
        return copy

    monkeypatch.setattr(checkpoint.DefaultStager, "stage", watched)
    state = {"w": torch.ones(1000)}
    saver = Saver(tmp_path, ranks, 2)
    gc.collect()
    gc.disable()  # a collector that comes late would keep a copy of a whole run
    try:
        for step in (1, 2):
            saver.save(step, state, {})
            saver.wait()
        assert len(copies) == 2 and all(copy.expired() for copy in copies)
    finally:
        gc.enable()


@pytest.mark.parametrize("damage", ["cut", "gone", "unreadable", "flipped", "contents flipped",
                                    "meta cut", "meta gone", "meta odd", "meta changed"])
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, ranks, tmp_path, capsys):
    save_steps(tmp_path, ranks, [100, 200])
    assert '"step": 200' in (tmp_path / "step_000200/meta.json").read_text()
    newest = tmp_path / "step_000200"
    data = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    if damage == "cut":
        os.truncate(data, data.stat().st_size // 2)
    elif damage == "gone":
        data.unlink()
    elif damage == "unreadable":
        data.unlink()
        data.mkdir()
    elif "flipped" in damage:
        data = newest / ".metadata" if "contents" in damage else data
        raw = bytearray(data.read_bytes())
        raw[len(raw) // 2] ^= 1
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
    assert "passing over" in said and "step_000200" in said
    assert ("meta.json" if "meta" in damage else data.name) in said


def test_a_new_checkpoint_is_never_pruned_for_a_damaged_later_one_nor_copies_of_the_user_s(
        ranks, tmp_path):
    save_steps(tmp_path, ranks, [100, 200])
    (tmp_path / "step_000200/.metadata").unlink()
    (tmp_path / "step_000100_best").mkdir()
    assert latest_checkpoint(tmp_path, ranks)[1]["step"] == 100
    save_steps(tmp_path, ranks, [150], keep=1)
    assert names_in(tmp_path) == ["step_000100_best", "step_000150"]
    assert latest_checkpoint(tmp_path, ranks)[1]["step"] == 150


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


def test_a_disk_too_small_for_a_run_is_told_before_it_begins(small_disk):
    check_disk(small_disk / "run/distill", 3_000, 2, keep=2)  # 120 of 256 KiB
    with pytest.raises(ValueError, match="3 checkpoints of 0.00012 GB and the student .*`keep`"):
        check_disk(small_disk / "run/distill", 10_000, 2, keep=2)


def listing_process(ranks: model.Ranks, folder: Path) -> None:
    """One of two processes; the second one's view of the folder is stale."""
    save_steps(folder / "run", ranks, [1, 2])
    if ranks.rank == 1:
        checkpoint.checkpoints = lambda folder: {}
    path, meta = latest_checkpoint(folder / "run", ranks)
    found = {"path": path.name, "step": meta["step"]}
    model.write_json(folder / f"rank{ranks.rank}.json", found)
    dist.barrier()


def test_a_rank_with_a_stale_view_of_the_folder_resumes_from_what_the_first_one_sees(tmp_path):
    in_processes(2, listing_process, tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found == {"path": "step_000002", "step": 2}


def test_an_export_takes_away_what_a_killed_one_left(ranks, tmp_path):
    (tmp_path / ".student.safetensors.77.part.safetensors").write_bytes(b"half")
    (tmp_path / "other.part").write_bytes(b"mine")
    value = torch.arange(6.0).view(2, 3)
    tensors = {"a": model.LazyTensor((2, 3), torch.float32, tmp_path, lambda rows=None: value),
               "b": model.LazyTensor((), torch.bfloat16, tmp_path,
                                     lambda rows=None: torch.tensor(3.0).bfloat16())}
    write_one_by_one(tmp_path / "student.safetensors", tensors, {"accvideo": "é"}, ranks)
    assert names_in(tmp_path) == ["other.part", "student.safetensors"]
    with safe_open(tmp_path / "student.safetensors", "pt") as f:
        assert f.metadata() == {"accvideo": "é"} and set(f.keys()) == {"a", "b"}
        assert torch.equal(f.get_tensor("a"), value) and f.get_tensor("b") == 3
        assert f.get_tensor("b").dtype == torch.bfloat16


def test_when_no_checkpoint_is_whole_resuming_is_an_error_that_names_them(ranks, tmp_path):
    save_steps(tmp_path, ranks, [100, 200])
    for folder in tmp_path.iterdir():
        (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match="no whole checkpoint.*step_000200.*step_000100"):
        latest_checkpoint(tmp_path, ranks)


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(ranks, small_disk):
    save_steps(small_disk, ranks, [100])
    with pytest.raises(ValueError, match="step_000200: the checkpoint cannot be written .*space"):
        save_checkpoint(small_disk, 200, {"w": torch.ones(100_000)}, {}, ranks, keep=2)
    assert names_in(small_disk) == ["step_000100"]
    assert latest_checkpoint(small_disk, ranks)[1]["step"] == 100


@pytest.mark.parametrize("where", [".metadata", "value"])
def test_code_in_a_checkpoint_is_never_run(where, ranks, tmp_path):
    evil, state = Evil(str(tmp_path / "run")), {"w": torch.ones(3), "count": 1}
    path = save_checkpoint(tmp_path, 1, state, {}, ranks, keep=1)
    if where == "value":
        dcp.save({**state, "count": evil}, checkpoint_id=str(path))
    if where == ".metadata":
        (path / ".metadata").write_bytes(pickle.dumps(evil))
    with pytest.raises(ValueError, match="step_000001: the checkpoint cannot be read .*open"):
        load_checkpoint(path, state)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("state", [{"w": torch.zeros(7)}, {"v": torch.zeros(100)}])
def test_a_checkpoint_of_another_network_is_an_error_that_names_it(state, ranks, tmp_path):
    save_steps(tmp_path, ranks, [1])
    with pytest.raises(ValueError, match="step_000001: the checkpoint cannot be read"):
        load_checkpoint(tmp_path / "step_000001", state)
