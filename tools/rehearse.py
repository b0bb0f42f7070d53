"""distill.py at full size on pretended GPUs: memory, traffic and work, before anyone rents them.

    python -m tools.rehearse CONFIG [--gpus 8] [--gib 80] [field=value]
    python -m tools.rehearse --plans        # the table of memory plans in docs/scaling.md

In:  CONFIG and its distill: section. No weights, no GPU.
Out: peak memory of a GPU and what it consists of, next to the memory plan; host memory of a
     checkpoint; traffic and FLOPs; where the host waits for the GPU, copies from pageable memory,
     or a block computes in fp32. `--depth all` runs all blocks instead of extrapolating.

distill.py's own functions run on tensors without data ("fake" tensors of torch), as rank 0 of a
process group that moves nothing. Few blocks are run, at two depths: every figure is linear in the
depth at each point of the run. What a GPU adds is not counted: the CUDA context, workspaces of
kernels and NCCL, fragmentation of the allocator.
"""

import common  # noqa: F401 (before torch, see common)
import argparse
import contextlib
import dataclasses
import math
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor, FakeTensorMode, in_kernel_invocation_manager)
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import flop_registry

import artifacts.lora
import common.ranks
import distill
import model
from common.config import load_config
from common.files import ROOT
from common.ranks import Ranks, cli, local_rows, setup_distributed
from model import check_model, key_times, latent_shape, sizes_of
from tools.networks import random_states
from training import checkpoint
from training.data import Loader
from training.memory import USABLE_MEMORY, memory_parts
from training.monitor import step_flops

DEVICE = "pretended"  # a device type that exists after register_device()
GiB = 2 ** 30
Figures = Counter[tuple[str, ...]]  # (kind, …) -> number; all are linear in the depth

# ------------------------------------------------------------------------------ pretended device


def register_device() -> None:
    """Give this process a device type that is no CPU and has no memory, and a process group that
    moves nothing. torch's private device type: errors about mixed devices then are real ones."""
    if hasattr(torch, DEVICE):
        return
    names = ("Stream", "Event", "stream", "current_stream", "synchronize", "set_device",
             "is_available", "is_initialized")
    handle = SimpleNamespace(
        **{name: getattr(torch.cpu, name) for name in names}, device_count=lambda: 1,
        current_device=lambda: 0, _is_in_bad_fork=lambda: False, manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16], get_rng_state=lambda _=None: torch.empty(
            0), set_rng_state=lambda *_: None)
    _setup_privateuseone_for_python_backend(DEVICE, handle)
    dist.Backend.register_backend("pretended", fake_pg._create_fake_pg, extended_api=True,
                                  devices=["cpu", DEVICE])


def gpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
              is_causal: bool = False, scale: float | None = None, **_: Any) -> Tensor:
    """F.scaled_dot_product_attention as a GPU computes it: without a matrix of all scores."""
    if mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    bias = torch.zeros((), dtype=q.dtype, device=q.device).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]


def without_reading(module: nn.Module, *_: Any, dtype: torch.dtype | None = None,
                    device: Any = DEVICE) -> nn.Module:
    """weights.load_module without its file."""
    return module.to(dtype).to_empty(device=device)


def clear_caches() -> None:
    """Free the tables on the device, which have no data here."""
    for function in (model.rope_table, model.frequencies):
        function.cache_clear()


@contextlib.contextmanager
def pretended_ranks(gpus: int, sp: int, heads: int) -> Iterator[Ranks]:
    """Be rank 0 of `gpus` ranks that do not exist; weights are not read from files."""
    register_device()
    dist.init_process_group("pretended", store=fake_pg.FakeStore(), rank=0, world_size=gpus)
    no_file = {"x": SimpleNamespace(file=Path("random"))}
    with contextlib.ExitStack() as stack:
        for module in (model, artifacts.lora):
            for name, other in (("load_module", without_reading), ("check_sizes", lambda *_: None),
                                ("dit_tensors", lambda _: dict(no_file))):
                stack.enter_context(patch.object(module, name, other))
        stack.enter_context(patch.object(common.ranks, "pick_device", lambda _: torch.device(
            DEVICE, 0)))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", gpu_attention))
        # Backward runs in this thread, and no exception of Python passes through its C++ code.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(set_checkpoint_early_stop(False))
        clear_caches()
        try:
            yield setup_distributed("auto", sp, heads)
        finally:
            clear_caches()
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------ the meter

