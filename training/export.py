"""The student as others take it: one file of official names, its student.md, a diffusers folder.

Tensors are gathered from all ranks and written one at a time; nowhere is all of the student.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from common.files import replace_file, replace_folder, write_json, write_text
from common.names import official_names
from common.ranks import AgreedError, Ranks, local_rows, raise_together
from common.readme import stock_scheduler, student_readme
from common.weights import CHECKSUM, LazyTensor, stream_safetensors
from model import Sizes, sizes_of
from training.lora import lora_file, student_tensors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD = 5 * 10 ** 9  # bytes at most in a file of a diffusers folder, but for a larger tensor


def export_student(cfg: Any, state: Any, ranks: Ranks, meta: dict, name: str = "student") -> Path:
    """Write <run>/<name>.safetensors and <name>.md, and by --export diffusers <name>_diffusers,
    after --lora <name>_lora.safetensors.

    Args: cfg, distill.Config; state, its TrainState; meta["teacher"], the teacher's fingerprint.
    A write that fails is tried once more. Raises AgreedError on all ranks after that, and for
    weights that export_dtype cannot hold.
    """
    path, dtype = Path(cfg.run) / f"{name}.safetensors", DTYPES[cfg.export_dtype]
    keys = ("family", "preset", "key", "n", "shift", "cfg_scale", "embedded_guidance")
    facts = {key: getattr(cfg, key) for key in keys}
    facts |= {"t_key": state.t_key[::-1], "teacher": meta["teacher"], "iterations": state.step,
              "dtype": cfg.export_dtype}
    about = {"format": "pt", "accvideo": json.dumps(facts), "crc32": CHECKSUM}
    sizes = sizes_of(cfg.preset)
    if dtype == torch.float16:
        check_range(state.student, dtype)
    tensors = student_tensors(state.student, path, dtype)
    write_together(path, tensors, about, ranks)
    if cfg.lora is not None:
        write_together(path.with_name(f"{name}_lora.safetensors"), lora_file(state.student, path),
                       about, ranks)
    if cfg.export == "diffusers":
        export_diffusers(path.with_name(f"{name}_diffusers"), tensors, about, sizes,
                         state.t_key[::-1], ranks)
    text = student_readme(facts, sizes.takes_image, path.name)
    on_rank_0(lambda: write_text(path.with_suffix(".md"), text), ranks)
    return path


def bytes_a_parameter(cfg: Any) -> int:
    """Bytes that a student's files take for each of its parameters."""
    return DTYPES[cfg.export_dtype].itemsize * (2 if cfg.export == "diffusers" else 1)


def check_range(student: nn.Module, dtype: torch.dtype) -> None:
    """Raise AgreedError on all ranks if a weight would be infinite in dtype; each rank looks at its
    own rows."""
    error = None
    for name, p in student.named_parameters():
        local = local_rows(p)[0].detach()
        if error is None and local.numel():
            largest = max(abs(x.item()) for x in local.aminmax())
            if torch.tensor(largest).to(dtype).isinf():
                error = ValueError(f"export_dtype: got fp16; {name} holds {largest:.4g}, and fp16 "
                                   f"ends at {torch.finfo(dtype).max:.0f}: export by the same "
                                   "command with --export_dtype bf16")
    raise_together(error)


def write_together(path: Path, tensors: dict[str, LazyTensor], about: dict[str, str],
                   ranks: Ranks) -> None:
    """Write a safetensors file, its tensors gathered on all ranks, aside and renamed; a write that
    fails is tried once more. Raises AgreedError on all ranks after that."""
    for retry in (True, False):
        error = None
        try:
            if ranks.rank == 0:
                for left in path.parent.glob(f".{path.name}.*.part*"):  # by one that was killed
                    left.unlink(missing_ok=True)
                replace_file(path, lambda aside: stream_safetensors(aside, tensors, about))
            else:
                stream_safetensors(path, tensors, about, write=False)
        except ValueError as e:
            error = e
        try:
            raise_together(error)
            return
        except AgreedError as e:
            if not retry:
                raise
            if e.args[0]:
                print(f"{e}; trying once more", flush=True)


