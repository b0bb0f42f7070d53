"""Load the frozen networks from official and diffusers weight folders.

Sections: files, configs and names · VAEs · text encoders · image encoder and conditioner.
"""

import re
from pathlib import Path

import torch
from torch import nn

from common.config import Shared
from common.files import NUMBER, abbreviate, error_summary, parse_json, read_json, shape_error
from common.names import is_list, official_names, plain_names, role_file
from common.prompts import Prompt
from common.ranks import Timer, compute_dtype
from common.weights import lazy_tensor, load_module, open_tensors, safetensors_metadata
from frozen.image import CLIPVision, Conditioner
from frozen.text import CLIPText, HunyuanText, Llama, TextEncoder, Tokenizer, UMT5Encoder
from frozen.vae import HunyuanVAE, WanVAE
from model import sizes_of

# ------------------------------------------------------------------------ files, configs and names

def component(weights: str | Path, what: str, official: list[str], subfolder: str,
              family: str = "wan") -> Path:
    """The official file, or the diffusers subfolder, of one network in a weight folder.

    Args: what, its name in errors; official, patterns of file names; subfolder, also its name in a
    list of files. Raises FileNotFoundError if there is none, ValueError for several.
    """
    weights = Path(weights)
    if (listed := role_file(weights, subfolder, family)) is not None:
        return listed
    if not weights.exists():
        raise FileNotFoundError(f"weights: {weights} does not exist: expected an official or "
                                "diffusers folder")
    matches = (sorted(weights.glob(pattern)) or [  # open_file reports a link to no file
        path for path in [weights / pattern] if path.is_symlink()] for pattern in official)
    path, *others = next(filter(None, matches), [weights / subfolder])
    if others:
        raise ValueError(f"{path}: expected one {what}, got {others[0].name} too: keep one")
    if not (path.is_file() or path.is_symlink() or (path / "config.json").is_file()):
        raise FileNotFoundError(f"{weights}: contains no {what}: expected {' or '.join(official)} "
                                f"(official) or {subfolder}/config.json (diffusers)")
    return path


def check_counts(path: Path, arguments: dict) -> dict:
    """Constructor arguments, unchanged. Raises ValueError for counts too large to be built."""
    for key, value in arguments.items():
        most = 1000 if key in ("num_layers", "num_res_blocks") else 10 ** 7
        counts = key.startswith(("num_", "dim", "vocab_size", "size", "patch"))
        for number in value if isinstance(value, list) else [value] if counts else []:
            if shape_error(number, NUMBER) and not isinstance(number, bool) or not number <= most:
                raise ValueError(f"{path}: config: {key}: expected a number up to {most}, got "
                                 f"{abbreviate(value)}: copy the file again")
    return arguments


def network_sizes(path: Path, names: dict[str, str], fixed: dict) -> dict:
    """Constructor arguments from the metadata of a single file, or from the config.json of a
    diffusers or transformers folder.

    Args: names, our argument to their key, where missing keys keep our default; fixed, their key to
    the only value that this code implements. Raises ValueError for another value.
    """
    if path.is_file():  # without a config it has the official size, our default
        text = safetensors_metadata(path).get("config", "{}")
        return check_counts(path, parse_json(text, f"{path}: metadata key config"))
    path /= "config.json"
    config = read_json(path, remedy="copy it again")
    config = config.get("text_config") or config  # of a multimodal model
    rope = config.get("rope_parameters") or {} if isinstance(config, dict) else {}
    fault = shape_error(config, dict, "text_config") or shape_error(rope, dict, "rope_parameters")
    if fault:
        raise ValueError(f"{path}: {fault}: copy it again")
    config = {**rope, **config}  # newer files nest rope_theta and rope_type
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(f"{path}: {key}: expected {value!r}, got {abbreviate(config[key])}: "
                             "this is the checkpoint of another model")
    return check_counts(path, {ours: config[theirs] for ours, theirs in names.items()
                               if theirs in config and config[theirs] is not None})


def build_module(cls: type, arguments: dict, path: Path, tensors: dict, dtype, device) -> nn.Module:
    """A frozen cls(**arguments) in eval mode with the weights `tensors`, read from `path`."""
    try:
        with torch.device("meta"):
            module = cls(**arguments)
    except Exception as error:  # torch raises different ones for impossible sizes
        raise ValueError(f"{path}: its config {abbreviate(arguments)} does not describe a "
                         f"{cls.__name__} ({error_summary(error)}): copy it again") from error
    return load_module(module, tensors, str(path), dtype, device).eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------- VAEs

