"""Names and folders of weights: prefixes and wrappers, ComfyUI's and diffusers' names, fp8 scales;
where each network's file is; identities.

Official names are the ones used here; every function maps to them, or from them to diffusers'.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from common.config import check_keys, load_yaml
from common.files import ROOT, abbreviate, parse_json, read_json
from common.weights import (
    WEIGHT_SUFFIXES, LazyTensor, dtype_name, only_weights, open_tensors, sample_blocks, sample_file)

# -------------------------------------------------------------------- prefixes, scales, refusals

# What training programs leave inside names, at any place.
WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# For each component, a tensor that every form of it has: what precedes its name is a prefix.
ANCHORS = {
    "transformer": ("patch_embedding.weight", "img_in.proj.weight", "x_embedder.proj.weight"),
    "vae": ("encoder.conv1.weight", "encoder.conv_in.weight", "encoder.conv_in.conv.weight"),
    "text_encoder": ("token_embedding.weight", "shared.weight"),
    "llm": ("embed_tokens.weight",), "clip_text": ("embeddings.token_embedding.weight",),
    "image_encoder": ("visual.cls_embedding", "vision_model.embeddings.class_embedding")}
LORA = re.compile(r".*[._](lora_(A|B|up|down)|hada_w1_a|lokr_w1)\b.*|.*\.diff(_b|_m)?")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8)
SCALE = re.compile(r"(.+)\.(scale_weight|weight_scale)")  # of a layer's fp8 weight
# Of its input, for fp8 products, and ComfyUI's markers: not needed for the weights.
UNUSED_SCALE = re.compile(r"(.+\.)?(scale_input|input_scale|comfy_quant|scaled_fp8)")
# Tensors that only quantised layers have: fp8 with scales of blocks, quanto, nvfp4, bitsandbytes,
# GPTQ, AWQ, SVDQuant.
QUANTISED = re.compile(r".+\.(weight[._](?!g$|v$|mask$)\w+(\.bitsandbytes__\w+)?|SCB|qweight|"
                       r"qzeros|g_idx|w?scales|wtscale|pre_quant_scale|smooth_factor)")
REMEDY = ("use bf16, fp16 or fp32 weights, or fp8 with one scale per tensor or per row of each "
          "weight (`weight_scale`)")


def plain_names(tensors: dict, component: str) -> dict:
    """Lazy tensors without other programs' wrappers and prefixes, fp8 ones with their scales
    applied, ComfyUI's HunyuanVideo names made official. Tensors outside the prefix are dropped.

    Raises ValueError for a LoRA, several networks of the kind in one file, and weights that are
    quantised in another form than fp8 with a scale per tensor or row, before any of them is used.
    """
    if not tensors or not isinstance(next(iter(tensors.values())), LazyTensor):
        return tensors
    for name, t in tensors.items():
        if LORA.fullmatch(name):
            raise ValueError(f"{t.file}: is a LoRA ({name:.80}), not a network: merge it into its "
                             "model (docs/own_teacher.md), or give it to sample.py as --lora")
    file = next(iter(tensors.values())).file
    tensors = {WRAPPERS.sub("", name): t for name, t in tensors.items()}
    prefixes = {name.removesuffix(anchor) for name in tensors for anchor in ANCHORS[component]
                if name == anchor or name.endswith(f".{anchor}")} or {""}
    if len(prefixes) > 1:
        raise ValueError(f"{file}: contains several networks of this kind, under "
                         f"{abbreviate(sorted(prefixes))}: save the one you mean alone")
    prefix = prefixes.pop()
    tensors = with_scales({name.removeprefix(prefix): t for name, t in tensors.items()
                           if name.startswith(prefix)})
    if component == "transformer" and "double_blocks.0.img_attn.qkv.weight" in tensors:
        tensors = {comfy_to_official(name): t for name, t in tensors.items()}
    return tensors


def with_scales(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors with scaled weights multiplied by their scales, without the scales and ComfyUI's
    markers. Raises ValueError for weights that are quantised in another form."""
    out, scales = {}, {}
    for name, t in tensors.items():
        scale = SCALE.fullmatch(name)
        twice = scale is not None and f"{scale[1]}.weight" in scales
        if twice or scale is None and is_quantised(name, t):
            raise ValueError(f"{t.file}: {name:.80}, {dtype_name(t)}, shows that the weights are "
                             f"quantised in a form that is not supported: {REMEDY}")
        if scale:
            scales[f"{scale[1]}.weight"] = name, t
        elif not UNUSED_SCALE.fullmatch(name):
            out[name] = t
    for name, t in out.items():
        if name in scales:
            out[name] = scale_weight(t, *scales[name])
        elif t.dtype in FLOAT8:
            check_range(name, t)
    return out


