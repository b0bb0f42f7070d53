"""Checkpoints of a training run: written in the background, checked on loading, resumed bit by bit.

<folder>/step_NNNNNN/ is a checkpoint. Each rank writes its rows of the sharded tensors to
rank_NNNNN.safetensors, from a copy in host memory, while training continues; the file's metadata
contains, for each tensor, which rows they are. meta.json holds the step, the settings, and the size
and CRC-32 of each file. A checkpoint gets its name when all ranks have written it. Damaged ones are
reported and skipped. A checkpoint loads on any number of ranks, and contains no pickle.
"""

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from artifacts.student import stream_safetensors
from common.config import load_yaml
from common.files import (
    WRITE_REMEDY, crc32_of_file, crc32_of_json, error_summary, parse_json, read_json, read_log,
    sync_to_disk, write_json)
from common.ranks import (
    SIGHT, AgreedError, Ranks, errors_on_all_ranks, gather_values, local_rows, on_first_rank,
    print_line)
from common.weights import LazyTensor, lazy_tensor, open_safetensors, safetensors_metadata

# ------------------------------------------------------------------------------------ saving

FORMAT = 2  # of a checkpoint on disk


class Saver:
    """Writes a run's checkpoints in the background, one at a time.

    Args: folder that holds them; keep, how many of the last ones to keep; step, the iteration of
    the newest one on disk. All ranks must call save() and wait() at the same points.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, step: int = 0):
        self.folder, self.ranks, self.keep = folder, ranks, keep
        # A separate group, since training uses the others meanwhile. Its timeout is long because a
        # disk may be slow; if the disk of one node no longer answers, it ends the run.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=3))
        self.thread: Thread | None = None
        self.error: BaseException | None = None
        self.failures = 0  # consecutive ones
        self.path, self.step = folder, step

    def save(self, step: int, state: dict[str, Tensor], meta: dict) -> None:
        """Copy `state` to host memory and start writing it, once the previous save has ended.

        Args: state, tensors by name: each rank writes its own rows of a sharded tensor; any other
        tensor is written by the first rank that has it; meta, JSON values to store with it.
        If the previous save failed, this one is the second try; after two failures in a row it
        raises as wait().
        """
        self.wait(retries=1)
        if self.failures and self.ranks.rank == 0:
            print_line(f"{self.failure()}; trying once more")
        self.path, self.step, self.error = self.folder / f"step_{step:06d}", step, None
        aside = self.folder / f".step_{step:06d}.part"
        if self.ranks.rank == 0:
            for stale in self.folder.glob(".step_*"):  # left by killed runs
                shutil.rmtree(stale, ignore_errors=True)
        tensors, rows = copy_to_host(state, self.ranks, self.group)
        meta = {**meta, "format": FORMAT, "step": step}
        self.thread = Thread(target=self.write, args=(aside, tensors, rows, meta))
        self.thread.start()

    def write(self, aside: Path, tensors: dict[str, Tensor], rows: dict, meta: dict) -> None:
        """In the background: write this rank's file; then the first rank publishes them all.

        An error on any rank is kept on all of them, for wait() in the main thread.
        """
        path = aside / f"rank_{self.ranks.rank:05d}.safetensors"
        try:
            aside.mkdir(parents=True, exist_ok=True)
            lazy = {name: lazy_tensor(t, aside) for name, t in tensors.items()}
            result: Any = stream_safetensors(path, lazy, {"rows": json.dumps(rows)})
        except Exception as e:  # others may not survive being pickled for the other ranks
            result = e if isinstance(e, (OSError, ValueError)) else RuntimeError(repr(e))
        lazy = tensors.clear()  # free the copy
        try:
            results = gather_values(result, self.group)
            error = next((r for r in results if isinstance(r, Exception)), None)
            if self.ranks.rank == 0 and error is None:
                files = {f"rank_{r:05d}.safetensors": sums for r, sums in enumerate(results)}
                error = self.publish(aside, {**meta, "files": files})
            if self.ranks.rank == 0 and error is not None:
                shutil.rmtree(aside, ignore_errors=True)
            # No rank continues before the checkpoint has its final name.
            self.error = gather_values(error, self.group)[0]
        except Exception as e:
            self.error = e

    def publish(self, aside: Path, meta: dict) -> Exception | None:
        """On the first rank: write meta.json, rename the folder, remove old checkpoints."""
        try:
            write_json(aside / "meta.json", {**meta, "crc32": crc32_of_json(meta)})
            replace_folder(self.path, aside)
        except (OSError, ValueError) as e:
            return e
        # Later checkpoints, which resuming skipped as damaged, are kept until the run has passed
        # their step: another start may be able to read them.
        steps = checkpoints(self.folder)
        for old in [s for s in steps if s <= meta["step"]][:-self.keep]:
            shutil.rmtree(steps[old], ignore_errors=True)
        return None

    def wait(self, retries: int = 0) -> None:
        """Wait for the save in progress; ValueError if more than `retries` in a row failed."""
        if self.thread is not None:
            self.thread.join(10)
            if self.thread.is_alive() and self.ranks.rank == 0:
                print_line(f"waiting until {self.path} is on the disk")
            self.thread.join()
            self.thread, self.failures = None, 0 if self.error is None else self.failures + 1
        if self.failures > retries:
            raise self.failure() from self.error

    def failure(self) -> BaseException:
        """The last save's error, to raise or to print."""
        if not isinstance(self.error, (OSError, ValueError)):
            return self.error
        return ValueError(f"{self.path}: the checkpoint cannot be written "
                          f"({error_summary(self.error)}): {WRITE_REMEDY}; older ones "
                          "are untouched")


