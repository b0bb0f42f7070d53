"""A student's file: what it says about itself, loading, export, and its page of instructions.

<name>.safetensors       the DiT under official names; its metadata "accvideo" holds the times
                         t_key from 1 (noise) to 0 (data), the reverse of distill.py's t_key[k],
                         the teacher's fingerprint and the settings of distillation
<name>_lora.safetensors  the LoRA that distill.py --lora trained, with the same metadata
<name>_diffusers/        transformer/ and scheduler/ as diffusers loads them (--export diffusers)
<name>.md                how other programs run it, from the templates assets/student*.md
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from artifacts.lora import is_lora, lora_changes, lora_file, student_tensors, with_lora
from common.config import Shared
from common.files import (
    NUMBER, ROOT, abbreviate, parse_json, path_hint, replace_file, replace_folder, shape_error,
    write_json, write_text)
from common.names import dit_tensors, fingerprint, official_names
from common.ranks import AgreedError, Ranks, compute_dtype, local_rows, raise_together
from common.weights import (
    CHECKSUM, LazyTensor, check_data, file_kind, load_module, open_tensors, safetensors_metadata,
    stream_safetensors)
from model import Sizes, empty_dit, key_times, sizes_of

# ------------------------------------------------------------------- what a student's file says

FACTS = ("family", "preset", "teacher", "t_key", "n", "shift", "cfg_scale", "embedded_guidance")
FACT_TYPES = {"family": str, "preset": str, "teacher": str, "t_key": [NUMBER], "n": int,
              "key": [int], "shift": NUMBER, "cfg_scale": NUMBER}


def student_facts(path: Path, cfg: Shared, foreign: bool = False,
                  same_teacher: bool = False) -> dict:
    """What a student says about itself, checked against the config.

    Args: path, a file, an index of shards or a folder of them; foreign, whether it may come from
    another project and say nothing, as AccVideo's own release does: then the config's key timesteps
    are taken, and teacher is None; same_teacher, whether `weights` must hold the DiT that it was
    distilled from, which sampling does not need.
    Returns FACTS and more: teacher is the fingerprint of its weights, t_key are the times from 1
    (noise) to 0 (data). Raises FileNotFoundError, or ValueError naming both sides of what does not
    fit.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no student yet{path_hint(path)}; make it by "
                                "`python distill.py CONFIG`, or sample the teacher with --teacher")
    tensors = open_tensors(path)  # raises an error for a damaged file
    if os.environ.get("LOCAL_RANK", "0") == "0":  # it reads all of the file: once on each host
        for file in dict.fromkeys(t.file for t in tensors.values()):
            if file_kind(file) == "safetensors":
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
                             f"the weights in {cfg.weights} are {teacher}: point `weights` at its "
                             "teacher, or distill again with `python distill.py CONFIG`")
    else:
        print(f"{path} does not say what it is: the config's key timesteps are used", flush=True)
        facts = {**{name: getattr(cfg, name, None) for name in FACTS},
                 "t_key": key_times(cfg.family, cfg.n, cfg.shift, cfg.key)}
    warn_of_another_model(path, tensors, facts["teacher"], cfg)
    return facts


def check_facts(path: Path, facts: dict, required: tuple[str, ...] = FACTS) -> None:
    """Raise ValueError if a student says too little about itself, or has no valid times."""
    absent = [name for name in required if name not in facts]
    if absent:
        raise ValueError(f"{path}: its 'accvideo' metadata lacks {', '.join(absent)}; expected a "
                         "student written by distill.py (to sample another DiT, point `weights` "
                         "at it and add --teacher)")
    types = {name: kind for name, kind in FACT_TYPES.items() if name in facts}
    if error := shape_error(facts, types):
        raise ValueError(f"{path}: 'accvideo' metadata: {error}: distill it again")
    t = facts["t_key"]
    if len(t) < 2 or t[0] != 1 or t[-1] != 0 or any(a <= b for a, b in itertools.pairwise(t)):
        raise ValueError(f"{path}: t_key: expected times falling from 1 (noise) to 0 (data), got "
                         f"{abbreviate(t)}: distill it again")