def is_quantised(name: str, t: LazyTensor) -> bool:
    """Whether a tensor belongs to weights that are integers, or quantised in another form than fp8
    with a scale per tensor or row."""
    if name.endswith(".comfy_quant"):  # ComfyUI's description of a layer, JSON as bytes
        text = t.read().flatten().byte().numpy().tobytes().decode(errors="replace")
        facts = parse_json(text, f"{t.file}: {name}", remedy="copy the file again")
        return (facts.get("format") not in ("float8_e4m3fn", "float8_e5m2")
                or bool(facts.keys() - {"format", "full_precision_matrix_mult"}))
    integers = name.endswith("weight") and len(t.shape) > 1 and t.dtype not in FLOATS
    return integers or bool(QUANTISED.fullmatch(name))


def scale_weight(t: LazyTensor, name: str, scale: LazyTensor) -> LazyTensor:
    """A weight times its scale, one for all of it or one per row. Raises ValueError for others."""
    count, rows = math.prod(scale.shape), (*t.shape, 1)[0]
    if scale.dtype not in FLOATS or count not in (1, rows) or (*scale.shape, 1)[0] != count:
        raise ValueError(f"{t.file}: {name} holds {dtype_name(scale)} {list(scale.shape)} for a "
                         f"weight {list(t.shape)}: scales per block are not supported: {REMEDY}")

    def read(part: slice | None = None) -> Tensor:
        factor = scale.read().float().flatten()
        if count > 1:
            factor = (factor[part] if part else factor).reshape(-1, *[1] * (len(t.shape) - 1))
        return t.read(part).float() * factor

    return dataclasses.replace(t, dtype=torch.float32, read=read)


def check_range(name: str, t: LazyTensor) -> None:
    """Raise ValueError for an fp8 matrix whose values use the range of e4m3, to 448, or of e5m2:
    weights are below 10, so these were divided by a scale, which is not in the file."""
    if len(t.shape) < 2 or re.search("embed|shared", name):  # umT5's embeddings are large
        return
    top = float(sample_blocks(t).abs().max())
    if top > torch.finfo(torch.float8_e4m3fn).max / 4:
        raise ValueError(f"{t.file}: {name} is fp8 with values up to {top:.0f} and without its "
                         f"scale (HunyuanVideo's …_fp8.pt needs its …_fp8_map.pt): {REMEDY}")


# ------------------------------------------------------------------------ ComfyUI's HunyuanVideo

COMFY = tuple((re.compile(pattern), official) for pattern, official in (
    (r"mlp\.0\.", "mlp.fc1."), (r"mlp\.2\.", "mlp.fc2."),
    (r"(txt_in\.t_embedder|time_in|guidance_in)\.in_layer\.", r"\1.mlp.0."),
    (r"(txt_in\.t_embedder|time_in|guidance_in)\.out_layer\.", r"\1.mlp.2."),
    (r"txt_in\.c_embedder\.in_layer\.", "txt_in.c_embedder.linear_1."),
    (r"txt_in\.c_embedder\.out_layer\.", "txt_in.c_embedder.linear_2."),
    (r"(_mod|\.modulation)\.lin\.", r"\1.linear."),
    (r"_attn\.(qkv|proj)\.", r"_attn_\1."),
    (r"_attn\.norm\.(query|key)_norm\.scale", r"_attn_\1_norm.weight"),
    (r"\.norm\.(query|key)_norm\.scale", r".\1_norm.weight"),
    (r"query_norm", "q_norm"), (r"key_norm", "k_norm")))


