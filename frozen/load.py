"""Weight folders, official and diffusers, to frozen networks: files, configs and names · VAEs, text
encoders, image encoder and conditioner.
"""

import re
from pathlib import Path

import torch
from torch import nn

from common.config import Shared
from common.files import NUMBER, shape_error, parse_json, read_json, error_summary, abbreviate
from common.names import is_list, official_names, plain_names, reshaped, role_file
from common.prompts import Prompt
from common.ranks import Timer, compute_dtype
from common.weights import load_module, open_tensors, safetensors_metadata
from frozen.image import CLIPVision, Conditioner
from frozen.text import CLIPText, HunyuanText, Llama, TextEncoder, Tokenizer, UMT5Encoder
from frozen.vae import HunyuanVAE, WanVAE
from model import sizes_of



# ------------------------------------------------------------------------ files, configs and names

def find(folder: Path, patterns: list[str]) -> Path | None:
    """The file that matches the first pattern with any match, or None; ValueError if several do."""
    for pattern in patterns:
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise ValueError(f"{folder}: {', '.join(f.name for f in files)} all match {pattern}: "
                             f"keep one")
        if files:
            return files[0]
    return None


def component(weights: str | Path, what: str, official: list[str], subfolder: str,
              role: str | None = None, family: str = "wan") -> Path:
    """The official file, or the diffusers subfolder, that holds one network of a weight folder;
    role, its name in a list of files (none: that of the subfolder)."""
    weights = Path(weights)
    own = role_file(weights, role or subfolder, family)
    if own is not None:
        return own
    if not weights.is_dir():
        raise FileNotFoundError(f"weights: no folder {weights}: want an official or diffusers one")
    path = find(weights, official) or weights / subfolder
    if not (path.is_file() or (path / "config.json").is_file()):
        raise FileNotFoundError(f"{weights} holds no {what}: want {' or '.join(official)} "
                                f"(official) or {subfolder}/config.json (diffusers)")
    return path


def checked(path: Path, arguments: dict) -> dict:
    """Constructor arguments as they came, if those that are counts are such as can be built.

    Raises ValueError naming file and key.
    """
    for key, value in arguments.items():
        most = 1000 if key in ("num_layers", "num_res_blocks") else 10 ** 7
        counts = key.startswith(("num_", "dim", "vocab_size", "size", "patch"))
        for number in value if isinstance(value, list) else [value] if counts else []:
            if shape_error(number, NUMBER) and not isinstance(number, bool) or not number <= most:
                raise ValueError(f"{path}: config: {key} is {abbreviate(value)}; wanted {most} at most: "
                                 "copy the file again")
    return arguments


def official_config(path: Path) -> dict:
    """Constructor arguments that a .safetensors file names in its metadata; {} is full size."""
    if path.suffix != ".safetensors":
        return {}
    where = f"{path}: metadata key config"
    return checked(path, parse_json(safetensors_metadata(path).get("config", "{}"), where))


def config_arguments(path: Path, names: dict[str, str], fixed: dict) -> dict:
    """Constructor arguments from a diffusers or transformers config.json.

    names: our argument to their key; keys the file lacks keep our default.
    fixed: their key to the only value that this code implements.
    """
    config = read_json(path, remedy="copy it again")
    config = config.get("text_config") or config  # of a model that also sees
    rope = config.get("rope_parameters") or {} if isinstance(config, dict) else {}
    if fault := shape_error(config, dict, "text_config") or shape_error(rope, dict, "rope_parameters"):
        raise ValueError(f"{path}: {fault}: copy it again")
    config = {**rope, **config}  # as newer files have it
    for key, want in fixed.items():
        if config.get(key, want) != want:
            raise ValueError(f"{path}: {key} is {abbreviate(config[key])}; only {want!r} is "
                             "implemented: is this the checkpoint of another model?")
    return checked(path, {ours: config[theirs] for ours, theirs in names.items()
                          if theirs in config and config[theirs] is not None})


def sizes_in(path: Path, names: dict[str, str], fixed: dict) -> dict:
    """Constructor arguments of a folder's config.json, or those that a single file names."""
    if path.is_file():
        return official_config(path)
    return config_arguments(path / "config.json", names, fixed)


def build_module(cls: type, arguments: dict, path: Path, tensors: dict, dtype, device) -> nn.Module:
    """An eval-mode, frozen cls(**arguments) with the weights `tensors`, which came from `path`."""
    try:
        with torch.device("meta"):
            module = cls(**arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, LookupError,
            ArithmeticError) as error:  # torch has one for each kind of number that cannot be
        raise ValueError(f"{path}: its config {abbreviate(arguments)} does not describe a "
                         f"{cls.__name__} ({error_summary(error)}): copy it again") from error
    return load_module(module, tensors, str(path), dtype, device).eval().requires_grad_(False)


# ---------------------------------------------- VAEs, text encoders, image encoder and conditioner

