"""A student's file: what it says about itself, loading, export, and its page of instructions."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from artifacts.lora import is_lora, lora_file, student_tensors, with_lora
from common.config import Shared
from common.files import (
    NUMBER, path_hint, shape_error, parse_json, replace_file, replace_folder, abbreviate, write_json,
    write_text)
from common.names import dit_tensors, fingerprint, official_names
from common.ranks import AgreedError, Ranks, compute_dtype, local_rows, raise_together
from common.weights import (
    CHECKSUM, LazyTensor, check_data, file_kind, load_module, open_tensors, safetensors_metadata,
    stream_safetensors)
from model import Sizes, empty_dit, key_times, sizes_of



# ---------------------------------------------------------------------------------- networks

FACTS = ("family", "preset", "teacher", "t_key", "n", "shift", "cfg_scale", "embedded_guidance")
KINDS = {"family": str, "preset": str, "teacher": str, "t_key": [NUMBER], "n": int, "key": [int],
         "shift": NUMBER, "cfg_scale": NUMBER}  # of what is computed with


def student_facts(path: Path, cfg: Shared, foreign: bool = False,
                  same_teacher: bool = False) -> dict:
    """What a student says about itself, checked against the config.

    Args: path, a file, an index of shards or a folder of them; foreign, whether it may be of
    another project and say nothing, as AccVideo's own release does: then the config's key timesteps
    are taken, and teacher is None; same_teacher, whether `weights` must hold the DiT that it was
    distilled from: to sample it none is needed.
    Returns FACTS and more: teacher is its weights' fingerprint, t_key are the times from 1 (noise)
    to 0 (data). Raises FileNotFoundError, or ValueError naming both sides of what does not fit.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no student yet{path_hint(path)}; make it by "
                                "`python distill.py CONFIG`, or sample the teacher with --teacher")
    tensors = open_tensors(path)  # names a damaged file
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # it reads all: once on each host
    for file in dict.fromkeys(t.file for t in tensors.values()) if first else ():
        if file_kind(file) == "safetensors":
            check_data(file)
    facts = facts_of(tensors)
    if foreign and not facts:
        print(f"{path} does not say what it is: it walks the config's key timesteps", flush=True)
        return {**{name: getattr(cfg, name, None) for name in FACTS},
                "t_key": key_times(cfg.family, cfg.n, cfg.shift, cfg.key)}
    check_facts(path, facts)
    for name in ("family", "preset", "embedded_guidance"):
        if facts[name] != getattr(cfg, name):
            raise ValueError(f"{path}: the student's {name} is {abbreviate(facts[name])}, the config's "
                             f"'{getattr(cfg, name)}': use the config that it was distilled with")
    if same_teacher and facts["teacher"] != (teacher := fingerprint(cfg.weights)):
        raise ValueError(f"{path}: the student was distilled from teacher {facts['teacher']}, the "
                         f"weights in {cfg.weights} are {teacher}: point `weights` at its teacher, "
                         "or distill again with `python distill.py CONFIG`")
    if not is_lora(tensors):
        warn_of_another_model(path, tensors, cfg)
    return facts


def check_facts(path: Path, facts: dict, wanted: tuple[str, ...] = FACTS) -> None:
    """Raise ValueError if a student says too little about itself, or no times that can be walked.
    """
    absent = [name for name in wanted if name not in facts]
    if absent:
        raise ValueError(f"{path}: its 'accvideo' metadata lacks {', '.join(absent)}; wanted a "
                         "student written by distill.py (to sample another DiT, point `weights` "
                         "at it and add --teacher)")
    if fault := shape_error(facts, {name: kind for name, kind in KINDS.items() if name in facts}):
        raise ValueError(f"{path}: 'accvideo' metadata: {fault}: distill it again")
    t = facts["t_key"]
    if len(t) < 2 or t[0] != 1 or t[-1] != 0 or any(a <= b for a, b in itertools.pairwise(t)):
        raise ValueError(f"{path}: t_key is {abbreviate(t)}; wanted times falling from 1 (noise) to 0 "
                         "(data)")


def facts_of(tensors: dict[str, LazyTensor]) -> dict:
    """What a student says about itself, in whichever of its files; {} if in none."""
    files = dict.fromkeys(t.file for t in tensors.values())
    return next((facts for file in files if (facts := facts_in(file))), {})


def facts_in(file: Path) -> dict:
    """What a student's file says about itself; {} if it says nothing. ValueError if it is damaged.
    """
    if file_kind(file) != "safetensors":
        return {}
    return parse_json(safetensors_metadata(file).get("accvideo", "{}"), f"{file}: 'accvideo' "
                      "metadata", remedy="distill it again, or remove the metadata")


