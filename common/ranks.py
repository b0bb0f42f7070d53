"""Processes: how they find each other, agree and end; seeds."""

import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import common  # before torch, see common
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from common.config import Shared, settings_to_compare
from common.files import TOKEN, lock_folder, write_text

# ----------------------------------------------------------------------- processes and devices

@dataclass(frozen=True)
class Ranks:
    """This process among the others: its rank, their number, its device and the mesh of all.

    With sequence parallelism `sp` successive ranks work on one batch, and with parallel guidance
    two such groups do. The ranks that share a batch are one data-parallel replica: `dp_rank` is its
    number, `dp_size` how many replicas there are. Otherwise every rank is a replica.
    """
    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    sp: int = 1
    sp_group: dist.ProcessGroup | None = None
    cfg_group: dist.ProcessGroup | None = None  # this rank and its counterpart in the other group

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that networks compute in on this rank's device."""
        return compute_dtype(self.device)

    @property
    def replica_size(self) -> int:
        return self.sp * (1 if self.cfg_group is None else 2)

    @property
    def dp_rank(self) -> int:
        return self.rank // self.replica_size

    @property
    def dp_size(self) -> int:
        return self.world // self.replica_size

    @property
    def sp_ranks(self) -> "Ranks | None":
        """The ranks over which a DiT that is only evaluated is sharded: those that share a sample's
        tokens, since they are in step and replicas are not. None if there is only this one."""
        return None if self.sp_group is None else replace(
            self, mesh=DeviceMesh.from_group(self.sp_group, self.device.type))

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the results of its replica."""
        return self.rank % self.replica_size == 0


def pick_device(device: str) -> torch.device:
    """"auto" is this process's GPU if there is one, else the CPU. Raises ValueError for others."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if count else "cpu"
    if device == "cuda" and count:
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}"
    if device not in ("cpu", *(f"cuda:{i}" for i in range(count))):
        raise ValueError(f"device: expected cpu, cuda, cuda:0, … or auto, got '{device}' with "
                         f"{count} GPU(s)")
    return torch.device(device)


def setup_distributed(cfg: Shared, sp: int = 1, heads: int = 1,
                      timeout: timedelta = timedelta(hours=12), cfg_parallel: bool = False,
                      **contents: Any) -> Ranks:
    """Join the processes that torchrun started, or be the only one: one code path for both.

    Args: cfg, whose settings all ranks must share, except paths and the device; sp, number of ranks
    that share each sample's tokens; heads, attention heads of the DiT, which these ranks divide;
    timeout, how long a rank waits for the others in a collective; cfg_parallel, whether two groups
    share the two evaluations of guidance; contents, JSON values that all ranks must share as well,
    which identify the files at the paths.
    Raises ValueError if they do not, or if sp does not divide both the ranks and the heads.
    """
    where = pick_device(cfg.device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    elif "OMP_NUM_THREADS" not in os.environ:  # the number of threads changes last bits; and
        torch.set_num_threads(1)               # processes use cores better than threads do
    prefer_attention(cfg.attention, where)  # after set_device: it must not open another GPU
    if not dist.is_initialized():
        join_processes("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo", timeout)
    rank, world = dist.get_rank(), dist.get_world_size()
    require_same(settings_to_compare(cfg) | contents)
    replica = sp * (1 + cfg_parallel)
    if world % replica or heads % sp:
        end_all(f"sp, cfg_parallel: expected replicas of {replica} rank(s) to divide the {world} "
                f"rank(s), and sp={sp} the {heads} attention heads")
    # The ranks of a batch's tokens are successive; a pair has the same tokens in both groups.
    pairs = [[a + j, a + j + sp] for a in range(0, world, 2 * sp) for j in range(sp)]
    sp_group = dist.new_subgroups(sp, timeout=timeout)[0] if sp > 1 else None
    cfg_group = dist.new_subgroups_by_enumeration(pairs, timeout)[0] if cfg_parallel else None
    return Ranks(rank, world, where, init_device_mesh(where.type, (world,)), sp, sp_group,
                 cfg_group)


def join_processes(backend: str, timeout: timedelta) -> None:
    """Create the process group of all ranks that torchrun started, or of this process alone."""
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=watch_launcher, daemon=True).start()
        store, rank, world = next(dist.rendezvous("env://"))
        # torchrun keeps its store through restarts: addresses of dead ranks must not be read.
        # (Over several nodes the count may differ: there torchrun must make new ones,
        # docs/scaling.md.)
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