def copy_to_host(state: dict[str, Tensor], ranks: Ranks,
                 group: dist.ProcessGroup) -> tuple[dict[str, Tensor], dict]:
    """Copies of the tensors or rows that this rank writes, and by name [first row, rows of the full
    tensor]."""
    plain = gather_values([n for n, t in state.items() if not isinstance(t, DTensor)], group)
    of_lower_ranks = {name for names in plain[:ranks.rank] for name in names}
    tensors, rows = {}, {}
    for name, t in state.items():
        local, held = local_rows(t.detach())
        if local.numel() and name not in of_lower_ranks:
            tensors[name] = torch.empty(local.shape, dtype=local.dtype).copy_(local)
            rows[name] = [held.start if held else 0, t.shape[0] if t.ndim else 0]
    return tensors, rows


def replace_folder(path: Path, aside: Path) -> None:
    """Rename the finished folder `aside` to `path`, in place of an earlier folder of that name."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    for part in [*aside.rglob("*"), aside]:
        sync_to_disk(part)
    if path.exists():
        os.replace(path, old)
    os.replace(aside, path)
    sync_to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> dict[int, Path]:
    """The folders of checkpoints by step, in rising order."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdecimal()]
    return dict(sorted((int(path.name[5:]), path) for path in found))


def check_disk(folder: Path, parameters: int, moments: int, keep: int, export: int) -> None:
    """Raise ValueError if a run's checkpoints and its student will not fit on the disk.

    Args: parameters, trainable ones, in fp32; moments, AdamW's per parameter; keep, as in Saver;
    export, bytes of the students' files that will be written.
    """
    size = 4 * parameters * (1 + moments)
    used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
    while not folder.exists():
        folder = folder.parent
    need, free = size * (keep + 1) + export - used, shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{folder}: {keep + 1} checkpoints of {size / 1e9:.3g} GB and "
                         f"{export / 1e9:.3g} GB of students need {need / 1e9:.3g} GB more, got "
                         f"{free / 1e9:.3g} GB: lower `keep`, raise `export_every`, free space, or "
                         "choose another --run")


# ----------------------------------------------------------------------------------- loading

def latest_checkpoint(folder: Path, ranks: Ranks) -> tuple[Path, dict] | None:
    """The newest intact checkpoint and its meta; damaged ones are reported and skipped.

    The first rank lists them; all ranks share the computation of checksums. Raises ValueError if
    there are checkpoints and none is intact.
    """
    listed = on_first_rank(lambda: [(path, read_meta(path)) for path in
                                    reversed(checkpoints(folder).values())])
    faults = []
    for path, meta in listed:
        fault = meta if isinstance(meta, str) else check_files(path, meta["files"], ranks)
        if fault is None:
            for skipped in faults if ranks.rank == 0 else ():
                print(f"skipping {skipped}; resuming from {path.name}")
            return path, meta
        faults.append(f"{path}: {fault}")
    if faults:
        raise ValueError(f"no intact checkpoint: {'; '.join(faults)}: remove the folder to start "
                         "from step 0, or choose another --run")
    return None