def on_rank_0(work: Callable[[], Any], ranks: Ranks) -> None:
    """Do something that writes on rank 0; its ValueError is an AgreedError on all ranks."""
    error = None
    if ranks.rank == 0:
        try:
            work()
        except ValueError as e:
            error = e
    raise_together(error)


# ---------------------------------------------------------------------------- diffusers' folder

def export_diffusers(folder: Path, tensors: dict[str, LazyTensor], about: dict[str, str],
                     sizes: Sizes, t_key: list[float], ranks: Ranks) -> None:
    """Write a folder with transformer/ and scheduler/ as diffusers loads them, aside and renamed.

    Args: tensors under official names; about, the files' metadata; t_key from 1 to 0.
    Raises AgreedError on all ranks if it cannot be written.
    """
    aside = folder.with_name(f".{folder.name}.part")

    def start() -> None:
        shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
        write_json(aside / "transformer/config.json", transformer_config(sizes))
        write_json(aside / "scheduler/scheduler_config.json", scheduler_config(sizes, t_key))

    on_rank_0(start, ranks)
    parts = shards_of(official_names(tensors, "transformer", reverse=True))
    base = "diffusion_pytorch_model"
    files = [f"{base}.safetensors"] if len(parts) == 1 else [
        f"{base}-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for file, part in zip(files, parts, strict=True):
        write_together(aside / "transformer" / file, part, about, ranks)

    def finish() -> None:
        if len(parts) > 1:
            size = sum(bytes_in(t) for part in parts for t in part.values())
            write_json(aside / f"transformer/{base}.safetensors.index.json", {
                "metadata": {"total_size": size},
                "weight_map": {name: file for file, part in zip(files, parts, strict=True)
                               for name in part}})
        replace_folder(folder, aside)

    on_rank_0(finish, ranks)


def bytes_in(tensor: LazyTensor | Tensor) -> int:
    """A tensor's size in a file."""
    return tensor.dtype.itemsize * torch.Size(tensor.shape).numel()


def shards_of(tensors: dict[str, LazyTensor]) -> list[dict[str, LazyTensor]]:
    """Tensors in their order, cut where a file would be larger than SHARD."""
    parts, size = [{}], 0
    for name, tensor in tensors.items():
        if parts[-1] and size + bytes_in(tensor) > SHARD:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += bytes_in(tensor)
    return parts


def transformer_config(sizes: Sizes) -> dict[str, Any]:
    """config.json of diffusers' WanTransformer3DModel or HunyuanVideoTransformer3DModel."""
    frames, height, _ = sizes.patch_size
    same = {"num_attention_heads": sizes.num_heads, "in_channels": sizes.in_dim,
            "attention_head_dim": sizes.dim // sizes.num_heads, "out_channels": sizes.out_dim}
    if sizes.family == "wan":
        image = sizes.takes_image
        return {"_class_name": "WanTransformer3DModel", **same, "patch_size": sizes.patch_size,
                "text_dim": sizes.text_dim, "freq_dim": sizes.freq_dim, "ffn_dim": sizes.ffn_dim,
                "num_layers": sizes.num_layers, "cross_attn_norm": True, "eps": sizes.eps,
                "qk_norm": "rms_norm_across_heads", "image_dim": sizes.image_dim if image else None,
                "added_kv_proj_dim": sizes.dim if image else None, "rope_max_seq_len": 1024}
    return {"_class_name": "HunyuanVideoTransformer3DModel", **same, "patch_size": height,
            "patch_size_t": frames, "num_layers": sizes.num_double,
            "num_single_layers": sizes.num_single, "num_refiner_layers": sizes.num_refiner,
            "mlp_ratio": sizes.ffn_dim / sizes.dim, "qk_norm": "rms_norm", "guidance_embeds": True,
            "text_embed_dim": sizes.text_dim, "pooled_projection_dim": sizes.pooled_dim,
            "rope_theta": 256.0, "rope_axes_dim": sizes.rope_dims}


def scheduler_config(sizes: Sizes, t_key: list[float]) -> dict[str, Any]:
    """scheduler_config.json of a stock scheduler that walks t_key.

    Where none does, its shift is 1 and student.md has the lines that hand it the times.
    """
    settings = stock_scheduler(sizes.family, t_key) or {"shift": 1.0}
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
            **settings}