def how_to_use(path: Path) -> str:
    """The text of a student's student.md, from what its file says about itself.

    Raises FileNotFoundError if there is none, ValueError if it says too little.
    """
    facts = facts_of(open_tensors(path))
    check_facts(path, facts, (*FACTS, "key"))
    name = path.name if path.suffix == ".safetensors" else "student.safetensors"
    return student_readme(facts, sizes_of(facts["preset"]).takes_image, name)


def warn_of_another_model(path: Path, tensors: dict[str, LazyTensor], cfg: Shared) -> None:
    """Say so if `weights` has a DiT, and it is of other sizes than the student: its text encoder
    and VAE may be another model's, too."""
    try:
        teacher = {name: t.shape for name, t in dit_tensors(cfg.weights).items()}
    except (FileNotFoundError, ValueError):  # it is not needed
        return
    own = {name: t.shape for name, t in official_names(tensors, "transformer").items()}
    if own != teacher and os.environ.get("RANK", "0") == "0":
        print(f"{path} is of another model than the DiT in {cfg.weights}: are its text encoder and "
              "VAE the right ones?", flush=True)


def load_student(cfg: Shared, path: Path, device: torch.device, ranks: Ranks | None = None,
                 scale: float = 1.0) -> nn.Module:
    """A student's DiT, frozen, sharded if `ranks` is given; official or diffusers names.

    A LoRA, times `scale`, is merged into the DiT of `weights` in fp32, and rounded once to what
    that computes in. Raises ValueError as common.lora.changes.
    """
    dit = empty_dit(cfg.preset, compute_dtype(device), ranks)
    tensors = open_tensors(path)
    tensors = (with_lora(dit_tensors(cfg.weights), path, scale) if is_lora(tensors) else
               official_names(tensors, "transformer"))
    return load_module(dit, tensors, f"student {path}", device=device).requires_grad_(False)
EXPORT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARD = 5 * 10 ** 9  # bytes at most in a file of a diffusers folder, but for a larger tensor


def export_student(cfg: Any, state: Any, ranks: Ranks, meta: dict, name: str = "student") -> Path:
    """Write <run>/<name>.safetensors and <name>.md, and by --export diffusers <name>_diffusers,
    after --lora <name>_lora.safetensors.

    Args: cfg, distill.Config; state, its TrainState; meta["teacher"], the teacher's fingerprint.
    A write that fails is tried once more. Raises AgreedError on all ranks after that, and for
    weights that export_dtype cannot hold.
    """
    path, dtype = Path(cfg.run) / f"{name}.safetensors", EXPORT_DTYPES[cfg.export_dtype]
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
    return EXPORT_DTYPES[cfg.export_dtype].itemsize * (2 if cfg.export == "diffusers" else 1)


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
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Repositories of whole pipelines under diffusers' names, and the official ones, by preset.
TEACHERS = {
    "wan-t2v-1.3b": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan2.1-T2V-1.3B"),
    "wan-t2v-14b": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan2.1-T2V-14B"),
    "wan-i2v-14b": ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", "Wan2.1-I2V-14B-480P"),
    "hunyuan-t2v": ("hunyuanvideo-community/HunyuanVideo", "HunyuanVideo")}
ACCVIDEO = {False: (50, 5), True: (40, 4)}  # its Wan scripts' steps, and every how many one is key


# --------------------------------------------------------------------- a scheduler of diffusers

def stock_scheduler(family: str, t_key: list[float]) -> dict[str, float] | None:
    """Settings with which diffusers' FlowMatchEulerDiscreteScheduler walks t_key by itself.

    Args: t_key, times from 1 to 0; the pipeline is given as many steps. Returns None if there are
    none: the key timesteps are not evenly spread over the teacher's grid.
    HunyuanVideo: the shift alone. Wan: WanPipeline names no times, so that the scheduler takes even
    ones from 1 to its own end. There k / (1 - t_k) is a line A - B k with B / A = (a - 1) / a · d,
    d the step before shift a, and shift_terminal stretches it by what is left.
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
    walked = stock_times(family, steps, **settings)
    near = all(abs(a - b) < 1e-6 for a, b in zip(walked, t, strict=True))
    return settings if near else None


def stock_times(family: str, steps: int, shift: float,
                shift_terminal: float | None = None) -> list[float]:
    """The times that diffusers' pipeline and FlowMatchEulerDiscreteScheduler walk, 1 to 0."""
    end = shift / (999 + shift) if family == "wan" else 1 / steps
    even = [1 + (end - 1) * k / max(steps - 1, 1) for k in range(steps)]
    times = [shift * u / (1 + (shift - 1) * u) for u in even]
    if shift_terminal is not None:
        stretch = (1 - shift_terminal) / (1 - times[-1])
        times = [1 - (1 - t) * stretch for t in times]
    return [*times, 0.0]