def load_vae(weights: str | Path, device="cpu", dtype=torch.float32,
             family: str = "wan") -> WanVAE | HunyuanVAE:
    """The VAE of an official or diffusers weight folder, frozen, on `device` in `dtype`.

    Raises FileNotFoundError if the folder holds none, ValueError if it does not fit.
    """
    if family == "hunyuan":
        return load_hunyuan_vae(weights, device, dtype)
    if family != "wan":
        raise ValueError(f"family: got {family!r}; want wan or hunyuan")
    path = component(weights, "VAE", ["Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth"], "vae")
    tensors = official_names(open_tensors(path), "vae")
    if path.is_file():
        return build_module(WanVAE, official_config(path), path, tensors, dtype, device)
    names = {"dim": "base_dim", "temporal_down": "temperal_downsample"}  # their spelling
    names |= {k: k for k in ("z_dim", "dim_mult", "latents_mean", "latents_std")}
    fixed = {"decoder_base_dim": None, "attn_scales": [], "is_residual": False,
             "num_res_blocks": 2, "in_channels": 3, "out_channels": 3, "patch_size": None}
    arguments = config_arguments(path / "config.json", names, fixed)
    return build_module(WanVAE, arguments, path, tensors, dtype, device)


def load_hunyuan_vae(weights: str | Path, device, dtype) -> HunyuanVAE:
    """HunyuanVideo's VAE, as load_vae; the official and the diffusers file have the same names."""
    path = component(weights, "VAE", ["hunyuan-video-t2v-720p/vae"], "vae", family="hunyuan")
    names = {"dims": "block_out_channels", "z_dim": "latent_channels", "groups": "norm_num_groups",
             "num_res_blocks": "layers_per_block", "scaling": "scaling_factor",
             "sample_size": "sample_size", "sample_tsize": "sample_tsize"}
    fixed = {"in_channels": 3, "out_channels": 3, "act_fn": "silu", "mid_block_add_attention": True,
             "spatial_compression_ratio": 8, "time_compression_ratio": 4,
             "temporal_compression_ratio": 4}
    arguments = sizes_in(path, names, fixed)
    tensors = plain_names(open_tensors(path), "vae")
    return build_module(HunyuanVAE, arguments, path, tensors, dtype, device)


def load_text(weights: str | Path, device="cpu", dtype=torch.bfloat16, text_len: int | None = None,
              family: str = "wan", image: bool = False,
              guidance: float = 6.016) -> TextEncoder | HunyuanText:
    """The text encoders and tokenizers of an official or diffusers weight folder, frozen.

    text_len: tokens that the DiT reads; None: as released, 512 (Wan) or 256 (HunyuanVideo).
    image: whether prompts are of single frames, which HunyuanVideo tells its LLM; guidance: its
    embedded guidance scale.
    Raises FileNotFoundError if the folder lacks a file, ValueError if one does not fit.
    """
    if family == "hunyuan":
        return load_hunyuan_text(weights, device, dtype, text_len or 256, image, guidance)
    if family != "wan":
        raise ValueError(f"family: got {family!r}; want wan or hunyuan")
    path = component(weights, "text encoder", ["models_t5*.safetensors", "models_t5*.pth"],
                     "text_encoder")
    tensors = open_tensors(path)
    if "spiece_model" in tensors:  # ComfyUI's files bring their tokenizer
        tokens = bytes(tensors.pop("spiece_model").read().numpy())
    elif is_list(Path(weights)):
        tokens = role_file(weights, "tokenizer")
    else:
        tokens = Path(weights) / ("google/umt5-xxl" if path.is_file() else "tokenizer")
    tokenizer, tensors = Tokenizer(tokens, text_len or 512), official_names(tensors, "text_encoder")
    if path.is_file():
        arguments = official_config(path)
    else:
        names = {"vocab_size": "vocab_size", "dim": "d_model", "num_heads": "num_heads",
                 "dim_ffn": "d_ff", "num_layers": "num_layers",
                 "num_buckets": "relative_attention_num_buckets",
                 "max_distance": "relative_attention_max_distance", "dim_attn": "d_kv"}
        fixed = {"model_type": "umt5", "feed_forward_proj": "gated-gelu",
                 "layer_norm_epsilon": 1e-6}
        arguments = config_arguments(path / "config.json", names, fixed)
        if "dim_attn" in arguments and "num_heads" in arguments:
            arguments["dim_attn"] *= arguments["num_heads"]  # d_kv is the width of one head
    encoder = build_module(UMT5Encoder, arguments, path, tensors, dtype, device)
    return TextEncoder(encoder, tokenizer)


