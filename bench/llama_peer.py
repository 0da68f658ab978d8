#!/usr/bin/env python3
"""A plain PyTorch Llama of the size of the preset transnormer-385m, trained by length: the peer of `everlong bench model`.

  python3 bench/llama_peer.py [--lengths 1K,8K,32K,128K] [--tokens 131072] [--steps 10] [--attention cudnn|flash]
                              [--compile] [--no-checkpointing] [--json FILE]

24 layers of width 1,024, 8 heads of 128, RMSNorm, RoPE, SwiGLU, causal attention by scaled_dot_product_attention in the
named backend, tied embedding. The MLP's width is the multiple of 64 that brings the parameters nearest to the preset's
384,926,720 (more than 1 % off is refused; --mlp sets another). Needs a Python with torch 2.11.0 (CUDA).

The same as `everlong bench model CONFIG --device cuda --dtype bf16 --checkpointing --lengths N --rows TOKENS/N`: random tokens
(targets are the inputs), TOKENS a batch whatever the row; weights, activations and gradients bf16; AdamW (0.9, 0.95, decay
0.1 of matrices, rate 1e-6, fused) on fp32 masters with fp32 moments and gradients; the norm of the gradients clipped to 1;
every block run again in the backward pass; the head and its loss in pieces of tokens, fp32 softmax, gradients made in the
same walk, so that the logits of a batch never exist at once (--loss-tokens a piece; ours are smaller); a step is timed from
idle device to idle device. Not the same: gradients need not repeat bit for bit here. --compile gives torch.compile the blocks.

Printed for each length: tokens a second (median, minimum and maximum of --steps after two that do not count) and the peak of
allocated memory. Exit code 1 when a length runs out of memory.
"""
import argparse, json, math, statistics, sys, time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from counts import count_by_1024

TARGET = 384_926_720
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def size(layers, width, mlp, vocab):
    return vocab * width + layers * (4 * width**2 + 3 * width * mlp + 2 * width) + width


def matching_mlp(layers, width, vocab):
    return max(1, round((TARGET - size(layers, width, 0, vocab)) / (3 * layers * width) / 64)) * 64


