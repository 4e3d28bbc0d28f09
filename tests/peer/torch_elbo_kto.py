"""The peer of `python -m elbo_kto_jax.benchmark`: ELBO-KTO in PyTorch, the way its authors compute it.

Our own version of their scheme, for timing and as an independent check of the numbers: one example at a time; for each
of its K draws a forward pass over the whole row with logits at every position; the K graphs live until the backward
pass of the example's loss; gradients add up over the examples of a batch, and AdamW follows. Rows are padded to
max_length with end-of-text that attention sees (their scheme), or have the example's own length (`true_length`, which
their scheme does not have, and the strongest form of a peer that works example by example).

On a GPU it computes in bfloat16, parameters and optimizer state too, with flash attention; log-probabilities, norms and
rotary angles are float32. Generous where a choice is open: the reference point of the batch, which their processes
exchange, is handed in, so it costs the peer nothing; torch's fused attention and fused AdamW.

It needs torch (extra `bench`) and nothing of this project. As a program it is the benchmark's worker: it reads one JSON
request per line from stdin and answers with one JSON line on stdout (see `main`).
"""

import contextlib
import functools
import json
import math
import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        d, f, e = cfg["d_model"], cfg["mlp_hidden_size"], cfg["d_model"] // cfg["n_heads"]
        self.heads, self.kv_heads, self.head_dim = cfg["n_heads"], cfg.get("n_kv_heads") or cfg["n_heads"], e
        linear = lambda n, m: nn.Linear(n, m, bias=False)  # noqa: E731
        self.attn_norm, self.ff_norm = RMSNorm(d, cfg["rms_norm_eps"]), RMSNorm(d, cfg["rms_norm_eps"])
        self.q_proj, self.attn_out = linear(d, d), linear(d, d)
        self.k_proj, self.v_proj = linear(d, self.kv_heads * e), linear(d, self.kv_heads * e)
        self.ff_proj, self.up_proj, self.ff_out = linear(d, f), linear(d, f), linear(f, d)

    def forward(self, x, cos, sin):
        b, s, _ = x.shape
        h = self.attn_norm(x)
        q = self.q_proj(h).view(b, s, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(h).view(b, s, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(h).view(b, s, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.kv_heads != self.heads:
            k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
            v = v.repeat_interleave(self.heads // self.kv_heads, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attn_out(attended.transpose(1, 2).reshape(b, s, -1))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


def rotate(x, cos, sin):
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class LLaDA(nn.Module):
    """The mask predictor; parameters have the published checkpoint's names below `model.transformer.`."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.wte = nn.Embedding(cfg["embedding_size"], cfg["d_model"])
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg["n_layers"]))
        self.ln_f = RMSNorm(cfg["d_model"], cfg["rms_norm_eps"])
        self.ff_out = nn.Linear(cfg["d_model"], cfg["embedding_size"], bias=False)
        self.activation_checkpointing = False

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "LLaDA":
        with torch.device("meta"):
            model = cls(json.loads((Path(folder) / "config.json").read_text()))
        tensors, prefix = {}, "model.transformer."
        for file in sorted(Path(folder).glob("*.safetensors")):
            loaded = load_file(file, device=device)
            tensors |= {name.removeprefix(prefix): tensor.to(dtype) for name, tensor in loaded.items()}
        model.load_state_dict(tensors, assign=True)
        return model.requires_grad_()

    def forward(self, ids):
        """Logits at every position, [b s v]."""
        e = self.cfg["d_model"] // self.cfg["n_heads"]
        frequency = 1.0 / self.cfg["rope_theta"] ** (torch.arange(0, e, 2, device=ids.device).float() / e)
        angle = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), frequency)
        cos, sin = angle.cos(), angle.sin()
        x = self.wte(ids)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, use_reentrant=False)
            else:
                x = block(x, cos, sin)
        return self.ff_out(self.ln_f(x))


def elbo_draws(model: LLaDA, example: dict, length: int):
    """One ELBO estimate (nats) per draw of an example: a list of scalars, each with its own graph."""
    cfg, device = model.cfg, model.ff_out.weight.device
    ids = torch.full((1, length), cfg["eos_token_id"], dtype=torch.long)
    ids[0, : len(example["tokens"])] = torch.from_numpy(example["tokens"].astype(np.int64))
    start, size = int(example["start"]), example["masks"].shape[1]
    estimates = []
    for mask, weight in zip(example["masks"], example["weights"], strict=True):
        hidden = torch.zeros((1, length), dtype=torch.bool)
        hidden[0, start : start + size] = torch.from_numpy(mask)
        logits = model(torch.where(hidden, cfg["mask_token_id"], ids).to(device))
        log_probs = F.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None].to(device))[..., 0]
        estimates.append(float(weight) * (log_probs * hidden.to(device)).sum())
    return estimates


@torch.no_grad()
def reference_pass(model: LLaDA, examples: list[dict], length_of) -> list[float]:
    """B_ref of every example, nats."""
    return [float(torch.stack(elbo_draws(model, x, length_of(x))).mean()) for x in examples]


def accumulate_gradient(model: LLaDA, examples: list[dict], length_of, elbo_ref, z0: float, beta: float):
    """The batch's loss (docs/method.md 2, lambda 1), whose gradient is added to the parameters', and each reward."""
    total, rewards = 0.0, []
    for x, b_ref in zip(examples, elbo_ref, strict=True):
        reward = torch.stack(elbo_draws(model, x, length_of(x))).mean() - b_ref
        s = beta * (reward - z0)
        loss = (1.0 - torch.sigmoid(s if x["desirable"] else -s)) / len(examples)
        loss.backward()
        total += float(loss.detach())
        rewards.append(float(reward.detach()))
    return total, rewards


def adamw(model: LLaDA, learning_rate: float) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)


def read_examples(file: str | Path) -> list[dict]:
    """The examples that the benchmark wrote, with their masks."""
    data = np.load(file)
    return [
        {
            "tokens": data[f"{i}.tokens"],
            "start": data[f"{i}.start"],
            "masks": data[f"{i}.masks"],
            "weights": data[f"{i}.weights"],
            "desirable": bool(data[f"{i}.desirable"]),
        }
        for i in range(int(data["count"]))
    ]


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of a few."""
    size, repeats = (2048, 1) if device == "cpu" else (8192, 10)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            a @ a
        synchronize(device)
        best = min(best, (time.perf_counter() - began) / repeats)
    return 2 * size**3 / best


def synchronize(device: str) -> None:
    """Waits for what the device was given to do."""
    if device != "cpu":
        torch.cuda.synchronize()


def train(model: LLaDA, optimizer: torch.optim.Optimizer, examples: list[dict], length_of, request: dict, beta: float):
    """One whole optimizer step: loss, rewards (nats), and the gradient's norm before it is clipped to 1."""
    elbo_ref = request["elbo_ref"][: len(examples)]
    loss, rewards = accumulate_gradient(model, examples, length_of, elbo_ref, request["z0"], beta)
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, "rewards": rewards, "grad_norm": norm}


def main() -> None:
    """Answers requests until stdin ends.

    First line: {"model", "max_length", "beta", "learning_rate", "activation_checkpointing", "dtype"}. Then
    {"do": "peak"}, {"do": "reference", "examples", "count", "true_length"} or {"do": "train", "examples", "count",
    "true_length", "elbo_ref", "z0"} over the first `count` examples of the file `examples`; "train" is one whole
    optimizer step, taken back afterwards.
    """
    setting = json.loads(sys.stdin.readline())
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, setting["dtype"])
    model = LLaDA.load(setting["model"], device, dtype)
    model.activation_checkpointing = setting["activation_checkpointing"]
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read, optimizer = functools.cache(read_examples), adamw(model, setting["learning_rate"])
    answer = {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
    while True:
        print(json.dumps(answer), flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        if request["do"] == "peak":
            answer = {"flops": matrix_peak(device, dtype)}
            continue
        length_of = (lambda x: len(x["tokens"])) if request.get("true_length") else lambda _: setting["max_length"]
        chosen = read(request["examples"])[: request.get("count")]
        began = time.perf_counter()
        with flash_attention(device):
            if request["do"] == "reference":
                answer = {"elbo": reference_pass(model, chosen, length_of)}
            else:
                answer = train(model, optimizer, chosen, length_of, request, setting["beta"])
        synchronize(device)
        answer["seconds"] = time.perf_counter() - began
        answer["peak_bytes"] = peak_bytes(device)
        if request["do"] == "train":
            model.load_state_dict(initial)


def flash_attention(device: str) -> contextlib.AbstractContextManager:
    """Within it, attention on a GPU is flash attention, or an error."""
    return contextlib.nullcontext() if device == "cpu" else sdpa_kernel(SDPBackend.FLASH_ATTENTION)


def peak_bytes(device: str) -> int:
    """The largest memory that this process has had: of the GPU, or the resident set.

    On Linux ru_maxrss starts at that of the parent, so the resident set is read elsewhere.
    """
    if device != "cpu":
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


if __name__ == "__main__":
    main()
