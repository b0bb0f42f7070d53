"""A student in other programs: its page of instructions, by the templates assets/student*.md, and
ComfyUI's workflow. What they need of each program's sampling is here: times of stock schedulers,
options of official scripts.

facts, here and below: what a student's file says about itself (artifacts/student.py).
"""

import math
from string import Template
from typing import Any

from common.files import ROOT
from common.names import EXPERTS
from experts import with_level
from model import sizes_of

# ----------------------------------------------------------------------- schedulers of diffusers

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
    "wan22-t2v-a14b": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan2.2-T2V-A14B"),
    "wan22-i2v-a14b": ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", "Wan2.2-I2V-A14B"),
    "hunyuan-t2v": ("hunyuanvideo-community/HunyuanVideo", "HunyuanVideo")}
ACCVIDEO = {False: (50, 5), True: (40, 4)}  # steps of its Wan scripts; every how many is key
SET_SIGMAS = """
set_timesteps = pipe.scheduler.set_timesteps  # WanPipeline passes no sigmas: they are set here
pipe.scheduler.set_timesteps = lambda steps, device=None: set_timesteps(
    sigmas=[{}], device=device)"""
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def student_page(facts: dict[str, Any], file: str, lora: bool = False) -> str:
    """student.md: what a student, or its LoRA, is, and how diffusers, ComfyUI, LightX2V, the
    official code and this project run it.

    Args: file, its name, of two experts without their levels of noise; lora, whether it is the
    LoRA.
    """
    t_key, family = facts["t_key"], facts["family"]
    stock, stem = stock_scheduler(family, t_key), file.removesuffix(".safetensors")
    image, dtype = sizes_of(facts["preset"]).takes_image, facts.get("dtype", "fp32")
    teacher, official = TEACHERS.get(facts["preset"], ("teacher-diffusers",
                                                       "the teacher's official folder"))
    values = {
        "fps": 16 if family == "wan" else 24, **facts, "file": file, "stem": stem,
        "steps": len(t_key) - 1, "times": digits(t_key), "shift": f"{facts['shift']:g}",
        "key": ", ".join(map(str, facts["key"])), "dtype": dtype,
        "torch_dtype": TORCH_DTYPES[dtype], "teacher": teacher, "official": official,
        "task": "image to video" if image else "text to video",
        "import_load_image": ", load_image" if image else "",
        "image_argument": ', image=load_image("photo.jpg")' if image else "",
        "image_option": " --image photo.jpg" if image else "",
        "scheduler": ", ".join(f"{k}={v}" for k, v in (stock or {"shift": 1.0}).items()),
        "scheduler_note": f" `{stem}_diffusers/scheduler`\nholds the same." if stock and not lora
        else "" if stock else " No stock\nscheduler has these times: the sigmas are passed to it."}
    values |= {"size": "", "size_argument": ""} if "height" not in facts else {
        "size": "\n- Size: {width} × {height}, {frames} frames, {fps:g} frames per second.".format(
            **values),
        "size_argument": ", height={height}, width={width}, num_frames={frames}".format(**values)}
    values["fps"] = f"{values['fps']:g}"
    if sizes_of(facts["preset"]).boundary is not None:
        return fill("student_experts", values | experts_values(facts, values, stock, image, lora))
    values |= (wan_values if family == "wan" else hunyuan_values)(facts, values, stock, image, lora)
    return fill("student_lora" if lora else "student", values)


