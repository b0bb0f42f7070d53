"""A stage at full size on pretended GPUs: memory, traffic and work, before anyone rents them.

    python -m tools.rehearse CONFIG [--stage distill|synvid|sample] [--gpus 8] [field=value]
    python -m tools.rehearse --table FILE   # the table of docs/scaling.md; resumes from FILE

In:  CONFIG and its section of the stage. No weights, no GPU.
Out: peak memory of a GPU and what it consists of, for distill next to its memory plan and host
     memory of a checkpoint; traffic and FLOPs by part of the run; where the host waits for the GPU,
     copies from pageable memory, or a block computes in fp32.

distill runs an iteration at k = m - 1 (with iterations=1 only this one) and one at k = 0, synvid a
batch of two steps, sample a batch of two steps (the teacher's with teacher=true), with all encoders
and the VAE. The stage's own functions run on tensors without data ("fake" tensors of torch), as
rank 0 of a process group that moves nothing. Few blocks are run, at two depths (`--depth all`: all
blocks): every figure is linear in the depth at each point of the run. What a GPU adds is not
counted: the CUDA context, workspaces of kernels and NCCL, fragmentation of the allocator.
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
from unittest.mock import Mock, patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed import fake_pg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import flop_registry

import artifacts.lora
import common.ranks
import distill
import frozen.image
import frozen.load
import frozen.text
import frozen.vae
import model
import sample
import synvid
from artifacts.videos import Video
from common.config import Shared, load_config
from common.files import ROOT, append_log, read_log
from common.names import EXPERTS
from common.prompts import Prompt
from common.ranks import Ranks, cli, compute_dtype, local_rows, setup_distributed
from experts import Experts
from model import check_model, empty_dit, key_times, latent_shape, load_dit, sizes_of, time_grid
from tools.networks import random_states
from training import checkpoint
from training.data import Loader, trained_steps
from training.memory import USABLE_MEMORY, memory_parts, meta_student
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
    if mask is None and q.shape[-1] <= 256:  # the widest head of flash kernels
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    if mask is not None:
        mask = torch.zeros((), dtype=q.dtype, device=q.device).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)[0]


def without_reading(module: nn.Module, tensors: Any = None, name: str = "",
                    dtype: torch.dtype | None = None, device: Any = DEVICE) -> nn.Module:
    """weights.load_module without its file."""
    return module.to(dtype).to_empty(device=device)


def copied_tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """torch.tensor, which builds a tensor of the host first and copies it to the device."""
    return TENSOR(data, **options).to(device)


TENSOR = torch.tensor


def ids(length: int) -> Tensor:
    return torch.zeros(length, dtype=torch.long)


def decoded_shapes(shape: tuple[int, ...] | None, group: dist.ProcessGroup) -> list[tuple]:
    """In place of gathering them: the shapes of the videos of the tiles in HunyuanVAE.run_tiles."""
    return [(1, 3, 4 * tile.shape[2] - 3, *(8 * size for size in tile.shape[3:]))
            for tile in sys._getframe(1).f_locals["batch"]]


def nothing(*_: Any, **__: Any) -> None:
    """In place of what reads or writes files."""


DIT_FILES = {f"{name}.x": SimpleNamespace(file=Path("random")) for name in EXPERTS}
# What the stages read, replaced: no weights, prompts of full length, images of zeros.
REPLACED: dict[Any, dict[str, Any]] = {
    model: {"load_module": without_reading, "check_sizes": nothing,
            "dit_tensors": lambda _: DIT_FILES},
    frozen.load: {
        "load_module": without_reading, "component": lambda *_, **__: Path(__file__),
        "open_tensors": lambda _: {}, "Tokenizer": lambda _, n: Mock(size=0, return_value=(
            ids(n)[None], ids(n)[None] + 1))},
    frozen.text: {"read_tokenizer": nothing},
    frozen.text.HunyuanText: {"ids": lambda self, _: (ids(self.llm_len), ids(self.clip_len))},
    frozen.vae: {"gather_values": decoded_shapes},
    frozen.image: {"read_image": lambda _: torch.zeros(3, 720, 1280)},
    distill: {"fingerprint": nothing, "load_high_student": lambda cfg, _, dtype, ranks:
              without_reading(empty_dit(cfg.preset, dtype, ranks, only=EXPERTS[0]))},
    common.ranks: {"pick_device": lambda _: torch.device(DEVICE, 0)},
    torch: {"tensor": copied_tensor},
    F: {"scaled_dot_product_attention": gpu_attention}}
REPLACED[artifacts.lora] = REPLACED[model]


def clear_caches() -> None:
    """Free the tables on the device, which have no data here."""
    for function in (model.rope_table, model.frequencies):
        function.cache_clear()


@contextlib.contextmanager
def pretended_ranks(cfg: Shared, gpus: int, heads: int, meter: "Meter") -> Iterator[Ranks]:
    """Be rank 0 of `gpus` ranks that do not exist; weights are not read from files."""
    def resized(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        meter.count(storage)

    def pin(x: Tensor) -> Tensor:
        meter.pinned.add(x.untyped_storage()._cdata)
        return x

    register_device()
    resize = torch.UntypedStorage.resize_
    dist.init_process_group("pretended", store=fake_pg.FakeStore(), rank=0, world_size=gpus)
    pairs = getattr(cfg, "cfg_parallel", False) and cfg.guidance != 1
    with contextlib.ExitStack() as stack:
        for place, others in (*REPLACED.items(), (torch.UntypedStorage, {"resize_": resized}),
                              (Tensor, {"pin_memory": pin})):
            stack.enter_context(patch.multiple(place, **others))
        # Backward runs in this thread, and no exception of Python passes through its C++ code.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(set_checkpoint_early_stop(False))
        clear_caches()
        stack.enter_context(meter)
        try:
            yield setup_distributed("auto", cfg.sp, heads, cfg_parallel=pairs)
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


def total_bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors_in(tensors))


class Meter(TorchDispatchMode):
    """Runs operations on the pretended device without data, and counts what they would take.

    figures: ("FLOP", …), ("traffic", kind, part), ("finding", what, where), …; peaks: by segment of
    the run, the bytes that are allocated at its peak, by purpose or line of code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.figures: Figures = Counter()
        self.sizes: dict[int, tuple[str, int]] = {}   # by storage, its purpose and bytes
        self.now, self.total = Counter(), 0
        self.peaks: dict[tuple[str, ...], tuple[int, dict[str, int]]] = {}
        self.pinned: set[int] = set()
        self.run, self.passes, self.block, self.segment = ("", False, 0), 0, 0, ("build",)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again with its local tensors
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # more than half of all calls
        kwargs = kwargs or {}
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # DTensor computes the shape of a result
        inputs = tensors_in((args, *kwargs.values()))
        fake = [isinstance(x, FakeTensor) for x in inputs]
        target = kwargs.get("device")
        large = func is torch.ops.aten.zeros.default and math.prod(args[0]) > 10 ** 6
        if not (any(fake) or large or target is not None and torch.device(target).type == DEVICE):
            return func(*args, **kwargs)
        self.inspect(func, inputs, target)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        if func is torch.ops.aten.copy_.default and not fake[0]:
            return args[0]  # to host memory
        try:
            out = self.fake.__torch_dispatch__(func, types, args, kwargs)
        except Exception as e:  # of two devices, or of shapes; backward would hide it
            print(f"{self.site()}: {func}: {e}", file=sys.stderr, flush=True)
            raise
        self.account(func, args, kwargs, out)
        return out

    def account(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Count an operation's memory, FLOPs and traffic."""
        purpose = None
        for x in tensors_in(out):
            if isinstance(x, FakeTensor) and x.fake_device.type == DEVICE:
                storage = x.untyped_storage()
                if storage._cdata not in self.sizes:
                    purpose = purpose or self.site()
                    self.count(storage, purpose)
        part = self.segment[0]
        if func._overloadpacket in flop_registry:
            of_dit = self.block or torch._C._current_graph_task_id() != -1
            self.figures["FLOP", "counted" if of_dit else "of other layers", part] += flop_registry[
                func._overloadpacket](*args, **kwargs, out_val=out)
        if func.namespace == "c10d" and func._opname in KINDS:
            size = next(dist.ProcessGroup.unbox(x).size() for x in args
                        if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
            moved = max(total_bytes(args[0]), total_bytes(args[1])) * (size - 1) / size
            kind = KINDS[func._opname]
            self.figures["traffic", kind, part] += moved * (2 if kind == "all-reduce" else 1)

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
        self.now[purpose] += size
        self.total += size
        if self.total > self.peaks.get(self.segment, (-1,))[0]:
            self.peaks[self.segment] = self.total, dict(self.now)

    def free(self, key: int) -> None:
        purpose, size = self.sizes.pop(key)
        self.pinned.discard(key)
        self.add(purpose, -size)

    def label(self, purpose: str, tensors: Any) -> None:
        """Give existing tensors a purpose; those in host memory are not counted."""
        for x in tensors:
            key = local_rows(x)[0].untyped_storage()._cdata
            before, size = self.sizes.get(key, (purpose, 0))
            if before != purpose:
                self.sizes[key] = purpose, size
                self.now[before] -= size
                self.now[purpose] += size

    def site(self) -> str:
        """What allocates: FSDP, a network's weights, or the line of our code that is executed."""
        frame, of_fsdp = sys._getframe(1), False
        while frame is not None:
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if file.endswith(FSDP):
                of_fsdp = True
                if name == "foreach_reduce" and "reduce_scatter_input" in frame.f_locals:
                    return "gradients"  # the output of the reduce-scatter, which they are views of
            elif of_fsdp:
                return "gathered layers"
            elif name == "without_reading":
                return type(frame.f_locals["module"]).__name__.removeprefix("FSDP")
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

    def watch(self, net: nn.Module, name: str) -> nn.Module:
        """Let each block of a DiT begin a segment of the run."""
        for dit in net.children() if isinstance(net, Experts) else (net,):
            kinds = [type(block).__name__ for block in dit.blocks]
            for i, block in enumerate(dit.blocks):
                ends = i == kinds.index(kinds[i]), i == len(kinds) - 1 or kinds[i + 1] != kinds[i]
                block._forward = self.in_block(block._forward, name, i, (kinds[i], str(ends)))
        return net

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


# ------------------------------------------------------------------------------------ the stages

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


def tokens_of(cfg: Shared) -> tuple[nn.Module, int]:
    """The config's DiT on the meta device, and its tokens of a sample."""
    dit = meta_student(sizes_of(cfg.preset), None)
    return dit, math.prod(dit.token_grid(*latent_shape(cfg.frames, cfg.height, cfg.width)[1:]))


def rehearse_distill(cfg: distill.Config, ranks: Ranks, meter: Meter) -> None:
    """distill.py: build, an iteration at the first k and one at the last, a checkpoint's copy."""
    cfg.micro_batch = min(cfg.micro_batch, cfg.batch // ranks.dp_size)
    size = cfg.micro_batch * ranks.dp_size
    cfg.batch = min(cfg.batch // size, 2) * size  # a third micro-batch adds nothing to the peak
    t_key = key_times(cfg.family, cfg.n, cfg.shift, cfg.key)[::-1]
    data = NoTrajectories({"shape": latent_shape(cfg.frames, cfg.height, cfg.width)}, t_key,
                          random_states(cfg))
    state = distill.build(cfg, t_key, ranks)
    weights = [*state.student.parameters(), *state.teacher.parameters()]
    meter.label("student", [p for p in weights if p.dtype == torch.float32])
    meter.label("teacher", [p for p in weights if p.dtype != torch.float32])
    meter.label("heads", state.heads.parameters())
    meter.label("AdamW", [x for opt in state.opts.values() for s in opt.state.values()
                          for x in s.values()])
    for name in ("student", "teacher"):
        meter.watch(getattr(state, name), name)
    loader, ks = Loader(cfg, data, ranks), trained_steps(cfg, t_key)
    loader.pool = SimpleNamespace(submit=lambda read, step: SimpleNamespace(
        result=lambda: read(step)))  # another thread would not be counted
    parts = [ks[0], ks[-1]][:min(cfg.iterations, len(ks))]
    cfg.iterations = len(ks)
    for k in parts:
        meter.begin(f"k={k}")
        state.step = ks.index(k)
        if k != ks[0]:  # one micro-batch, with the latents that the steps between would have made
            loader.slots, cfg.batch = loader.slots[:1], size
            state.queues[k + 1] = deque(state.queues[k + 1] or state.queues[ks[0]])
        _, _, log = next(distill.algorithm_1(cfg, state, loader))
        log.gather()
        meter.figures["FLOP", "formula", f"k={k}"] = step_flops(
            cfg, state, k, tokens_of(cfg)[1], recomputed=True) / ranks.world
    meter.begin("checkpoint")
    tensors, _ = checkpoint.Saver.copy_to_host(
        SimpleNamespace(ranks=ranks, group=None),
        dict(checkpoint.flatten(checkpoint.tensors_of(state, {}))))
    meter.figures["checkpoint",] = total_bytes(list(tensors.values()))


PROMPT = Prompt("a prompt", Path("image.png"))


def rehearse_synvid(cfg: synvid.Config, ranks: Ranks, meter: Meter) -> None:
    """synvid.py: a batch of prompts, two steps of the teacher, a decoded video."""
    shape = latent_shape(cfg.frames, cfg.height, cfg.width)
    manifest, cfg.n, cfg.videos = {"shape": shape, "stored": [1, 2], "n": 2}, 2, 1
    meter.begin("synvid")
    with patch.multiple(
            synvid, load_dit=lambda *args: meter.watch(load_dit(*args), "DiT"),
            read_manifest=lambda _: manifest, write_trajectory=nothing, write_video=nothing,
            read_trajectory=lambda *_: (torch.zeros(1, *shape), {}, ""), print_cost=nothing,
            trajectory_path=lambda *_: Path(__file__)), contextlib.redirect_stdout(None):
        synvid.generate(cfg, [PROMPT], Path("random"), manifest, range(cfg.batch),
                        list(range(cfg.batch)), ranks)
    count_evaluations(cfg, ranks, meter)


def rehearse_sample(cfg: sample.Config, ranks: Ranks, meter: Meter) -> None:
    """sample.py: a batch of prompts, two steps of the student or the teacher, decoded videos."""
    def load(weights: str, preset: str, dtype: torch.dtype, *args: Any) -> nn.Module:
        return meter.watch(load_dit(weights, preset, dtype, *args), "DiT").requires_grad_(False)

    meter.begin("sample")
    sample.drop_guidance(cfg)
    video = Video(0, PROMPT, 0, cfg.height, cfg.width, Path(__file__).name)
    with patch.multiple(
            sample, load_dit=load, write_video=nothing, append_log=nothing,
            load_student=lambda cfg, _, device, shards, scale: load(
                cfg.weights, cfg.preset, compute_dtype(device), device, shards)):
        sample.sample_videos(cfg, [video] * cfg.batch, time_grid(
            cfg.family, 2, cfg.shift).tolist(), "", Path(__file__), ranks)
    count_evaluations(cfg, ranks, meter)


def count_evaluations(cfg: Any, ranks: Ranks, meter: Meter) -> None:
    """FLOPs of a rank in two steps of a batch, by the DiT's formula."""
    dit, tokens = tokens_of(cfg)
    flop = 2 * (1 if cfg.guidance == 1 else 2) * cfg.batch * dit.flops(tokens) / ranks.replica_size
    meter.figures["FLOP", "formula", meter.segment[0]] = flop


STAGES: dict[str, tuple[type, Callable]] = {
    "distill": (distill.Config, rehearse_distill), "synvid": (synvid.Config, rehearse_synvid),
    "sample": (sample.Config, rehearse_sample)}

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
        if getattr(cfg, name, None) is not None:
            at = (getattr(cfg, name) + 1) * sizes.num_layers / full
            setattr(cfg, name, math.ceil(at) - 1)
    stage = next(stage for of, stage in STAGES.values() if isinstance(cfg, of))
    meter = Meter()
    with patch.dict(model.PRESETS, {cfg.preset: sizes}), pretended_ranks(
            cfg, gpus, sizes.num_heads, meter) as ranks:
        stage(cfg, ranks, meter)
        for segment, (_, parts) in meter.peaks.items():
            meter.figures.update({("peak", segment, part): n for part, n in parts.items()})
    return meter.figures


def rehearse(cfg: Any, gpus: int, complete: bool = False) -> Figures:
    """The figures at the full depth, from two runs with fewer blocks, or of one with
    all blocks if `complete`."""
    sizes = sizes_of(cfg.preset)
    depths = (3, 6) if sizes.family == "wan" and getattr(cfg, "iterations", 1) > 1 else (2, 3)
    few, more = (shallow(sizes, depth) for depth in depths)
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

ACTIVATIONS = "activations, latents"


def plan_of(cfg: distill.Config, gpus: int) -> dict[str, float]:
    """Bytes of distill.py's memory plan on a GPU, by purpose."""
    plan = memory_parts(cfg, latent_shape(cfg.frames, cfg.height, cfg.width),
                        torch.device("cuda"), gpus, cfg.sp)
    return plan | {ACTIVATIONS: sum(plan.pop(name) for name in (
        "activations", "features, heads", "latents"))}


def by_purpose(parts: dict[str, float]) -> dict[str, float]:
    """Bytes at a peak by the purposes of the memory plan."""
    named = {name: size for name, size in parts.items() if ":" not in name and name != "heads"}
    return named | {ACTIVATIONS: sum(parts.values()) - sum(named.values())}


def format_figures(figures: Figures, plan: dict[str, float], gib: float) -> str:
    """All figures as text; plan, where the stage has one."""
    parts = peak_of(figures)
    purposes, total = by_purpose(parts), sum(parts.values())
    rows = [(name, purposes.get(name, 0), plan.get(name, 0))
            for name in dict.fromkeys((*plan, *purposes))]
    lines = [f"{'GiB of a GPU at the peak':<40}{'rehearsed':>10}{'plan' * bool(plan):>10}"]
    for name, size, planned in (*rows, ("together", total, sum(plan.values()))):
        lines.append(f"  {name:<38}{size / GiB:10.3f}" + f"{planned / GiB:10.3f}" * bool(plan))
    fits = total < USABLE_MEMORY * gib * GiB
    lines.append(f"  {'fits' if fits else 'DOES NOT FIT'} in {gib:g} GiB, of which "
                 f"{USABLE_MEMORY:.0%} are usable")
    lines.append("most of the activations, GiB, by the line that allocates them")
    of_lines = Counter({name: size for name, size in parts.items() if ":" in name})
    lines += [f"  {name:<38}{size / GiB:10.2f}" for name, size in of_lines.most_common(8)]
    rest = {key: n for key, n in figures.items() if key[0] not in ("peak", "finding")}
    for key, number in sorted(rest.items()):
        unit, by = ("TFLOP", 1e12) if key[0] == "FLOP" else ("GB", 1e9)
        lines.append(f"{' '.join(key):<40}{number / by:10.2f} {unit}")
    found = sorted((names, number) for (kind, *names), number in figures.items()
                   if kind == "finding")
    lines += [f"{what}: {where} ({number:.0f} times)" for (what, where), number in found]
    return "\n".join(lines)


# -------------------------------------------------------------------- the table of docs/scaling.md

GPUS, SP = (1, 4, 8), (1, 2, 4, 8)
VARIANTS = ("hunyuan-t2v-544p offload=true", "hunyuan-t2v-544p lora=64",
            "wan-t2v-14b-480p offload=true", "wan-t2v-14b-480p lora=64",
            *(f"wan22-t2v-a14b-480p {x}" for x in ("offload=true", "experts=high", "experts=low")))
ROWS = [(name, sp) for name in sorted(path.stem for path in ROOT.glob("configs/[hw]*.yaml"))
        for sp in SP] + [(name, sp) for name in VARIANTS for sp in (1, 4)]


def table_config(row: str, sp: int) -> distill.Config:
    """The config of a row, which is a name in configs/ and settings; only k = m - 1 is run."""
    name, *settings = row.split()
    return load_config(distill.Config, "distill", [
        str(ROOT / f"configs/{name}.yaml"), "weights=random", "iterations=1", f"sp={sp}",
        *settings])


def make_table(path: Path) -> str:
    """GiB of a GPU and how far the plan is from it; GB that a rank of the last column receives for
    a micro-batch at k = m - 1, and the formulas of docs/scaling.md; CPU seconds of a rehearsal.

    path: a file of JSON lines with the cells so far; missing ones are rehearsed and appended.
    """
    cells = {(x["row"], x["sp"], x["gpus"]): x for x in read_log(path, "gpus", "sp", "peak")}
    lines = ["| | `sp` | 1 GPU | 4 GPUs | 8 GPUs | FSDP2 | all-to-all | s |", "|---" * 8 + "|"]
    for row, sp in ROWS:
        cfg, found = table_config(row, sp), []
        for gpus in GPUS:
            if sp > gpus or sizes_of(cfg.preset).num_heads % sp:
                found.append("–")
                continue
            if (row, sp, gpus) not in cells:
                started, figures = time.process_time(), rehearse(cfg, gpus)
                cells[row, sp, gpus] = {
                    "row": row, "sp": sp, "gpus": gpus, "peak": sum(peak_of(figures).values()),
                    "seconds": time.process_time() - started, "traffic": {
                        key[1]: n for key, n in figures.items() if key[0] == "traffic"}}
                append_log(path, cells[row, sp, gpus])
            cell = cells[row, sp, gpus]
            difference = sum(plan_of(cfg, gpus).values()) / cell["peak"] - 1
            found.append(f"{cell['peak'] / GiB:.1f} ({difference:+.1%})")
        if found[-1] == "–":
            continue
        by_kind, micro = Counter(cell["traffic"]), 1e9 * min(cfg.batch * sp // gpus, 2)
        for rehearsed, formula in zip((by_kind["all-gather"] + by_kind["reduce-scatter"],
                                       by_kind["all-to-all"]), traffic(cfg, gpus), strict=True):
            found.append(f"{rehearsed / micro:.0f} / {formula / 1e9:.0f}")
        lines.append(f"| {row} | {sp} | {' | '.join(found)} | {cell['seconds']:.0f} |")
    return "\n".join(lines)


def traffic(cfg: distill.Config, gpus: int) -> tuple[float, float]:
    """Bytes that a rank receives for a micro-batch: by FSDP2 24 per parameter (16 with a LoRA), and
    by all-to-all q, k, v and the output in each of 11 passes through the blocks."""
    (dit, tokens), sp = tokens_of(cfg), cfg.sp
    sizes = dit.cfg
    parameters = sum(p.numel() for p in dit.parameters()) * sizes.num_layers / len(dit.blocks)
    tokens += sizes.text_len * (cfg.family == "hunyuan")
    moved = 4 * tokens / sp * sizes.dim * (sp - 1) / sp * 2
    return ((24 if cfg.lora is None else 16) * parameters * (gpus - 1) / gpus,
            11 * sizes.num_layers * moved)


def main() -> None:
    """Read the options, rehearse, report."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("config", nargs="?", default="configs/tiny.yaml")
    parser.add_argument("--stage", choices=STAGES, default="distill")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gib", type=float, default=80)
    parser.add_argument("--depth", choices=("few", "all"), default="few")
    parser.add_argument("--table", type=Path)
    own, rest = parser.parse_known_args()
    if own.table is not None:
        return print(make_table(own.table))
    started = time.perf_counter()
    cfg = load_config(STAGES[own.stage][0], own.stage, [own.config, "--weights=random", *rest],
                      __doc__, "-m tools.rehearse")
    check_model(cfg)
    figures = rehearse(cfg, own.gpus, own.depth == "all")
    plan = plan_of(cfg, own.gpus) if own.stage == "distill" else {}
    print(f"{own.stage}: {cfg.origin} on {own.gpus} GPUs, rehearsed in "
          f"{time.perf_counter() - started:.0f} s\n{format_figures(figures, plan, own.gib)}")


if __name__ == "__main__":
    cli(main)
