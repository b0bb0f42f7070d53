"""A student's file: the facts in its metadata, loading, export, and its page of instructions.

<name>.safetensors       the DiT under official names; its metadata "accvideo" holds the times
                         t_key from 1 (noise) to 0 (data), the reverse of distill.py's t_key[k],
                         the teacher's fingerprint and the settings of distillation
<name>_lora.safetensors  the LoRA that distill.py --lora trained, with the same metadata
<name>_diffusers/        transformer/ and scheduler/ as diffusers loads them (--export diffusers)
<name>.md                how other programs run it, from the templates assets/student*.md
<name>_lora.md           the same for its LoRA
<name>_comfyui.json      ComfyUI's workflow for it, to drag into ComfyUI's window

A student of Wan 2.2 A14B has two files of weights and two LoRAs, <name>_high_noise.safetensors and
<name>_low_noise.safetensors with the same metadata, and transformer_2/ in its folder. A path to
either of the two files means both.
"""

import contextlib
import itertools
import json
import math
import os
import struct
import zlib
from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from artifacts.instructions import comfyui_workflow, stock_scheduler, student_page
from artifacts.lora import is_lora, lora_changes, lora_file, student_tensors, with_lora
from common.config import Shared
from common.files import (
    NUMBER, abbreviate, crc32_of_file, parse_json, replace_file, shape_error, write_json,
    write_text)
from common.names import EXPERTS, dit_tensors, expert_paths, fingerprint, official_names
from common.ranks import (
    AgreedError, Ranks, compute_dtype, errors_on_all_ranks, local_rows, on_first_rank, print_line)
from common.weights import (
    DTYPES, LazyTensor, load_module, open_tensors, safetensors_header, safetensors_metadata)
from experts import by_expert, with_level
from model import Sizes, empty_dit, key_times, sizes_of

# ----------------------------------------------------------------- the facts in a student's file

SETTINGS = {"family": str, "preset": str, "key": [int], "n": int, "shift": NUMBER,
            "cfg_scale": NUMBER, "embedded_guidance": NUMBER, "height": int, "width": int,
            "frames": int, "fps": NUMBER}  # of the config
FACTS = {**SETTINGS, "teacher": str, "t_key": [NUMBER], "dtype": str}


def student_facts(path: Path, cfg: Shared, foreign: bool = False,
                  same_teacher: bool = False) -> dict:
    """The facts in a student's metadata, checked against the config.

    Args: path, a file, an index of shards or a folder of them; foreign, whether it may come from
    another project and contain no facts, as AccVideo's own release does: then the config's key
    timesteps are used, and teacher is None; same_teacher, whether `weights` must hold the DiT that
    it was distilled from, which sampling does not need.
    Returns FACTS and more: teacher is the fingerprint of the teacher's weights, t_key are the times
    from 1 (noise) to 0 (data). Raises FileNotFoundError, or ValueError naming the student's and the
    config's value of what does not fit.
    """
    if not path.exists() and not path.is_symlink():
        raise FileNotFoundError(f"{path}: no such student or LoRA: make it by `python distill.py "
                                "CONFIG` or tools.extract_lora, or sample the teacher: --teacher")
    tensors = open_student(path)  # raises an error for a damaged file
    count, expected = len(by_expert(tensors)), 1 if sizes_of(cfg.preset).boundary is None else 2
    if count != expected:
        raise ValueError(f"{path}: expected {expected} DiT(s) by preset '{cfg.preset}', got "
                         f"{count}: give a student of this preset")
    if os.environ.get("LOCAL_RANK", "0") == "0":  # it reads all of the file: once on each host
        for file in dict.fromkeys(t.file for t in tensors.values()):
            check_data(file)
    facts = facts_of(tensors)
    if facts or not foreign:
        check_facts(path, facts)
        for name in ("family", "preset", "embedded_guidance"):
            if facts[name] != getattr(cfg, name):
                raise ValueError(f"{path}: the student's {name} is {abbreviate(facts[name])}, the "
                                 f"config's '{getattr(cfg, name)}': use the config that it was "
                                 "distilled with")
        if same_teacher and facts["teacher"] != (teacher := fingerprint(cfg.weights)):
            raise ValueError(f"{path}: the student was distilled from teacher {facts['teacher']}, "
                             f"{cfg.weights} is {teacher}: point `weights` at its teacher")
    else:
        if os.environ.get("RANK", "0") == "0":
            print(f"{path} has no metadata of this project: the config's key timesteps are used")
        facts = {**{name: getattr(cfg, name) for name in SETTINGS}, "teacher": None,
                 "t_key": key_times(cfg.family, cfg.n, cfg.shift, cfg.key), "dtype": "bf16"}
    if is_lora(tensors):
        check_lora(path, facts["teacher"], cfg.weights)
    elif isinstance(getattr(cfg, "lora", None), str):  # lora_scale would have no effect
        raise ValueError(f"lora: expected a LoRA, got {path}, a complete DiT: give it as --student")
    return facts


