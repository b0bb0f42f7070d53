"""Stage 0: train the small teacher that the project ships (Eq. 3) on the clips of clips.py.

    python -m small_world.teacher [CONFIG] [--out DIR] [--field value]     the same command resumes

A sentencepiece model and a tiny umT5, a tiny Wan VAE and a tiny Wan DiT are trained in this order.
With `base` (configs/tiny-i2v.yaml) VAE and text encoder are copied from another folder, the DiT
starts from that folder's DiT, as Wan's image-to-video model did, and an image encoder is added.

In:   nothing; everything is drawn from `seed`.
Out:  DIR (default <run>/teacher/weights) in the layout of the official Wan 2.1 folder, with
      training.json (hours, gates); <run>/teacher/ has the log and training states.
"""

import io
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.config import Shared, announce, field, load_config
from common.files import (
    lock_folder, read_log, replace_file, write_json, write_json_lines, write_text)
from common.names import dit_tensors, fingerprint
from common.prompts import Prompt, heldout_prompts, read_prompts
from common.ranks import (
    check_compiler, cli, device_name, draw_noise, generator, pick_device, prefer_attention, seed_of)
from common.video import write_image
from common.weights import open_safetensors, safetensors_metadata, save_tensors
from frozen.image import CLIPVision
from frozen.load import Conditioner, load_conditioner, load_vae
from frozen.text import Tokenizer, UMT5Encoder
from frozen.vae import WanVAE
from model import (
    build_dit, check_model, collate, latent_shape, load_dit, sample_euler, shift_time, sizes_of,
    time_grid)
from small_world.clips import ATTRIBUTES, COMBINATIONS, WORDINGS, caption, make_captions, make_clips
from small_world.fit import fit, folder, note
from small_world.oracle import agreement, caption_attributes, floor_detail, gate, psnr, read_clip

# ------------------------------------------------------------------------------------ Config

@dataclass
class Config(Shared):
    out: str | None = field(None, "folder for the weights; default <run>/teacher/weights")
    threads: int = field(1, "CPU threads", "[1, inf)")
    base: str | None = field(None, "weight folder to start from: its VAE and text encoder are kept")
    compile: bool = field(True, "torch.compile the DiT while training (needs a C++ compiler)")
    save_every: float = field(120.0, "seconds between two saves of the training state", "[0, inf)")
    text_iters: int = field(600, "iterations of the text encoder, 96 captions each", "[1, inf)")
    image_iters: int = field(600, "iterations of the image encoder, 32 images each", "[1, inf)")
    first_frames: int = field(2048, "images for SynVid (image-to-video)", "[1, inf)")
    vae_iters: int = field(5000, "iterations of the VAE", "[1, inf)")
    vae_batch: int = field(3, "clips per iteration of the VAE", "[1, inf)")
    vae_crop: int = field(32, "side of the crops that the VAE is trained on, pixels")
    vae_dim: int = field(16, "base width of the VAE", "[1, inf)")
    dit_pool: int = field(24000, "clips encoded for the DiT", "[1, inf)")
    dit_decay_from: float = field(0.3, "fraction of iterations before the cosine decay", "[0, 1)")
    dit_iters: int = field(12000, "iterations of the DiT", "[1, inf)")
    dit_batch: int = field(64, "latents per iteration of the DiT", "[1, inf)")
    eval_every: int = field(1000, "iterations between two evaluations", "[1, inf)")
    gate_clips: int = field(288, "clips that each gate is measured on", "[1, inf)")


# ------------------------------------------------------------------------------------ Parts

PER_FILE = 500  # clips in one file of encoded clips
BASE_FILES = ("Wan2.1_VAE.safetensors", "models_t5_umt5-tiny.safetensors",
              "google/umt5-xxl/spiece.model")  # copied from `base`


# --------------------------------------------------------------------------------------- VAE

