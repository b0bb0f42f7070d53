"""Names of other programs: prefixes and wrappers, ComfyUI's and diffusers' names, scales of fp8.

Official names are ours; every function here leads to them, or from them to diffusers'.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.config import load_yaml, nearest
from common.files import ROOT, read_json, abbreviate
from common.weights import WEIGHT_SUFFIXES, LazyTensor, only_weights, open_tensors



# -------------------------------------------------------------------- prefixes, scales, refusals

# What training programs leave inside names, at any place.
WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of each component, a tensor that every form of it has: what stands before it is a prefix.
ANCHORS = {
    "transformer": ("patch_embedding.weight", "img_in.proj.weight", "x_embedder.proj.weight"),
    "vae": ("encoder.conv1.weight", "encoder.conv_in.weight", "encoder.conv_in.conv.weight"),
    "text_encoder": ("token_embedding.weight", "shared.weight"),
    "llm": ("embed_tokens.weight",), "clip_text": ("embeddings.token_embedding.weight",),
    "image_encoder": ("visual.cls_embedding", "vision_model.embeddings.class_embedding")}
LORA = re.compile(r".*[._](lora_(A|B|up|down)|hada_w1_a|lokr_w1)\b.*")
SCALES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale")
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def below_anchor(tensors: dict, anchors: tuple[str, ...]) -> dict:
    """The tensors under the prefix that stands before an anchor, named without it; others, which
    are of other networks in the file, go. Raises ValueError if several prefixes have anchors."""
    prefixes = {name.removesuffix(anchor) for name in tensors for anchor in anchors
                if name == anchor or name.endswith(f".{anchor}")}
    if len(prefixes) > 1:
        file = next(iter(tensors.values())).file
        raise ValueError(f"{file}: holds several networks of this kind, under "
                         f"{', '.join(sorted(map(repr, prefixes)))}: save the one you mean alone")
    prefix = prefixes.pop() if prefixes else ""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def plain_names(tensors: dict, component: str) -> dict:
    """Tensors without other programs' wrappers and prefixes, fp8 ones with their scales applied,
    ComfyUI's HunyuanVideo names made official. Raises ValueError for a LoRA and whole numbers."""
    if not tensors or not isinstance(next(iter(tensors.values())), LazyTensor):
        return tensors
    refuse_other_kinds(tensors)
    tensors = {WRAPPERS.sub("", name): t for name, t in tensors.items()}
    tensors = with_scales(below_anchor(tensors, ANCHORS[component]))
    if component == "transformer" and "double_blocks.0.img_attn.qkv.weight" in tensors:
        tensors = {comfy_to_official(name): t for name, t in tensors.items()}
    return tensors


def refuse_other_kinds(tensors: dict[str, LazyTensor]) -> None:
    """Raise ValueError for a LoRA, and for weights stored as whole numbers."""
    for name, t in tensors.items():
        if LORA.fullmatch(name):
            raise ValueError(f"{t.file}: is a LoRA ({name}), which goes on top of a model: point "
                             "`weights` at the model, and give this file as --lora")
        if name.endswith("weight") and len(t.shape) > 1 and not t.dtype.is_floating_point:
            raise ValueError(f"{t.file}: {name} holds {str(t.dtype).removeprefix('torch.')}: the "
                             "weights are quantised to whole numbers in a form that is not read "
                             "here: wanted bf16, fp16, fp32 or fp8")


