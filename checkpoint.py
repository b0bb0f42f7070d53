"""What a training run keeps: AdamW's moments, checkpoints that survive kills, the student's file.

<folder>/step_NNNNNN/ is a checkpoint of torch.distributed.checkpoint: every rank writes its own
part of the state, from a copy in host memory, while training goes on. meta.json in it tells step,
settings, and size and CRC-32 of each file. It is written aside and renamed when it is whole, on all
ranks; a faulty one is named and passed over. It loads on any number of ranks.
"""

import io
import json
import os
import pickle
import re
import shutil
import struct
import zlib
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from model import LazyTensor, Ranks, cause, read_json, replace_file, write_json
from synvid import crc32, on_first_rank

# ---------------------------------------------------------------------------- AdamW's state

def adamw(cfg: Any, module: nn.Module, offload: bool = False) -> torch.optim.AdamW:
    """AdamW with its state laid out at once, so that a checkpoint is read in place.

    Args: offload, whether the moments of a sharded module stay in host memory.
    """
    def zeros(p: nn.Parameter) -> Tensor:
        if not offload:
            return torch.zeros_like(p.detach())
        local = torch.zeros(p.to_local().shape)  # pinned, it would take up to twice the memory
        return DTensor.from_local(local, hosts, p.placements, shape=p.shape, stride=p.stride())

    hosts = init_device_mesh("cpu", (dist.get_world_size(),)) if offload else None
    opt = torch.optim.AdamW(module.parameters(), cfg.lr, (cfg.beta1, cfg.beta2),
                            weight_decay=cfg.weight_decay)
    for p in module.parameters():
        opt.state[p] = {"step": torch.zeros(()), "exp_avg": zeros(p), "exp_avg_sq": zeros(p)}
    return opt


def step_from_host(opt: torch.optim.AdamW) -> None:
    """opt.step(), a parameter at a time, its moments brought to its device and back."""
    (group,) = opt.param_groups
    params = group["params"]
    for p in params:
        group["params"], state = [p], opt.state[p]
        at_home = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        for name, value in at_home.items():
            local = value.to_local().to(p.to_local().device)
            state[name] = DTensor.from_local(local, p.device_mesh, p.placements, shape=p.shape,
                                             stride=p.stride())
        opt.step()
        for name, value in at_home.items():
            value.to_local().copy_(state[name].to_local())
            state[name] = value
    group["params"] = params


# ------------------------------------------------------------------------------------ saving


class Saver:
    """Writes a run's checkpoints, one at a time, in the background.

    Args: folder that holds them; keep, how many of the last ones stay. All ranks must call each
    method at the same point.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int):
        self.folder, self.ranks, self.keep = folder, ranks, keep
        # Training goes on with the other groups. A slow disk is waited for.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        self.thread: Thread | None = None
        self.error: BaseException | None = None
        self.failed = 0  # in a row
        self.path = folder

    def save(self, step: int, state: dict, meta: dict) -> None:
        """Copy `state` to host memory and begin to write it; first the one before is waited for.

        Args: state, nested dicts of tensors and plain values for torch.distributed.checkpoint;
        meta, JSON values stored beside it. If the one before failed, this one is another try; after
        a second failure it raises as `wait`.
        """
        self.join()
        if self.failed == 1 and self.ranks.rank == 0:
            print(f"{self.fault()}; trying once more", flush=True)
        if self.failed > 1:
            raise self.fault() from self.error
        self.path, self.error = self.folder / f"step_{step:06d}", None
        if self.ranks.rank == 0:
            for stale in self.folder.glob(".step_*.part"):
                shutil.rmtree(stale, ignore_errors=True)
        dist.barrier()
        aside = self.folder / f".step_{step:06d}.part"
        # Plain copies and a plain writer: torch's own choice would open every rank's CUDA context
        # on the first GPU, from the thread that writes.
        stager = DefaultStager(StagingOptions(False, False, False, False))
        writer = dcp.FileSystemWriter(str(aside), per_thread_copy_ahead=0)
        written = dcp.async_save(state, storage_writer=writer, async_stager=stager,
                                 process_group=self.group)
        meta = {**meta, "step": step}
        self.thread = Thread(target=self.finish, args=(written, stager, aside, meta))
        self.thread.start()

    def finish(self, written: Future, stager: DefaultStager, aside: Path, meta: dict) -> None:
        """In the background: when all ranks have written, sum up the files and give the name."""
        rank = self.ranks.rank
        try:
            try:
                written.result()
            finally:
                stager.close()  # else it keeps the copy
            mine = {p.name: sums_of(p) for p in sorted(aside.iterdir())
                    if p.name.startswith(f"__{rank}_") or (rank == 0 and p.name == ".metadata")}
            sums = [None] * self.ranks.world
            dist.all_gather_object(sums, mine, group=self.group)
            if rank == 0:
                meta["files"] = {name: found for part in sums for name, found in part.items()}
                write_json(aside / "meta.json", {**meta, "crc32": crc32(meta)})
                to_disk(aside / "meta.json")
                shutil.rmtree(self.path, ignore_errors=True)
                os.replace(aside, self.path)
                to_disk(self.folder)
                self.prune(meta["step"])
        except BaseException as e:  # told by the main thread, in `wait`; torch raises such
            if rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            self.error = e

    def prune(self, step: int) -> None:
        """Remove all but the last few up to `step`; later ones were passed over on resuming."""
        steps = checkpoints(self.folder)
        for old in [s for s in steps if s > step] + [s for s in steps if s <= step][:-self.keep]:
            shutil.rmtree(steps[old], ignore_errors=True)

    def join(self) -> None:
        """Until the checkpoint under way is whole, or has failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread, self.failed = None, 0 if self.error is None else self.failed + 1
            dist.barrier()

    def wait(self) -> None:
        """Until the checkpoint under way is whole; ValueError if it could not be written."""
        self.join()
        if self.error is not None:
            raise self.fault() from self.error

    def fault(self) -> Exception:
        """The error of the last checkpoint as one to raise or to print."""
        if not isinstance(self.error, (OSError, ValueError, dcp.api.CheckpointException)):
            return self.error
        return ValueError(f"{self.path}: the checkpoint cannot be written ({reason(self.error)}): "
                          "free some space, or choose another run folder; older ones are untouched")