SDPA_ORDER = contextlib.ExitStack()  # keeps the context alive: it would be left when collected


def prefer_attention(kernels: str, device: torch.device) -> None:
    """From here on, attention on a GPU tries one kind of kernel first; the others remain available.

    kernels: flash | cudnn | auto, which is cudnn on Hopper and flash on others. On an H100 cuDNN's
    were measured 1.7 to 2.3 times as fast as torch's flash kernels, on an A100 0.8 times.
    Source: huggingface/transformers, pull request 48163.
    """
    if device.type != "cuda":
        return
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION,
             SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    if kernels == "cudnn" or kernels == "auto" and hopper:
        order[:2] = order[1], order[0]
    SDPA_ORDER.enter_context(sdpa_kernel(order, set_priority=True))  # and never left


class Timer:
    """Seconds by name, from lap to lap: by the clock on a CPU; on a GPU by events in its stream, so
    that nothing synchronises before the seconds are read."""

    def __init__(self, device: torch.device):
        self.device, self.total, self.marks = device, {}, []
        self.lap("")

    def lap(self, name: str) -> None:
        """Count the time since the last lap as `name`."""
        mark: Any = time.perf_counter()
        if self.device.type == "cuda":
            mark = torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
        self.marks.append((name, mark))

    def laps(self) -> list[float]:
        """Seconds of each lap since the last call."""
        if self.device.type == "cuda":
            self.marks[-1][1].synchronize()
        out = []
        for (_, a), (name, b) in zip(self.marks, self.marks[1:], strict=False):
            out.append(b - a if isinstance(a, float) else a.elapsed_time(b) / 1000)
            self.total[name] = self.total.get(name, 0.0) + out[-1]
        self.marks = self.marks[-1:]
        return out

    def seconds(self) -> dict[str, float]:
        """Seconds of all laps by name."""
        self.laps()
        return self.total


def device_name(device: torch.device) -> str:
    """The device as reports call it: a GPU's name, or the processor's (where the system has none,
    its architecture) and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info, threads = Path("/proc/cpuinfo"), torch.get_num_threads()
    found = re.search(r"model name\s*: *(.*\S)", info.read_text() if info.exists() else "")
    return f"{found[1] if found else platform.machine()}, {threads} thread{'s' * (threads > 1)}"


def check_compiler(device: torch.device) -> None:
    """Raise ValueError if torch.compile cannot work: on a CPU it needs a C++ compiler."""
    if device.type == "cpu" and not shutil.which("g++"):
        raise ValueError("compile: found no g++ for torch.compile: install it, or --compile=false")


def compile_blocks(dit: nn.Module) -> None:
    """torch.compile every block of a DiT. Raises as check_compiler."""
    import torch._dynamo
    check_compiler(next(dit.parameters()).device)
    # Dynamo's own limit of 8 variants would leave HunyuanVideo uncompiled after a few prompts, with
    # only a warning. 20 were seen: with and without gradients, of weights or of inputs alone,
    # samples of a batch, tokens fixed or free, odd or even for two ranks.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in dit.blocks:
        block.compile()


def local_rows(p: Tensor) -> tuple[Tensor, slice | None]:
    """This rank's part of a parameter and the rows of the full one that it holds (None: all)."""
    if not isinstance(p, DTensor):
        return p.data, None
    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return p.to_local().data, slice(offset[0], offset[0] + shape[0])


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype that networks compute in: bf16 on a GPU, fp32 on the CPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


