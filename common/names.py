"""Names and folders of weights: prefixes and wrappers, ComfyUI's and diffusers' names, fp8 scales;
where each network's file is; identities.

Official names are the ones used here; every function maps to them, or from them to diffusers'.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import check_keys, load_yaml
from common.files import ROOT, abbreviate, parse_json, read_json
from common.weights import (
    WEIGHT_SUFFIXES, LazyTensor, only_weights, open_tensors, sample_blocks, sample_file)

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
# Tensors that only quantised layers have, in forms that are not read.
SCHEMES = tuple((re.compile(pattern), scheme) for pattern, scheme in (
    (r".+\.weight_scale_inv", "fp8 with one scale per block (DeepSeek's)"),
    (r".+\.weight\._(data|scale|shift)", "quanto"), (r".+\.weight_scale_2", "nvfp4"),
    (r".+\.weight\.(absmax|quant_map|nested_|quant_state).*|.+\.(SCB|weight_format)",
     "bitsandbytes"),
    (r".+\.(qweight|qzeros|g_idx|scales|wscales|wtscale)", "GPTQ, AWQ or SVDQuant"),
    (r".+\.(pre_quant_scale|smooth_factor)", "weights scaled together with their inputs"),
    (r".+\.weight[._](?!g$|v$|mask$)\w+", "weights stored in parts")))
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
            raise ValueError(f"{t.file}: is a LoRA ({name:.80}), which changes a model: point "
                             "`weights` at the model, and give this file as --lora")
    file = next(iter(tensors.values())).file
    tensors = {WRAPPERS.sub("", name): t for name, t in tensors.items()}
    prefixes = {name.removesuffix(anchor) for name in tensors for anchor in ANCHORS[component]
                if name == anchor or name.endswith(f".{anchor}")} or {""}
    if len(prefixes) > 1:
        raise ValueError(f"{file}: contains several networks of this kind, under "
                         f"{', '.join(f'{p!r:.80}' for p in sorted(prefixes)[:6])}: save the one "
                         "you mean alone")
    prefix = prefixes.pop()
    tensors = with_scales({name.removeprefix(prefix): t for name, t in tensors.items()
                           if name.startswith(prefix)})
    if component == "transformer" and "double_blocks.0.img_attn.qkv.weight" in tensors:
        tensors = {comfy_to_official(name): t for name, t in tensors.items()}
    return tensors


def with_scales(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors with scaled weights multiplied by their scales, without the scales and ComfyUI's
    markers. Raises ValueError naming the scheme of weights that are quantised in another form."""
    out, scales = {}, {}
    for name, t in tensors.items():
        scale = SCALE.fullmatch(name)
        check_scheme(name, t, twice=scale is not None and f"{scale[1]}.weight" in scales)
        if scale:
            scales[f"{scale[1]}.weight"] = name, t
        elif not UNUSED_SCALE.fullmatch(name):
            out[name] = t
    for name, (scale_name, scale) in scales.items():
        if name in out:
            out[name] = scaled(out[name], scale_name, scale)
    for name, t in out.items():
        if t.dtype in FLOAT8:
            check_range(name, t)
    for t in tensors.values():
        if t.dtype in FLOAT8 and t.shape != (0,):  # ComfyUI's marker is empty
            warn_of_fp8(t.file, bool(scales))
    return out


def check_scheme(name: str, t: LazyTensor, twice: bool) -> None:
    """Raise ValueError if a tensor belongs to a form of quantised weights that is not read, or is
    the second scale of a weight (twice)."""
    kind, scheme = str(t.dtype).removeprefix("torch."), "with two scales" if twice else None
    if name.endswith("weight") and len(t.shape) > 1 and t.dtype not in FLOATS:
        raise ValueError(f"{t.file}: {name} holds {kind}: the weights are quantised to integers or "
                         f"to less than fp8: {REMEDY}")
    if name.endswith(".comfy_quant"):
        if t.dtype != torch.uint8 or not 0 < math.prod(t.shape) <= 4096:
            scheme = "ComfyUI's, with a description that cannot be read"
        else:
            text = bytes(t.read().flatten().tolist()).decode(errors="replace")
            facts = parse_json(text, f"{t.file}: {name}", remedy="copy the file again")
            plain = facts.get("format") in ("float8_e4m3fn", "float8_e5m2")
            if not plain or facts.keys() - {"format", "full_precision_matrix_mult"}:
                scheme = f"ComfyUI's {abbreviate(json.dumps(facts))}"
    elif not SCALE.fullmatch(name):
        scheme = next((scheme for pattern, scheme in SCHEMES if pattern.fullmatch(name)), None)
    if scheme:
        raise ValueError(f"{t.file}: {name:.80} shows that the weights are quantised in a form "
                         f"that is not supported ({scheme}): {REMEDY}")