def checkpoints(folder: Path) -> dict[int, Path]:
    """The folders of checkpoints by step, rising."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdecimal()]
    return dict(sorted((int(path.name[5:]), path) for path in found))


def to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk, not only in its cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def check_disk(folder: Path, parameters: int, moments: int, keep: int) -> None:
    """Raise ValueError if a run's checkpoints and its student will not fit on the disk.

    Args: parameters of the student, fp32; moments, AdamW's of each; keep, as in Saver; one more is
    there while it is written.
    """
    one = 4 * parameters * (1 + moments)
    here = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
    while not folder.exists():
        folder = folder.parent
    need, free = one * (keep + 1) + 4 * parameters - here, shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{folder}: {keep + 1} checkpoints of {one / 1e9:.3g} GB and the student "
                         f"need {need / 1e9:.3g} GB more, got {free / 1e9:.3g} GB: free some "
                         "space, lower `keep`, or choose another run folder")


def reason(error: BaseException) -> str:
    """What happened on the first rank that failed, in one line."""
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return cause(error)


def crc32_of(path: Path) -> str:
    """Checksum of a file."""
    total = 0
    with path.open("rb") as f:
        while chunk := f.read(1 << 24):
            total = zlib.crc32(chunk, total)
    return f"{total:08x}"


# ----------------------------------------------------------------------------------- loading

def latest_checkpoint(folder: Path, ranks: Ranks) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its meta; faulty ones are named and passed over.

    What there is, the first rank says; then each reads its share of the files against their
    checksums. Raises ValueError when there are checkpoints and none of them is whole.
    """
    there = on_first_rank(ranks, lambda: [(path, read_meta(path)) for path in
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
    try:
        meta = read_json(path / "meta.json")
        if meta.pop("crc32") != crc32(meta):
            return "meta.json is changed"
        return meta
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        return f"meta.json ({e})"


def sums_of(path: Path) -> list | None:
    """Size and checksum of a file; None if it cannot be read."""
    try:
        return [path.stat().st_size, crc32_of(path)]
    except OSError:
        return None


class PlainUnpickler(pickle.Unpickler):
    """Reads the table of contents that torch pickles, and refuses names that are none of it."""

    NAMES = re.compile(r"torch\.distributed\.checkpoint\.(metadata\.\w+|filesystem\._StorageInfo)|"
                       r"torch\.(Size|bool|\w*(int|float)\d+\w*|serialization\._get_layout)|"
                       r"pathlib(\._local)?\.PosixPath")

    def find_class(self, module: str, name: str) -> Any:
        if not self.NAMES.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


class PlainPlanner(dcp.DefaultLoadPlanner):
    """Checks each value that is no tensor by weights_only; torch would run code in it."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


def load_checkpoint(path: Path, state: dict) -> None:
    """Read a checkpoint into `state`, which is nested as it was saved; on any number of ranks.

    Raises ValueError when it is damaged, of another model, or holds code (which is never run).
    """
    try:
        with (path / ".metadata").open("rb") as f:
            PlainUnpickler(f).load()
        dcp.load(state, checkpoint_id=str(path), planner=PlainPlanner())
    except (OSError, EOFError, LookupError, AttributeError, TypeError, ValueError,
            pickle.UnpicklingError, dcp.api.CheckpointException) as e:
        raise ValueError(f"{path}: the checkpoint cannot be read ({reason(e)}): it is damaged or "
                         "of another config; remove it to resume from the one before") from e


# --------------------------------------------------------------------------------- exporting

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_one_by_one(path: Path, tensors: dict[str, LazyTensor], metadata: dict[str, str],
                     ranks: Ranks) -> None:
    """Write a safetensors file on rank 0, one tensor in memory at a time.

    Args: tensors, whose read() is a collective that every rank takes part in; metadata, strings.
    Raises ValueError if the file cannot be written. Source: the format's own description (8 bytes
    of header length, JSON, data).
    """
    header, end = {"__metadata__": metadata}, 0
    for name, t in tensors.items():
        start, end = end, end + t.dtype.itemsize * torch.Size(t.shape).numel()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(aside: Path) -> None:
        with aside.open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors.values():
                f.write(bytes_of(tensor.read()))

    if ranks.rank == 0:
        for left in path.parent.glob(f".{path.name}.*.part*"):  # by an export that was killed
            left.unlink(missing_ok=True)
        replace_file(path, write)
    else:
        for tensor in tensors.values():
            tensor.read().flatten()[:1].cpu()  # waits: else a GPU's rank would run ahead of rank 0


def whole_tensor(p: DTensor, path: Path) -> LazyTensor:
    """A sharded parameter, gathered when it is read."""
    def read(rows: slice | None = None) -> Tensor:
        value = p.detach().full_tensor()
        return value[rows] if rows else value

    return LazyTensor(tuple(p.shape), p.dtype, path, read)


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements as they lie in a file."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