# --------------------------------------------------------------------- agreement, start and end

def gather_values(value: Any, group: dist.ProcessGroup | None = None) -> list:
    """A value of every rank (of a group), by rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def limit_waiting(ranks: Ranks, timeout: timedelta) -> None:
    """Set how long a rank waits for the others from here on, in collectives of all ranks and of
    those that share a batch's tokens."""
    for group in filter(None, (dist.group.WORLD, ranks.sp_group)):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def shared_queue(count: int, ranks: Ranks) -> Iterator[int]:
    """The numbers 0 … count - 1, each for the ranks of one replica. A replica gets its next number
    when it asks for it, so that at the end none waits for more than one turn of another; longer
    means that a node was lost, and ends the run. Collective."""
    store = dist.distributed_c10d._get_default_store()
    name = on_first_rank(lambda: f"queue {time.time_ns()}")  # torchrun's store outlives restarts

    def numbers() -> Iterator[int]:
        longest = 0.0  # seconds of a turn
        for turn in itertools.count():
            key = f"{name} replica {ranks.dp_rank} turn {turn}"
            if ranks.is_writer:
                store.set(key, str(store.add(name, 1) - 1))
            if (number := int(store.get(key))) >= count:
                break
            start = time.perf_counter()
            yield number
            longest = max(longest, time.perf_counter() - start)
        if longest:  # others may still load their networks
            limit_waiting(ranks, timedelta(hours=2, seconds=4 * longest))

    return numbers()


def end_all(message: str) -> NoReturn:
    """End all ranks by an error that all of them have found; the first one prints it."""
    raise ValueError(message if dist.get_rank() == 0 else "")


def require_same(facts: dict[str, Any]) -> None:
    """Raise ValueError on every rank if one has other settings or files than the first.

    Args: facts, JSON values by name.
    """
    first, *others = gather_values(facts)
    for rank, other in enumerate(others, 1):
        for name in first | other:
            if other.get(name) != first.get(name):
                end_all(f"{name}: rank {rank} has {other.get(name)!r}, rank 0 "
                        f"{first.get(name)!r}: give all ranks the same settings and files; nothing "
                        "was written")


def error_text(error: Exception) -> str:
    """An error's message; the system's errors about a file begin with its name."""
    of_file = isinstance(error, OSError) and error.filename and error.strerror
    return f"{error.filename}: {error.strerror}" if of_file else str(error)


class AgreedError(ValueError):
    """An error that every rank raises at the same point, so that they can still act together; only
    one of them has a message."""


@contextlib.contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """Raise AgreedError on every rank if the work inside is an error, a ValueError or OSError, on
    one or more; the first of them has its message."""
    error, rank = None, dist.get_rank()
    try:
        yield
    except (ValueError, OSError) as e:
        error = e
    first = torch.tensor(rank if error is not None else dist.get_world_size())
    dist.all_reduce(first, dist.ReduceOp.MIN)
    if first < dist.get_world_size():
        raise AgreedError(error_text(error) if first == rank else "") from error


def on_first_rank(work: Callable[[], Any]) -> Any:
    """The result of `work` on rank 0, sent to all. Raises its error as errors_on_all_ranks."""
    result = [None]
    with errors_on_all_ranks():
        if dist.get_rank() == 0:
            result = [work()]
    dist.broadcast_object_list(result)
    return result[0]


SIGHT = 60  # seconds after which a network disk shows a new file on all nodes (NFS: acdirmax)


def require_shared_folder(folder: Path) -> None:
    """Raise ValueError if a rank does not see the file that rank 0 writes into the folder."""
    if dist.get_world_size() == 1:
        return
    name = f".shared.{os.getpid()}-{TOKEN}.part"  # removed as a leftover if this is killed
    path = folder / on_first_rank(lambda: write_text(folder / name, name) or name)
    for _ in range(SIGHT):
        if not path.exists():
            time.sleep(1)
    blind = [rank for rank, sees in enumerate(gather_values(path.exists())) if not sees]
    path.unlink(missing_ok=True)
    if blind:
        end_all(f"{folder}: rank(s) {', '.join(map(str, blind))} do not see what rank 0 writes "
                "there: put --run on a disk that all nodes share")


