"""A student in other programs: its page of instructions, from the templates assets/student*.md,
and ComfyUI's workflow. The facts about these programs that they need are here: times of stock
schedulers, options of official scripts.

In all functions, `facts` is the metadata of a student's file (artifacts/student.py).
"""

import json
import math
import re
from string import Template
from typing import Any

from common.files import ROOT
from experts import with_level
from model import sizes_of

# ----------------------------------------------------------------------- schedulers of diffusers

def stock_scheduler(family: str, t_key: list[float]) -> dict[str, float] | None:
    """Settings with which diffusers' FlowMatchEulerDiscreteScheduler makes the times t_key itself.

    Args: t_key, times from 1 to 0; the pipeline is given as many steps. Returns None if no settings
    make them, as for key timesteps that are not evenly spread over the teacher's grid.
    HunyuanVideo needs the shift alone. WanPipeline passes no times, so that the scheduler takes
    even times from 1 to its own end and shifts them by a: then k / (1 - t_k) is a line A - B k with
    B / A = (a - 1) / a · d, where d is the step between even times, and shift_terminal scales 1 - t
    so that the last t above 0 is t_key[-2].
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
    return settings if all(abs(a - b) < 1e-6 for a, b in zip(times, t, strict=True)) else None


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
    "wan22-t2v-a14b": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan2.2-T2V-A14B"),
    "wan22-i2v-a14b": ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "Wan2.2-I2V-A14B"),
    "hunyuan-t2v": ("hunyuanvideo-community/HunyuanVideo", "HunyuanVideo")}
ACCVIDEO = {False: (50, 5), True: (40, 4)}  # by takes_image: steps of its grid, stride of key
SET_SIGMAS = """
set_timesteps = pipe.scheduler.set_timesteps  # WanPipeline passes no sigmas: they are set here
pipe.scheduler.set_timesteps = lambda steps, device=None: set_timesteps(
    sigmas=[{}], device=device)"""
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def student_page(facts: dict[str, Any], file: str, lora: bool = False) -> str:
    """student.md: what a student, or its LoRA, is, and how diffusers, ComfyUI, LightX2V, the
    official code and this project run it.

    Args: file, its name (of two experts' files, the name without the level of noise); lora, whether
    it is the LoRA.
    """
    t_key, sizes = facts["t_key"], sizes_of(facts["preset"])
    stock, stem = stock_scheduler(sizes.family, t_key), file.removesuffix(".safetensors")
    wan, task = sizes.family == "wan", "i2v" if sizes.takes_image else "t2v"
    teacher, official = TEACHERS.get(facts["preset"], ("teacher-diffusers",
                                                       "the teacher's official folder"))
    values = {
        **facts, **parts(f"student_{task}", facts), "file": file, "stem": stem,
        "steps": len(t_key) - 1, "times": digits(t_key),
        "shift": f"{facts['shift']:g}", "fps": f"{facts['fps']:g}",
        "key": ", ".join(map(str, facts["key"])),
        "torch_dtype": TORCH_DTYPES.get(facts["dtype"], "bfloat16"),
        "thousandths": [round(1000 * t) for t in t_key[:-1]], "teacher": teacher,
        "official": official, "guidance_scale": 1.0, "sigmas_setting": "",
        "set_sigmas": "" if stock or not wan else SET_SIGMAS.format(digits(t_key[:-1])),
        "scheduler": ", ".join(f"{k}={v}" for k, v in (stock or {"shift": 1.0}).items())}
    if sizes.boundary is not None:
        values |= split_times(facts, file)
        values |= parts(f"student_experts_{'loras' if lora else 'files'}", values)
        return fill("student_experts.md", values)
    values |= wan_values(facts, values, lora) if wan else hunyuan_values(facts, values, stock)
    values |= parts(f"student_{sizes.family}", values)
    sections = values["lightx2v"], "" if lora else values["official_code"]
    values["family_part"] = "".join(f"{section}\n\n" for section in sections if section)
    return fill("student_lora.md" if lora else "student.md", values)


def split_times(facts: dict[str, Any], file: str) -> dict[str, Any]:
    """The two files of a student of Wan 2.2 A14B, the step and time at which the second takes over,
    and the times of each."""
    t, boundary = facts["t_key"], sizes_of(facts["preset"]).boundary
    switch = sum(time >= boundary for time in t[:-1])
    return {"high": with_level(file, "high"), "low": with_level(file, "low"), "boundary": boundary,
            "switch": switch, "rest": len(t) - 1 - switch, "high_times": digits(t[:switch + 1]),
            "low_times": digits(t[switch:])}


def wan_values(facts: dict[str, Any], values: dict[str, Any], lora: bool) -> dict[str, Any]:
    """Values of the page's templates that only a student of Wan has, by name."""
    n, (steps, every) = facts["n"], ACCVIDEO[sizes_of(facts["preset"]).takes_image]
    published = n == steps and facts["key"] == list(range(0, n + 1, every))
    return {
        "sigmas_page": fill("student_sigmas.md", values),
        "weights": f'"lora_configs": [{{"path": "{values["file"]}", "strength": 1.0}}]' if lora
        else f'"dit_original_ckpt": "{values["file"]}"',
        "accvideo": f"AccVideo's copy samples at these times with `--sample_solver euler "
        f"--sample_steps {n} --sample_shift {values['shift']}`." if published else
        "No official script samples at these times."}


def hunyuan_values(facts: dict[str, Any], values: dict[str, Any],
                   stock: dict[str, float] | None) -> dict[str, Any]:
    """Values of the page's templates that only a student of HunyuanVideo has, by name."""
    shift, steps = simple_shift(facts), values["steps"]
    return {
        "sigmas_setting": "" if stock else f', "sigmas": [{digits(facts["t_key"][:-1])}]',
        "sigmas_page": fill("student_sigmas.md", values) if shift is None else
        f"ModelSamplingSD3: shift {shift:g}. KSampler or BasicScheduler: sampler euler, scheduler "
        f"simple, {steps} steps.\nThat gives the times above.",
        "options": hunyuan_options(steps, stock, facts["embedded_guidance"])}


def hunyuan_options(steps: int, stock: dict[str, float] | None, embedded: float) -> str:
    """The options with which two official programs sample at the times of HunyuanVideo's student.
    """
    if stock is None:
        return "No options of these two programs give these times."
    shift = f"{stock['shift']:g}"
    accvideo = (f"`--num_inference_steps {steps} --flow_shift {shift} --flow-reverse "
                f"--guidance_scale 1 --embedded_cfg_scale {embedded}`" if shift.isdecimal() else
                f"its `--flow_shift` takes whole numbers alone, not {shift}")
    return (f"AccVideo's `sample_t2v.py`: {accvideo}.\nHunyuanVideo's `sample_video.py`: "
            f"`--infer-steps {steps} --flow-shift {shift} --flow-reverse --cfg-scale 1 "
            f"--embedded-cfg-scale {embedded}`.")


def digits(t_key: list[float]) -> str:
    """Times as text, seven digits of each."""
    return ", ".join(f"{t:.7g}" if t in (0, 1) else f"{t:.7f}" for t in t_key)


def fill(template: str, values: dict[str, Any]) -> str:
    """A template of assets/ with the values at its $names."""
    return Template((ROOT / "assets" / template).read_text(encoding="utf-8")).substitute(values)


def parts(template: str, values: dict[str, Any]) -> dict[str, str]:
    """The parts of a template, each after a line <!-- name -->, with the values at their $names."""
    pieces = re.split(r"<!-- (\w+) -->\n", fill(f"{template}.md", values))
    return {name: text.rstrip("\n") for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}


# ---------------------------------------------------------------------------- ComfyUI's workflow

def simple_shift(facts: dict[str, Any]) -> float | None:
    """The shift with which ComfyUI's scheduler `simple` makes HunyuanVideo's times; None if there
    is none. `simple` picks from 1000 times, so the number of steps must divide 1000."""
    stock = stock_scheduler(facts["family"], facts["t_key"])
    fits = facts["family"] == "hunyuan" and stock and 1000 % (len(facts["t_key"]) - 1) == 0
    return stock["shift"] if fits else None


def comfyui_workflow(facts: dict[str, Any], file: str) -> dict[str, dict[str, Any]]:
    """ComfyUI's graph of a student, from prompt to video, in the form of its API, which its window
    takes too: {number: {"class_type", "inputs"}}; an input [number, i] is output i of a node.

    Args: facts, its metadata; file, its name in models/diffusion_models. The graphs are
    assets/comfyui_*.json, with the other files' names as ComfyUI distributes them.
    """
    sizes, shift = sizes_of(facts["preset"]), simple_shift(facts)
    times = json.dumps({"class_type": "ManualSigmas", "inputs": {"sigmas": digits(facts["t_key"])}}
                       if shift is None else {"class_type": "BasicScheduler", "inputs": {
                           "model": ["6", 0], "scheduler": "simple",
                           "steps": len(facts["t_key"]) - 1, "denoise": 1.0}})
    values = {**facts, "file": file, "stem": file.removesuffix(".safetensors"), "sigmas": times,
              "shift": shift or 1.0, "fps": float(facts["fps"])}
    experts = {} if sizes.boundary is None else split_times(facts, file)
    kind = f"{sizes.family}{'_experts' * bool(experts)}{'_image' * sizes.takes_image}"
    return json.loads(fill(f"comfyui_{kind}.json", values | experts))
