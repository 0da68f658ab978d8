#!/usr/bin/env python3
"""Lightning attention beside its peers on one NVIDIA GPU: the same inputs, interleaved, in one run.

  make torch-library                                     builds build/release/lib/libeverlong_torch.so
  python3 bench/lightning_peers.py [--peers FOLDER | --alone] [--pass forward,fused,train,step,packed]
                                   [--shapes 8x16K,1x128K] [--factors 1,0.013] [--json FILE]

Needs a Python with torch 2.11.0 (CUDA) and Triton. Peers: flash-linear-attention (chunk_simple_gla with g_gamma, and
fused_recurrent_simple_gla for single tokens), and where --peers has the package lightning_attn, the authors' own
kernel (lightning_attn2, its inputs laid out and scaled as it wants them before the clock starts). --peers names a
folder with wheels (pip download --no-deps fla-core einops) or with the packages unpacked; without it they are imported
as installed. --alone leaves them out (their first call tunes itself for minutes).

Every case first has to agree with a float64 recurrence, and rows of a million tokens with float64 at their end too;
then each competitor runs once a round, in turn, between events, with the level 2 cache overwritten before. Printed:
medians, their spread, the ratio, and the fraction of the copy bandwidth measured in the same run that the least
traffic (every input read once, every output written once) makes. Exit code 1 when a case is wrong.

  forward  with the final state (--no-state: without)     train   forward and backward, without: nobody needs it there
  fused    ours beside ours with silu of q, k and v and the row squares of o made on the way
  step     one token; ours also with states written behind (rings of 16 tokens, sessions at every filling)
  packed   sequences of random length 1 to 4,096 beside rows of 4,096 of as many tokens
"""
import argparse, json, statistics, subprocess, sys

from counts import count_by_1024
from lightning_forms import (TOLERANCE, Authors, WriteBehind, alibi, competitors, everlong_form, gate, gate_far,
                             gate_fused, gate_write_behind, inputs_of, relative)

HEADS, DIM = 32, 128
SHAPES = "128x1K,32x4K,8x16K,2x64K,1x128K"


class Timer:
    def __init__(self, torch):
        self.torch = torch
        self.flush = torch.zeros(64 * 1024**2, device="cuda")  # 256 MiB, well above the level 2 cache

    def once(self, run):
        self.flush.sum()  # by reading: what is written would have to leave the cache in the time that is measured
        self.torch.cuda._sleep(500_000)  # 0.3 ms in which the host gets ahead: what is timed is the device
        start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    def rounds(self, runs, seconds):
        """{name: seconds of each round}: one after the other within a round, so that the clock is the same for all."""
        for run in runs.values():
            for _ in range(2):
                run()
        first = {name: self.once(run) for name, run in runs.items()}
        count = max(5, min(50, int(seconds / max(1e-4, sum(first.values())))))
        times = {name: [] for name in runs}
        for _ in range(count):
            for name, run in runs.items():
                times[name].append(self.once(run))
        return times


def clock():
    out = subprocess.run(["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"],
                         capture_output=True, text=True).stdout.strip()
    return int(out.splitlines()[0]) if out else None