def facts_of(tensors: dict[str, LazyTensor]) -> dict:
    """What a student says about itself, in whichever of its files; {} if in none."""
    files = dict.fromkeys(t.file for t in tensors.values())
    return next((facts for file in files if (facts := facts_in(file))), {})


def facts_in(file: Path) -> dict:
    """What a student's file says about itself; {} for nothing. ValueError if it is damaged."""
    if file_kind(file) != "safetensors":
        return {}
    return parse_json(safetensors_metadata(file).get("accvideo", "{}"), f"{file}: 'accvideo' "
                      "metadata", remedy="distill it again, or remove the metadata")


def warn_of_another_model(path: Path, tensors: dict[str, LazyTensor], teacher: str | None,
                          cfg: Shared) -> None:
    """Print a line if the DiT of `weights` has other sizes than the student (its text encoder and
    VAE may then be another model's), or is not the one that a LoRA was made on.

    Raises ValueError if a LoRA does not fit the DiT. Other students do not need it.
    """
    first = os.environ.get("RANK", "0") == "0"
    if is_lora(tensors):
        lora_changes(path, {name: t.shape for name, t in dit_tensors(cfg.weights).items()})
        if teacher and teacher != (found := fingerprint(cfg.weights)) and first:
            print(f"{path} was made on the DiT {teacher}; {cfg.weights} has {found}: the same "
                  "model in another dtype is fine, another model is not", flush=True)
    elif teacher:
        try:
            dit = dit_tensors(cfg.weights)
        except (FileNotFoundError, ValueError):
            return
        student = official_names(tensors, "transformer")
        if first and {n: t.shape for n, t in student.items()} != {
                n: t.shape for n, t in dit.items()}:
            print(f"{path} is of another model than the DiT in {cfg.weights}: are its text encoder "
                  "and VAE the right ones?", flush=True)


# ----------------------------------------------------------------------------- loading, export

EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load_student(cfg: Shared, path: Path, device: torch.device, ranks: Ranks | None = None,
                 scale: float = 1.0) -> nn.Module:
    """A student's DiT, frozen, sharded if `ranks` is given; official or diffusers names.

    A LoRA, times `scale`, is merged into the DiT of `weights` in fp32, and rounded once to the
    dtype of computation. Raises ValueError as artifacts.lora.lora_changes.
    """
    dit = empty_dit(cfg.preset, compute_dtype(device), ranks)
    tensors = open_tensors(path)
    tensors = (with_lora(dit_tensors(cfg.weights), path, scale) if is_lora(tensors) else
               official_names(tensors, "transformer"))
    return load_module(dit, tensors, f"student {path}", device=device).requires_grad_(False)


def export_student(cfg: Any, state: Any, ranks: Ranks, meta: dict, name: str = "student") -> Path:
    """Write <run>/<name>.safetensors and the other files of the list above.

    Args: cfg, distill.Config; state, its TrainState; meta["teacher"], the teacher's fingerprint.
    Raises AgreedError on all ranks if a file cannot be written, or if export_dtype cannot hold a
    weight.
    """
    path, dtype = Path(cfg.run) / f"{name}.safetensors", EXPORT_DTYPES[cfg.export_dtype]
    keys = ("family", "preset", "key", "n", "shift", "cfg_scale", "embedded_guidance")
    facts = {key: getattr(cfg, key) for key in keys}
    facts |= {"t_key": state.t_key[::-1], "teacher": meta["teacher"], "iterations": state.step,
              "dtype": cfg.export_dtype}
    metadata = {"format": "pt", "accvideo": json.dumps(facts), "crc32": CHECKSUM}
    if dtype == torch.float16:
        check_range(state.student, dtype)
    tensors = student_tensors(state.student, path, dtype)
    write_together(path, tensors, metadata, ranks)
    if cfg.lora is not None:
        write_together(path.with_name(f"{name}_lora.safetensors"), lora_file(state.student, path),
                       metadata, ranks)
    if cfg.export == "diffusers":
        export_diffusers(path.with_name(f"{name}_diffusers"), tensors, metadata,
                         sizes_of(cfg.preset), facts["t_key"], ranks)
    page = student_page(facts, path.name)
    on_rank_0(lambda: write_text(path.with_suffix(".md"), page), ranks)
    return path