def exported_path(cfg: Shared, name: str = "student", experts: str = "both") -> Path:
    """Where distill.py writes a student's file; with two experts, that of the first it trains."""
    level = "" if sizes_of(cfg.preset).boundary is None else experts.replace("both", "high")
    return Path(cfg.run) / with_level(f"{name}.safetensors", level)


def check_replaceable(path: Path) -> None:
    """Raise ValueError if the file at a student's path is not a student of this project, since an
    export would replace it. A damaged file may be replaced."""
    facts: dict | None = None
    with contextlib.suppress(ValueError):
        facts = facts_in(path) if path.is_file() else None
    if facts == {}:
        raise ValueError(f"{path}: exists, and is not a student that distill.py wrote: rename it, "
                         "or choose another --run")


def open_student(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a student under the names in its files.

    Args: path, its file (either one of two), an index of shards, or a folder such as the one that
    --export diffusers writes. The names of two DiTs' tensors begin with the expert's name.
    Raises as common.names.expert_paths and open_tensors."""
    if pair := expert_paths(path):
        return {f"{expert}.{name}": t for expert, file in zip(EXPERTS, pair, strict=True)
                for name, t in open_tensors(file).items()}
    return open_tensors(path / "transformer" if (path / "transformer").is_dir() else path)


def official_tensors(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors that open_student returns, under official names."""
    return {f"{level}_noise_model.{name}" if level else name: t
            for level, part in by_expert(tensors).items()
            for name, t in official_names(part, "transformer").items()}


def check_facts(path: Path, facts: dict) -> None:
    """Raise ValueError unless a student's metadata has all FACTS, with valid times."""
    if error := shape_error(facts, FACTS):
        raise ValueError(f"{path}: 'accvideo' metadata: {error}: give a student that distill.py "
                         "wrote (to sample another DiT, make it `weights`, with --teacher)")
    t = facts["t_key"]
    if len(t) < 2 or t[0] != 1 or t[-1] != 0 or any(a <= b for a, b in itertools.pairwise(t)):
        raise ValueError(f"{path}: t_key: expected times falling from 1 (noise) to 0 (data), got "
                         f"{abbreviate(t)}: distill it again")


def facts_of(tensors: dict[str, LazyTensor]) -> dict:
    """The facts in the first of a student's files that has some; {} if none has. Raises ValueError
    if the files of two experts are exchanged, or belong to two students."""
    found: dict = {}
    for level, part in by_expert(tensors).items():
        for file in dict.fromkeys(t.file for t in part.values()):
            facts = facts_in(file)
            if level and facts.get("expert", level) != level:
                raise ValueError(f"{file}: expected the expert for {level} noise, got that for "
                                 f"{abbreviate(facts['expert'])} noise: exchange the files")
            for key in ("t_key", "teacher", "preset", "pair") if found and facts else ():
                got, other = facts.get(key), found.get(key)
                if got != other:
                    raise ValueError(f"{file}: {key} is {abbreviate(got)}, in the other file "
                                     f"{abbreviate(other)}: give two files of one export")
            found = found or facts
    return found


def facts_in(file: Path) -> dict:
    """The facts in a student's file; {} if there are none. Raises ValueError if it is damaged."""
    text = safetensors_metadata(file).get("accvideo", "{}")
    return parse_json(text, f"{file}: 'accvideo' metadata", remedy="distill it again")


def check_lora(path: Path, teacher: str | None, weights: str) -> None:
    """Raise ValueError if a LoRA does not fit the DiT of `weights`; print a line if that is not the
    DiT `teacher`, on which it was made."""
    lora_changes(path, {name: t.shape for name, t in dit_tensors(weights).items()})
    found = fingerprint(weights)
    if teacher not in (None, found) and os.environ.get("RANK", "0") == "0":
        print(f"{path} was made on the DiT {teacher}; {weights} has {found}: the same model in "
              "another dtype is fine, another model is not")


# ----------------------------------------------------------------------------- loading, export

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_student(cfg: Shared, path: Path, device: torch.device, ranks: Ranks | None = None,
                 scale: float = 1.0) -> nn.Module:
    """A student's DiT, frozen, sharded if `ranks` is given; official or diffusers names.

    A LoRA, times `scale`, is merged into the DiT of `weights` in fp32, and rounded once to the
    dtype of computation. Raises ValueError as artifacts.lora.lora_changes.
    """
    dit = empty_dit(cfg.preset, compute_dtype(device), ranks)
    tensors = open_student(path)
    tensors = (with_lora(dit_tensors(cfg.weights), path, scale) if is_lora(tensors) else
               official_tensors(tensors))
    return load_module(dit, tensors, f"student {path}", device=device).requires_grad_(False)


def high_student(cfg: Any) -> Path:
    """The file of the high-noise expert with which a run of distill.py trains the other one.
    Raises FileNotFoundError if it does not exist."""
    path = Path(cfg.high_student) if cfg.high_student else exported_path(cfg)
    if not path.is_file():
        raise FileNotFoundError(f"high_student: {path}: no such file: distill it first with "
                                "--experts high")
    return path


def high_checksum(cfg: Any) -> str | None:
    """The checksum of the data in high_student's file, after checking it. Raises as high_student
    and check_data."""
    path = high_student(cfg)
    check_data(path)
    return safetensors_metadata(path).get("crc32")


def load_high_student(cfg: Any, teacher: str, dtype: torch.dtype, ranks: Ranks) -> nn.Module:
    """The expert in high_student's file, frozen. Raises ValueError unless it has the config's key
    timesteps and was distilled from the teacher with this fingerprint."""
    path = high_student(cfg)
    facts = facts_in(path)
    check_facts(path, facts)
    for key, value in {"expert": "high", "teacher": teacher, "preset": cfg.preset,
                       "t_key": key_times(cfg.family, cfg.n, cfg.shift, cfg.key)}.items():
        if facts.get(key) != value:
            raise ValueError(f"high_student: {path}: {key}: expected {abbreviate(value)}, got "
                             f"{abbreviate(facts.get(key))}: distill it by this config, --experts "
                             "high")
    dit = empty_dit(cfg.preset, dtype, ranks, experts="high").high_noise_model
    tensors = official_names(open_tensors(path), "transformer")
    return load_module(dit, tensors, str(path), device=ranks.device).requires_grad_(False)


def export_student(cfg: Any, state: Any, ranks: Ranks, meta: dict, name: str = "student") -> Path:
    """Write <run>/<name>.safetensors and the other files in this module's list; returns the first.

    Args: cfg, distill.Config; state, its TrainState; meta["teacher"], the teacher's fingerprint.
    Raises AgreedError on all ranks if a file cannot be written.
    """
    path, dtype = exported_path(cfg, name, cfg.experts), EXPORT_DTYPES[cfg.export_dtype]
    sizes = sizes_of(cfg.preset)
    facts = {key: getattr(cfg, key) for key in SETTINGS}
    facts |= {"t_key": state.t_key[::-1], "teacher": meta["teacher"], "iterations": state.step,
              "dtype": cfg.export_dtype}
    if sizes.boundary is not None:
        facts |= {"boundary": sizes.boundary, "cfg_scale_low": cfg.cfg_scale_low,
                  "pair": state.step if cfg.experts == "both" else None}  # checked on loading
    if cfg.guidance != 1:  # the target of an evaluation depends on it
        facts |= {"negative_prompt": cfg.negative_prompt}
    if dtype == torch.float16:
        check_export_range(state.student, dtype)
    parts = by_expert(student_tensors(state.student, path, dtype))
    if cfg.experts != "both":  # the frozen one is of another run
        parts = {cfg.experts: parts[cfg.experts]}
    metadata = {level: file_metadata(facts, level) for level in parts}
    files = {"": parts} | (
        {} if cfg.lora is None else {"_lora": by_expert(lora_file(state.student, path))})
    for form, tensors in files.items():
        for level in parts:
            file = path.with_name(with_level(f"{name}{form}.safetensors", level))
            write_together(file, tensors[level], metadata[level], ranks)
    if cfg.export == "diffusers":
        export_diffusers(path.with_name(f"{name}_diffusers"), parts, metadata, sizes,
                         facts["t_key"], ranks)

    def write_pages() -> None:
        for form in files:
            page = student_page(facts, f"{name}{form}.safetensors", lora=form == "_lora")
            write_text(path.with_name(f"{name}{form}.md"), page)
        write_json(path.with_name(f"{name}_comfyui.json"),
                   comfyui_workflow(facts, f"{name}.safetensors"))

    on_first_rank(write_pages)
    return path


def file_metadata(facts: dict, level: str) -> dict[str, str]:
    """The metadata of a student's or LoRA's file; level, of an expert, or "" for the only DiT."""
    facts = facts | ({"expert": level} if level else {})
    return {"format": "pt", "accvideo": json.dumps(facts), "crc32": CHECKSUM}


def check_export_range(student: nn.Module, dtype: torch.dtype) -> None:
    """Raise AgreedError on all ranks if a weight would be infinite in dtype; each rank checks its
    own rows."""
    with errors_on_all_ranks():
        for name, p in student.named_parameters():
            local = local_rows(p)[0].detach()
            if local.numel() and local.to(dtype).isinf().any():
                raise ValueError(f"export_dtype: got fp16; {name} contains {local.abs().max():.4g},"
                                 f" more than fp16's {torch.finfo(dtype).max:.0f}: export by the "
                                 "same command with --export_dtype bf16")


def write_together(path: Path, tensors: dict[str, LazyTensor], metadata: dict[str, str],
                   ranks: Ranks) -> None:
    """Write a safetensors file whose tensors all ranks gather, under a temporary name that is then
    changed. A write that fails is tried once more; after that AgreedError is raised on all ranks.
    """
    def prepare() -> None:  # its errors come before any rank waits for another in a collective
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in path.parent.glob(f".{path.name}.*.part*"):  # left by a killed process
            part.unlink(missing_ok=True)

    def write() -> None:
        replace_file(path, lambda aside: stream_safetensors(aside, tensors, metadata))

    def gather() -> None:
        for t in tensors.values():
            bytes_of(t.read().flatten()[:1])  # waits for a GPU's part in the collective

    on_first_rank(prepare)
    for retry in (True, False):
        try:
            with errors_on_all_ranks():
                return write() if ranks.rank == 0 else gather()
        except AgreedError as e:
            if not retry:
                raise
            if e.args[0]:
                print_line(f"{e}; trying once more")


# ---------------------------------------------------------------------------- diffusers' folder

SUBFOLDERS = {"": "transformer", "high": "transformer", "low": "transformer_2"}


def export_diffusers(folder: Path, parts: dict[str, dict[str, LazyTensor]],
                     metadata: dict[str, dict[str, str]], sizes: Sizes, t_key: list[float],
                     ranks: Ranks) -> None:
    """Write a folder with transformer/ and scheduler/ as diffusers loads them; for an expert for
    low noise transformer_2/, and model_index.json with the boundary. An earlier export is replaced
    file by file, other files of the folder are kept.

    Args: parts, tensors under official names, and metadata of each file, by expert; t_key from 1 to
    0. Raises AgreedError on all ranks if it cannot be written.
    """
    def write_settings() -> None:
        for pattern in ("*-of-*.safetensors", "*.safetensors.index.json"):
            for shard in folder.glob(f"transformer*/{pattern}"):  # would be loaded instead
                shard.unlink()
        for level in parts:
            write_json(folder / SUBFOLDERS[level] / "config.json", transformer_config(sizes))
        write_json(folder / "scheduler/scheduler_config.json", scheduler_config(sizes, t_key))
        if sizes.boundary is not None and not (folder / "model_index.json").exists():
            write_json(folder / "model_index.json", pipeline_index(sizes))

    on_first_rank(write_settings)
    for level, tensors in parts.items():
        write_together(folder / SUBFOLDERS[level] / "diffusion_pytorch_model.safetensors",
                       official_names(tensors, "transformer", reverse=True), metadata[level], ranks)


def transformer_config(sizes: Sizes) -> dict[str, Any]:
    """config.json for diffusers' WanTransformer3DModel or HunyuanVideoTransformer3DModel."""
    frames, height, _ = sizes.patch_size
    same = {"num_attention_heads": sizes.num_heads, "in_channels": sizes.in_dim,
            "attention_head_dim": sizes.dim // sizes.num_heads, "out_channels": sizes.out_dim}
    if sizes.family == "wan":
        image = sizes.has_clip
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


def pipeline_index(sizes: Sizes) -> dict[str, Any]:
    """model_index.json for a student with two experts. It names only the student's parts of the
    pipeline; the others are arguments of the pipeline or come from the teacher's folder."""
    network = ["diffusers", "WanTransformer3DModel"]
    return {"_class_name": "WanImageToVideoPipeline" if sizes.takes_image else "WanPipeline",
            "boundary_ratio": sizes.boundary, "transformer": network, "transformer_2": network,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}


def scheduler_config(sizes: Sizes, t_key: list[float]) -> dict[str, Any]:
    """scheduler_config.json for a stock scheduler whose times are t_key.

    Where no settings give these times, the shift is 1, and student.md has lines that pass the times
    to the scheduler.
    """
    settings = stock_scheduler(sizes.family, t_key) or {"shift": 1.0}
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
            **settings}


# ------------------------------------------------------------ safetensors, a tensor at a time

CHECKSUM = "-" * 8  # placeholder in the metadata, crc32: CHECKSUM, for the CRC-32 of the data
SYNC_BYTES = 1 << 30  # the most that is written between two syncs, for which all ranks wait
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def stream_safetensors(path: Path, tensors: dict[str, LazyTensor],
                       metadata: dict[str, str]) -> list:
    """Write a safetensors file one tensor at a time; returns [bytes, CRC-32] once it is on disk.

    Each read() is called once, in order, even if the file cannot be written, since it may be a
    collective of all ranks. If metadata["crc32"] is CHECKSUM, it is replaced by the CRC-32 of the
    data alone, for check_data, and this one is returned. Raises OSError if it cannot be written.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, t in tensors.items():
        start, end = end, end + t.dtype.itemsize * math.prod(t.shape)
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    of_data = metadata.get("crc32") == CHECKSUM
    size, crc, synced = len(head), 0 if of_data else zlib.crc32(head), 0
    chunks = (bytes_of(t.read()) for t in tensors.values())
    try:
        with path.open("wb") as file:
            file.write(head)
            for chunk in chunks:
                file.write(chunk)
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
                if size - synced >= SYNC_BYTES:
                    file.flush()
                    os.fsync(file.fileno())
                    synced = size
            if of_data:
                file.seek(8 + text.index(b'"crc32": "') + 10)
                file.write(f"{crc:08x}".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        deque(chunks, maxlen=0)  # read the remaining tensors: the other ranks take part in it
        raise
    return [size, f"{crc:08x}"]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements as bytes."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def check_data(path: Path) -> None:
    """Raise ValueError if the CRC-32 in a safetensors file's metadata is not that of its data."""
    stored = safetensors_metadata(path).get("crc32")  # none in a file of torch.save
    if stored and stored != (found := crc32_of_file(path, safetensors_header(path)[2])):
        raise ValueError(f"{path}: is damaged: its data have CRC-32 {found}, expected {stored} by "
                         "its metadata: copy it again, or export it again by the same command")


# --------------------------------------------------------------------- the page of instructions

def how_to_use(path: Path) -> str:
    """The text of student.md, made from the metadata of a student's file.

    Raises FileNotFoundError if there is no such file, ValueError if facts are missing.
    """
    file = path / "transformer" if (path / "transformer").is_dir() else path
    tensors = open_tensors(file)
    facts = facts_in(next((t.file for t in tensors.values()), file))
    check_facts(path, facts)
    if (family := sizes_of(facts["preset"]).family) != facts["family"]:
        raise ValueError(f"{path}: its family is {abbreviate(facts['family'])}, that of its preset "
                         f"{facts['preset']} is {family}: distill it again")
    name = path.name if path.suffix == ".safetensors" else "student.safetensors"
    return student_page(facts, name.replace(f"_{facts.get('expert')}_noise", ""),
                        is_lora(tensors))
