"""A GPU and ranks that do not exist, for tools/rehearse.py: networks run on them without data or
files, and a meter counts what they would take."""

import contextlib
import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
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
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import flop_registry

import artifacts.lora
import common.ranks
import distill
import experts
import frozen.image
import frozen.load
import frozen.text
import model
from common.config import Shared
from common.files import ROOT
from common.names import EXPERTS
from common.ranks import Ranks, local_rows, setup_distributed
from experts import Experts
from tools.networks import frozen_arguments, ids

DEVICE = "pretended"  # a device type that exists after register_device()
Figures = Counter[tuple[str, ...]]  # (kind, …) -> number; all are linear in a DiT's depth

# ------------------------------------------------------------------------------ pretended device


def register_device() -> None:
    """Give this process a device type that is not a CPU and has no memory, and a process group that
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


def nothing(*_: Any, **__: Any) -> None:
    """In place of what reads or writes files."""


DIT_FILES = {f"{name}.x": SimpleNamespace(file=Path("random")) for name in EXPERTS}
# What the stages read, replaced: no weights, prompts of full length, images of zeros.
REPLACED: dict[Any, dict[str, Any]] = {
    experts: {"check_sizes": nothing, "dit_tensors": lambda _: DIT_FILES},
    model: {"load_module": without_reading},
    frozen.load: {
        "load_module": without_reading, "component": lambda *_, **__: Path(__file__),
        "open_tensors": lambda _: {}, "safetensors_metadata": lambda _: {},
        "Tokenizer": lambda _, n: Mock(size=0, return_value=(ids(n), ids(n) + 1))},
    frozen.text: {"read_tokenizer": nothing},
    frozen.text.HunyuanText: {"ids": lambda self, _: (ids(self.llm_len)[0], ids(self.clip_len)[0])},
    frozen.image: {"read_image": lambda _: torch.zeros(3, 720, 1280)},
    distill: {"fingerprint": nothing, "load_high_student": lambda cfg, _, dtype, ranks:
              without_reading(model.empty_dit(cfg.preset, dtype, ranks, experts="high")
                              ).requires_grad_(False).high_noise_model},
    artifacts.lora: {"load_module": without_reading},
    common.ranks: {"pick_device": lambda _: torch.device(DEVICE, 0)},
    torch: {"tensor": copied_tensor},
    F: {"scaled_dot_product_attention": gpu_attention}}


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
        x.untyped_storage().pinned = True
        return x

    def build(cls: type, found: dict, *others: Any) -> nn.Module:
        return build_module(cls, found | arguments[cls], *others)

    register_device()
    resize, build_module = torch.UntypedStorage.resize_, frozen.load.build_module
    arguments = frozen_arguments(cfg)
    dist.init_process_group("pretended", store=fake_pg.FakeStore(), rank=0, world_size=gpus)
    pairs = getattr(cfg, "cfg_parallel", False) and cfg.guidance != 1
    with contextlib.ExitStack() as stack:
        for place, others in REPLACED.items():
            stack.enter_context(patch.multiple(place, **others))
        stack.enter_context(patch.object(torch.UntypedStorage, "resize_", resized))
        stack.enter_context(patch.object(Tensor, "pin_memory", pin))
        stack.enter_context(patch.object(frozen.load, "build_module", build))
        # Backward runs in this thread, and no exception of Python passes through its C++ code.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(set_checkpoint_early_stop(False))
        clear_caches()
        stack.enter_context(meter)
        try:
            yield setup_distributed(cfg, cfg.sp, heads, cfg_parallel=pairs)
        finally:
            clear_caches()
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------ the meter

FSDP = ("_fsdp_collectives.py", "_fsdp_param.py", "_fsdp_param_group.py")
OTHERS = f"{ROOT}/tools/"  # is not rehearsed
CASTS = ("_to_copy", "copy_", "native_layer_norm", "cat")
KINDS = {"_allgather_base_": "all-gather", "allgather_": "all-gather", "alltoall_base_":
         "all-to-all", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce",
         "broadcast_": "broadcast"}


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in a value or in nested lists of them."""
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


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
        self.run, self.passes, self.block, self.segment = ("", False, 0), 0, 0, ("build",)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        if DTensor in types:
            return NotImplemented  # DTensor calls this again with its local tensors
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
        if not all(fake):  # tensors of the host become ones without data
            args, kwargs = tree_map_only(Tensor, lambda x: x if isinstance(
                x, FakeTensor) or not x.is_cpu else self.fake.from_tensor(x), (args, kwargs))
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
            weakref.finalize(storage, self.free, key)
        purpose, before = self.sizes.get(key, (purpose, 0))
        self.sizes[key] = purpose, size
        self.add(purpose, size - before)

    def add(self, purpose: str, size: int) -> None:
        self.now[purpose] += size
        self.total += size
        if self.total > self.peaks.get(self.segment, (-1,))[0]:
            self.peaks[self.segment] = self.total, dict(self.now)

    def free(self, key: int) -> None:
        purpose, size = self.sizes.pop(key)
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
            elif file.startswith(f"{ROOT}/") and not file.startswith(OTHERS) and (
                    "site-packages" not in file):
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
            ends = source.device.type, to.type
            if ends == (DEVICE, "cpu"):
                found = ["the host waits for a copy"]
            elif ends == ("cpu", DEVICE) and not hasattr(source.untyped_storage(), "pinned"):
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
