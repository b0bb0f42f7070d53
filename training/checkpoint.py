"""What a training run keeps: AdamW's moments, checkpoints that survive kills, and resuming.

<folder>/step_NNNNNN/ is a checkpoint. Each rank writes its rows of the sharded tensors to
rank_NNNNN.safetensors, from a copy in host memory, while training goes on; the file's metadata says
which rows of which tensor they are. meta.json tells step, settings, and size and CRC-32 of each
file. All of it is written aside and renamed when it is complete on all ranks; a faulty one is named
and passed over. It loads on any number of ranks. Nothing in it is, or could be, code.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from common.config import read_settings
from common.files import (
    crc32_of_file, crc32_of_json, shape_error, parse_json, read_json, read_log, error_summary,
    sync_to_disk, write_json, write_remedy)
from common.ranks import Ranks, local_rows, on_first_rank, raise_together
from common.weights import LazyTensor, open_safetensors, safetensors_metadata, stream_safetensors

# ------------------------------------------------------------------------------------ saving

FORMAT = 2  # of a checkpoint on disk; 1 was torch.distributed.checkpoint's, whose table is a pickle


def flatten(state: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dicts by their path, "opt_traj/head.weight/exp_avg"."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


class Saver:
    """Writes a run's checkpoints, one at a time, in the background.

    Args: folder that holds them; keep, how many of the last ones stay; step, the iteration that is
    on the disk already. All ranks must call each method but let_finish at the same point.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, step: int = 0):
        self.folder, self.ranks, self.keep = folder, ranks, keep
        # Training goes on with the other groups. A slow disk is waited for.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self.thread: Thread | None = None
        self.error: BaseException | None = None
        self.failed = 0  # in a row
        self.path, self.step = folder, step

    def save(self, step: int, state: dict, meta: dict) -> None:
        """Copy `state` to host memory and begin to write it; first the one before is waited for.

        Args: state, nested dicts of tensors: sharded ones by rows, others whole, written by the
        first rank that has them; meta, JSON values stored beside it. If the one before failed, this
        one is another try; after a second failure it raises as `wait`.
        """
        self.join()
        if self.failed == 1 and self.ranks.rank == 0:
            print(f"{self.fault()}; trying once more", flush=True)
        if self.failed > 1:
            raise self.fault() from self.error
        self.path, self.step, self.error = self.folder / f"step_{step:06d}", step, None
        aside = self.folder / f".step_{step:06d}.part"
        if self.ranks.rank == 0:
            for stale in self.folder.glob(".step_*.part"):
                shutil.rmtree(stale, ignore_errors=True)
        tensors, rows = self.copy_to_host(dict(flatten(state)))
        meta = {**meta, "format": FORMAT, "step": step}
        self.thread = Thread(target=self.write, args=(aside, tensors, rows, meta))
        self.thread.start()

    def copy_to_host(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
        """Copies of what this rank writes, and by name [first row, rows of the full tensor]."""
        held: list[Any] = [None] * self.ranks.world
        dist.all_gather_object(held, [n for n, t in state.items() if not isinstance(t, DTensor)],
                               group=self.group)
        others = {name for names in held[:self.ranks.rank] for name in names}
        tensors, rows = {}, {}
        for name, t in state.items():
            local, mine = local_rows(t.detach())
            if local.numel() and name not in others:
                tensors[name] = torch.empty(local.shape, dtype=local.dtype).copy_(local)
                rows[name] = [mine.start if mine else 0, t.shape[0] if t.ndim else 0]
        return tensors, rows

    def write(self, aside: Path, tensors: dict[str, Tensor], rows: dict, meta: dict) -> None:
        """In the background: write this rank's file; when all have, give the checkpoint its name.

        An error of any rank is kept on all of them, for `wait` in the main thread.
        """
        rank, name = self.ranks.rank, f"rank_{self.ranks.rank:05d}.safetensors"
        try:
            aside.mkdir(parents=True, exist_ok=True)
            lazy = {n: LazyTensor(tuple(t.shape), t.dtype, aside, lambda rows=None, t=t: t)
                    for n, t in tensors.items()}
            mine: Any = stream_safetensors(aside / name, lazy, {"rows": json.dumps(rows)})
        except (OSError, ValueError) as e:
            mine = e
        except Exception as e:
            mine = RuntimeError(repr(e))  # the others must be able to read it
        lazy = tensors.clear()  # let the copy go
        found: list[Any] = [None] * self.ranks.world
        try:
            dist.all_gather_object(found, mine, group=self.group)
            self.error = next((e for e in found if isinstance(e, Exception)), None)
            if rank == 0 and self.error is None:
                files = {f"rank_{r:05d}.safetensors": sums for r, sums in enumerate(found)}
                self.name_it(aside, {**meta, "files": files})
            elif rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            found = [self.error]
            dist.broadcast_object_list(found, group=self.group)  # named, before any rank may leave
            self.error = found[0]
        except Exception as e:
            self.error = e

    def name_it(self, aside: Path, meta: dict) -> None:
        """On the first rank: sum up the files, rename the folder, remove the oldest."""
        try:
            write_json(aside / "meta.json", {**meta, "crc32": crc32_of_json(meta)})
            sync_to_disk(aside / "meta.json")
            sync_to_disk(aside)
            shutil.rmtree(self.path, ignore_errors=True)
            os.replace(aside, self.path)
            sync_to_disk(self.folder)
            self.prune(meta["step"])
        except (OSError, ValueError) as e:
            shutil.rmtree(aside, ignore_errors=True)
            self.error = e

    def prune(self, step: int) -> None:
        """Remove all but the last few up to `step`; later ones were passed over on resuming."""
        steps = checkpoints(self.folder)
        for old in [s for s in steps if s > step] + [s for s in steps if s <= step][:-self.keep]:
            shutil.rmtree(steps[old], ignore_errors=True)

    def join(self) -> None:
        """Until the checkpoint under way is complete, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread, self.failed = None, 0 if self.error is None else self.failed + 1

    def wait(self) -> None:
        """Until the checkpoint under way is complete; ValueError if it could not be written."""
        self.join()
        if self.error is not None:
            raise self.fault() from self.error

    def finish(self, save: Callable[[], None]) -> None:
        """As wait, but a checkpoint that could not be written is tried once more by `save`."""
        self.join()
        if self.failed == 1:
            save()
        self.wait()

    def let_finish(self) -> None:
        """Give the checkpoint under way time to become complete; for a rank that will fail."""
        if self.thread is not None:
            self.thread.join(600)

    def fault(self) -> Exception:
        """The error of the last checkpoint as one to raise or to print."""
        if not isinstance(self.error, (OSError, ValueError)):
            return self.error
        return ValueError(f"{self.path}: the checkpoint cannot be written "
                          f"({error_summary(self.error)}): "
                          f"{write_remedy(self.error)}; older ones are untouched")


def checkpoints(folder: Path) -> dict[int, Path]:
    """The folders of checkpoints by step, rising."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdecimal()]
    return dict(sorted((int(path.name[5:]), path) for path in found))


def check_disk(folder: Path, parameters: int, moments: int, keep: int, export: int) -> None:
    """Raise ValueError if a run's checkpoints and its student will not fit on the disk.

    Args: parameters that learn, fp32; moments, AdamW's of each; keep, as in Saver; one more is
    there while it is written; export, bytes of the student's files.
    """
    one = 4 * parameters * (1 + moments)
    here = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
    while not folder.exists():
        folder = folder.parent
    need, free = one * (keep + 1) + export - here, shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{folder}: {keep + 1} checkpoints of {one / 1e9:.3g} GB and the student "
                         f"need {need / 1e9:.3g} GB more, got {free / 1e9:.3g} GB: free some "
                         "space, lower `keep`, or choose another run folder")