def bytes_a_parameter(cfg: Any) -> int:
    """Bytes that a student's files take for each of its parameters."""
    return EXPORT_DTYPES[cfg.export_dtype].itemsize * (2 if cfg.export == "diffusers" else 1)


def check_range(student: nn.Module, dtype: torch.dtype) -> None:
    """Raise AgreedError on all ranks if a weight would be infinite in dtype; each rank checks its
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


def write_together(path: Path, tensors: dict[str, LazyTensor], metadata: dict[str, str],
                   ranks: Ranks) -> None:
    """Write a safetensors file whose tensors all ranks gather, aside and renamed; a write that
    fails is tried once more. Raises AgreedError on all ranks after that."""
    def write() -> None:
        for part in path.parent.glob(f".{path.name}.*.part*"):  # left by a killed process
            part.unlink(missing_ok=True)
        replace_file(path, lambda aside: stream_safetensors(aside, tensors, metadata))

    def gather() -> None:
        stream_safetensors(path, tensors, metadata, write=False)

    for retry in (True, False):
        try:
            return on_rank_0(write, ranks, gather)
        except AgreedError as e:
            if not retry:
                raise
            if e.args[0]:
                print(f"{e}; trying once more", flush=True)


def on_rank_0(work: Callable[[], Any], ranks: Ranks,
              elsewhere: Callable[[], Any] = lambda: None) -> None:
    """Do `work` on rank 0, `elsewhere` on others; a ValueError becomes an AgreedError on all."""
    error = None
    try:
        (work if ranks.rank == 0 else elsewhere)()
    except ValueError as e:
        error = e
    raise_together(error)


# ---------------------------------------------------------------------------- diffusers' folder

SHARD = 5 * 10 ** 9  # bytes of a file at most, unless one tensor is larger


def export_diffusers(folder: Path, tensors: dict[str, LazyTensor], metadata: dict[str, str],
                     sizes: Sizes, t_key: list[float], ranks: Ranks) -> None:
    """Write a folder with transformer/ and scheduler/ as diffusers loads them, aside and renamed.

    Args: tensors under official names; metadata of each file; t_key from 1 to 0.
    Raises AgreedError on all ranks if it cannot be written.
    """
    aside = folder.with_name(f".{folder.name}.part")

    def start() -> None:
        shutil.rmtree(aside, ignore_errors=True)  # left by a killed process
        write_json(aside / "transformer/config.json", transformer_config(sizes))
        write_json(aside / "scheduler/scheduler_config.json", scheduler_config(sizes, t_key))

    on_rank_0(start, ranks)
    parts = shards_of(official_names(tensors, "transformer", reverse=True))
    base, count = "diffusion_pytorch_model", len(parts)
    files = [f"{base}.safetensors"] if count == 1 else [
        f"{base}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file, part in zip(files, parts, strict=True):
        write_together(aside / "transformer" / file, part, metadata, ranks)

    def finish() -> None:
        if count > 1:
            size = sum(bytes_in(t) for part in parts for t in part.values())
            write_json(aside / f"transformer/{base}.safetensors.index.json", {
                "metadata": {"total_size": size},
                "weight_map": {name: file for file, part in zip(files, parts, strict=True)
                               for name in part}})
        replace_folder(folder, aside)

    on_rank_0(finish, ranks)


def bytes_in(tensor: LazyTensor | Tensor) -> int:
    """A tensor's size in a file."""
    return tensor.dtype.itemsize * math.prod(tensor.shape)


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
    """scheduler_config.json of a stock scheduler whose times are t_key.

    Where none has them, its shift is 1 and student.md has the lines that pass it the times.
    """
    settings = stock_scheduler(sizes.family, t_key) or {"shift": 1.0}
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
            **settings}