# By family: the class, official files, our arguments to the keys of diffusers' config.json, and the
# only values of other keys that are implemented. temperal is diffusers' spelling.
VAES = {
    "wan": (WanVAE, ["Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth"],
            {"dim": "base_dim", "temporal_down": "temperal_downsample", "z_dim": "z_dim",
             "dim_mult": "dim_mult", "latents_mean": "latents_mean", "latents_std": "latents_std"},
            {"decoder_base_dim": None, "attn_scales": [], "is_residual": False,
             "num_res_blocks": 2, "in_channels": 3, "out_channels": 3, "patch_size": None}),
    "hunyuan": (HunyuanVAE, ["hunyuan-video-t2v-720p/vae"],
                {"dims": "block_out_channels", "z_dim": "latent_channels",
                 "groups": "norm_num_groups", "num_res_blocks": "layers_per_block",
                 "scaling": "scaling_factor", "sample_size": "sample_size",
                 "sample_tsize": "sample_tsize"},
                {"in_channels": 3, "out_channels": 3, "act_fn": "silu",
                 "mid_block_add_attention": True, "spatial_compression_ratio": 8,
                 "time_compression_ratio": 4, "temporal_compression_ratio": 4})}


def load_vae(weights: str | Path, device="cpu", dtype=torch.float32,
             family: str = "wan") -> WanVAE | HunyuanVAE:
    """The frozen VAE of an official or diffusers weight folder.

    Raises FileNotFoundError if the folder contains none, ValueError if it does not fit.
    """
    cls, official, names, fixed = VAES[family]
    path = component(weights, "VAE", official, "vae", family=family)
    rename = official_names if family == "wan" else plain_names  # HunyuanVideo's are the same
    tensors = rename(open_tensors(path), "vae")
    arguments = network_sizes(path, names, fixed)
    return build_module(cls, arguments, path, tensors, dtype, device)


# ----------------------------------------------------------------------------------- text encoders

def load_text(weights: str | Path, device="cpu", dtype=torch.bfloat16, text_len: int | None = None,
              family: str = "wan", image: bool = False,
              guidance: float = 6.016) -> TextEncoder | HunyuanText:
    """The frozen text encoders and tokenizers of an official or diffusers weight folder.

    Args: text_len, tokens that the DiT reads (None: as released, 512 for Wan and 256 for
    HunyuanVideo); image, whether prompts describe single frames, which selects HunyuanVideo's
    template; guidance, its embedded guidance scale.
    Raises FileNotFoundError if a file is missing, ValueError if one does not fit.
    """
    if family == "hunyuan":
        return load_hunyuan_text(weights, device, dtype, text_len or 256, image, guidance)
    path = component(weights, "text encoder", ["models_t5*.safetensors", "models_t5*.pth"],
                     "text_encoder")
    tensors = open_tensors(path)
    if "spiece_model" in tensors:  # ComfyUI's files contain their tokenizer
        tokens = bytes(tensors.pop("spiece_model").read().numpy())
    elif is_list(Path(weights)):
        tokens = role_file(weights, "tokenizer")
    else:
        tokens = Path(weights) / ("google/umt5-xxl" if path.is_file() else "tokenizer")
    tokenizer, tensors = Tokenizer(tokens, text_len or 512), official_names(tensors, "text_encoder")
    names = {"vocab_size": "vocab_size", "dim": "d_model", "num_heads": "num_heads",
             "dim_ffn": "d_ff", "num_layers": "num_layers",
             "num_buckets": "relative_attention_num_buckets",
             "max_distance": "relative_attention_max_distance", "dim_attn": "d_kv"}
    fixed = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}
    arguments = network_sizes(path, names, fixed)
    if path.is_dir() and {"dim_attn", "num_heads"} <= arguments.keys():
        arguments["dim_attn"] *= arguments["num_heads"]  # d_kv is the width of one head
    encoder = build_module(UMT5Encoder, arguments, path, tensors, dtype, device)
    return TextEncoder(encoder, tokenizer)