def initialise_vae(vae: nn.Module, g: torch.Generator) -> None:
    """Initialise a small VAE as a blurring autoencoder; torch's own initialisation stalls at 11 dB.

    Downsampling averages 2×2 pixels and pairs of frames, upsampling repeats and smooths, the other
    kernels of the main path act at one position, residual branches start small. The first biases
    are spread out, because channel norms discard amplitude and with it the grey of the floor.
    """
    def normal(weight: Tensor, fan_in: int) -> Tensor:
        return torch.randn(weight.shape, generator=g) / fan_in ** 0.5

    for name, p in vae.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(p)
            continue
        if p.ndim == 1:
            p.data = 0.7 * torch.randn(p.shape, generator=g) * (name == "encoder.conv1.bias")
            continue
        channels, taps = p.shape[1], p[0, 0].numel()
        noise = normal(p, channels * taps)
        same = torch.eye(p.shape[0], channels).view(*p.shape[:2], *[1] * (p.ndim - 2))
        if "downsamples" in name and "resample" in name:
            kernel = torch.tensor([[0.25, 0.25, 0.0], [0.25, 0.25, 0.0], [0.0, 0.0, 0.0]])
            p.data = same * kernel + 0.2 * noise
        elif "downsamples" in name and "time_conv" in name:
            p.data = same * torch.tensor([0.0, 0.5, 0.5]).view(3, 1, 1) + 0.2 * noise
        elif "upsamples" in name and "time_conv" in name:
            twice = torch.cat([torch.eye(channels)] * 2).view(*p.shape[:2], 1, 1, 1)
            p.data = twice * torch.tensor([0.0, 0.0, 1.0]).view(3, 1, 1) + 0.2 * noise
        elif "upsamples" in name and "resample" in name:
            kernel = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
            p.data = normal(p[..., :1, :1], channels) * kernel + 0.2 * noise
        elif name.endswith(("residual.6.weight", "proj.weight")):
            p.data = 0.3 * noise
        elif "residual" in name or "to_qkv" in name or taps == 1:
            p.data = noise
        else:  # the first and last convolutions of encoder and decoder, causal in time
            p.data = 0.2 * noise
            p.data[..., -1, 1, 1] += normal(p[..., 0, 0, 0], channels)
    for conv in (vae.conv1, vae.conv2):  # between the networks and the latent
        conv.weight.data = torch.eye(conv.weight.shape[0]).view_as(conv.weight)
    vae.conv1.bias.data[vae.z_dim:] = -6.0  # log-variance


def train_vae(cfg: Config, out: Path) -> None:
    """Train a VAE by MSE, L1 and L1 of differences on random crops; latents are sampled at the end.

    Crops keep all frames, because each latent frame of a causal VAE has its own function to learn.
    The differences keep the edges of the floor's tiles free of grid lines and coloured fringes.
    """
    sizes = {"dim": cfg.vae_dim, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
             "temporal_down": [False, True, True]}
    device, vae = pick_device(cfg.device), WanVAE(**sizes)
    initialise_vae(vae, generator(cfg.seed, "vae"))
    vae.to(device)
    moments, reconstruct = vae.moments, vae.reconstruct
    if cfg.compile:
        moments, reconstruct = torch.compile(moments), torch.compile(reconstruct)

    def loss_of(i: int) -> Tensor:
        g = generator(cfg.seed, "vae", i)
        clips = make_clips(cfg.seed, i * cfg.vae_batch, cfg.vae_batch, cfg.height, cfg.frames)[0]
        y, x = torch.randint(cfg.height - cfg.vae_crop + 1, (2,), generator=g).tolist()
        video = clips[..., y:y + cfg.vae_crop, x:x + cfg.vae_crop].contiguous().to(device)
        mean, logvar = moments(video)
        z, divergence = mean, 0.0
        if i >= 0.6 * cfg.vae_iters:
            z = mean + torch.randn(mean.shape, generator=g).to(device) * (logvar / 2).exp()
            divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error = reconstruct(z) - video
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return (error.square().mean() + 0.2 * error.abs().mean() + 0.1 * edges
                + 1e-5 * mean.square().mean() + 1e-6 * divergence)

    def evaluate(average: nn.Module) -> dict:
        clips = make_clips(cfg.seed, 0, min(48, cfg.gate_clips), cfg.height, cfg.frames, True)[0]
        with torch.no_grad():
            again = [average.reconstruct(average.moments(some.to(device))[0]).clamp(-1, 1).cpu()
                     for some in clips.split(8)]
        return {"psnr": float(psnr(torch.cat(again), clips).mean())}

    vae = fit(cfg, "vae", vae, cfg.vae_iters, (2e-3, 1e-3), 0.4, loss_of, evaluate)
    with torch.no_grad():  # the DiT works on channels of mean 0 and standard deviation 1
        clips = make_clips(cfg.seed, 0, min(480, cfg.dit_pool), cfg.height, cfg.frames)[0]
        means = torch.cat([vae.moments(some.to(device))[0] for some in clips.split(8)])
    sizes["latents_mean"] = means.mean((0, 2, 3, 4)).tolist()
    sizes["latents_std"] = means.std((0, 2, 3, 4)).tolist()
    save_tensors(out / "Wan2.1_VAE.safetensors", half(vae), {"config": json.dumps(sizes)})