def experts_values(facts: dict[str, Any], values: dict[str, Any], stock: dict[str, float] | None,
                   image: bool, lora: bool) -> dict[str, Any]:
    """What the page says of the two files of a student of Wan 2.2 A14B, or of its two LoRAs."""
    t, boundary = facts["t_key"], sizes_of(facts["preset"]).boundary
    high, low = (with_level(values["file"], level) for level in ("high", "low"))
    switch = sum(time >= boundary for time in t[:-1])
    names = {"high": high, "low": low, "stem": values["stem"],
             "pipeline": "WanImageToVideoPipeline" if image else "WanPipeline"}
    weights = ", ".join(f'{{"name": "{name}", "path": "{file}", "strength": 1.0}}'
                        for name, file in zip(EXPERTS, (high, low), strict=True))
    return names | {
        "torch_dtype": "bfloat16" if lora else values["torch_dtype"],
        "what": "Two LoRAs" if lora else "A student", "boundary": boundary, "switch": switch,
        "rest": len(t) - 1 - switch, "peft": " peft" if lora else "",
        "option": "lora" if lora else "student", "task_option": "i2v" if image else "t2v",
        "tensors": "Tensors: `diffusion_model.` and official names, no alpha: strength 1 is the "
        "student." if lora else f"Tensors: official names, {values['dtype']}. Text encoder and VAE "
        "are the teacher's.",
        "load": fill(f"student_experts_{'loras' if lora else 'files'}", values | names),
        "set_sigmas": "" if stock else SET_SIGMAS.format(digits(t[:-1])),
        "comfyui": "Put both files into `models/loras`. Load Diffusion Model twice, the teacher's "
        "two; LoraLoaderModelOnly after each: strength_model 1." if lora else
        f"Put both files into `models/diffusion_models`. `{values['stem']}_comfyui.json`, which "
        "`distill.py` writes next to them, is the\nwhole graph: drag it into ComfyUI's window. By "
        "hand: Load Diffusion Model twice.",
        "high_times": digits(t[:switch + 1]), "low_times": digits(t[switch:]),
        "weights": f'"lora_configs": [{weights}]' if lora else
        f'"high_noise_original_ckpt": "{high}", "low_noise_original_ckpt": "{low}"',
        "thousandths": [round(1000 * time) for time in t[:-1]],
        "folders": "" if lora else " Its folders `high_noise_model` and `low_noise_model` take the "
        "two files\nas `diffusion_pytorch_model.safetensors`, next to `config.json`, in place of "
        "the teacher's index and shards."}


def wan_values(facts: dict[str, Any], values: dict[str, Any], stock: dict[str, float] | None,
               image: bool, lora: bool) -> dict[str, Any]:
    """What the page says of Wan's students: values of the templates by name."""
    n, (steps, every) = facts["n"], ACCVIDEO[image]
    published = n == steps and facts["key"] == list(range(0, n + 1, every))
    weights = (f'"lora_configs": [{{"path": "{values["file"]}", "strength": 1.0}}]' if lora else
               f'"dit_original_ckpt": "{values["file"]}"')
    parts = {
        "weights": weights, "task_option": "i2v" if image else "t2v",
        "thousandths": [round(1000 * t) for t in facts["t_key"][:-1]],
        "accvideo": f"AccVideo's copy samples at these times with `--sample_solver euler "
        f"--sample_steps {n} --sample_shift {values['shift']}`." if published else
        "No official script samples at these times."}
    lightx2v = fill("student_lightx2v", values | parts)
    return {
        "model": "Wan 2.1", "network": "WanTransformer3DModel", "guidance_scale": 1.0,
        "pipeline": "WanImageToVideoPipeline" if image else "WanPipeline", "sigmas_setting": "",
        "guidance": "Without guidance: one evaluation per step.",
        "set_sigmas": "" if stock else SET_SIGMAS.format(digits(facts["t_key"][:-1])),
        "comfyui": fill("student_sigmas", values), "applied": "diffusers applies its matrices and "
        "their biases, but no norms, patches or modulation; ComfyUI all but modulation.",
        "family_part": lightx2v + ("" if lora else fill("student_wan", values | parts))}