def load_hunyuan_text(weights, device, dtype, text_len, image, guidance) -> HunyuanText:
    """The used layers of the LLM, and CLIP's text encoder, as load_text."""
    names = {"vocab_size": "vocab_size", "dim": "hidden_size", "dim_ffn": "intermediate_size",
             "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    path = component(weights, "LLM", ["text_encoder"], "text_encoder", family="hunyuan")
    more = {"num_kv_heads": "num_key_value_heads", "theta": "rope_theta", "eps": "rms_norm_eps"}
    fixed = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
             "mlp_bias": False, "rope_scaling": None, "rope_type": "default"}
    sizes = network_sizes(path, names | more, fixed)
    layers = sizes.get("num_layers", 32)
    sizes["num_layers"] = layers - 2  # HunyuanVideo reads the states before the last two
    unread = re.compile(rf"norm\.weight|layers\.({layers - 2}|{layers - 1})\..*|.*\.inv_freq")
    tensors = plain_names(open_tensors(path), "llm")
    tensors = {name: t for name, t in tensors.items() if not unread.fullmatch(name)}
    llm = build_module(Llama, sizes, path, tensors, dtype, device)

    path = component(weights, "CLIP", ["text_encoder_2"], "text_encoder_2", family="hunyuan")
    fixed = {"model_type": "clip_text_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    more = {"max_len": "max_position_embeddings"}
    sizes = network_sizes(path, names | more, fixed)
    tensors = plain_names(open_tensors(path), "clip_text")
    tensors.pop("embeddings.position_ids", None)  # a buffer of older files
    clip = build_module(CLIPText, sizes, path, tensors, dtype, device)
    # diffusers has separate folders of tokenizers; the official tree stores them with the weights.
    folders = [folder if folder.is_dir() else folder.with_name(f"text_encoder{number}")
               for number in ("", "_2") for folder in [Path(weights) / f"tokenizer{number}"]]
    if is_list(Path(weights)):
        folders = [role_file(weights, role) for role in ("tokenizer", "tokenizer_2")]
    return HunyuanText(llm, clip, *folders, text_len, image, guidance)


# ---------------------------------------------------------------------- image encoder, conditioner

def load_image_encoder(weights: str | Path, device="cpu", dtype=torch.float32) -> CLIPVision:
    """The frozen CLIP image encoder of an official or diffusers image-to-video folder.

    The text encoder, the last layer and the projection are not read. Raises as load_vae.
    """
    path = component(weights, "image encoder", ["models_clip*.safetensors", "models_clip*.pth"],
                     "image_encoder")
    tensors = plain_names(open_tensors(path), "image_encoder")
    names = {"dim": "hidden_size", "dim_ffn": "intermediate_size", "patch": "patch_size",
             "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
             "size": "image_size"}
    arguments = network_sizes(path, names, {"model_type": "clip_vision_model", "hidden_act": "gelu",
                                            "layer_norm_eps": 1e-5})
    if path.is_dir() or "visual.cls_embedding" not in tensors:
        prefixes = ("vision_model.", "visual_projection.")  # newer files omit the first
        tensors = {n if n.startswith(prefixes) else f"vision_model.{n}": t
                   for n, t in tensors.items()}
        tensors = official_names(tensors, "image_encoder")
        for name, ones in (("visual.cls_embedding", (1, 1)), ("visual.pos_embedding", (1,))):
            if name in tensors:
                value = tensors[name].read()
                tensors[name] = lazy_tensor(value.view(*ones, *value.shape), tensors[name].file)
    layers = arguments.pop("num_layers", 32)
    unread = re.compile(rf"head|post_norm\..*|transformer\.{layers - 1}\..*|embeddings\..*")
    tensors = {n.removeprefix("visual."): t for n, t in tensors.items() if n.startswith("visual.")}
    tensors = {name: t for name, t in tensors.items() if not unread.fullmatch(name)}
    arguments["num_layers"] = layers - 1  # the features come from before the last layer
    return build_module(CLIPVision, arguments, path, tensors, dtype, device)


def load_conditioner(cfg: Shared, device, dtype: torch.dtype, crop: bool) -> Conditioner:
    """The conditioner of a config's model; dtype of the text encoders, crop as in Conditioner."""
    sizes, vae, clip = sizes_of(cfg.preset), None, None
    text = load_text(cfg.weights, device, dtype, sizes.text_len, cfg.family,
                     image=cfg.frames == 1, guidance=cfg.embedded_guidance)
    if sizes.takes_image:  # fp32 (TF32 on GPUs), because bf16 adds 1% noise
        vae = load_vae(cfg.weights, device, torch.float32, cfg.family)
    if sizes.takes_image and sizes.has_clip:
        clip = load_image_encoder(cfg.weights, device, torch.float32)
    return Conditioner(text, vae, clip, cfg.frames, crop)


def encode_prompts(cfg: Shared, prompts: list[Prompt], sizes: list[tuple[int, int]], crop: bool,
                   device: torch.device, timer: Timer) -> tuple[list[dict], list[dict] | None]:
    """The cond of each prompt, and of the negative prompt if cfg_scale enables guidance.

    Args: sizes, height and width of each video; crop, as in Conditioner. The encoders are freed
    afterwards, and equal prompts are encoded once.
    """
    conditioner = load_conditioner(cfg, device, compute_dtype(device), crop)
    timer.lap("load")
    keys, encoded = list(zip(prompts, sizes, strict=True)), {}
    for prompt, size in dict.fromkeys(keys):  # one by one: all wait for their batch on the host
        (cond,) = conditioner.encode_each([prompt], *size, timer.lap)
        encoded[prompt, size] = {name: c.cpu() for name, c in cond.items()}
    conds = [encoded[key] for key in keys]
    unconds = None if cfg.guidance == 1 else conditioner.with_text(cfg.negative_prompt, conds)
    timer.lap("text")
    return conds, unconds