# -------------------------------------------------------------------------------------- text

def train_text(cfg: Config, out: Path) -> None:
    """Train a sentencepiece model and a umT5 that classifies a caption's attributes.

    Only the encoder is kept: its states are the frozen input of the DiT, as in Wan.
    """
    captions = [caption(c, w) for c in range(len(COMBINATIONS)) for w in range(len(WORDINGS))]
    words = sorted({word.strip(",") for text in captions for word in text.split()})
    # A word with a single form is split into letters, so each one also occurs with punctuation.
    lines = captions + [word + mark for word in words for mark in (",", ".", ";")]
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=pieces, model_type="unigram", vocab_size=96,
        hard_vocab_limit=False, normalization_rule_name="identity", num_threads=1, minloglevel=2,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3)
    spiece = out / "google/umt5-xxl/spiece.model"
    replace_file(spiece, lambda path: path.write_bytes(pieces.getvalue()))
    tokenizer = Tokenizer(spiece)
    sizes = {"vocab_size": tokenizer.size, "dim": 64, "dim_attn": 64, "num_heads": 4,
             "dim_ffn": 128, "num_layers": 2}
    counts = [len(values) for values in ATTRIBUTES.values()]
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(cfg.seed, "text"))
        both = nn.ModuleDict({"text": UMT5Encoder(**sizes),
                              "heads": nn.Linear(sizes["dim"], sum(counts))})
    device = pick_device(cfg.device)
    both.to(device)

    def loss_of(i: int) -> Tensor:
        drawn = make_captions(cfg.seed, i * 96, 96)
        ids, mask = (x.to(device) for x in tokenizer(drawn))
        states = both["text"](ids, mask) * mask[..., None]                   # B L D
        logits = both["heads"](states.sum(1) / mask.sum(1, keepdim=True))    # B sum(counts)
        labels = torch.tensor([list(caption_attributes(text).values()) for text in drawn])
        return sum(F.cross_entropy(part, labels[:, j].to(device))
                   for j, part in enumerate(logits.split(counts, 1)))

    encoder = fit(cfg, "text", both, cfg.text_iters, (0.0, 2e-3), 0.4, loss_of)["text"]
    save_tensors(out / "models_t5_umt5-tiny.safetensors", half(encoder),
                 {"config": json.dumps(sizes)})


def half(module: nn.Module) -> dict[str, Tensor]:
    """A network's tensors in float16, which keeps 11 bits and halves the files."""
    return {name: value.half() for name, value in module.state_dict().items()}


# ------------------------------------------------------------------------------------- images