def hunyuan_values(facts: dict[str, Any], values: dict[str, Any], stock: dict[str, float] | None,
                   image: bool, lora: bool) -> dict[str, Any]:
    """What the page says of HunyuanVideo's students: values of the templates by name."""
    embedded, shift, steps = facts["embedded_guidance"], simple_shift(facts), values["steps"]
    sampling = fill("student_sigmas", values) if shift is None else (
        f"ModelSamplingSD3: shift {shift:g}. KSampler or BasicScheduler: sampler euler, scheduler "
        f"simple, {steps} steps.\nThat gives the times above.\n")
    return {
        "model": "HunyuanVideo", "network": "HunyuanVideoTransformer3DModel",
        "pipeline": "HunyuanVideoPipeline", "guidance_scale": embedded, "set_sigmas": "",
        "guidance": "Without true guidance; the embedded guidance, an input of the network, is "
        f"{embedded}.",
        "sigmas_setting": "" if stock else f', "sigmas": [{digits(facts["t_key"][:-1])}]',
        "comfyui": f"FluxGuidance: {embedded}; its field rounds that to a tenth, which in bf16 is "
        f"the same to the network. cfg 1.\n{sampling}",
        "applied": "Both programs apply all of it. It has the blocks' matrices; what distillation "
        "changed elsewhere is left out.",
        "family_part": "" if lora else fill("student_hunyuan", values | {
            "options": hunyuan_options(steps, stock, embedded)})}


def hunyuan_options(steps: int, stock: dict[str, float] | None, embedded: float) -> str:
    """The options with which two official programs sample at the times of HunyuanVideo's student.
    """
    if stock is None:
        return "No option of either gives these times."
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
    text = (ROOT / f"assets/{template}.md").read_text(encoding="utf-8")
    return Template(text).substitute(values)


# ---------------------------------------------------------------------------- ComfyUI's workflow

# Its files in ComfyUI's models folder, as ComfyUI distributes them.
COMFYUI = {
    "wan": {"clip": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "vae": "wan_2.1_vae.safetensors",
            "vision": "clip_vision_h.safetensors"},
    "hunyuan": {"clip": "clip_l.safetensors", "llava": "llava_llama3_fp8_scaled.safetensors",
                "vae": "hunyuan_video_vae_bf16.safetensors"}}


def simple_shift(facts: dict[str, Any]) -> float | None:
    """The shift with which ComfyUI's scheduler `simple` makes HunyuanVideo's times; None if there
    is none. It picks from 1000 times."""
    stock = stock_scheduler(facts["family"], facts["t_key"])
    fits = facts["family"] == "hunyuan" and stock and 1000 % (len(facts["t_key"]) - 1) == 0
    return stock["shift"] if fits else None