def copy_bandwidth(torch, timer):
    source = torch.empty(1024**3, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    best = min(timer.once(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.numel() / best


def packed(torch, timer, everlong, heads, dim, slopes, scale, sequences, longest, seconds):
    """Seconds of `sequences` of random length and of rows of `longest` with as many tokens, each interleaved."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (sequences,), generator=generator)
    offsets = [0] + lengths.cumsum(0).tolist()
    q, k, v = (torch.randn(1, offsets[-1], heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    tokens = offsets[-1] // longest * longest
    dense = [x[:, :tokens].view(-1, longest, heads, dim) for x in (q, k, v)]
    with torch.no_grad():
        some = next(i for i in range(sequences) if lengths[i] > 64)
        own = slice(offsets[some], offsets[some + 1])
        whole = everlong(q, k, v, slopes, scale, None, offsets)
        alone = everlong(q[:, own], k[:, own], v[:, own], slopes, scale)
        error = max(relative(whole[0][:, own], alone[0]), relative(whole[1][some:some + 1], alone[1]))
        del whole, alone
        times = timer.rounds({"packed": lambda: everlong(q, k, v, slopes, scale, None, offsets),
                              "dense": lambda: everlong(*dense, slopes, scale)}, seconds)
    median = {n: statistics.median(t) for n, t in times.items()}
    return offsets[-1], median["packed"], median["dense"] * offsets[-1] / tokens, error


def runs_of(torch, task, forms, q, k, v, slopes, scale, final_state):
    """({name: what to time}, least bytes that have to move)"""
    batch, heads, dim = q.shape[0], q.shape[2], v.shape[3]
    keys, values, state_bytes = 2 * q.numel(), 2 * v.numel(), 4 * batch * heads * q.shape[3] * dim
    forward = 2 * keys + 2 * values
    if task == "forward":
        runs = {n: (lambda f=f: f(q, k, v, slopes, scale, final_state=final_state)) for n, f in forms.items()
                if not isinstance(f, Authors) or f.takes(q)}
        return runs, forward + final_state * state_bytes
    if task == "fused":
        ours, riders = forms["everlong"], {"silu_q": True, "silu_k": True, "silu_v": True, "row_squares": True}
        return {"everlong": lambda: ours(q, k, v, slopes, scale),
                "fused": lambda: ours(q, k, v, slopes, scale, **riders)}, forward + state_bytes
    if task == "step":
        state = torch.randn(batch, heads, dim, dim, device="cuda")
        runs = {n: (lambda f=f: f(q, k, v, slopes, scale, state)) for n, f in forms.items()
                if not isinstance(f, Authors)}
        behind = WriteBehind(torch, batch, heads, dim, state)
        behind.waiting = (torch.arange(batch, device="cuda") % behind.ring).int()
        runs["write_behind"] = lambda: behind(q, k, v, slopes, scale)
        return runs, forward + 2 * state_bytes
    weight = torch.randn_like(v)

    def train(form):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        form(*leaves, slopes, scale, final_state=False)[0].backward(weight)

    runs = {}
    for name, form in forms.items():
        if not isinstance(form, Authors):
            runs[name] = lambda f=form: train(f)
        elif form.takes(q):
            leaves = form.leaves(q, k, v, scale)
            runs[name] = lambda f=form, x=leaves: f.train(x, slopes, weight)
    return runs, forward + 4 * keys + 3 * values  # backward reads q, k, v, dO, writes dq, dk, dv


def check(torch, task, forms, args, slopes, scale):
    """Prints what is wrong of ours; ({name: error}, whether all is right)."""
    errors = gate(torch, forms, args.heads, args.key_dim, args.head_dim, slopes, scale, task == "train")
    wrong = [f"relative norm error {errors['everlong']:.2e}"] if not errors["everlong"] <= TOLERANCE else []
    if task == "fused":
        errors["fused"] = gate_fused(torch, forms["everlong"], args.heads, args.head_dim, slopes, scale)
        if not errors["fused"] <= TOLERANCE:
            wrong.append(f"with silu and row squares {errors['fused']:.2e}")
    if task == "step":
        outputs, states = gate_write_behind(torch, args.heads, args.head_dim, slopes, scale)
        if not (outputs < TOLERANCE and states < 1e-5):
            wrong.append(f"written behind {outputs:.2e}, states {states:.2e} (allowed 1e-05)")
    for what in wrong:
        print(f"{task}: ours is wrong: {what}, allowed {TOLERANCE:.0e}", file=sys.stderr)
    return errors, not wrong


def describe(task, batch, tokens, factor, median, times, fraction, far):
    ours = median["everlong"]
    text = f"{task:8} {batch:4} x {tokens:8,}"
    if factor != 1:
        text += f" factor {factor:g}"
    text += f"  everlong {ours * 1e3:9.3f} ms ({min(times['everlong']) * 1e3:.3f} to {max(times['everlong']) * 1e3:.3f})"
    for name in median:
        if name in ("fla", "authors"):
            text += f"  {name} {median[name] * 1e3:9.3f} ms {median[name] / ours:5.2f}x"
        elif name == "fused":
            text += f"  fused {median[name] * 1e3:9.3f} ms, {median[name] / ours:5.3f} of it"
        elif name == "write_behind":
            text += f"  written behind {median[name] * 1e3:.3f} ms, {ours / median[name]:.2f}x ours"
    return text + f"  {fraction * 100:5.1f} % of copy" + (f"; end {far:.1e} off" if far is not None else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default="build/release/lib/libeverlong_torch.so")
    parser.add_argument("--peers", help="folder with the peers' wheels")
    parser.add_argument("--alone", action="store_true", help="no peers")
    parser.add_argument("--pass", dest="passes", default="forward,train,step")
    parser.add_argument("--shapes", default=SHAPES, help="sequences x tokens (K, M)")
    parser.add_argument("--sessions", default="1,64,512", help="for step")
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--head-dim", type=int, default=DIM)
    parser.add_argument("--key-dim", type=int, help="of q and k, if another: LRPE 256 (forward and train alone)")
    parser.add_argument("--factors", default="1", help="layer factors on the ALiBi slopes")
    parser.add_argument("--no-state", action="store_true", help="forward without the final state")
    parser.add_argument("--seconds", type=float, default=1.0, help="a case")
    parser.add_argument("--json", help="file of one JSON object a line")
    args = parser.parse_args()
    args.key_dim = args.key_dim or args.head_dim
    if args.key_dim != args.head_dim and not set(args.passes.split(",")) <= {"forward", "train"}:
        parser.error("--key-dim: only with --pass forward,train")

    import torch
    torch.ops.load_library(args.library)
    forms = everlong_form(torch) if args.alone else competitors(torch, args.peers)
    timer = Timer(torch)
    scale, bandwidth = args.head_dim**-0.5, copy_bandwidth(torch, timer)
    print(f"{torch.cuda.get_device_name()}; copy {bandwidth / 1e12:.2f} TB/s; H {args.heads}, d {args.head_dim}"
          + (f", keys {args.key_dim}" if args.key_dim != args.head_dim else ""),
          file=sys.stderr)
    log = open(args.json, "w") if args.json else None
    failed = False

    def record(line):
        if log:
            log.write(json.dumps(line) + "\n")
            log.flush()

    for task, factor in ((t, float(f)) for f in args.factors.split(",") for t in args.passes.split(",")):
        slopes = [factor * s for s in alibi(args.heads)]
        if task == "packed":
            for sequences, longest in ((1000, 4096), (67, 4096), (526, 512)):
                tokens, mine, dense, error = packed(torch, timer, forms["everlong"], args.heads, args.head_dim, slopes,
                                                    scale, sequences, longest, args.seconds)
                failed = failed or not error < TOLERANCE
                print(f"packed   {sequences:4} of 1..{longest:,}, {tokens:,} tokens: {mine * 1e3:9.3f} ms, dense "
                      f"{dense * 1e3:9.3f} ms, {mine / dense:5.2f}x; one of them alone: {error:.1e} off", flush=True)
                record({"pass": "packed", "sequences": sequences, "longest": longest, "tokens": tokens,
                        "seconds": mine, "dense_seconds": dense, "relative_error": error})
            continue
        errors, right = check(torch, task, forms, args, slopes, scale)
        failed = failed or not right
        if not right:
            continue
        cases = [(int(s), 1) for s in args.sessions.split(",")] if task == "step" else [
            (int(s.split("x")[0]), count_by_1024(s.split("x")[1])) for s in args.shapes.split(",")]
        for batch, tokens in cases:
            q, k, v = inputs_of(torch, batch, tokens, args.heads, args.key_dim, args.head_dim)
            runs, floor = runs_of(torch, task, forms, q, k, v, slopes, scale, not args.no_state)
            with torch.set_grad_enabled(task == "train"):
                far = gate_far(torch, forms["everlong"], q, k, v, slopes, scale) \
                    if task == "forward" and batch == 1 and tokens > 2**19 else None
                if far is not None and not far < TOLERANCE:
                    print(f"forward: the end of {tokens:,} tokens is wrong: {far:.2e}", file=sys.stderr)
                    failed = True
                    continue
                times = timer.rounds(runs, args.seconds)
            median = {n: statistics.median(t) for n, t in times.items()}
            fraction = floor / median["everlong"] / bandwidth
            line = {"pass": task, "batch": batch, "tokens": tokens, "heads": args.heads, "head_dim": args.head_dim,
                    "key_dim": args.key_dim, "layer_factor": factor, "clock_mhz": clock(), "bytes": floor,
                    "copy_bandwidth": bandwidth, "fraction_of_ceiling": fraction, "relative_error_at_end": far}
            for name in runs:
                line[name] = {"seconds": median[name], "seconds_min": min(times[name]), "seconds_max": max(times[name]),
                              "rounds": len(times[name]), "relative_error": errors.get(name)}
            print(describe(task, batch, tokens, factor, median, times, fraction, far), flush=True)
            record(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