def load_hunyuan_text(weights, device, dtype, text_len, image, guidance) -> HunyuanText:
    """The LLM, without what HunyuanVideo does not run of it, and CLIP's text half, as load_text."""
    names = {"vocab_size": "vocab_size", "dim": "hidden_size", "dim_ffn": "intermediate_size",
             "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    path = component(weights, "LLM", ["text_encoder"], "text_encoder", family="hunyuan")
    more = {"num_kv_heads": "num_key_value_heads", "theta": "rope_theta", "eps": "rms_norm_eps"}
    fixed = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
             "mlp_bias": False, "rope_scaling": None, "rope_type": "default"}
    sizes = sizes_in(path, names | more, fixed)
    layers = sizes.get("num_layers", 32)
    sizes["num_layers"] = layers - 2  # the states are taken before the last two
    unread = re.compile(rf"norm\.weight|layers\.({layers - 2}|{layers - 1})\..*|.*\.inv_freq")
    tensors = plain_names(open_tensors(path), "llm")
    tensors = {name: t for name, t in tensors.items() if not unread.fullmatch(name)}
    llm = build_module(Llama, sizes, path, tensors, dtype, device)

    path = component(weights, "CLIP", ["text_encoder_2"], "text_encoder_2", family="hunyuan")
    fixed = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    more = {"max_len": "max_position_embeddings"}
    sizes = sizes_in(path, names | more, fixed)
    tensors = plain_names(open_tensors(path), "clip_text")
    tensors.pop("embeddings.position_ids", None)  # a buffer of older files
    clip = build_module(CLIPText, sizes, path, tensors, dtype, device)
    # diffusers keeps tokenizers in folders of their own, the official tree with the weights.
    folders = [folder if folder.is_dir() else folder.with_name(f"text_encoder{number}")
               for number in ("", "_2") for folder in [Path(weights) / f"tokenizer{number}"]]
    if is_list(Path(weights)):
        folders = [role_file(weights, role) for role in ("tokenizer", "tokenizer_2")]
    return HunyuanText(llm, clip, *folders, text_len, image, guidance)


def load_image_encoder(weights: str | Path, device="cpu", dtype=torch.float32) -> CLIPVision:
    """CLIP's image tower of an official or diffusers image-to-video folder, frozen, as load_vae.

    The text tower, the last layer and the projection are never read.
    """
    path = component(weights, "image encoder", ["models_clip*.safetensors", "models_clip*.pth"],
                     "image_encoder")
    tensors = plain_names(open_tensors(path), "image_encoder")
    arguments = official_config(path) if path.is_file() else {}
    if path.is_dir() or "visual.cls_embedding" not in tensors:
        names = {"dim": "hidden_size", "dim_ffn": "intermediate_size", "patch": "patch_size",
                 "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
                 "size": "image_size"}
        arguments = arguments or sizes_in(path, names, {
            "model_type": "clip_vision_model", "hidden_act": "gelu", "layer_norm_eps": 1e-5})
        known = ("vision_model.", "visual_projection.")  # newer files leave the first away
        tensors = {n if n.startswith(known) else f"vision_model.{n}": t for n, t in tensors.items()}
        tensors = official_names(tensors, "image_encoder")
        for name, ones in (("visual.cls_embedding", (1, 1)), ("visual.pos_embedding", (1,))):
            if name in tensors:
                tensors[name] = reshaped(tensors[name], (*ones, *tensors[name].shape))
    layers = arguments.pop("num_layers", 32)
    unread = re.compile(rf"head|post_norm\..*|transformer\.{layers - 1}\..*|embeddings\..*")
    tensors = {n.removeprefix("visual."): t for n, t in tensors.items() if n.startswith("visual.")}
    tensors = {name: t for name, t in tensors.items() if not unread.fullmatch(name)}
    arguments["num_layers"] = layers - 1  # the features are taken before the last
    return build_module(CLIPVision, arguments, path, tensors, dtype, device)


def load_conditioner(cfg: Shared, device, dtype: torch.dtype, crop: bool) -> Conditioner:
    """The conditioner of a config's model, from its weight folder; dtype of the text encoders."""
    text = load_text(cfg.weights, device, dtype, sizes_of(cfg.preset).text_len, cfg.family,
                     image=cfg.frames == 1, guidance=cfg.embedded_guidance)
    vae = clip = None
    if sizes_of(cfg.preset).takes_image:  # fp32, TF32 on GPUs: bf16 puts 1% noise on it
        vae = load_vae(cfg.weights, device, torch.float32, cfg.family)
        clip = load_image_encoder(cfg.weights, device, torch.float32)
    return Conditioner(text, vae, clip, cfg.frames, crop)


def encode_prompts(cfg: Shared, prompts: list[Prompt], sizes: list[tuple[int, int]], crop: bool,
                   device: torch.device, timer: Timer) -> tuple[list[dict], list[dict] | None]:
    """The conditioning of each prompt, and of the negative one if cfg_scale asks for guidance.

    Args: sizes, height and width of each video; crop, as in Conditioner. The encoders are loaded
    for it and freed again; a repeated prompt is encoded once.
    """
    conditioner = load_conditioner(cfg, device, compute_dtype(device), crop)
    timer.lap("load")
    conds: list[dict] = [{}] * len(prompts)
    for size in dict.fromkeys(sizes):
        those = [i for i, its in enumerate(sizes) if its == size]
        found = conditioner.encode_each([prompts[i] for i in those], *size, timer.lap)
        for i, cond in zip(those, found, strict=True):
            conds[i] = {name: c.cpu() for name, c in cond.items()}  # many may wait for their turn
    unconds = None if cfg.cfg_scale == 1 else conditioner.with_text(cfg.negative_prompt, conds)
    timer.lap("text")
    return conds, unconds
