"""Text encoders: shared parts · umT5 · LLaMA-3 and CLIP · tokenizers · prompts to text states.

Shapes: B prompts, L or S tokens, D width; ids and mask [B, L] int64, text states [B, L, D].
"""

import html
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from model import RMSNorm

# ------------------------------------------------------------------------------------ shared parts

def linears(bias: bool, **sizes: tuple[int, int]) -> nn.ModuleDict:
    """Linear layers by name, each given as (inputs, outputs)."""
    return nn.ModuleDict({name: nn.Linear(*size, bias=bias) for name, size in sizes.items()})


def attend(layers: nn.ModuleDict, x: Tensor, width: int, angle: Tensor | None = None,
           bias: Tensor | None = None) -> Tensor:
    """Attention with heads of `width` over x [B, L, D]; layers of q, k, v and output, in order.

    Query heads may share keys and values. angle [L, width/2] rotates pairs (j, j + width/2). bias
    [B, heads, L, L] is added to unscaled logits (T5); without it attention is causal.
    """
    *to_qkv, to_out = layers.values()
    q, k, v = (f(x).unflatten(-1, (-1, width)).transpose(1, 2) for f in to_qkv)  # B heads L width
    if angle is not None:
        cos, sin = angle.cos(), angle.sin()
        pairs = [z.float().chunk(2, dim=-1) for z in (q, k)]
        q, k = (torch.cat([y * cos - z * sin, z * cos + y * sin], -1).to(v.dtype) for y, z in pairs)
    y = F.scaled_dot_product_attention(
        q, k, v, bias, is_causal=bias is None, scale=None if bias is None else 1.0,
        enable_gqa=q.shape[1] != k.shape[1])
    return to_out(y.transpose(1, 2).flatten(2))                                  # B L D


# ------------------------------------------------------------------------ umT5: Wan's text encoder

class RelativeBias(nn.Module):
    """A learned bias on attention logits by head and bucket of key - query (T5)."""

    def __init__(self, num_buckets: int, num_heads: int, max_distance: int):
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.embedding = nn.Embedding(num_buckets, num_heads)

    def forward(self, L: int) -> Tensor:
        """The bias [heads, L, L] (query, key) for L positions."""
        positions = torch.arange(L, device=self.embedding.weight.device)
        r = positions[None, :] - positions[:, None]     # key - query
        half = self.num_buckets // 2                    # keys after the query use the upper half
        exact = half // 2                               # smaller distances have a bucket each
        a = r.abs()
        far = torch.log(a.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
        bucket = half * (r > 0) + torch.where(a < exact, a, far)
        return self.embedding(bucket).permute(2, 0, 1)  # heads L L


class T5Block(nn.Module):
    def __init__(self, dim, dim_attn, num_heads, dim_ffn, num_buckets, max_distance):
        super().__init__()
        self.width, inner = dim_attn // num_heads, (dim, dim_attn)
        self.norm1 = RMSNorm(dim, eps=1e-6)
        self.attn = linears(False, q=inner, k=inner, v=inner, o=(dim_attn, dim))
        self.norm2 = RMSNorm(dim, eps=1e-6)
        gate = nn.Sequential(nn.Linear(dim, dim_ffn, bias=False), nn.GELU("tanh"))
        self.ffn = nn.ModuleDict(
            {"gate": gate, **linears(False, fc1=(dim, dim_ffn), fc2=(dim_ffn, dim))})
        self.pos_embedding = RelativeBias(num_buckets, num_heads, max_distance)  # one per block

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        bias = self.pos_embedding(x.shape[1])                                    # heads L L
        bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(x.dtype).min)  # B heads L L
        x = x + attend(self.attn, self.norm1(x), self.width, bias=bias)
        y = self.norm2(x)
        return x + self.ffn["fc2"](self.ffn["fc1"](y) * self.ffn["gate"](y))