# ----------------------------------------------------------------------------------- loading

def latest_checkpoint(folder: Path, ranks: Ranks) -> tuple[Path, dict] | None:
    """The newest faultless checkpoint and its meta; faulty ones are named and passed over.

    What there is, the first rank says; then each reads its share of the files against their
    checksums. Raises ValueError when there are checkpoints and none of them is faultless.
    """
    there = on_first_rank(lambda: [(path, read_meta(path)) for path in
                                   reversed(checkpoints(folder).values())])
    faults = []
    for path, meta in there:
        if isinstance(meta, str):
            faults.append(f"{path}: {meta}")
            continue
        names = list(meta["files"])[ranks.rank::ranks.world]
        wrong = [name for name in names if sums_of(path / name) != meta["files"][name]]
        found: list[Any] = [None] * ranks.world
        dist.all_gather_object(found, wrong)
        wrong = [name for part in found for name in part]
        if not wrong:
            for fault in faults if ranks.rank == 0 else ():
                print(f"passing over {fault}; resuming from {path.name}", flush=True)
            return path, meta
        faults.append(f"{path}: missing, cut or changed: {', '.join(wrong)}")
    if faults:
        raise ValueError(f"no whole checkpoint to resume from: {'; '.join(faults)}. Remove the "
                         "folder to start from step 0, or choose another run folder")
    return None