def scaled(t: LazyTensor, name: str, scale: LazyTensor) -> LazyTensor:
    """A weight times its scale, one for all of it or one per row. Raises ValueError for others."""
    count, rows = math.prod(scale.shape), (*t.shape, 1)[0]
    if scale.dtype not in FLOATS or count not in (1, rows) or (*scale.shape, 1)[0] != count:
        raise ValueError(f"{t.file}: {name} holds {str(scale.dtype).removeprefix('torch.')} "
                         f"{list(scale.shape)} for a weight {list(t.shape)}: scales per block are "
                         f"not supported: {REMEDY}")

    def read(part: slice | None = None) -> Tensor:
        factor = scale.read().float().flatten()
        if count > 1:
            factor = (factor[part] if part else factor).reshape(-1, *[1] * (len(t.shape) - 1))
        return t.read(part).float() * factor

    return dataclasses.replace(t, dtype=torch.float32, read=read)


def check_range(name: str, t: LazyTensor) -> None:
    """Raise ValueError for an fp8 matrix whose values use the range of fp8, to 448 in e4m3: weights
    are below 10, so these were divided by a scale, which is not in the file."""
    if len(t.shape) < 2 or re.search("embed|shared", name):  # umT5's embeddings are large
        return
    top = float(sample_blocks(t).abs().max())
    if top > torch.finfo(t.dtype).max / 4:
        raise ValueError(f"{t.file}: {name} is fp8 with values up to {top:.0f} and without its "
                         "scale: the scales of these weights are stored elsewhere (HunyuanVideo's "
                         "in …_fp8_map.pt, which belongs next to …_fp8.pt) or were lost: "
                         f"{REMEDY}")


@functools.lru_cache
def warn_of_fp8(file: Path, scaled: bool) -> None:
    """Print once per file what fp8 weights cost, as measured on the small world's student."""
    cost = ("a quarter more endpoint error" if scaled else
            "velocities 6 to 8% off, twice the endpoint error")
    if os.environ.get("RANK", "0") == "0":
        print(f"{file}: {'scaled ' if scaled else ''}fp8 weights: on the small world they cost "
              f"{cost}; 16-bit weights cost nothing", flush=True)


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


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """A small tensor in another shape; all of it is read at once."""
    def read(rows: slice | None = None) -> Tensor:
        value = tensor.read().reshape(shape)
        return value[rows] if rows else value

    return dataclasses.replace(tensor, shape=shape, read=read)


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

ROLES = ("dit", "vae", "text_encoder", "text_encoder_2", "image_encoder", "tokenizer",
         "tokenizer_2")
# Under ComfyUI/models: the folders of a role, and how its file's name starts for each family.
COMFY_FOLDERS = {"dit": (("diffusion_models", "unet"), {"wan": "", "hunyuan": ""}),
         "vae": (("vae",), {"wan": "wan_2.1_vae", "hunyuan": "hunyuan_video_vae"}),
         "text_encoder": (("text_encoders", "clip"), {"wan": "umt5", "hunyuan": "llava_llama3"}),
         "text_encoder_2": (("text_encoders", "clip"), {"hunyuan": "clip_l"}),
         "image_encoder": (("clip_vision",), {"wan": "clip_vision_h"})}


def is_list(weights: Path) -> bool:
    """Whether `weights` is a YAML file that names the files."""
    return weights.is_file() and weights.suffix in (".yaml", ".yml")


def read_list(path: Path) -> dict[str, Path]:
    """The file or folder of each network by a YAML file, relative to it. Raises ValueError naming
    the key if it is not such a list."""
    values = load_yaml(path)
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise ValueError(f"{path}: expected lines such as `dit: file.safetensors`, for "
                         f"{', '.join(ROLES)}")
    check_keys(values, ROLES, str(path))
    return {key: path.parent / Path(value).expanduser() for key, value in values.items()}