def with_scales(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors with fp8 weights times their scales, which go, as does ComfyUI's marker."""
    def scaled(t: LazyTensor, scale: LazyTensor) -> LazyTensor:
        def read(rows: slice | None = None) -> Tensor:
            factor = scale.read().float()
            factor = factor.reshape(-1, *[1] * (len(t.shape) - 1)) if factor.numel() > 1 else factor
            return t.read(rows).float() * (factor[rows] if rows and factor.numel() > 1 else factor)

        return LazyTensor(t.shape, torch.float32, t.file, read)

    out = {}
    for name, t in tensors.items():
        base = name.removesuffix(".weight")
        scale = next((tensors[base + end] for end in SCALES[:2] if base + end in tensors), None)
        if name.endswith(SCALES) or name in ("scaled_fp8", "comfy_quant"):
            continue
        if t.dtype in FLOAT8:
            tell_fp8(t.file, scale is not None)
            t = t if scale is None else scaled(t, scale)
        out[name] = t
    return out


@functools.lru_cache
def tell_fp8(file: Path, scaled: bool) -> None:
    """Say once what fp8 weights cost; measured on the small world's student."""
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
    """Several tensors one after the other along their first dimension, as one; read lazily."""
    ends = list(itertools.accumulate(part.shape[0] for part in parts))

    def read(rows: slice | None = None) -> Tensor:
        a, b = (rows.start, rows.stop) if rows else (0, ends[-1])
        inside = [part.read(slice(max(a - end + part.shape[0], 0), min(b - end, 0) + part.shape[0]))
                  for part, end in zip(parts, ends, strict=True)
                  if a < end and b > end - part.shape[0]]
        return torch.cat(inside)

    first = parts[0]
    return LazyTensor((ends[-1], *first.shape[1:]), first.dtype, first.file, read)


def rows_of(tensor: LazyTensor | Tensor, start: int, stop: int) -> LazyTensor | Tensor:
    """Rows start … stop - 1 of a tensor; of a lazy one, lazily."""
    if isinstance(tensor, Tensor):
        return tensor[start:stop]

    def read(rows: slice | None = None) -> Tensor:
        rows = rows or slice(0, stop - start)
        return tensor.read(slice(start + rows.start, start + rows.stop))

    return LazyTensor((stop - start, *tensor.shape[1:]), tensor.dtype, tensor.file, read)


def swap_halves(tensor: LazyTensor | Tensor) -> LazyTensor | Tensor:
    """A tensor with the second half of its rows first."""
    rows = tensor.shape[0]
    halves = [rows_of(tensor, rows // 2, rows), rows_of(tensor, 0, rows // 2)]
    return torch.cat(halves) if isinstance(tensor, Tensor) else joined(halves)


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """A small tensor in another shape; it is read whole."""
    def read(rows: slice | None = None) -> Tensor:
        value = tensor.read().reshape(shape)
        return value[rows] if rows else value

    return LazyTensor(shape, tensor.dtype, tensor.file, read)
HUNYUAN_MARKS = {"context_embedder.proj_in.weight", "txt_in.input_embedder.weight"}


def official_names(tensors: dict, component: str, reverse: bool = False) -> dict:
    """Rename diffusers or transformers tensors to official names (reverse: the other way).

    Args: component, "transformer", "vae", "text_encoder" or "image_encoder". A name without a rule
    is kept, as official names are, so that strict loading can name it. Some diffusers layouts have
    q, k, v (and the MLP's input) apart, in the order of its rules, and [scale, shift] for [shift,
    scale] in the last layer: forward takes lazy tensors, reverse takes plain ones too.
    Forward also takes off what other programs add to names, and applies the scales of fp8 weights.
    Raises ValueError if the tensors are a LoRA, or whole numbers.
    """
    if not reverse:
        tensors = plain_names(tensors, component)
    hunyuan = component == "transformer" and bool(HUNYUAN_MARKS & tensors.keys())
    fused = hunyuan or component == "image_encoder"
    rules, found = name_rules("hunyuan" if hunyuan else "wan", component, reverse), {}
    for name, value in tensors.items():
        hits = [(i, match.expand(template)) for i, (pattern, template) in enumerate(rules)
                if (match := pattern.fullmatch(name))]
        if fused and reverse and hits:  # one official tensor, or the parts of it
            parts, D = [value], tensors["img_in.proj.bias"].shape[0]
            if len(hits) > 1:
                ends = [*(D, 2 * D, 3 * D)[:len(hits) - 1], value.shape[0]]
                parts = [rows_of(value, a, b) for a, b in itertools.pairwise([0, *ends])]
            elif name.startswith("final_layer.adaLN"):
                parts = [swap_halves(value)]
            found |= {target: [(i, part)] for (i, target), part in zip(hits, parts, strict=True)}
            continue
        i, target = hits[0] if hits else (0, name)
        if fused and hits and target.startswith("final_layer.adaLN"):
            value = swap_halves(value)
        found.setdefault(target, []).append((i, value))
    return {name: joined([v for _, v in sorted(parts, key=lambda part: part[0])])
            if fused and len(parts) > 1 else parts[-1][1] for name, parts in found.items()}


# ------------------------------------------------------------- a list of files, ComfyUI's folder

ROLES = ("dit", "vae", "text_encoder", "text_encoder_2", "image_encoder", "tokenizer",
         "tokenizer_2")
# Under ComfyUI/models: folders of a role, and how names of its files begin for each family.
COMFY_FOLDERS = {"dit": (("diffusion_models", "unet"), {"wan": "", "hunyuan": ""}),
         "vae": (("vae",), {"wan": "wan_2.1_vae", "hunyuan": "hunyuan_video_vae"}),
         "text_encoder": (("text_encoders", "clip"), {"wan": "umt5", "hunyuan": "llava_llama3"}),
         "text_encoder_2": (("text_encoders", "clip"), {"hunyuan": "clip_l"}),
         "image_encoder": (("clip_vision",), {"wan": "clip_vision_h"})}


def read_list(path: Path) -> dict[str, Path]:
    """A YAML file that names the file or folder of each network, relative to itself.

    Raises ValueError if it is none, naming the key.
    """
    values = load_yaml(path)
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise ValueError(f"{path}: wanted lines such as `dit: file.safetensors`, of "
                         f"{', '.join(ROLES)}")
    for key in values:
        if key not in ROLES:
            raise ValueError(f"{path}: unknown key '{key!s:.80}'{nearest(str(key), ROLES)}; wanted "
                             f"{', '.join(ROLES)}")
    return {key: path.parent / Path(value).expanduser() for key, value in values.items()}


def is_list(weights: Path) -> bool:
    """Whether `weights` is a YAML file that names the files."""
    return weights.is_file() and weights.suffix in (".yaml", ".yml")


def is_comfy(weights: Path) -> bool:
    """Whether `weights` is ComfyUI's folder of models."""
    return any((weights / folder).is_dir() for folder in COMFY_FOLDERS["dit"][0])


def role_file(weights: str | Path, role: str, family: str = "wan") -> Path | None:
    """The file of one network that a list or ComfyUI's folder has; None where neither is there.

    Raises FileNotFoundError if they lack it, ValueError if ComfyUI's folder has several.
    """
    weights = Path(weights)
    if is_list(weights):
        path = read_list(weights).get(role)
        if path is None or not path.exists():
            raise FileNotFoundError(f"{weights}: {role}: got {path}; wanted the file or folder of "
                                    "this network")
        return path
    if not is_comfy(weights):
        return None
    folders, begin = COMFY_FOLDERS.get(role, ((), {}))
    found = sorted(p for folder in folders for p in (weights / folder).rglob("*")
                   if p.suffix in WEIGHT_SUFFIXES and p.is_file()
                   and p.name.startswith(begin.get(family, "-")))
    if len(found) != 1:
        got = ", ".join(str(p.relative_to(weights)) for p in found[:6]) or "no such file"
        raise (ValueError if found else FileNotFoundError)(
            f"{weights}: {role}: got {got}; wanted one file: name the one you mean in a small "
            f"file.yaml with lines such as `{role}: {weights}/…`, and point `weights` at that")
    return found[0]


# --------------------------------------------------------------------------- the DiT's folder

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
    own = role_file(weights, "dit")
    weights = weights if own is None else own
    if (weights / "transformer").is_dir():
        weights = weights / "transformer"
    if not weights.is_dir():
        return weights
    file = weights / "diffusion_pytorch_model.safetensors"
    index = Path(f"{file}.index.json")
    if index.exists() and file.exists():
        raise ValueError(f"{weights}: holds both {file.name} and {index.name}, which may be a "
                         "student and its teacher: point `weights` at the file you mean")
    if index.exists() or file.exists():
        return index if index.exists() else file
    others = sorted(weights.glob("diffusion_pytorch_model*"))  # a variant, or .bin
    return only_weights(weights) if others else file


def check_sizes(weights: str | Path, sizes: Any, what: str) -> None:
    """Raise ValueError if a folder's config.json tells other sizes than `sizes` of `what`."""
    config = find_dit(weights).with_name("config.json")
    if not (Path(weights).is_dir() and config.exists()):
        return
    own = dataclasses.asdict(sizes)
    for key, got in read_json(config).items():
        name, got = sizes.diffusers.get(key, key), tuple(got) if isinstance(got, list) else got
        if name in own and got is not None and got != own[name]:
            raise ValueError(f"{config}: {key} is {abbreviate(got)}, {what} has {own[name]}: choose the "
                             "preset that belongs to these weights, or add one")


def dit_tensors(weights: str | Path) -> dict[str, LazyTensor]:
    """The DiT tensors of an official or diffusers folder, or of one file, under official names."""
    return official_names(open_tensors(find_dit(weights)), "transformer")


def fingerprint(weights: str | Path) -> str:
    """Identity of a DiT's weights: a hash over each tensor's name, shape and first row.

    The same for official, diffusers, sharded and single files of one dtype. It tells models apart;
    it is no proof against damage.
    """
    tensors, digest = dit_tensors(weights), hashlib.sha256()
    for name in sorted(tensors):
        row = tensors[name].read(slice(0, 1)).float().contiguous()
        digest.update(f"{name}{list(tensors[name].shape)}".encode())
        digest.update(row.numpy().tobytes())
    return digest.hexdigest()[:32]


def fingerprint_files(weights: str | Path) -> str:
    """Identity of all weight files of a folder: names, sizes, first and last bytes of each.

    It tells whether two hosts have the same encoders, as far as a look at 128 KB of each can.
    """
    digest, weights = hashlib.sha256(), Path(weights)
    top = weights.parent if weights.is_file() else weights
    under = list(read_list(weights).values()) if is_list(weights) else [weights]
    for path in sorted(p for start in under for p in (start, *start.rglob("*"))
                       if p.suffix in WEIGHT_SUFFIXES and p.is_file()):
        size = path.stat().st_size
        with path.open("rb") as f:
            ends = f.read(1 << 16)
            f.seek(max(0, size - (1 << 16)))
            ends += f.read()
        digest.update(f"{os.path.relpath(path, top)} {size} ".encode() + ends)
    return digest.hexdigest()[:32]