def read_meta(path: Path) -> dict | str:
    """A checkpoint's meta.json, or what is wrong with it."""
    if (path / ".metadata").exists():
        return "is of an earlier version, whose table is a pickle, which is not read"
    try:
        meta = read_json(path / "meta.json", {"crc32": str, "format": int, "step": int})
        if meta.pop("crc32") != crc32_of_json(meta):
            return "meta.json is changed"
        if meta["format"] != FORMAT:
            return f"is of format {meta['format']}; this code reads {FORMAT}"
        if fault := shape_error(meta, {"files": {str: list}}):
            return f"meta.json: {fault}"
        if not all(re.fullmatch(r"rank_\d+\.safetensors", name) for name in meta["files"]):
            return "meta.json names other files than a checkpoint's"
        return meta
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        return f"meta.json ({e})"


def sums_of(path: Path) -> list | None:
    """Size and checksum of a file; None if it cannot be read."""
    try:
        return [path.stat().st_size, crc32_of_file(path)]
    except OSError:
        return None


def load_checkpoint(path: Path, state: dict) -> None:
    """Read a checkpoint into `state`, which is nested as it was saved; on any number of ranks.

    Raises ValueError on all ranks when it is damaged or of another model.
    """
    error = None
    try:
        shards: dict[str, list[tuple[int, LazyTensor]]] = {}
        sizes: dict[str, int] = {}
        meta = read_meta(path)
        if isinstance(meta, str):
            raise ValueError(meta)
        for file in meta["files"]:
            rows = parse_json(safetensors_metadata(path / file)["rows"], file, {str: [int]})
            for name, lazy in open_safetensors(path / file).items():
                start, sizes[name] = rows[name]
                shards.setdefault(name, []).append((start, lazy))
        for name, t in flatten(state):
            if name not in shards:
                raise ValueError(f"it has no {name}")
            read_rows(name, t.detach(), shards[name], sizes[name])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as e:
        error = ValueError(f"{path}: the checkpoint cannot be read ({error_summary(e)}): it is "
                           "damaged or of another config; remove it to resume from the one before")
        error.__cause__ = e
    raise_together(error)


def read_rows(name: str, target: Tensor, shards: list[tuple[int, LazyTensor]], size: int) -> None:
    """Fill this rank's rows of a tensor from the shards that hold them."""
    local, rows = local_rows(target)
    first = shards[0][1]
    shape = (size, *first.shape[1:]) if target.ndim else ()
    if shape != tuple(target.shape) or first.dtype != target.dtype:
        raise ValueError(f"{name} is {first.dtype} {list(shape)}, wanted {target.dtype} "
                         f"{list(target.shape)}")
    if not target.ndim:
        local.copy_(first.read())
        return
    begin, filled = rows.start if rows else 0, 0
    for start, lazy in shards:
        a, b = max(begin, start), min(begin + len(local), start + lazy.shape[0])
        if a < b:
            local[a - begin:b - begin] = lazy.read(slice(a - start, b - start))
            filled += b - a
    if filled != len(local):
        raise ValueError(f"it has {filled} of the {len(local)} rows of {name}")


# ------------------------------------------------------------------- a run's state, resuming it