# ------------------------------------------------------------------------------------ the text

def student_readme(facts: dict[str, Any], takes_image: bool, file: str) -> str:
    """student.md: what a student is, and the settings that run it elsewhere.

    Args: facts, its metadata; takes_image, whether videos start from an image; file, its name.
    """
    about = {**facts, "takes_image": takes_image, "file": file,
             "stem": file.removesuffix(".safetensors")}
    parts = [what_it_is(about), diffusers_part(about), comfyui_part(about)]
    if facts["family"] == "wan":
        parts.append(lightx2v_part(about))
    return "\n".join([*parts, official_part(about), own_part(about)])


def numbers(t_key: list[float]) -> str:
    """Times as text, seven digits of each."""
    return ", ".join(f"{t:.7g}" if t in (0, 1) else f"{t:.7f}" for t in t_key)


def what_it_is(about: dict[str, Any]) -> str:
    """Which model, its times, and what holds in every program."""
    model = {"hunyuan": "HunyuanVideo"}.get(about["family"], "Wan 2.1")
    kind = "image to video" if about["takes_image"] else "text to video"
    t_key, guidance = about["t_key"], "Without guidance: one evaluation a step."
    if about["family"] == "hunyuan":
        guidance = ("Without true guidance; the embedded guidance, an input of the network, is "
                    f"{about['embedded_guidance']}.")
    return f"""# {about["file"]}

A student of {model}, {kind}, preset `{about["preset"]}`. It makes a video in {len(t_key) - 1} \
steps.

- Times (sigmas), 1 is noise: `{numbers(t_key)}`. They are final: no program may shift them again.
- Solver: Euler. {guidance}
- They are the steps {", ".join(map(str, about["key"]))} of its teacher's {about["n"]}, shift \
{about["shift"]:g}.
- Tensors: official names, {about.get("dtype", "fp32")}. Text encoder and VAE are the teacher's.
"""


def diffusers_part(about: dict[str, Any]) -> str:
    """Code to paste: a transformer, by the file or by the folder; the pipeline; a video."""
    hunyuan, steps = about["family"] == "hunyuan", len(about["t_key"]) - 1
    network = "HunyuanVideoTransformer3DModel" if hunyuan else "WanTransformer3DModel"
    image = about["takes_image"]
    pipeline = ("HunyuanVideoPipeline" if hunyuan else
                "WanImageToVideoPipeline" if image else "WanPipeline")
    teacher = TEACHERS.get(about["preset"], ("teacher-diffusers", ""))[0]
    scheduler, settings = scheduler_code(about)
    settings = ", ".join([f'"num_inference_steps": {steps}', *settings])
    holds = (f"`{about['stem']}_diffusers/scheduler`\nholds the same." if stock_scheduler(
        about["family"], about["t_key"]) else "No stock\nscheduler walks these times by itself: "
        "the sigmas are handed to it.")
    given = '"…", image=load_image("photo.jpg")' if image else '"…"'
    fps = 24 if hunyuan else 16
    return f"""## diffusers

Needs `pip install diffusers accelerate`.

```python
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, {pipeline}, {network}
from diffusers.utils import export_to_video{", load_image" if image else ""}

teacher = "{teacher}"  # or its folder on your disk
dtype = torch.{TORCH_DTYPES[about.get("dtype", "fp32")]}
```

The network, from this one file:

```python
transformer = {network}.from_single_file(
    "{about["file"]}", config=teacher, subfolder="transformer", torch_dtype=dtype)
```

or from the folder that `distill.py --export diffusers` wrote:

```python
transformer = {network}.from_pretrained(
    "{about["stem"]}_diffusers/transformer", torch_dtype=dtype)
```

The pipeline. The scheduler that it comes with walks other times: it must be replaced. {holds}

```python
pipe = {pipeline}.from_pretrained(teacher, transformer=transformer, torch_dtype=dtype)
{scheduler}
settings = {{{settings}}}
```

A video; add height, width and num_frames if the pipeline's own are not the ones you want:

```python
pipe.to("cuda")
export_to_video(pipe({given}, **settings).frames[0], "video.mp4", fps={fps})
```
"""