class UMT5Encoder(nn.Module):
    """umT5's encoder, by default XXL; names as in Wan's checkpoint. Source: umT5, Wan 2.1."""

    def __init__(self, vocab_size=256384, dim=4096, dim_attn=4096, num_heads=64, dim_ffn=10240,
                 num_layers=24, num_buckets=32, max_distance=128):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            T5Block(dim, dim_attn, num_heads, dim_ffn, num_buckets, max_distance)
            for _ in range(num_layers))
        self.norm = RMSNorm(dim, eps=1e-6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text states [B, L, dim] of ids [B, L] int64; mask [B, L] is 1 on tokens, 0 on padding."""
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, mask.bool())
        return self.norm(x)


# ------------------ LLaMA-3 and CLIP: HunyuanVideo's; causal, so that right padding has no effect

class LlamaBlock(nn.Module):
    def __init__(self, dim: int, dim_ffn: int, num_heads: int, num_kv_heads: int, eps: float):
        super().__init__()
        self.width, wide = dim // num_heads, (dim, dim_ffn)
        kv = (dim, num_kv_heads * self.width)
        self.self_attn = linears(False, q_proj=(dim, dim), k_proj=kv, v_proj=kv, o_proj=(dim, dim))
        self.mlp = linears(False, gate_proj=wide, up_proj=wide, down_proj=wide[::-1])
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        x = x + attend(self.self_attn, self.input_layernorm(x), self.width, angle)
        y = self.post_attention_layernorm(x)
        y = F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)
        return x + self.mlp["down_proj"](y)


class Llama(nn.Module):
    """The first 30 layers of LLaMA-3 8B without the final norm, named as below `model.`."""

    def __init__(self, vocab_size=128320, dim=4096, dim_ffn=14336, num_layers=30, num_heads=32,
                 num_kv_heads=8, theta=500000.0, eps=1e-5):
        super().__init__()
        pairs = dim // num_heads // 2
        self.freq = [theta ** (-k / pairs) for k in range(pairs)]
        self.embed_tokens = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(LlamaBlock(dim, dim_ffn, num_heads, num_kv_heads, eps)
                                    for _ in range(num_layers))

    def forward(self, ids: Tensor) -> Tensor:
        """States [B, L, dim] of ids [B, L] int64, where shorter rows are padded on the right."""
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angle = torch.outer(positions, torch.tensor(self.freq, device=ids.device))  # L width/2
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, angle)
        return x


class CLIPBlock(nn.Module):
    def __init__(self, dim: int, dim_ffn: int, num_heads: int):
        super().__init__()
        self.width, square = dim // num_heads, (dim, dim)
        self.self_attn = linears(True, q_proj=square, k_proj=square, v_proj=square, out_proj=square)
        self.mlp = linears(True, fc1=(dim, dim_ffn), fc2=(dim_ffn, dim))
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + attend(self.self_attn, self.layer_norm1(x), self.width)
        y = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](y * torch.sigmoid(1.702 * y))  # CLIP's approximation of GELU


class CLIPText(nn.Module):
    """The text encoder of CLIP ViT-L/14 without projection, named as below `text_model.`."""

    def __init__(self, vocab_size=49408, dim=768, dim_ffn=3072, num_layers=12, num_heads=12,
                 max_len=77):
        super().__init__()
        self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(vocab_size, dim),
                                         "position_embedding": nn.Embedding(max_len, dim)})
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(
            *(CLIPBlock(dim, dim_ffn, num_heads) for _ in range(num_layers)))})
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, L, dim] of ids [B, L] int64, and pooled [B, dim], the state at each row's
        largest id, which is the first <|endoftext|>."""
        positions = self.embeddings["position_embedding"].weight[:ids.shape[1]]
        x = self.embeddings["token_embedding"](ids) + positions
        x = self.final_layer_norm(self.encoder["layers"](x))
        return x, x[torch.arange(len(x), device=x.device), ids.argmax(1)]


# -------------------------------------------------------------------------------------- tokenizers

def clean_text(text: str) -> str:
    """Fix broken encodings and HTML entities, and collapse whitespace to single spaces (Wan)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def open_tokenizer(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns. Raises ValueError naming the file or folder if it cannot be read."""
    try:
        return read()
    except Exception as error:  # tokenizers raises bare Exception, sentencepiece RuntimeError
        raise ValueError(f"{path}: is not a readable tokenizer ({error}): copy it again from the "
                         "checkpoint") from error


def tokenizer_from_json(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, without the padding and truncation that it may set."""
    fast = tokenizers.Tokenizer.from_file(str(file))
    fast.no_padding()
    fast.no_truncation()
    return fast


class Tokenizer:
    """Text to umT5 ids, at most `max_len` with the final </s>, as in Wan.

    Args: path, a tokenizer.json or spiece.model, a folder that contains one (the first of both
    counts), or the bytes of a spiece.model; max_len, the longest row in tokens.
    The two files give equal ids except for literal special tokens: a typed `</s>` is one token to
    tokenizer.json (and so to the official code), plain text to spiece.model.
    Raises FileNotFoundError if there is no such file, ValueError if it cannot be read.
    """

    PAD, END, UNKNOWN = 0, 1, 3  # umT5's ids

    def __init__(self, path: str | Path | bytes, max_len: int = 512):
        if isinstance(path, bytes):
            self.file = Path("spiece_model in the text encoder's file")
            source = {"model_proto": path}
        else:
            files = [path, *(Path(path) / name for name in ("tokenizer.json", "spiece.model"))]
            self.file = next((file for file in map(Path, files) if file.is_file()), None)
            source = {"model_file": str(self.file)}
        if self.file is None:
            raise FileNotFoundError(f"{path}: contains no tokenizer.json or spiece.model: copy it "
                                    "from the checkpoint's google/umt5-xxl or tokenizer")
        self.max_len, self.fast = max_len, None
        if self.file.suffix == ".json":
            self.fast = open_tokenizer(self.file, lambda: tokenizer_from_json(self.file))
            self.size, end = self.fast.get_vocab_size(), self.fast.token_to_id("</s>")
        else:
            self.sp = open_tokenizer(
                self.file, lambda: sentencepiece.SentencePieceProcessor(**source))
            self.size, end = self.sp.vocab_size(), self.sp.eos_id()
        if end != self.END:
            raise ValueError(f"{self.file}: </s>: expected umT5's id {self.END}, got {end}: it is "
                             "the file of another model")

    def pieces(self, text: str) -> list[int]:
        """All ids of a cleaned text, without </s>."""
        if self.fast:
            return self.fast.encode(text, add_special_tokens=False).ids
        ids = []
        for i in self.sp.encode(text):
            i = self.UNKNOWN if self.sp.is_byte(i) else i
            if not (i == self.UNKNOWN and ids[-1:] == [i]):  # consecutive bytes are one unknown
                ids.append(i)
        return ids

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, L], right-padded to the longest text of the batch.

        A text of more than max_len - 1 pieces is truncated with a warning.
        """
        rows = []
        for text in map(clean_text, texts):
            ids = self.pieces(text)
            lost = len(ids) - (self.max_len - 1)
            if lost > 0:
                warnings.warn(f"prompt {text[:40]!r}... has {len(ids)} tokens; the text "
                              f"encoder reads {self.max_len - 1}: the last {lost} are dropped",
                              stacklevel=2)
            rows.append(torch.tensor(ids[:self.max_len - 1] + [self.END]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.PAD)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def clip_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """CLIP's tokenizer from vocab.json and merges.txt: byte-pair encoding of lower-case words."""
    ends = start, end = "<|startoftext|>", "<|endoftext|>"
    vocab, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    fast = tokenizers.Tokenizer(
        models.BPE.from_file(vocab, merges, unk_token=end, end_of_word_suffix="</w>"))
    fast.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.add_special_tokens(list(ends))
    fast.post_processor = processors.TemplateProcessing(
        f"{start} $A {end}", None, [(token, fast.token_to_id(token)) for token in ends])
    return fast


def read_tokenizer(folder: Path, rows: int, text: str, count: int) -> tokenizers.Tokenizer:
    """The tokenizer of a folder's tokenizer.json, or of CLIP's vocab.json and merges.txt.

    Raises FileNotFoundError if there is none; ValueError if it cannot be read or is another
    model's: it has more than `rows` tokens, or does not split `text` into `count` tokens.
    """
    file = folder / "tokenizer.json"
    if not (file.is_file() or (folder / "vocab.json").is_file()):
        raise FileNotFoundError(f"{folder}: contains no tokenizer.json (or CLIP's vocab.json and "
                                "merges.txt): copy it from the checkpoint")
    fast = open_tokenizer(folder, lambda: tokenizer_from_json(file) if file.is_file()
                          else clip_tokenizer(folder))
    size, got = fast.get_vocab_size(), len(fast.encode(text).ids)
    if size > rows or got != count:
        raise ValueError(f"{folder}: expected a tokenizer of at most the text encoder's {rows} "
                         f"tokens that splits {text[:40]!r}… into {count}, got {size} tokens and "
                         f"{got}: copy both from one model")
    return fast


# -------------------------------------------------------------------------- prompts to text states

class TextEncoder:
    """Prompts to the text states that the DiT reads."""

    def __init__(self, encoder: UMT5Encoder, tokenizer: Tokenizer):
        rows = encoder.token_embedding.num_embeddings
        if tokenizer.size > rows:
            raise ValueError(f"{tokenizer.file}: expected at most {rows} tokens as in the text "
                             f"encoder, got {tokenizer.size}: copy both from one model")
        self.encoder, self.tokenizer = encoder, tokenizer

    def token_ids(self, prompt: str) -> Tensor:
        """The token ids of a prompt, int64 [L]."""
        return self.tokenizer([prompt])[0][0]

    @torch.no_grad()
    def encode_each(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """{"text": fp32 [L_i, D]} of each prompt, with </s> and without padding.

        Prompts are encoded one by one, so that their states do not depend on each other.
        """
        device = self.encoder.token_embedding.weight.device
        rows = (self.tokenizer([prompt]) for prompt in prompts)
        return [{"text": self.encoder(ids.to(device), mask.to(device))[0].float()}
                for ids, mask in rows]


# The LLM's template around a prompt, and the number of tokens before the prompt, which the DiT does
# not see. There is no space between sentences. Source: HunyuanVideo.
USER = ":<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
DESCRIBE = "<|start_header_id|>system<|end_header_id|>\n\nDescribe the "
TEMPLATES = {
    "video": (95, DESCRIBE + "video by detailing the following aspects: 1. The main content and "
              "theme of the video.2. The color, shape, size, texture, quantity, text, and spatial "
              "relationships of the objects.3. Actions, events, behaviors temporal relationships, "
              "physical movement changes of the objects.4. background environment, light, style "
              "and atmosphere.5. camera angles, movements, and transitions used in the video"
              + USER),
    "image": (36, DESCRIBE + "image by detailing the color, shape, size, texture, quantity, text, "
              "spatial relationships of the objects and background" + USER)}


class HunyuanText:
    """Prompts to the text states and the pooled text that HunyuanVideo's DiT reads.

    Args: the encoders; their tokenizers' folders; text_len, tokens of a video's prompt that the DiT
    reads; image, whether prompts describe single frames, whose shorter template leaves more room;
    guidance, the embedded guidance scale. Special tokens in a prompt act as such, as in the
    official code.
    """

    def __init__(self, llm: Llama, clip: CLIPText, llm_folder: Path, clip_folder: Path,
                 text_len: int = 256, image: bool = False, guidance: float = 6.016):
        self.llm, self.clip, self.guidance = llm, clip, guidance
        self.crop, self.template = TEMPLATES["image" if image else "video"]
        positions, words = (clip.embeddings[f"{name}_embedding"] for name in ("position", "token"))
        self.llm_len, self.clip_len = text_len + TEMPLATES["video"][0], positions.num_embeddings
        self.llm_tokenizer = read_tokenizer(llm_folder, llm.embed_tokens.num_embeddings,
                                            self.template.partition("{}")[0], self.crop)
        self.clip_tokenizer = read_tokenizer(clip_folder, words.num_embeddings, "", 2)

    def ids(self, prompt: str) -> tuple[Tensor, Tensor]:
        """The LLM's ids of a prompt in its template, and CLIP's of the prompt alone: int64 [L].

        The LLM's row is truncated with a warning. CLIP's is truncated silently and keeps its end
        token, because prompts are usually longer than CLIP reads.
        """
        prompt = prompt.encode("utf-8", "replace").decode()  # lone surrogates have no UTF-8
        ids = self.llm_tokenizer.encode(self.template.replace("{}", prompt.strip())).ids
        lost, room = len(ids) - self.llm_len, self.llm_len - self.crop
        if lost > 0:
            warnings.warn(f"prompt {prompt[:40]!r}... has {room + lost} tokens; the text encoder "
                          f"reads {room}: the last {lost} are dropped", stacklevel=2)
        *pooled, end = self.clip_tokenizer.encode(prompt).ids
        return torch.tensor(ids[:self.llm_len]), torch.tensor(pooled[:self.clip_len - 1] + [end])

    def token_ids(self, prompt: str) -> Tensor:
        """The token ids of both encoders in one row, int64 [L]."""
        return torch.cat(self.ids(prompt))

    @torch.no_grad()
    def encode_each(self, prompts: list[str]) -> list[dict[str, Tensor]]:
        """{"text": fp32 [S_i, D], "pooled": fp32 [D'], "guidance": fp32 []} of each prompt.

        text contains the states of the prompt and the template's end, without padding. Prompts are
        encoded one by one. Source: HunyuanVideo.
        """
        device, conds = self.llm.embed_tokens.weight.device, []
        for prompt in prompts:
            ids, pooled = (row[None].to(device) for row in self.ids(prompt))
            text = self.llm(ids)[0, self.crop:].float()
            conds.append({"text": text, "pooled": self.clip(pooled)[1][0].float(),
                          "guidance": torch.tensor(self.guidance, device=device)})
        return conds