def role_file(weights: str | Path, role: str, family: str = "wan") -> Path | None:
    """The file of one network by a list or in ComfyUI's folder; None if `weights` is neither.

    Raises FileNotFoundError if it is missing there, ValueError if ComfyUI's folder has several.
    """
    weights = Path(weights)
    if is_list(weights):
        path = read_list(weights).get(role)
        if path is None or not (path.exists() or path.is_symlink()):
            raise FileNotFoundError(f"{weights}: {role}: expected the file or folder of this "
                                    f"network, got {path}: correct this line")
        return path
    if not any((weights / folder).is_dir() for folder in COMFY_FOLDERS["dit"][0]):
        return None
    folders, begin = COMFY_FOLDERS.get(role, ((), {}))
    files = sorted(p for folder in folders for p in (weights / folder).rglob("*")
                   if not p.is_dir() and p.name.startswith(begin.get(family, "-")))
    found = [p for p in files if p.suffix in WEIGHT_SUFFIXES] or [
        p for p in files if p.suffix == ".gguf"]  # which is refused by what it is
    if len(found) != 1:
        got = ", ".join(str(p.relative_to(weights)) for p in found[:6]) or "no such file"
        raise (ValueError if found else FileNotFoundError)(
            f"{weights}: {role}: expected one file, got {got}: name the one you mean in a small "
            f"file.yaml with lines such as `{role}: {weights}/…`, and point `weights` at that")
    return found[0]


# --------------------------------------------------------------------- the DiT's file, identities

# Where official folders keep a DiT: HunyuanVideo's ckpts, AccVideo's release.
OFFICIAL_DITS = ("hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt",
                 "accvideo-t2v-5-steps/diffusion_pytorch_model.pt",
                 "accvideo-t2v-5-steps/diffusion_pytorch_model.safetensors")


def find_dit(weights: str | Path) -> Path:
    """The weight file (or index of shards) of the DiT in an official or diffusers folder."""
    weights = Path(weights)
    for name in OFFICIAL_DITS:
        if (weights / name).is_file():
            return weights / name
    weights = role_file(weights, "dit") or weights
    if (weights / "transformer").is_dir():
        weights = weights / "transformer"
    refuse_experts(weights)
    if not weights.is_dir():
        return weights
    file = weights / "diffusion_pytorch_model.safetensors"
    index = Path(f"{file}.index.json")
    if index.exists() and file.exists():
        raise ValueError(f"{weights}: contains both {file.name} and {index.name}, which may be a "
                         "student and its teacher: point `weights` at the file you mean")
    if index.exists() or file.exists():
        return index if index.exists() else file
    others = sorted(weights.glob("diffusion_pytorch_model*"))  # a variant, or .bin
    return only_weights(weights) if others else file


def refuse_experts(dit: Path) -> None:
    """Raise ValueError if a DiT's file or folder is part of Wan 2.2 A14B, whose two DiTs have the
    names and shapes of Wan 2.1's but sample one part of the steps each."""
    folder = dit if dit.is_dir() else dit.parent
    root = folder.parent if folder.name == "transformer" else folder
    experts = ("high_noise_model", "low_noise_model")
    found = [name for name in ("transformer_2", *experts) if (root / name).exists()]
    found += [folder.name] if folder.name in experts else []
    found += [dit.name] if re.search("(high|low)_noise", dit.name) else []
    index = root / "model_index.json"
    if index.is_file() and read_json(index, remedy="copy it again").get("boundary_ratio"):
        found.append("boundary_ratio in model_index.json")
    if found:
        raise ValueError(f"{dit}: is of Wan 2.2 A14B, by {found[0]}: its two DiTs sample one part "
                         "of the steps each, and this code samples all steps by one DiT: point "
                         "`weights` at Wan 2.1")


def check_sizes(weights: str | Path, sizes: Any, what: str) -> None:
    """Raise ValueError if a folder's config.json has other sizes than `sizes`, of `what`."""
    path = find_dit(weights).with_name("config.json")
    if not (Path(weights).is_dir() and path.exists()):
        return
    expected = dataclasses.asdict(sizes)
    for key, got in read_json(path).items():
        name, got = sizes.diffusers.get(key, key), tuple(got) if isinstance(got, list) else got
        if name in expected and got is not None and got != expected[name]:
            raise ValueError(f"{path}: {key} is {abbreviate(got)}, {what} has {expected[name]}: "
                             "choose the preset that belongs to these weights, or add one")


def dit_tensors(weights: str | Path) -> dict[str, LazyTensor]:
    """The DiT tensors of an official or diffusers folder, or of one file, under official names."""
    return official_names(open_tensors(find_dit(weights)), "transformer")


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
    starts = list(read_list(weights).values()) if is_list(weights) else [weights]
    files = [p for start in starts for p in (start, *start.rglob("*"))]
    files += [start.with_name(PEFT_SETTINGS) for start in starts if start.is_file()]
    for path in sorted(p for p in files if p.is_file()
                       and (p.suffix in WEIGHT_SUFFIXES or p.name == PEFT_SETTINGS)):
        digest.update(f"{os.path.relpath(path, top)} {path.stat().st_size} ".encode())
        digest.update(sample_file(path))
    return digest.hexdigest()[:32]