@contextlib.contextmanager
def lock_run_folder(folder: Path, first: int = 0, stop: int = 1) -> Iterator[None]:
    """files.lock_folder for all ranks of this job. Raises also as require_shared_folder."""
    with contextlib.ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(lock_folder(folder, first, stop)))
        require_shared_folder(folder)
        yield


def watch_launcher() -> None:
    """End this process soon after torchrun ends, even while it waits for other ranks; in a thread.

    It gets the signal that torchrun would have sent; before the process group exists it ends at
    once. torchrun may have ended while torch was imported: its id was taken before.
    """
    while os.getppid() == common.LAUNCHER:
        time.sleep(1)
    print("torchrun exited; stopping this rank", file=sys.stderr, flush=True)
    if not dist.is_initialized():
        os._exit(1)
    os.kill(os.getpid(), signal.SIGTERM)


def print_line(line: str, error: bool = False) -> None:
    """Print a line, or drop it if the output cannot be written, which must not end a run."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr if error else sys.stdout, flush=True)


def progress_bar(total: int, name: str, rank: int = 0, initial: int = 0, unit: str = "it") -> tqdm:
    """A progress bar on rank 0; without a terminal, a line per minute."""
    lines = SimpleNamespace(flush=lambda: None, write=lambda text: text.strip() and print_line(
        text.strip(), error=True))
    interval, stream = (0.5, sys.stderr) if sys.stderr.isatty() else (60, lines)
    return tqdm(total=total, desc=name, initial=initial, unit=unit, mininterval=interval,
                file=stream, disable=rank > 0)


def print_error(error: str) -> None:
    """Print an error on a line of its own. Before the ranks are connected all may have the same
    one: the first prints it, and torchrun ends the others before they do."""
    if not dist.is_initialized() and os.environ.get("RANK", "0") != "0":
        time.sleep(10)  # ranks start seconds apart on a busy disk
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"error: {error}", file=sys.stderr, flush=True)


def wait_for_message() -> None:
    """Wait until the rank that prints the error of all has ended: torchrun ends all ranks with the
    first that fails, even one that has not printed yet."""
    with contextlib.suppress(RuntimeError):  # its connection is closed
        dist.all_reduce(torch.zeros(1))


def cli(main: Callable[[], None]) -> None:
    """Run a stage's main. An error that a user can cause is one line on stderr and exit status 1.

    Output is written line by line, since torchrun may end a rank at any time.
    With a process group, the process always ends without Python's shutdown. A rank that fails then
    does not wait for the others, so that torchrun sees it and stops them; and a gloo thread may
    still release the tensors of the last collective, which aborts the process during shutdown.
    """
    status = 1
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows what it can
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
        status = 0
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError) as e:
        if text := error_text(e):
            print_error(text)
        elif dist.is_initialized():
            wait_for_message()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        status = 130
    except SystemExit as e:
        if not dist.is_initialized():
            raise
        status = e.code if isinstance(e.code, int) else 1
        if status:
            wait_for_message()
    except BaseException:
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        if dist.get_world_size() > 1:
            # If it only lost another rank, torchrun sees that one end first, and ends this one.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
    if dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        raise SystemExit(status)


# ------------------------------------------------------------------------------------ seeding

def seed_of(*key: int | str) -> int:
    """A 63-bit seed from integers and strings; different keys give unrelated seeds."""
    digest = hashlib.sha256(json.dumps(key, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator for one draw, which rank, world size and restarts cannot change."""
    return torch.Generator().manual_seed(seed_of(*key))


def draw_noise(shape: Iterable[int], keys: list[tuple]) -> Tensor:
    """Noise ~ N(0, I), fp32 [B, *shape] on the CPU: one draw per key (name, seed, index, …)."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(*key)) for key in keys])