def read_meta(path: Path) -> dict | str:
    """A checkpoint's meta.json, or what is wrong with it."""
    try:
        meta = read_json(path / "meta.json", {"crc32": str, "format": int, "step": int,
                                              "files": {str: list}})
        if meta.pop("crc32") != crc32_of_json(meta) or meta["format"] != FORMAT:
            return f"meta.json does not match its own checksum, or is not of format {FORMAT}"
    except (OSError, ValueError) as e:
        return f"meta.json ({e})"
    if not all(re.fullmatch(r"rank_\d+\.safetensors", name) for name in meta["files"]):
        return "meta.json names files that are not a checkpoint's"
    return meta


def check_files(path: Path, files: dict[str, list], ranks: Ranks) -> str | None:
    """Which of a checkpoint's files do not match; None if all do. Every rank compares the sizes of
    all files, and one rank each file's CRC-32. With several ranks, one may see a file late on a
    shared disk, so files that do not match are compared once more."""
    own = list(files)[ranks.rank::ranks.world]

    def matches(name: str) -> bool:
        try:
            size = (path / name).stat().st_size
            crc = [crc32_of_file(path / name)] if name in own else files[name][1:]
            return [size, *crc] == files[name]
        except OSError:
            return False

    names = list(files)
    for wait in (SIGHT, 0) if ranks.world > 1 else (0,):
        names = [name for name in names if not matches(name)]
        parts = gather_values(names)
        if not any(parts):
            return None
        time.sleep(wait)
    damaged = sorted({name for part in parts for name in part})
    return f"missing, truncated or changed: {', '.join(damaged)}"


def load_checkpoint(path: Path, state: dict[str, Tensor]) -> None:
    """Read a checkpoint into the tensors of `state`, on any number of ranks.

    Raises ValueError on all ranks if it is damaged or of another model.
    """
    with errors_on_all_ranks():
        try:
            shards: dict[str, list[tuple[int, int, LazyTensor]]] = {}
            meta = read_meta(path)
            if isinstance(meta, str):
                raise ValueError(meta)
            for file in meta["files"]:
                rows = parse_json(safetensors_metadata(path / file)["rows"], file, {str: [int]})
                for name, lazy in open_safetensors(path / file).items():
                    start, size = rows[name]
                    shards.setdefault(name, []).append((start, size, lazy))
            for name, t in state.items():
                if name not in shards:
                    raise ValueError(f"it does not contain {name}")
                read_rows(name, t.detach(), shards[name])
        except (OSError, ValueError, LookupError, RuntimeError) as e:
            raise ValueError(f"{path}: the checkpoint cannot be read ({error_summary(e)}): it is "
                             "damaged or of another config; remove it to resume from the one "
                             "before") from e


def read_rows(name: str, target: Tensor, shards: list[tuple[int, int, LazyTensor]]) -> None:
    """Fill this rank's rows of a tensor from its shards, each (first row, number of rows of the
    full tensor, the rows)."""
    local, rows = local_rows(target)
    _, size, first = shards[0]
    shape = (size, *first.shape[1:]) if target.ndim else ()
    if shape != tuple(target.shape) or first.dtype != target.dtype:
        raise ValueError(f"{name}: expected {target.dtype} {list(target.shape)}, got "
                         f"{first.dtype} {list(shape)}")
    if not target.ndim:
        local.copy_(first.read())
        return
    begin, filled = rows.start if rows else 0, 0
    for start, _, lazy in shards:
        a, b = max(begin, start), min(begin + len(local), start + lazy.shape[0])
        if a < b:
            local[a - begin:b - begin] = lazy.read(slice(a - start, b - start))
            filled += b - a
    if filled != len(local):
        raise ValueError(f"{name}: expected {len(local)} rows, got {filled}")


# ------------------------------------------------------------- saving and resuming a run's state