def comfy_to_official(name: str) -> str:
    """The official name of a HunyuanVideo tensor as ComfyUI saves it."""
    for pattern, official in COMFY:
        name = pattern.sub(official, name)
    return name


# ----------------------------------------------------------------------------------- diffusers

@functools.lru_cache
def name_rules(family: str, component: str, reverse: bool) -> list[tuple[re.Pattern, str]]:
    """Rules (pattern, template) from diffusers to official names of a component, or back."""
    rules = []
    for diffusers, official, note in read_json(ROOT / f"assets/{family}_diffusers_map.json", list):
        if not re.match(rf"{component}\b", note) or (reverse and "alias" in note):
            continue
        source, target = (official, diffusers) if reverse else (diffusers, official)
        pattern = re.escape(source).replace(r"\{i\}", "(?P<i>[0-9]+)")
        pattern = pattern.replace(r"\{p\}", "(?P<p>weight|bias)")
        target = target.replace("{i}", r"\g<i>").replace("{p}", r"\g<p>")
        rules.append((re.compile(pattern), target))
    return rules


def joined(parts: list[LazyTensor]) -> LazyTensor:
    """Several tensors concatenated along their first dimension, read lazily; plain ones are too."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    ends = list(itertools.accumulate(part.shape[0] for part in parts))

    def read(rows: slice | None = None) -> Tensor:
        a, b = (rows.start, rows.stop) if rows else (0, ends[-1])
        inside = [part.read(slice(max(a - end + part.shape[0], 0), min(b - end, 0) + part.shape[0]))
                  for part, end in zip(parts, ends, strict=True)
                  if a < end and b > end - part.shape[0]]
        return torch.cat(inside)

    return dataclasses.replace(parts[0], shape=(ends[-1], *parts[0].shape[1:]), read=read)


HUNYUAN_MARKS = {"context_embedder.proj_in.weight", "txt_in.input_embedder.weight"}


def official_names(tensors: dict, component: str, reverse: bool = False) -> dict:
    """Rename diffusers or transformers tensors to official names (reverse: the other way).

    Args: tensors, lazy or plain; component, "transformer", "vae", "text_encoder" or
    "image_encoder". A name without a rule is kept, so that strict loading reports it. Some
    diffusers layouts have q, k, v (and the MLP's input) apart, in the order of its rules, and
    [scale, shift] for [shift, scale] in the last layer.
    Forward also removes what other programs add to names, and applies the scales of fp8 weights.
    Raises ValueError as plain_names does.
    """
    if not reverse:
        tensors = plain_names(tensors, component)
    hunyuan = component == "transformer" and bool(HUNYUAN_MARKS & tensors.keys())
    fused = hunyuan or component == "image_encoder"
    rules, found = name_rules("hunyuan" if hunyuan else "wan", component, reverse), {}
    for name, value in tensors.items():
        hits = [(i, match.expand(template)) for i, (pattern, template) in enumerate(rules)
                if (match := pattern.fullmatch(name))] or [(0, name)]
        if hits[0][1] != name and "final_layer.adaLN" in f"{name} {hits[0][1]}":
            half = value.shape[0] // 2
            value = joined([value[half:], value[:half]])
        if fused and reverse and len(hits) > 1:  # split into the parts that diffusers keeps apart
            D = tensors["img_in.proj.bias"].shape[0]
            ends = [*(D, 2 * D, 3 * D)[:len(hits) - 1], value.shape[0]]
            found |= {target: [(i, value[a:b])] for (i, target), a, b
                      in zip(hits, [0, *ends], ends, strict=False)}
        else:
            found.setdefault(hits[0][1], []).append((hits[0][0], value))
    return {name: joined([v for _, v in sorted(parts, key=lambda part: part[0])])
            if fused and len(parts) > 1 else parts[-1][1] for name, parts in found.items()}


# ------------------------------------------------------------ a list of files, ComfyUI's folder

# Under ComfyUI/models: the folders of a role, and a pattern of its file's name for each family.
DIT_FOLDERS = ("diffusion_models", "unet")
COMFY_FOLDERS = {
    "dit": (DIT_FOLDERS, {"wan": "", "hunyuan": ""}),
    "dit_high": (DIT_FOLDERS, {"wan": ".*high_noise"}),
    "dit_low": (DIT_FOLDERS, {"wan": ".*low_noise"}),
    "vae": (("vae",), {"wan": r"wan_2\.1_vae", "hunyuan": "hunyuan_video_vae"}),
    "text_encoder": (("text_encoders", "clip"), {"wan": "umt5", "hunyuan": "llava_llama3"}),
    "text_encoder_2": (("text_encoders", "clip"), {"hunyuan": "clip_l"}),
    "image_encoder": (("clip_vision",), {"wan": "clip_vision_h"})}
ROLES = (*COMFY_FOLDERS, "tokenizer", "tokenizer_2")


def is_list(weights: Path) -> bool:
    """Whether `weights` is a YAML file that names the files."""
    return weights.is_file() and weights.suffix in (".yaml", ".yml")


def read_list(path: Path) -> dict[str, Path]:
    """The file or folder of each network by a YAML file, relative to it. Raises ValueError naming
    the key if it is not such a list."""
    values = load_yaml(path)
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise ValueError(f"{path}: expected lines `ROLE: FILE`, for {', '.join(ROLES)}")
    check_keys(values, ROLES, str(path))
    return {key: path.parent / Path(value).expanduser() for key, value in values.items()}


def role_files(weights: Path, family: str = "wan") -> dict[str, list[Path]] | None:
    """The files of each network, by role, in a list or in ComfyUI's folder `models`; None if
    `weights` is neither."""
    if is_list(weights):
        return {role: [path] for role, path in read_list(weights).items()}
    if not any((weights / folder).is_dir() for folder in DIT_FOLDERS):
        return None
    found = {}
    for role, (folders, patterns) in COMFY_FOLDERS.items():
        files = sorted(p for folder in folders for p in (weights / folder).rglob("*")
                       if not p.is_dir() and re.match(patterns.get(family, "-"), p.name))
        found[role] = [p for p in files if p.suffix in WEIGHT_SUFFIXES] or [
            p for p in files if p.suffix == ".gguf"]  # which is refused by what it is
    return found


def role_file(weights: str | Path, role: str, family: str = "wan") -> Path | None:
    """The file of one network by a list or in ComfyUI's folder; None if `weights` is neither.

    Raises FileNotFoundError unless there is exactly one.
    """
    files = role_files(Path(weights), family)
    if files is None:
        return None
    found = [p for p in files.get(role, ()) if p.exists() or p.is_symlink()]
    if len(found) != 1:
        got = ", ".join(map(str, files.get(role, ())[:6])) or "none"
        raise FileNotFoundError(f"{weights}: {role}: expected one existing file, got {got}: give "
                                f"`{role}: FILE` in a file.yaml, and point `weights` at that")
    return found[0]


# ------------------------------------------------------------------- the DiTs' files, identities

# Where official folders keep a DiT: HunyuanVideo's ckpts, AccVideo's release.
OFFICIAL_DITS = ("hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt",
                 "accvideo-t2v-5-steps/diffusion_pytorch_model.pt",
                 "accvideo-t2v-5-steps/diffusion_pytorch_model.safetensors")
# Wan 2.2 A14B's two DiTs: the official folders, which also begin the names of parameters here.
EXPERTS = ("high_noise_model", "low_noise_model")
NOISE = re.compile("(high|low)_noise")  # in the names of their files


def expert_files(file: Path) -> list[Path] | None:
    """The files of high and of low noise, given one of the two; None if its name has neither."""
    if not NOISE.search(file.name):
        return None
    return [file.with_name(NOISE.sub(f"{level}_noise", file.name)) for level in ("high", "low")]


def expert_paths(weights: Path) -> list[Path] | None:
    """The files or folders of high and of low noise of Wan 2.2 A14B; None for another model.

    Raises FileNotFoundError if one of the two is missing, ValueError for a folder that is one.
    """
    roles, files = ("dit_high", "dit_low"), role_files(weights) or {}
    if any(files.get(role) for role in roles) and len(files.get("dit", ())) in (0, 2):
        return [role_file(weights, role) for role in roles]
    folder, index = weights if weights.is_dir() else weights.parent, weights / "model_index.json"
    if folder.name in EXPERTS or (folder.name.startswith("transformer")
                                  and (folder.parent / "transformer_2").exists()):
        raise ValueError(f"{weights}: is one of the two DiTs of Wan 2.2 A14B: point `weights` at "
                         f"{folder.parent}")
    pair = None if weights.is_dir() else expert_files(weights)
    if any((weights / name).exists() for name in EXPERTS):
        pair = [weights / name for name in EXPERTS]
    elif (weights / "transformer_2").exists() or index.is_file() and read_json(
            index, remedy="copy it again").get("boundary_ratio") is not None:
        pair = [weights / "transformer", weights / "transformer_2"]
    for path in pair or ():
        if not path.exists():
            raise FileNotFoundError(f"{path}: is missing: get both DiTs of Wan 2.2 A14B")
    return pair


def dit_files(weights: str | Path) -> dict[str, Path]:
    """The weight file (or index of shards) of each DiT, by what its parameters' names begin with:
    "" for the only one. Raises as expert_paths."""
    weights = Path(weights)
    if pair := expert_paths(weights):
        return {f"{name}.": weight_file(path) for name, path in zip(EXPERTS, pair, strict=True)}
    folder = weights / "transformer"
    official = (weights / name for name in OFFICIAL_DITS if (weights / name).is_file())
    return {"": next(official, None) or role_file(weights, "dit")
            or weight_file(folder if folder.is_dir() else weights)}


def weight_file(path: Path) -> Path:
    """The weight file (or index of shards) in a DiT's own folder; a file is returned as it is."""
    return only_weights(path, "diffusion_pytorch_model") if path.is_dir() else path


def dit_tensors(weights: str | Path) -> dict[str, LazyTensor]:
    """The DiT tensors of an official or diffusers folder, or of one file, under official names; of
    Wan 2.2 A14B with the folder's name before them. Raises ValueError for Wan 2.2 TI2V-5B."""
    found = {}
    for prefix, file in dit_files(weights).items():
        tensors = official_names(open_tensors(file), "transformer")
        if "patch_embedding.weight" in tensors and (
                tensors["patch_embedding.weight"].shape[1:2] == (48,)):
            raise ValueError(f"{file}: is Wan 2.2 TI2V-5B, whose VAE and times of each token are "
                             "not supported: use Wan 2.2 A14B or Wan 2.1")
        found |= {prefix + name: t for name, t in tensors.items()}
    return found


def fingerprint(weights: str | Path) -> str:
    """Identity of a DiT's weights: a hash over each tensor's name, shape and 64 spread blocks.

    The same for official, diffusers, sharded and single files of one dtype. A change between the
    blocks, such as a flipped bit, is not seen.
    """
    tensors, digest = dit_tensors(weights), hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}".encode())
        digest.update(sample_blocks(tensors[name]).numpy().tobytes())
    return digest.hexdigest()[:32]


PEFT_SETTINGS = "adapter_config.json"


def fingerprint_files(weights: str | Path) -> str:
    """Identity of all weight files of a folder, and of peft's settings of a LoRA in it or next to
    it: the name, size and 64 spread blocks of each. What it cannot see is as in fingerprint."""
    digest, weights = hashlib.sha256(), Path(weights)
    top = weights.parent if weights.is_file() else weights
    starts = list(read_list(weights).values()) if is_list(weights) else (
        expert_files(weights) if weights.is_file() else None) or [weights]
    files = [p for start in starts for p in (start, *start.rglob("*"))]
    files += [start.with_name(PEFT_SETTINGS) for start in starts if start.is_file()]
    for path in sorted(p for p in files if p.is_file()
                       and (p.suffix in WEIGHT_SUFFIXES or p.name == PEFT_SETTINGS)):
        digest.update(f"{os.path.relpath(path, top)} {path.stat().st_size} ".encode())
        digest.update(sample_file(path))
    return digest.hexdigest()[:32]