def scheduler_code(about: dict[str, Any]) -> tuple[str, list[str]]:
    """Lines that give `pipe` a scheduler for t_key, and the call's settings beside its steps."""
    family, t_key = about["family"], about["t_key"]
    hunyuan, stock = family == "hunyuan", stock_scheduler(family, t_key)
    guidance = f'"guidance_scale": {about["embedded_guidance"] if hunyuan else 1.0}'
    options = ", ".join(f"{key}={value}" for key, value in (stock or {"shift": 1.0}).items())
    code = f"pipe.scheduler = FlowMatchEulerDiscreteScheduler({options})"
    sigmas = f"[{numbers(t_key[:-1])}]"
    if stock is not None:
        return code, [guidance]
    if hunyuan:
        return code, [guidance, f'"sigmas": {sigmas}']
    return f"""{code}
set_timesteps = pipe.scheduler.set_timesteps  # WanPipeline hands no sigmas on: so they go in here
pipe.scheduler.set_timesteps = lambda steps, device=None: set_timesteps(
    sigmas={sigmas}, device=device)""", [guidance]


def comfyui_part(about: dict[str, Any]) -> str:
    """Nodes and their settings."""
    t_key = about["t_key"]
    stock = stock_scheduler(about["family"], t_key)
    text = f"""## ComfyUI

Put `{about["file"]}` into `models/diffusion_models` and load it by Load Diffusion Model.
"""
    if about["family"] == "hunyuan":
        text += f"FluxGuidance: {about['embedded_guidance']}. cfg 1.\n"
        if stock is not None and 1000 % (len(t_key) - 1) == 0:  # simple picks from 1000 times
            return text + (f"ModelSamplingSD3: shift {stock['shift']:g}. KSampler or "
                           f"BasicScheduler: sampler euler, scheduler simple, {len(t_key) - 1} "
                           "steps.\nThat gives the times above.\n")
    return text + f"""ModelSamplingSD3: shift 1. SamplerCustom: cfg 1, KSamplerSelect: euler. \
None of the schedulers to choose from gives
these times: paste them into ManualSigmas (older versions: CustomSigmas of KJNodes with \
interpolate_to_steps {len(t_key)}):

```
{numbers(t_key)}
```

WanVideoWrapper shifts the sigmas that it is given: set shift 1 there too.
"""


def lightx2v_part(about: dict[str, Any]) -> str:
    """Keys of its config."""
    steps = [round(1000 * t) for t in about["t_key"][:-1]]
    return f"""## LightX2V

In the config of a `step_distill` model, which takes whole thousandths (an error of at most 0.0005):

```json
{{"infer_steps": {len(steps)}, "denoising_step_list": {steps}, "sample_shift": 1, \
"enable_cfg": false}}
```
"""


def official_part(about: dict[str, Any]) -> str:
    """Wan's, HunyuanVideo's and AccVideo's own code."""
    steps, shift, title = len(about["t_key"]) - 1, about["shift"], "## The official code\n\n"
    if about["family"] == "hunyuan":
        text = f"""AccVideo's copy reads `--dit-weight {about["file"]}`. HunyuanVideo's own reads \
only torch's files:

```python
import torch
from safetensors.torch import load_file

torch.save(load_file("{about["file"]}"), "{about["stem"]}.pt")
```
"""
        stock = stock_scheduler("hunyuan", about["t_key"])
        how = ("No option of either gives these times." if stock is None else
               f"Both: `--infer-steps {steps} --flow-shift {stock['shift']:g} --flow-reverse "
               f"--cfg-scale 1 --embedded-cfg-scale {about['embedded_guidance']}`.")
        return f"{title}{text}\n{how}\n"
    folder = TEACHERS.get(about["preset"], ("", "the teacher's official folder"))[1]
    n, every = ACCVIDEO[about["takes_image"]]
    own = about["n"] == n and about["key"] == list(range(0, n + 1, every))
    times = (f"AccVideo's copy walks these times with `--sample_solver euler --sample_steps {n} "
             f"--sample_shift {shift:g}`." if own else
             "No official script walks these times.")
    return f"""{title}It loads whatever lies in the teacher's folder. **In a copy of {folder}, \
remove the teacher's index and
shards first** (`diffusion_pytorch_model*.safetensors` and \
`diffusion_pytorch_model.safetensors.index.json`): while they are
there it loads the teacher and says nothing. Then put `{about["file"]}` there as \
`diffusion_pytorch_model.safetensors`,
beside the `config.json` that stays.

{times}

Wan's own script has no Euler. `--sample_solver unipc --sample_steps {steps} --sample_shift \
{shift:g} --sample_guide_scale 1` walks
times near them.
"""


def own_part(about: dict[str, Any]) -> str:
    """This project's command."""
    image = " --image photo.jpg" if about["takes_image"] else ""
    return f"""## This project

```
python sample.py CONFIG --prompt "…"{image} --student {about["file"]}
```

CONFIG is the one that it was distilled with. The times are read from the file. This page is \
printed by
`python sample.py --how {about["file"]}`.
"""