def tensors_of(state: Any, slots: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a run that change, by names such as "opt_traj/head.weight/exp_avg"; a
    checkpoint is read into them, in place. slots: the generated latents that wait in a queue."""
    student, heads = ({name: p for name, p in net.named_parameters() if p.requires_grad}
                      for net in (state.student, state.heads))
    tensors = {f"student/{name}": p.detach() for name, p in student.items()}
    tensors |= {f"heads/{name}": p.detach() for name, p in heads.items()}
    tensors |= {f"queue/{slot}": x for slot, x in slots.items()}
    for kind, opt in state.opts.items():
        for name, p in (heads if kind == "heads" else student).items():
            tensors |= {f"opt_{kind}/{name}/{key}": x for key, x in opt.state[p].items()}
    return tensors


def save_state(saver: Saver, state: Any, loader: Any, meta: dict) -> None:
    """Save networks, optimizers and the one queue that is not empty between iterations."""
    entries = [entry for queue in state.queues for entry in queue]
    slots = {str(slot): x for (x_gen, _, _), numbers in zip(entries, loader.slots, strict=False)
             for slot, x in zip(numbers, x_gen, strict=True)}
    saver.save(state.step, tensors_of(state, slots), meta)


@contextlib.contextmanager
def saving(saver: Saver, state: Any, loader: Any, meta: dict) -> Iterator[None]:
    """Leave the training loop only when its last checkpoint is on the disk.

    A last save that failed is tried once more. After an error that all ranks raise together the
    finished iterations are saved first; after any other, the save in progress gets time to end.
    """
    agreed = None
    try:
        yield
    except AgreedError as e:
        agreed = e
        if state.step > saver.step:
            save_state(saver, state, loader, meta)
    except BaseException:
        if saver.thread is not None:
            saver.thread.join(600)
        raise
    saver.wait(retries=1)
    if saver.failures:
        save_state(saver, state, loader, meta)
        saver.wait()
    if agreed is not None:
        raise agreed


CHANGEABLE_ON_RESUME = {
    "run", "device", "iterations", "micro_batch", "eval_every", "save_every", "keep", "synvid",
    "export_every", "checkpointing", "compile", "export", "export_dtype", "peak_tflops", "weights",
    "fps", "sp", "offload", "attention", "force_plan", "high_student",
    "experts"}  # each value has a folder of its own


def run_folder(cfg: Any) -> Path:
    """The folder of a run's log and checkpoints; a run that trains one expert has its own."""
    return Path(cfg.run) / ("distill" if cfg.experts == "both" else f"distill_{cfg.experts}")


def check_same_run(path: Path, saved: dict, meta: dict) -> None:
    """Raise ValueError if the run saved at `path` had other settings, teacher or data.

    Where the learning rate falls to lr_final at the last iteration, `iterations` cannot change
    either.
    """
    fixed = {"iterations"} if meta["config"].get("lr_final", 1) != 1 else set()
    changeable = CHANGEABLE_ON_RESUME - fixed
    for key in ["teacher", "synvid", "high", *(k for k in meta["config"] if k not in changeable)]:
        old, new = (facts.get(key, facts["config"].get(key)) for facts in (saved, meta))
        if old != new:
            why = ", which its learning rate depends on (lr_final)" if key in fixed else ""
            raise ValueError(f"{path}: that run began with {key}={old}{why}, the config has {new}: "
                             f"set {key} back, or choose another --run")


def check_begun(folder: Path, meta: dict) -> None:
    """check_same_run for a run that has logged iterations and has no checkpoint yet."""
    path = folder / "config.yaml"
    if path.exists() and read_log(folder / "log.jsonl", "step"):
        begun = dict(meta["config"])
        with contextlib.suppress(OSError, ValueError, TypeError):  # a copy, which may be damaged
            begun.update(load_yaml(path))
        check_same_run(folder, {**meta, "config": begun}, meta)


def resume(cfg: Any, state: Any, loader: Any, ranks: Ranks, meta: dict) -> None:
    """Continue from the newest intact checkpoint, if there is one.

    Raises ValueError if the folder belongs to a run with other settings.
    """
    folder = run_folder(cfg)
    found = latest_checkpoint(folder, ranks)
    if found is None:
        return on_first_rank(lambda: check_begun(folder, meta))
    path, saved = found
    on_first_rank(lambda: check_same_run(path, saved, meta))
    if saved["count"] > loader.count:
        raise ValueError(f"{path}: expected the {saved['count']} trajectories that the run trained "
                         f"on, got {loader.count}: make the missing ones again by synvid.py")
    loader.count = meta["count"] = saved["count"]  # later ones do not change the order
    state.step = saved["step"]
    if state.step > cfg.iterations and ranks.rank == 0:
        print(f"{path} is beyond iterations={cfg.iterations}: its iterations are kept")
    done, slots = state.step % len(loader.ks) if cfg.adv else 0, {}
    if done:  # in the middle of a pass over k, the last Q_k holds the generated latents
        slots = {str(slot): torch.zeros(loader.shape, device=ranks.device)
                 for numbers in loader.slots for slot in numbers}
    load_checkpoint(path, tensors_of(state, slots))
    for b in loader.read(state.step - done) if done else []:  # the trajectories of this pass
        x_gen = torch.stack([slots[str(slot)] for slot in b.slots])
        state.queues[loader.ks[done - 1]].append((x_gen, b.x_key, b.cond))
    if ranks.rank == 0:
        print(f"resuming from {path}")