FSDP = ("_fsdp_collectives.py", "_fsdp_param.py", "_fsdp_param_group.py")
CASTS = ("_to_copy", "copy_", "native_layer_norm", "cat")
KINDS = {"_allgather_base_": "all-gather", "allgather_": "all-gather", "alltoall_base_":
         "all-to-all", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce",
         "broadcast_": "broadcast"}


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in a value or in nested lists of them."""
    if isinstance(values, Tensor):
        return [values]
    return [x for value in values for x in tensors_in(value)] if isinstance(
        values, (list, tuple)) else []


def shapes(values: Any) -> Any:
    """A key for arguments: tensors count by shape, strides and dtype."""
    if isinstance(values, Tensor):
        return tuple(values.shape), values.stride(), values.dtype
    return tuple(map(shapes, values)) if isinstance(values, (list, tuple)) else (
        type(values), values)


def total_bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors_in(tensors))


class Meter(TorchDispatchMode):
    """Runs operations on the pretended device without data, and counts what they would take.

    figures: ("flop",), ("traffic", kind), ("finding", what, where), …; peaks: by segment of the
    run, the bytes that are allocated at its peak, by purpose or line of code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.kinds: dict[Any, str] = {}               # of operations
        self.outputs: dict[Any, tuple[type, list]] = {}
        self.figures: Figures = Counter()
        self.sizes: dict[int, tuple[str, int]] = {}   # by storage, its purpose and bytes
        self.now, self.total, self.host, self.host_peak = Counter(), 0, 0, 0
        self.peaks: dict[tuple[str, ...], tuple[int, dict[str, int]]] = {}
        self.pinned: set[int] = set()
        self.segment: tuple[str, ...] = ("build",)
        self.run, self.passes, self.block = ("", False, 0), 0, 0

    def __enter__(self) -> "Meter":
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self.count(storage)

        def pin(x: Tensor) -> Tensor:
            self.pinned.add(x.untyped_storage()._cdata)
            return x

        self.patches = contextlib.ExitStack()
        self.patches.enter_context(patch.object(torch.UntypedStorage, "resize_", resized))
        self.patches.enter_context(patch.object(Tensor, "pin_memory", pin))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again with its local tensors
        kwargs = kwargs or {}
        inputs = tensors_in((args, *kwargs.values()))
        fake = [isinstance(x, FakeTensor) for x in inputs]
        target = kwargs.get("device")
        if not (any(fake) or target is not None and torch.device(target).type == DEVICE):
            out = func(*args, **kwargs)
            for x in tensors_in(out):
                if x.device.type == "cpu":
                    self.count(x.untyped_storage(), "host")
            return out
        self.inspect(func, inputs, target)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.copy_.default and not fake[0]:
            return args[0]  # to host memory
        if not all(fake):
            args, kwargs = tree_map_only(Tensor, self.without_data, (args, kwargs))
        try:
            out = self.without_kernel(func, args, kwargs, inputs)
        except Exception as e:  # of two devices, or of shapes; backward would hide it
            print(f"{self.site()}: {func}: {e}", file=sys.stderr, flush=True)
            raise
        self.account(func, args, kwargs, out)
        return out

    def without_kernel(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor]) -> Any:
        """What FakeTensorMode returns for an operation, in less than half of the time: the shapes
        of new tensors are kept by the arguments' shapes, views and changes in place skip checks."""
        kind = self.kinds.get(func)
        if kind is None:
            written = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
            alias = any(r.alias_info for r in func._schema.returns)
            known = func.namespace == "aten" and not func._opname.startswith(
                ("_foreach", "_fused", "_unsafe_view", "lift_fresh"))
            kind = self.kinds[func] = not known and "other" or (
                written and "write" or alias and "view" or "new")
        simple = kind != "other" and inputs and all(
            isinstance(x, FakeTensor) and x.fake_device.type == DEVICE for x in inputs)
        key = (func, shapes(args), shapes(tuple(kwargs.items()))) if (
            simple and kind == "new" and kwargs.get("device") is None) else None
        if simple and kind == "view" or simple and kind == "write" and func._opname[-1] == "_":
            with in_kernel_invocation_manager(self.fake):
                out = func(*args, **kwargs)
            return args[0] if kind == "write" else self.wrap(out, inputs[0].fake_device)
        if key in self.outputs:
            kind, made = self.outputs[key]
            out = [x and self.wrap(torch.empty_strided(x[0], x[1], dtype=x[2], device="meta"),
                                   inputs[0].fake_device) for x in made]
            return out[0] if issubclass(kind, Tensor) else kind(out)
        with self.fake:
            out = func(*args, **kwargs)
        made = [out] if isinstance(out, Tensor) else out
        if key is not None and isinstance(made, (list, tuple)) and all(
                x is None or isinstance(x, FakeTensor) and x.fake_device.type == DEVICE
                and x.untyped_storage()._cdata not in self.sizes for x in made):
            self.outputs[key] = type(out), [
                x if x is None else (tuple(x.shape), x.stride(), x.dtype) for x in made]
        return out

    def wrap(self, out: Any, device: torch.device) -> Any:
        if isinstance(out, Tensor):
            return FakeTensor(self.fake, out, device)
        return type(out)(self.wrap(x, device) for x in out) if isinstance(
            out, (list, tuple)) else out

    def without_data(self, x: Tensor) -> Tensor:
        """A tensor of the host as one without data."""
        return x if isinstance(x, FakeTensor) or not x.is_cpu else self.fake.from_tensor(x)

    def account(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Count an operation's memory, FLOPs and traffic."""
        purpose = None
        for x in tensors_in(out):
            if isinstance(x, FakeTensor) and x.fake_device.type == DEVICE:
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes:
                    purpose = purpose or self.site()
                    self.count(storage, purpose)
        if func._overloadpacket in flop_registry:
            flop = flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
            self.figures["flop",] += flop
        if func.namespace == "c10d" and func._opname in KINDS:
            size = next(dist.ProcessGroup.unbox(x).size() for x in args
                        if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
            moved = max(total_bytes(args[0]), total_bytes(args[1])) * (size - 1) / size
            kind = KINDS[func._opname]
            self.figures["traffic", kind] += moved * (2 if kind == "all-reduce" else 1)

    def count(self, storage: torch.UntypedStorage, purpose: str | None = None) -> None:
        """Count a storage that is new, or has another size than before."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:
            if purpose is None:
                return
            self.sizes[key] = purpose, 0
            weakref.finalize(storage, self.free, key)
        purpose, before = self.sizes[key]
        self.sizes[key] = purpose, size
        self.add(purpose, size - before)

    def add(self, purpose: str, size: int) -> None:
        if purpose == "host":
            self.host += size
            self.host_peak = max(self.host, self.host_peak)
            return
        self.now[purpose] += size
        self.total += size
        if self.total > self.peaks.get(self.segment, (-1,))[0]:
            self.peaks[self.segment] = self.total, dict(self.now)

    def free(self, key: int) -> None:
        purpose, size = self.sizes.pop(key)
        self.pinned.discard(key)
        self.add(purpose, -size)

    def label(self, purpose: str, tensors: Any) -> None:
        """Give existing tensors a purpose."""
        for x in tensors:
            key = x.untyped_storage()._cdata
            before, size = self.sizes[key]
            if before != "host":  # as offloaded moments are
                self.sizes[key] = purpose, size
                self.now[before] -= size
                self.now[purpose] += size

    def site(self) -> str:
        """What allocates: FSDP, or the line of our code that is being executed."""
        frame, of_fsdp = sys._getframe(1), False
        while frame is not None:
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if file.endswith(FSDP):
                of_fsdp = True
                if name == "foreach_reduce" and "reduce_scatter_input" in frame.f_locals:
                    return "gradients"  # the output of the reduce-scatter, which they are views of
            elif of_fsdp:
                return "gathered layers"
            elif file.startswith(str(ROOT)) and "site-packages" not in file and file != __file__:
                return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno} {name}"
            frame = frame.f_back
        return "backward"

    def inspect(self, func: Any, inputs: list[Tensor], target: Any) -> None:
        """Find what makes a GPU wait, or compute in more than bf16."""
        name, found = func._opname, []
        if name == "_local_scalar_dense":
            found = ["the host waits for a value"]
        elif name == "copy_" or name == "_to_copy" and target is not None:
            source = inputs[-1]
            to = inputs[0].device if name == "copy_" else torch.device(target)
            if to.type == "cpu" and source.device.type == DEVICE:
                found = ["the host waits for a copy"]
            elif source.device.type == "cpu" and to.type == DEVICE and (
                    source.untyped_storage()._cdata not in self.pinned):
                found = ["a copy from pageable memory"]
        dtypes = {x.dtype for x in inputs if x.is_floating_point() and x.ndim}
        if torch.float64 in dtypes:
            found.append("float64")
        if self.block and torch.float32 in dtypes and (
                func._overloadpacket in flop_registry or torch.bfloat16 in dtypes
                and name not in CASTS):
            found.append("fp32 in a block")
        for what in found:
            self.figures["finding", what, self.site()] += 1

    def watch(self, net: nn.Module, name: str) -> None:
        """Let each block of a DiT begin a segment of the run."""
        kinds = [type(block).__name__ for block in net.blocks]
        for i, block in enumerate(net.blocks):
            ends = (i == kinds.index(kinds[i]), i == len(kinds) - 1 or kinds[i + 1] != kinds[i])
            block._forward = self.in_block(block._forward, name, i, (kinds[i], str(ends)))

    def in_block(self, forward: Callable, net: str, i: int, kind: tuple[str, ...]) -> Callable:
        def run(*args: Any) -> Tensor:
            backward = torch._C._current_graph_task_id() != -1
            step = -1 if backward else 1
            if self.run != (net, backward, i - step):
                self.passes += 1
            self.run = net, backward, i
            self.segment = (*self.segment[:1], net, f"pass {self.passes}", *kind)
            self.block += 1
            try:
                return forward(*args)
            finally:
                self.block -= 1
        return run

    def begin(self, name: str) -> None:
        """Begin a part of the run."""
        self.segment, self.run, self.passes = (name,), ("", False, 0), 0


# ------------------------------------------------------------------------------------- the stage

@dataclass
class NoTrajectories:
    """As many trajectories of zeros as are read, as Loader reads them."""
    manifest: dict
    t_key: list[float]
    cond: dict[str, Tensor]

    def __len__(self) -> int:
        return 10 ** 6

    def read(self, i: int, ks: list[int]) -> tuple[Tensor, dict, str]:
        return torch.zeros(len(ks), *self.manifest["shape"]), self.cond, ""


def local(tensors: Any) -> list[Tensor]:
    return [local_rows(x)[0] for x in tensors]


def rehearse_distill(cfg: Any, ranks: Ranks, meter: Meter) -> None:
    """distill.py: build, an iteration at k = m - 1 and one at k = 0, a checkpoint's copy."""
    m = len(cfg.key) - 1
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch // ranks.dp_size)
    cfg.batch = min(cfg.batch // (cfg.micro_batch * ranks.dp_size), 2) * (
        cfg.micro_batch * ranks.dp_size)  # a third micro-batch adds nothing to the peak
    t_key = key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1]
    data = NoTrajectories({"shape": latent_shape(cfg.frames, cfg.height, cfg.width)}, t_key,
                          random_states(cfg))
    state = distill.build(cfg, t_key, ranks)
    tokens = math.prod(state.student.token_grid(*data.manifest["shape"][1:]))
    for name in ("student", "teacher", "heads"):
        meter.label(name, local(getattr(state, name).parameters()))
        if name != "heads":
            meter.watch(getattr(state, name), name)
    moments = [x for opt in state.opts.values() for s in opt.state.values() for x in s.values()]
    meter.label("AdamW", local(moments))
    loader = Loader(cfg, data, ranks)

    def at_once(work: Callable, *args: Any) -> SimpleNamespace:
        batches = work(*args)
        return SimpleNamespace(result=lambda: batches)
    loader.pool = SimpleNamespace(submit=at_once)  # another thread would not be counted
    cfg.iterations = m + 1
    for k in dict.fromkeys((m - 1, 0)):
        meter.begin(f"k={k}")
        state.step = m - 1 - k
        if k < m - 1:  # one micro-batch
            loader.slots, cfg.batch = loader.slots[:1], cfg.micro_batch * ranks.dp_size
        if k == 0 and m > 2:
            state.queues[1], state.queues[m - 1] = state.queues[m - 1], deque()
        flop = meter.figures["flop",]
        _, _, log = next(distill.algorithm_1(cfg, state, loader))
        log.gather()
        meter.figures["FLOP", "counted", f"k={k}"] = meter.figures["flop",] - flop
        meter.figures["FLOP", "formula", f"k={k}"] = step_flops(
            cfg, state, k, tokens, recomputed=True) / ranks.world
    tensors, _ = checkpoint.Saver.copy_to_host(
        SimpleNamespace(ranks=ranks, group=None),
        dict(checkpoint.flatten(checkpoint.tensors_of(state, {}))))
    meter.figures["checkpoint",] = total_bytes(list(tensors.values()))


# --------------------------------------------------------------------------------- extrapolation

def shallow(sizes: model.Sizes, depth: int) -> model.Sizes:
    """Sizes with fewer blocks; depth in units of the smallest that keeps the ratio of kinds."""
    if sizes.family == "wan":
        return dataclasses.replace(sizes, num_layers=depth)
    unit = math.gcd(sizes.num_double, sizes.num_single)
    return dataclasses.replace(sizes, num_double=sizes.num_double // unit * depth,
                               num_single=sizes.num_single // unit * depth)


def run_at(cfg: Any, gpus: int, sizes: model.Sizes) -> Figures:
    """The figures with a DiT of these sizes."""
    cfg, full = dataclasses.replace(cfg), sizes_of(cfg.preset).num_layers
    for name in ("tap", "tap_data"):
        if getattr(cfg, name) is not None:
            at = (getattr(cfg, name) + 1) * sizes.num_layers / full
            setattr(cfg, name, math.ceil(at) - 1)
    with patch.dict(model.PRESETS, {cfg.preset: sizes}), pretended_ranks(
            gpus, cfg.sp, sizes.num_heads) as ranks, Meter() as meter:
        rehearse_distill(cfg, ranks, meter)
        for segment, (_, parts) in meter.peaks.items():
            meter.figures.update({("peak", segment, part): n for part, n in parts.items()})
        meter.figures["host",] = meter.host_peak
    return meter.figures


def rehearse(cfg: Any, gpus: int, complete: bool = False) -> Figures:
    """The figures at the full depth, from two runs with fewer blocks, or of one with
    all blocks if `complete`."""
    sizes = sizes_of(cfg.preset)
    few, more = (shallow(sizes, d) for d in ((3, 6) if sizes.family == "wan" else (2, 3)))
    if complete or more.num_layers >= sizes.num_layers:
        return run_at(cfg, gpus, sizes)
    a, b = (run_at(cfg, gpus, s) for s in (few, more))
    slope = (sizes.num_layers - few.num_layers) / (more.num_layers - few.num_layers)
    segments = {key[1] for key in a if key[0] == "peak"}  # the others are like their neighbours
    return Counter({key: a[key] + slope * (b[key] - a[key]) for key in a | b
                    if key[0] != "peak" or key[1] in segments})


def peak_of(figures: Figures) -> dict[str, float]:
    """Bytes at the peak of the run, by purpose."""
    segments: dict[tuple, dict[str, float]] = {}
    for key, size in figures.items():
        if key[0] == "peak":
            segments.setdefault(key[1], {})[key[2]] = size
    return max(segments.values(), key=lambda parts: sum(parts.values()))


# ------------------------------------------------------------------------------------ the report

def plan_of(cfg: Any, gpus: int, sp: int, offload: bool = False) -> dict[str, float]:
    """Bytes of distill.py's memory plan on a GPU, by purpose."""
    plan = memory_parts(dataclasses.replace(cfg, offload=offload), latent_shape(
        cfg.frames, cfg.height, cfg.width), torch.device("cuda"), gpus, sp)
    return plan | {ACTIVATIONS: sum(plan.pop(name) for name in (
        "activations", "features, heads", "latents"))}


ACTIVATIONS = "activations, latents"


def by_purpose(parts: dict[str, float]) -> dict[str, float]:
    """Bytes at a peak by the purposes of the memory plan."""
    named = {name: size for name, size in parts.items() if ":" not in name and name != "heads"}
    return named | {ACTIVATIONS: sum(parts.values()) - sum(named.values())}


def format_figures(figures: Figures, plan: dict[str, float], gib: float) -> str:
    """All figures as text."""
    parts = peak_of(figures)
    purposes, total = by_purpose(parts), sum(parts.values())
    lines = [f"{'GiB of a GPU at the peak':<40}{'rehearsed':>10}{'plan':>10}"]
    for name in dict.fromkeys((*plan, *purposes)):
        lines.append(f"  {name:<38}{purposes.get(name, 0) / GiB:10.3f}"
                     f"{plan.get(name, 0) / GiB:10.3f}")
    lines.append(f"  {'together':<38}{total / GiB:10.3f}{sum(plan.values()) / GiB:10.3f}")
    fits = total < USABLE_MEMORY * gib * GiB
    lines.append(f"  {'fits' if fits else 'DOES NOT FIT'} in {gib:g} GiB, of which "
                 f"{USABLE_MEMORY:.0%} are usable")
    lines.append("most of the activations, GiB, by the line that allocates them")
    of_lines = Counter({name: size for name, size in parts.items() if ":" in name})
    lines += [f"  {name:<38}{size / GiB:10.2f}" for name, size in of_lines.most_common(8)]
    rest = {key: n for key, n in figures.items() if key[0] not in ("peak", "finding", "flop")}
    for (kind, *names), number in sorted(rest.items()):
        unit, by = ("TFLOP", 1e12) if kind == "FLOP" else ("GB", 1e9)
        lines.append(f"{' '.join((kind, *names)):<40}{number / by:10.2f} {unit}")
    found = sorted((names, number) for (kind, *names), number in figures.items()
                   if kind == "finding")
    lines += [f"{what}: {where} ({number:.0f} times)" for (what, where), number in found]
    return "\n".join(lines)


def plan_table() -> str:
    """The table of memory plans in docs/scaling.md."""
    columns = [(1, 1, False), *((n, sp, off) for n in (4, 8) for sp, off in (
        (1, False), (4, False), *(((8, False),) if n == 8 else ()), (n, True)))]
    head = [f"{n}{f', `sp={sp}`' * (sp > 1)}{', off' * off}" for n, sp, off in columns]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for path in sorted(ROOT.glob("configs/[hw]*.yaml")):
        cfg = load_config(distill.Config, "distill", [str(path), "weights=random"])
        heads = sizes_of(cfg.preset).num_heads
        cells = [f"{sum(plan_of(cfg, gpus, sp, off).values()) / GiB:.0f}" if heads % sp == 0
                 else "–" for gpus, sp, off in columns]
        lines.append(f"| {path.stem} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Read the options, rehearse, report."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?", default="configs/tiny.yaml")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gib", type=float, default=80)
    parser.add_argument("--depth", choices=("few", "all"), default="few")
    parser.add_argument("--plans", action="store_true")
    own, rest = parser.parse_known_args()
    if own.plans:
        return print(plan_table())
    started = time.perf_counter()
    cfg = load_config(distill.Config, "distill", [own.config, "--weights=random", *rest], __doc__,
                      "-m tools.rehearse")
    check_model(cfg)
    figures = rehearse(cfg, own.gpus, own.depth == "all")
    plan = plan_of(cfg, own.gpus, cfg.sp, cfg.offload)
    print(f"distill: {cfg.origin} on {own.gpus} GPUs, rehearsed in "
          f"{time.perf_counter() - started:.0f} s\n{format_figures(figures, plan, own.gib)}")


if __name__ == "__main__":
    cli(main)
