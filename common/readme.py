"""How other programs run a student: the text of student.md, and a diffusers scheduler for t_key.

Every number comes from the student's own metadata, the times from its t_key. A section is a
program; `student_readme` puts them together.
"""

import math
from typing import Any

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