def stock_scheduler(family: str, t_key: list[float]) -> dict[str, float] | None:
    """Settings with which diffusers' FlowMatchEulerDiscreteScheduler makes the times t_key itself.

    Args: t_key, times from 1 to 0; the pipeline is given as many steps. Returns None if there are
    none: the key timesteps are not evenly spread over the teacher's grid.
    HunyuanVideo: the shift alone. Wan: WanPipeline passes no times, so that the scheduler takes
    even ones from 1 to its own end. There k / (1 - t_k) is a line A - B k with B / A = (a - 1) / a
    · d, d the step before shift a, and shift_terminal stretches it by what is left.
    """
    t, steps = t_key, len(t_key) - 1
    if family == "hunyuan":
        shift = 1.0 if steps == 1 else t[1] * (1 / steps) / ((1 - 1 / steps) * (1 - t[1]))
        settings = {"shift": round(shift, 7)}
    elif steps == 1:
        settings = {"shift": 1.0}
    else:
        first, last = 1 / (1 - t[1]), (steps - 1) / (1 - t[-2])
        slope = (first - last) / max(steps - 2, 1)
        r = slope / (first + slope) * (steps - 1)    # (a - 1) / a · 999 / (999 + a)
        root = (999 * (1 - r)) ** 2 - 4 * 999 * r
        if root < 0:
            return None
        shift = 2 * 999 / (999 * (1 - r) + math.sqrt(root))
        settings = {"shift": round(shift, 7), "shift_terminal": t[-2]}
    times = stock_times(family, steps, **settings)
    near = all(abs(a - b) < 1e-6 for a, b in zip(times, t, strict=True))
    return settings if near else None


def stock_times(family: str, steps: int, shift: float,
                shift_terminal: float | None = None) -> list[float]:
    """The times of diffusers' pipeline with FlowMatchEulerDiscreteScheduler, 1 to 0."""
    end = shift / (999 + shift) if family == "wan" else 1 / steps
    even = [1 + (end - 1) * k / max(steps - 1, 1) for k in range(steps)]
    times = [shift * u / (1 + (shift - 1) * u) for u in even]
    if shift_terminal is not None:
        stretch = (1 - shift_terminal) / (1 - times[-1])
        times = [1 - (1 - t) * stretch for t in times]
    return [*times, 0.0]


# --------------------------------------------------------------------- the page of instructions

# A preset's teacher: the repository of its diffusers pipeline, and the official folder.
TEACHERS = {
    "wan-t2v-1.3b": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-1.3B"),
    "wan-t2v-14b": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan2.1-T2V-14B"),
    "wan-i2v-14b": ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan2.1-I2V-14B-480P"),
    "hunyuan-t2v": ("hunyuanvideo-community/HunyuanVideo", "HunyuanVideo")}
ACCVIDEO = {False: (50, 5), True: (40, 4)}  # steps of its Wan scripts; every how many is key
SET_SIGMAS = """
set_timesteps = pipe.scheduler.set_timesteps  # WanPipeline passes no sigmas: they are set here
pipe.scheduler.set_timesteps = lambda steps, device=None: set_timesteps(
    sigmas=[{}], device=device)"""


def how_to_use(path: Path) -> str:
    """The text of a student's student.md, from what its file says about itself.

    Raises FileNotFoundError if there is none, ValueError if it says too little.
    """
    facts = facts_of(open_tensors(path))
    check_facts(path, facts, (*FACTS, "key"))
    return student_page(facts, path.name if path.suffix == ".safetensors" else
                        "student.safetensors")