def tensors_of(state: Any, slots: dict[str, Tensor]) -> dict:
    """All tensors of a run that change, by name; a checkpoint is read into this dict, in place."""
    student, heads = ({name: p for name, p in net.named_parameters() if p.requires_grad}
                      for net in (state.student, state.heads))
    tensors = {"student": {n: p.detach() for n, p in student.items()},
               "heads": {n: p.detach() for n, p in heads.items()}, "queue": slots}
    for name, opt in state.opts.items():
        named = heads if name == "heads" else student
        tensors[f"opt_{name}"] = {f"{n}/{key}": value for n, p in named.items()
                                  for key, value in opt.state[p].items()}
    return tensors


def save_state(saver: Saver, state: Any, loader: Any, meta: dict) -> None:
    """Checkpoint networks, optimizers and the one queue that is not empty between iterations."""
    entries = [entry for queue in state.queues for entry in queue]
    slots = {str(slot): x for (x_gen, _, _), mine in zip(entries, loader.slots, strict=False)
             for slot, x in zip(mine, x_gen, strict=True)}
    saver.save(state.step, tensors_of(state, slots), meta)


CHANGEABLE_ON_RESUME = {
    "run", "device", "iterations", "micro_batch", "eval_every", "save_every", "keep", "synvid",
    "export_every", "checkpointing", "compile", "export", "export_dtype", "peak_tflops", "weights",
    "fps", "sp", "offload", "attention", "force_plan"}


def check_same_run(path: Path, saved: dict, meta: dict) -> None:
    """Raise ValueError if a run that began at `path` had other settings, teacher or data."""
    for key in ["teacher", "synvid", *(k for k in meta["config"] if k not in CHANGEABLE_ON_RESUME)]:
        old, new = (about.get(key, about["config"].get(key)) for about in (saved, meta))
        if old != new:
            raise ValueError(f"{path}: that run began with {key}={old}, the config has {new}: go "
                             "back to it, choose another --run, or remove that run's checkpoints")


def check_begun(folder: Path, meta: dict) -> None:
    """As check_same_run, for a run that logged iterations and has no checkpoint yet."""
    path = folder / "config.yaml"
    if path.exists() and read_log(folder / "log.jsonl", "step"):
        begun = {**meta["config"], **read_settings(path)}
        check_same_run(folder, {**meta, "config": begun}, meta)


def resume(cfg: Any, state: Any, loader: Any, ranks: Ranks, meta: dict) -> None:
    """Continue from the newest faultless checkpoint, if there is one.

    Raises ValueError when the folder belongs to a run with other settings.
    """
    folder = Path(cfg.run) / "distill"
    found = latest_checkpoint(folder, ranks)
    if found is None:
        return on_first_rank(lambda: check_begun(folder, meta))
    path, saved = found
    if fault := shape_error(saved, {"config": dict, "count": int, "step": int}):
        raise ValueError(f"{path}/meta.json: {fault}: remove this checkpoint")
    check_same_run(path, saved, meta)
    if saved["count"] > loader.count:
        raise ValueError(f"{path}: that run learned from {saved['count']} trajectories, now there "
                         f"are {loader.count}: make the missing ones again by `python synvid.py`")
    loader.count = meta["count"] = saved["count"]  # more have come since: the order stays
    state.step, m = saved["step"], len(state.t_key) - 1
    if state.step > cfg.iterations and ranks.rank == 0:
        print(f"{path} has more iterations than the {cfg.iterations} asked for: they stay")
    done, slots = state.step % m if cfg.adv else 0, {}
    if done:  # in the midst of a pass over k, Q_{m - done} holds the generated latents
        slots = {str(slot): torch.zeros(loader.shape, device=ranks.device)
                 for mine in loader.slots for slot in mine}
    load_checkpoint(path, tensors_of(state, slots))
    for b in loader.read(state.step - done) if done else []:  # trajectories the pass began with
        x_gen = torch.stack([slots[str(slot)] for slot in b.slots])
        state.queues[m - done].append((x_gen, b.x_key, b.cond))
    if ranks.rank == 0:
        print(f"resuming from {path}", flush=True)