def train_image(cfg: Config, out: Path) -> None:
    """Train a small CLIP-like image encoder that classifies a first frame's colour and shape."""
    dit = sizes_of(cfg.preset)
    sizes = {"dim": dit.image_dim, "dim_ffn": 2 * dit.image_dim, "num_layers": 2, "num_heads": 2,
             "size": 48, "patch": 48 // math.isqrt(dit.image_len - 1)}
    names = ("colour", "shape")
    counts = [len(ATTRIBUTES[name]) for name in names]
    device = pick_device(cfg.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(cfg.seed, "image"))
        both = nn.ModuleDict({"tower": CLIPVision(**sizes),
                              "heads": nn.Linear(dit.image_dim, sum(counts))}).to(device)

    def loss_of(i: int) -> Tensor:
        clips, _, shown = make_clips(cfg.seed, i * 32, 32, cfg.height, cfg.frames)
        tower = both["tower"]
        logits = both["heads"](tower(tower.pixels(clips[:, :, 0].to(device))).mean(1))
        return sum(F.cross_entropy(part, shown[name].to(device))
                   for name, part in zip(names, logits.split(counts, 1), strict=True))

    tower = fit(cfg, "image", both, cfg.image_iters, (0.0, 2e-3), 0.4, loss_of)["tower"]
    sizes["num_layers"] += 1  # the released encoder has one more layer, which is not used
    save_tensors(out / "models_clip_tiny.safetensors",
                 {f"visual.{name}": value for name, value in half(tower).items()},
                 {"config": json.dumps(sizes)})


# --------------------------------------------------------------------------------------- DiT

def encode_part(cfg: Config, conditioner: Conditioner, vae: nn.Module,
                start: int) -> dict[str, Tensor]:
    """Encode up to PER_FILE clips from `start` on and keep them on disk.

    Returns "latents" [N, 16, T, H/8, W/8] in fp16, and for image-to-video the condition tensors of
    the clips' first frames.
    """
    path = folder(cfg) / "pool" / f"{start:06d}.safetensors"
    count = min(PER_FILE, cfg.dit_pool - start)
    mark = {"vae": weights_sum(vae), "clip": weights_sum(conditioner.clip),
            "clips": f"{count} of seed {cfg.seed}, {cfg.frames} frames, {cfg.height} pixels"}
    if path.exists() and safetensors_metadata(path) == mark:
        return {name: t.read() for name, t in open_safetensors(path).items()}
    begun = time.perf_counter()
    clips = make_clips(cfg.seed, start, count, cfg.height, cfg.frames)[0]
    with torch.no_grad():
        device = pick_device(cfg.device)
        part = {"latents": torch.cat([vae.encode(some.to(device)) for some in clips.split(4)])}
        if conditioner.clip is not None:
            firsts = [conditioner.encode_image(first, cfg.height, cfg.width)
                      for first in clips[:, :, 0]]
            part |= {name: torch.stack([cond[name] for cond in firsts]) for name in firsts[0]}
    part = {name: value.half().cpu() for name, value in part.items()}
    save_tensors(path, part, mark)
    note(cfg, stage="encode", iteration=start + count, seconds=time.perf_counter() - begun)
    return part


def weights_sum(module: nn.Module | None) -> str:
    """A number that differs between networks."""
    return str(sum(p.double().abs().sum().item() for p in module.parameters()) if module else None)


def start_dit(cfg: Config) -> nn.Module:
    """The DiT to train: newly initialised, or `base`'s DiT with zero weights for its new inputs."""
    dit = build_dit(cfg.preset)
    dit.init_weights(generator(cfg.seed, "dit"))
    if cfg.base is not None:
        tensors = dit_tensors(cfg.base)
        for name, p in dit.state_dict().items():
            if name in tensors:
                value = tensors[name].read(slice(None)).float()
                p.zero_()[tuple(map(slice, value.shape))] = value
    return dit.to(pick_device(cfg.device))


def train_dit(cfg: Config, out: Path, vae: nn.Module, conditioner: Conditioner) -> None:
    """Train the tiny DiT by flow matching (Eq. 3) on encoded clips."""
    device, dit = pick_device(cfg.device), start_dit(cfg)
    starts = tqdm(range(0, cfg.dit_pool, PER_FILE), "encode", disable=None)
    parts = [encode_part(cfg, conditioner, vae, start) for start in starts]
    pool = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    latents = pool.pop("latents")
    captions = make_captions(cfg.seed, 0, cfg.dit_pool)
    distinct = sorted(set(captions))
    row = torch.tensor([distinct.index(text) for text in captions])
    states = collate(conditioner.text.encode_each([*distinct, ""]))["text"]  # captions + 1, L, D
    network = torch.compile(dit) if cfg.compile else dit

    def loss_of(i: int) -> Tensor:
        g, count = generator(cfg.seed, "dit", i), cfg.dit_batch
        pick = torch.randint(cfg.dit_pool, (count,), generator=g)
        empty = torch.rand(count, generator=g) < 0.1  # for guidance
        u = (torch.arange(count) + torch.rand((), generator=g)) / count  # stratified
        x0 = latents[pick].float().to(device)
        x1 = torch.randn(x0.shape, generator=g).to(device)
        cond = {name: value[pick].float().to(device) for name, value in pool.items()}
        cond["text"] = states[torch.where(empty, len(distinct), row[pick]).to(device)]
        t = shift_time(u, 3.0).to(device)  # more noise than `shift`, which is for sampling
        x = x0 + t.view(-1, 1, 1, 1, 1) * (x1 - x0)
        v = network(x, t, cond)
        return F.mse_loss(v, x1 - x0)  # Eq. 3

    def evaluate(average: nn.Module) -> dict:
        count = min(len(COMBINATIONS), cfg.gate_clips)
        prompts = held_out(cfg, out)[:count]
        times = time_grid(cfg.family, 25, cfg.shift).tolist()
        videos = sample(cfg, average, vae, conditioner, prompts, times)
        clips = make_clips(cfg.seed, 0, count, cfg.height, cfg.frames, True)[0]
        return {**agreement(videos, [prompt.text for prompt in prompts]),
                "floor": float(floor_detail(videos).mean() / floor_detail(clips).mean()),
                "solid": float((read_clip(videos)["worst_iou"] >= 0.8).float().mean())}

    made_from = {"base": fingerprint(cfg.base) if cfg.base else "", "vae": weights_sum(vae),
                 "clip": weights_sum(conditioner.clip)}
    dit = fit(cfg, "dit", dit, cfg.dit_iters, (8e-3, 2e-3), cfg.dit_decay_from, loss_of, evaluate,
              made_from)
    sizes = {name: value for name, value in asdict(dit.cfg).items()
             if name not in ("patch_size", "image_dim", "image_len", "boundary")}
    write_json(out / "config.json", {"_class_name": "WanModel", **sizes})
    save_tensors(out / "diffusion_pytorch_model.safetensors", half(dit), {})


def sample(cfg: Config, dit: nn.Module, vae: nn.Module, conditioner: Conditioner,
           prompts: list[Prompt], times: list[float]) -> Tensor:
    """Videos [N, 3, T, H, W] of prompts, each from its own noise, denoised along `times`."""
    shape = latent_shape(cfg.frames, cfg.height, cfg.width)
    videos = []
    for start in range(0, len(prompts), 72):
        some = prompts[start:start + 72]
        cond = collate(conditioner.encode_each(some, cfg.height, cfg.width))
        x = draw_noise(shape, [(cfg.seed, "gate", start + i) for i in range(len(some))])
        x = x.to(cond["text"].device)
        *_, x = sample_euler(dit, x, times, cond)
        with torch.no_grad():
            videos += [vae.decode(part).cpu() for part in x.split(8)]
    return torch.cat(videos)


# ----------------------------------------------------------------------------------- prompts

def write_prompts(cfg: Config, out: Path) -> None:
    """Write prompts.txt and prompts_heldout.txt; for image-to-video .jsonl files and images."""
    if not sizes_of(cfg.preset).takes_image:
        seen = dict.fromkeys(make_captions(cfg.seed, 0, cfg.dit_pool))
        unseen = make_captions(cfg.seed, 0, len(COMBINATIONS), held_out=True)
        for name, captions in (("prompts", seen), ("prompts_heldout", unseen)):
            write_text(out / f"{name}.txt", "\n".join(captions) + "\n")
        return
    for name, count in (("prompts", cfg.first_frames), ("prompts_heldout", cfg.gate_clips)):
        lines = []
        for start in range(0, count, PER_FILE):
            clips, captions, _ = make_clips(cfg.seed, start, min(PER_FILE, count - start),
                                            cfg.height, cfg.frames, name == "prompts_heldout")
            for i, (clip, text) in enumerate(zip(clips, captions, strict=True), start):
                lines.append({"prompt": text, "image": f"images/{name}_{i:04d}.png"})
                write_image(out / lines[-1]["image"], clip[:, 0])
        write_json_lines(out / f"{name}.jsonl", lines)


def held_out(cfg: Config, out: Path) -> list[Prompt]:
    """The prompts of the held-out clips 0 … gate_clips - 1."""
    if sizes_of(cfg.preset).takes_image:
        return read_prompts(heldout_prompts(out, images=True), images=True)
    return [Prompt(text) for text in make_captions(cfg.seed, 0, cfg.gate_clips, held_out=True)]


def conditioner_of(cfg: Config, out: Path) -> Conditioner:
    """The conditioner with the encoders in `out`."""
    return load_conditioner(replace(cfg, weights=str(out)), pick_device(cfg.device), torch.float32,
                            crop=True)


# ------------------------------------------------------------------------------------- gates

def measure_gates(cfg: Config, out: Path) -> dict[str, dict]:
    """Measure the weights in `out` on held-out captions, clips and noise.

    Returns a bound and a figure by gate, and the oracle's readings as fractions of all clips.
    """
    device = pick_device(cfg.device)
    vae, dit = load_vae(out, device), load_dit(out, cfg.preset, device=device).eval()
    conditioner, prompts = conditioner_of(cfg, out), held_out(cfg, out)
    clips, captions, _ = make_clips(cfg.seed, 0, cfg.gate_clips, cfg.height, cfg.frames, True)
    with torch.no_grad():
        again = torch.cat([vae.decode(vae.encode(v.to(device))).cpu() for v in clips.split(8)])
    grid = time_grid(cfg.family, cfg.n, cfg.shift)
    two = [0, cfg.n // 2, cfg.n]
    many, few, fewest = (sample(cfg, dit, vae, conditioner, prompts, grid[key].tolist())
                         for key in (slice(None), cfg.key, two))
    readings = {"rendered": agreement(clips, captions), "vae": agreement(again, captions),
                **{f"teacher, {len(t) - 1} steps": agreement(v, captions)
                   for t, v in ((grid, many), (cfg.key, few), (two, fewest))}}
    floor = float(floor_detail(clips).mean())
    floors = {n: floor_detail(v) / floor for n, v in ((cfg.n, many), ("few", few), (2, fewest))}
    torn = read_clip(many)["worst_iou"]
    found = {
        "rendered_oracle": gate("oracle right on rendered clips",
                                readings["rendered"]["all"], 0.99),
        "vae_psnr": gate("VAE on held-out clips, dB", psnr(again, clips).mean(), 34),
        "vae_oracle": gate("oracle right on the VAE's clips", readings["vae"]["all"], 0.97),
        "teacher_oracle": gate("oracle right on the teacher's videos",
                               readings[f"teacher, {cfg.n} steps"]["all"], 0.95),
        "teacher_floor": gate("floor detail that nine of ten of the teacher's videos reach, over "
                              "rendered clips'", floors[cfg.n].quantile(0.1), 0.65),
        "teacher_solids": gate("videos whose solid keeps its shape in every frame",
                               (torn >= 0.8).float().mean(), 0.95),
        "few_steps_floor": gate("floor detail of few steps over that of all",
                                floors["few"].mean() / floors[cfg.n].mean(), most=0.8),
        "two_steps_floor": gate("floor detail of two steps over that of all",
                                floors[2].mean() / floors[cfg.n].mean(), most=0.5)}
    if dit.cfg.takes_image:
        found["first_frame_psnr"] = gate("first frame against its image, dB",
                                         psnr(many[:, :, :1], clips[:, :, :1]).mean(), 30)
    return found | {"readings": readings}


# -------------------------------------------------------------------------------------- main

def copy_base(cfg: Config, out: Path) -> None:
    """Copy VAE and text encoder of `base`. Raises FileNotFoundError if it has none."""
    missing = [name for name in BASE_FILES if not (Path(cfg.base) / name).is_file()]
    if missing:
        raise FileNotFoundError(f"base: {cfg.base} has no {missing[0]}: choose a folder that "
                                "stage 0 made, such as assets/tiny")
    for name in BASE_FILES:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(out / name, lambda aside, name=name: shutil.copyfile(
            Path(cfg.base) / name, aside))


def check(cfg: Config) -> None:
    """Raise ValueError for settings that this stage does not support."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("expected one process: start this stage by `python -m "
                         "small_world.teacher`, without torchrun")
    if cfg.family != "wan" or cfg.preset not in ("tiny", "tiny-i2v"):
        raise ValueError(f"preset: expected tiny or tiny-i2v of family wan, got {cfg.preset} of "
                         f"{cfg.family}: use configs/tiny.yaml or configs/tiny-i2v.yaml")
    if cfg.height != cfg.width or not 8 <= cfg.vae_crop <= cfg.height or cfg.vae_crop % 8:
        raise ValueError(f"height, width, vae_crop: expected a square and a multiple of 8 up to "
                         f"its side, got {cfg.height}, {cfg.width}, {cfg.vae_crop}")
    if cfg.compile:
        check_compiler(pick_device(cfg.device))
    weights = [] if cfg.out is None else sorted(Path(cfg.out).glob("*.safetensors"))
    ours = (Path(cfg.out or "") / "training.json", folder(cfg) / "config.yaml")
    if weights and not any(path.exists() for path in ours):
        raise ValueError(f"out: {weights[0]} exists, and is not of this stage: choose another "
                         "--out")


def main(argv: list[str] | None = None) -> None:
    """Check the settings and train all parts in order, continuing where an earlier process stopped;
    then measure them."""
    given = sys.argv[1:] if argv is None else argv
    cfg = load_config(Config, "teacher", given, __doc__, "-m small_world.teacher")
    check_model(cfg)
    check(cfg)
    out, device = Path(cfg.out or folder(cfg) / "weights"), pick_device(cfg.device)
    torch.set_num_threads(cfg.threads)
    prefer_attention(cfg.attention, device)
    with lock_folder(folder(cfg)):
        announce(cfg, "teacher")
        write_prompts(cfg, out)
        if cfg.base is None:
            train_text(cfg, out)
            train_vae(cfg, out)
        else:
            copy_base(cfg, out)
        if sizes_of(cfg.preset).takes_image:
            train_image(cfg, out)
        train_dit(cfg, out, load_vae(out, device), conditioner_of(cfg, out))
        found, seconds = measure_gates(cfg, out), {"encode": 0.0}
        for line in read_log(folder(cfg) / "log.jsonl", "seconds"):
            done = seconds["encode"] if line["stage"] == "encode" else 0.0
            seconds[line["stage"]] = round(done + line["seconds"], 1)
        write_json(out / "training.json", {
            "command": " ".join(["python -m small_world.teacher", *given]), "config": asdict(cfg),
            "hardware": f"{device_name(device)}, {os.cpu_count()} cores",
            "seconds": seconds, "torch": torch.__version__, "gates": found})
    for name, figures in found.items():
        print(f"{name}: {figures}")
    print(f"weights and training.json are in {out}")


if __name__ == "__main__":
    cli(main)