def student_page(facts: dict[str, Any], file: str) -> str:
    """student.md: what a student is, and how diffusers, ComfyUI, LightX2V, the official code and
    this project run it, by the templates assets/student*.md.

    Args: facts, its metadata; file, its name.
    """
    t_key, steps, n = facts["t_key"], len(facts["t_key"]) - 1, facts["n"]
    image, dtype = sizes_of(facts["preset"]).takes_image, facts.get("dtype", "fp32")
    stock, stem = stock_scheduler(facts["family"], t_key), file.removesuffix(".safetensors")
    teacher, official = TEACHERS.get(facts["preset"], ("teacher-diffusers",
                                                       "the teacher's official folder"))
    values = {
        **facts, "file": file, "stem": stem, "steps": steps, "points": steps + 1,
        "times": digits(t_key), "thousandths": [round(1000 * t) for t in t_key[:-1]],
        "key": ", ".join(map(str, facts["key"])), "shift": f"{facts['shift']:g}",
        "dtype": dtype, "torch_dtype": str(EXPORT_DTYPES[dtype]).removeprefix("torch."),
        "task": "image to video" if image else "text to video",
        "import_load_image": ", load_image" if image else "",
        "image_argument": ', image=load_image("photo.jpg")' if image else "",
        "image_option": " --image photo.jpg" if image else "",
        "teacher": teacher, "official": official,
        "scheduler": ", ".join(f"{k}={v}" for k, v in (stock or {"shift": 1.0}).items()),
        "scheduler_note": f"`{stem}_diffusers/scheduler`\nholds the same." if stock else
        "No stock\nscheduler has these times: the sigmas are passed to it."}
    manual, embedded = fill("student_sigmas", values), facts["embedded_guidance"]
    if facts["family"] == "wan":
        steps_of_script, every = ACCVIDEO[image]
        published = n == steps_of_script and facts["key"] == list(range(0, n + 1, every))
        values |= {
            "model": "Wan 2.1", "network": "WanTransformer3DModel", "fps": 16,
            "pipeline": "WanImageToVideoPipeline" if image else "WanPipeline",
            "guidance": "Without guidance: one evaluation per step.", "guidance_scale": 1.0,
            "sigmas_setting": "", "comfyui": manual,
            "set_sigmas": "" if stock else SET_SIGMAS.format(digits(t_key[:-1])),
            "accvideo": "AccVideo's copy samples at these times with `--sample_solver euler "
            f"--sample_steps {n} --sample_shift {values['shift']}`." if published else
            "No official script samples at these times."}
    else:
        simple = ("" if stock is None else f"ModelSamplingSD3: shift {stock['shift']:g}. KSampler "
                  f"or BasicScheduler: sampler euler, scheduler simple, {steps} steps.\nThat gives "
                  "the times above.\n") if 1000 % steps == 0 else ""  # it picks from 1000 times
        values |= {
            "model": "HunyuanVideo", "network": "HunyuanVideoTransformer3DModel", "fps": 24,
            "pipeline": "HunyuanVideoPipeline", "guidance": "Without true guidance; the embedded "
            f"guidance, an input of the network, is {embedded}.", "guidance_scale": embedded,
            "sigmas_setting": "" if stock else f', "sigmas": [{digits(t_key[:-1])}]',
            "set_sigmas": "",
            "comfyui": f"FluxGuidance: {embedded}. cfg 1.\n{simple or manual}",
            "options": "No option of either gives these times." if stock is None else
            f"Both: `--infer-steps {steps} --flow-shift {stock['shift']:g} --flow-reverse "
            f"--cfg-scale 1 --embedded-cfg-scale {embedded}`."}
    return fill("student", {**values, "family_part": fill(f"student_{facts['family']}", values)})


def digits(t_key: list[float]) -> str:
    """Times as text, seven digits of each."""
    return ", ".join(f"{t:.7g}" if t in (0, 1) else f"{t:.7f}" for t in t_key)


def fill(template: str, values: dict[str, Any]) -> str:
    """A template of assets/ with the values at its $names."""
    text = (ROOT / f"assets/{template}.md").read_text(encoding="utf-8")
    return Template(text).substitute(values)