def turn(x, cos, sin):
    """Pairs (i, i + d/2) of x [B, T, H, d] turned by the angle of their token, cos and sin [T, 1, d/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(torch.nn.Module):
    def __init__(self, width, heads, mlp, layers):
        super().__init__()
        self.heads = heads

        def matrix(rows, columns, gain=1.0):
            return torch.nn.Parameter(torch.randn(rows, columns) * gain / math.sqrt(columns))

        self.norm1, self.norm2 = (torch.nn.Parameter(torch.ones(width)) for _ in range(2))
        self.q, self.k, self.v = (matrix(width, width) for _ in range(3))
        self.gate, self.up = (matrix(mlp, width) for _ in range(2))
        self.o, self.down = matrix(width, width, (2 * layers)**-0.5), matrix(width, mlp, (2 * layers)**-0.5)

    def forward(self, x, cos, sin):
        h = F.rms_norm(x, (x.shape[-1], ), self.norm1, 1e-6)
        q, k, v = (F.linear(h, w).unflatten(-1, (self.heads, -1)) for w in (self.q, self.k, self.v))
        q, k, v = (x.transpose(1, 2) for x in (turn(q, cos, sin), turn(k, cos, sin), v))  # views: no layout is copied
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.linear(o.transpose(1, 2).flatten(2), self.o)
        h = F.rms_norm(x, (x.shape[-1], ), self.norm2, 1e-6)
        return x + F.linear(F.silu(F.linear(h, self.gate)) * F.linear(h, self.up), self.down)


class HeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of hidden [N, D] under weight [V, D], some tokens at a time, and its gradients at once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, piece):
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for first in range(0, hidden.shape[0], piece):
            h, t = hidden[first:first + piece], targets[first:first + piece, None]
            logits = F.linear(h, weight).float()
            lse = logits.logsumexp(-1, keepdim=True)
            total += (lse - logits.gather(1, t)).sum(dtype=torch.float64)
            slope = logits.sub_(lse).exp_().scatter_add_(1, t, torch.full_like(lse, -1)).to(h.dtype)
            grad_hidden[first:first + piece] = slope @ weight
            grad_weight += slope.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        return *(grad.to(x.dtype) * x for x in ctx.saved_tensors), None, None


class Llama(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.randn(args.vocab, args.width) * 0.02)
        self.blocks = torch.nn.ModuleList(
            Block(args.width, args.heads, args.mlp, args.layers) for _ in range(args.layers))
        self.norm = torch.nn.Parameter(torch.ones(args.width))
        self.checkpointing, self.piece = not args.no_checkpointing, args.loss_tokens

    def loss(self, tokens, cos, sin):
        """Sum over all tokens; the token itself is the target, which costs what any other would."""
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = checkpoint(block, x, cos, sin, use_reentrant=False) if self.checkpointing else block(x, cos, sin)
        x = F.rms_norm(x, (x.shape[-1], ), self.norm, 1e-6)
        return HeadLoss.apply(x.flatten(0, 1), self.embedding, tokens.flatten(), self.piece)


class Training:
    def __init__(self, model):
        self.model, self.parameters = model, list(model.parameters())
        self.masters = [p.detach().float().clone() for p in self.parameters]
        groups = [{"params": [m for m in self.masters if (m.dim() > 1) == decays], "weight_decay": 0.1 * decays}
                  for decays in (True, False)]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def step(self, tokens, cos, sin):
        loss = self.model.loss(tokens, cos, sin) / tokens.numel()
        loss.backward()
        for master, parameter in zip(self.masters, self.parameters):
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)
        return loss.detach()


def measure(training, args, length, device):
    """Seconds of each step, the last loss, peak bytes (None without a GPU)."""
    rows, cuda = max(1, args.tokens // length), device.type == "cuda"
    dtype = training.parameters[0].dtype
    tokens = torch.randint(args.vocab, (rows, length), device=device)
    half = args.width // args.heads // 2
    rate = 10000.0**(-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), rate)[:, None].to(device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    wait = torch.cuda.synchronize if cuda else lambda: None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for step in range(args.steps + 2):
        wait()
        start = time.perf_counter()
        loss = training.step(tokens, cos, sin)
        wait()
        seconds.append(time.perf_counter() - start)
        print(f"{rows} x {length:,}: step {step - 1 if step > 1 else 'uncounted'}, {seconds[-1]:.3f} s", file=sys.stderr)
    return rows, seconds[2:], loss.item(), torch.cuda.max_memory_allocated() if cuda else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1K,8K,32K,128K", help="tokens of a row")
    parser.add_argument("--tokens", type=count_by_1024, default=131072, help="of a batch, whatever the row")
    parser.add_argument("--steps", type=int, default=10, help="counted, a length")
    parser.add_argument("--attention", choices=sorted(BACKENDS), default="cudnn")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--vocab", type=int, default=50272)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--mlp", type=int, help="width of the MLP; default: see above")
    parser.add_argument("--loss-tokens", type=int, default=4096, help="of a piece of the head and its loss")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in fp32, to try the script")
    parser.add_argument("--json", help="file of one JSON object a line")
    args = parser.parse_args()
    if args.mlp is None:
        args.mlp = matching_mlp(args.layers, args.width, args.vocab)
        off = size(args.layers, args.width, args.mlp, args.vocab) / TARGET - 1
        if abs(off) > 0.01:
            parser.error(f"no MLP of these sizes makes {TARGET:,} parameters ({off:+.1%} at best); give --mlp")

    torch.manual_seed(1)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    model = Llama(args).to(device, torch.bfloat16 if cuda else torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    if args.compile:
        for block in model.blocks:
            block.compile()
    training = Training(model)
    name = torch.cuda.get_device_name() if cuda else "cpu"
    print(f"{name}, torch {torch.__version__}; Llama of {parameters:,} parameters, MLP of {args.mlp:,}, "
          f"{args.attention} attention{', compiled' if args.compile else ''}"
          f"{'' if args.no_checkpointing else ', checkpointing'}", flush=True)
    log = open(args.json, "w") if args.json else None
    failed = False
    for length in map(count_by_1024, args.lengths.split(",")):
        line = {"model": "llama", "parameters": parameters, "attention": args.attention, "compiled": args.compile,
                "checkpointing": not args.no_checkpointing, "tokens": length}
        try:
            with sdpa_kernel(BACKENDS[args.attention]):
                rows, seconds, loss, peak = measure(training, args, length, device)
        except torch.OutOfMemoryError:
            line["trouble"] = "out of memory"
            print(f"train    {length:8,} a row: out of memory", flush=True)
        else:
            rates = sorted(rows * length / s for s in seconds)
            memory = "" if peak is None else f"  {peak / 1e9:6.1f} GB"
            print(f"train    {rows:4} x {length:8,}  {statistics.median(rates):11,.0f} tokens/s  "
                  f"({rates[0]:,.0f} to {rates[-1]:,.0f}){memory}  loss {loss:.3f}", flush=True)
            line |= {"rows": rows, "steps": args.steps, "training_tokens_per_second": statistics.median(rates),
                     "training_tokens_per_second_min": rates[0], "training_tokens_per_second_max": rates[-1],
                     "training_peak_bytes": peak, "loss": loss}
        if "trouble" in line:  # only here nothing holds the failed step any more
            failed = True
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        if log:
            log.write(json.dumps(line) + "\n")
            log.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