def comfyui_workflow(facts: dict[str, Any], file: str) -> dict[str, dict[str, Any]]:
    """ComfyUI's graph of a student, from prompt to video, in the form of its API, which its window
    takes too: {number: {"class_type", "inputs"}}; an input [number, i] is output i of a node.

    Args: facts, its metadata; file, its name in models/diffusion_models.
    """
    wan, image = facts["family"] == "wan", sizes_of(facts["preset"]).takes_image
    names, shift = COMFYUI[facts["family"]], simple_shift(facts)
    experts = sizes_of(facts["preset"]).boundary is not None
    size = {"width": facts["width"], "height": facts["height"], "length": facts["frames"],
            "batch_size": 1}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {  # (node, i) is its output i
        "dit": ("UNETLoader", {"unet_name": file, "weight_dtype": "default"}),
        "clip": ("CLIPLoader", {"clip_name": names["clip"], "type": "wan"}) if wan else (
            "DualCLIPLoader", {"clip_name1": names["clip"], "clip_name2": names["llava"],
                               "type": "hunyuan_video"}),
        "vae": ("VAELoader", {"vae_name": names["vae"]}),
        "prompt": ("CLIPTextEncode", {"text": "…", "clip": ("clip", 0)}),
        "nothing": ("CLIPTextEncode", {"text": "", "clip": ("clip", 0)}),  # cfg 1 does not use it
        "shift": ("ModelSamplingSD3", {"model": ("dit", 0), "shift": shift or 1.0}),
        "sampler": ("KSamplerSelect", {"sampler_name": "euler"}),
        "sigmas": ("ManualSigmas", {"sigmas": digits(facts["t_key"])}) if shift is None else (
            "BasicScheduler", {"model": ("shift", 0), "scheduler": "simple",
                               "steps": len(facts["t_key"]) - 1, "denoise": 1.0})}
    positive, negative, latent = ("prompt", 0), ("nothing", 0), ("size", 0)
    if not wan:
        nodes["guidance"] = "FluxGuidance", {"conditioning": positive,
                                             "guidance": facts["embedded_guidance"]}
        positive = "guidance", 0
    if image:
        nodes["image"] = "LoadImage", {"image": "photo.jpg"}
        features = {}
        if sizes_of(facts["preset"]).has_clip:
            nodes["vision"] = "CLIPVisionLoader", {"clip_name": names["vision"]}
            nodes["features"] = "CLIPVisionEncode", {"clip_vision": ("vision", 0),
                                                     "image": ("image", 0), "crop": "none"}
            features = {"clip_vision_output": ("features", 0)}
        nodes["size"] = "WanImageToVideo", {
            "positive": positive, "negative": negative, "vae": ("vae", 0), **size,
            **features, "start_image": ("image", 0)}
        positive, negative, latent = ("size", 0), ("size", 1), ("size", 2)
    else:
        nodes["size"] = "EmptyHunyuanLatentVideo", size
    nodes["sample"] = "SamplerCustom", {
        "model": ("shift", 0), "add_noise": True, "noise_seed": 0, "cfg": 1.0,
        "positive": positive, "negative": negative, "sampler": ("sampler", 0),
        "sigmas": ("sigmas", 0), "latent_image": latent}
    if experts:
        nodes = with_second_expert(nodes, facts, file)
    nodes |= {
        "decode": ("VAEDecode", {"samples": ("sample", 0), "vae": ("vae", 0)}),
        "video": ("CreateVideo", {"images": ("decode", 0), "fps": float(facts["fps"])}),
        "save": ("SaveVideo", {"video": ("video", 0), "format": "auto", "codec": "auto",
                               "filename_prefix": f"video/{file.removesuffix('.safetensors')}"})}
    if experts:
        nodes["decode"][1]["samples"] = "sample_low", 0
    numbers = {name: str(i) for i, name in enumerate(nodes, 1)}
    return {numbers[name]: {"class_type": kind, "inputs": {
        key: [numbers[value[0]], value[1]] if isinstance(value, tuple) else value
        for key, value in inputs.items()}} for name, (kind, inputs) in nodes.items()}


def with_second_expert(nodes: dict[str, tuple[str, dict[str, Any]]], facts: dict[str, Any],
                       file: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """A workflow's nodes with the high-noise expert sampling to the boundary, and those with which
    the other one continues from its latents."""
    t, boundary = facts["t_key"], sizes_of(facts["preset"]).boundary
    switch = sum(time >= boundary for time in t[:-1])
    more = {}
    for suffix, level, part in (("", "high", t[:switch + 1]), ("_low", "low", t[switch:])):
        name = {"unet_name": with_level(file, level)}
        more[f"dit{suffix}"] = "UNETLoader", nodes["dit"][1] | name
        more[f"sigmas{suffix}"] = "ManualSigmas", {"sigmas": digits(part)}
    more["shift_low"] = "ModelSamplingSD3", {"model": ("dit_low", 0), "shift": 1.0}
    more["sample_low"] = "SamplerCustom", nodes["sample"][1] | {
        "model": ("shift_low", 0), "add_noise": False, "sigmas": ("sigmas_low", 0),
        "latent_image": ("sample", 0)}
    return nodes | more
