"""Where weights lie: official, diffusers, ComfyUI folders, a list of files; identity of a model."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from common.config import load_yaml, nearest
from common.files import read_json, shown
from common.names import official_names
from common.weights import WEIGHT_SUFFIXES, LazyTensor, only_weights, open_tensors

# ------------------------------------------------------------- a list of files, ComfyUI's folder

ROLES = ("dit", "vae", "text_encoder", "text_encoder_2", "image_encoder", "tokenizer",
         "tokenizer_2")
# Under ComfyUI/models: folders of a role, and how names of its files begin for each family.
COMFY = {"dit": (("diffusion_models", "unet"), {"wan": "", "hunyuan": ""}),
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
    return any((weights / folder).is_dir() for folder in COMFY["dit"][0])


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
    folders, begin = COMFY.get(role, ((), {}))
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
            raise ValueError(f"{config}: {key} is {shown(got)}, {what} has {own[name]}: choose the "
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
