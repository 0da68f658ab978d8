#!/usr/bin/env python3
"""Lightning attention beside its peers on one NVIDIA GPU: the same inputs, interleaved, in one run.

  make torch-library                                     builds build/release/lib/libeverlong_torch.so
  python3 bench/lightning_peers.py [--peers FOLDER | --alone] [--pass forward,train,step,packed]
                                   [--shapes 8x16K,1x128K] [--json FILE]

Needs a Python with torch 2.11.0 (CUDA) and Triton. Peers: flash-linear-attention (chunk_simple_gla with g_gamma, and
fused_recurrent_simple_gla for single tokens). --peers names a folder with its wheels (pip download --no-deps fla-core
einops) or with the packages unpacked; without it they are imported as installed. --alone leaves them out (their first
call tunes itself for minutes).

Every case first has to agree with a float64 recurrence; then each competitor runs once a round, in turn, between
events, with the level 2 cache overwritten before. Printed: medians, their spread, the ratio, and the fraction of the
copy bandwidth measured in the same run that the least traffic (every input read once, every output written once)
makes. Exit code 1 when a case is wrong. Besides, `step` shows our step with states written behind (rings of 16 tokens,
sessions at every filling), and `packed` sequences of random length 1 to 4,096 beside rows of 4,096 of as many tokens.
"""
import argparse, json, math, pathlib, statistics, subprocess, sys, zipfile

HEADS, DIM = 32, 128
SHAPES = "128x1K,32x4K,8x16K,2x64K,1x128K"
TOLERANCE = 4e-3  # relative norm, bf16 outputs: one rounding of o and of p and S each, 2^-9 a time


def parse_count(text):
    return int(text[:-1]) * {"K": 1024, "M": 1024**2}[text[-1]] if text[-1] in "KM" else int(text)


def alibi(heads):
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + [2 ** (-8 * (2 * j + 1) / (2 * power)) for j in range(heads - power)]


def recurrence(torch, q, k, v, slopes, scale):
    """float64, one token after the other."""
    q, k, v = (x.double() for x in (q, k, v))
    decay = torch.exp(-torch.tensor(slopes, dtype=torch.float64, device=q.device))[None, :, None, None]
    state = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float64, device=q.device)
    rows = []
    for t in range(q.shape[1]):
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        rows.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(rows, 1), state


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def gradients(forward, inputs, weight):
    leaves = [x.detach().requires_grad_() for x in inputs]
    (forward(*leaves).double() * weight).sum().backward()
    return [x.grad for x in leaves]


class Timer:
    def __init__(self, torch):
        self.torch = torch
        self.flush = torch.empty(256 * 1024**2, dtype=torch.int8, device="cuda")  # well above the level 2 cache

    def once(self, run):
        self.flush.zero_()
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


def everlong_form(torch):
    def everlong(q, k, v, slopes, scale, state=None, offsets=()):
        return torch.ops.everlong.decay_linear_attention(q, k, v, slopes, scale, list(offsets), state)

    return {"everlong": everlong}


def competitors(torch, peers):
    if peers:
        for wheel in pathlib.Path(peers).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(pathlib.Path(peers) / "unpacked")
        sys.path[:0] = [str(pathlib.Path(peers) / "unpacked"), peers]
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    def gamma(slopes):
        return -torch.tensor(slopes, dtype=torch.float32, device="cuda")

    def fla(q, k, v, slopes, scale, state=None):
        run = fused_recurrent_simple_gla if q.shape[1] == 1 else chunk_simple_gla
        return run(q, k, v, g_gamma=gamma_of[tuple(slopes)], scale=scale, initial_state=state, output_final_state=True)

    gamma_of = {}

    class Gammas(dict):  # the table of slopes lies on the device before any timing
        def __missing__(self, key):
            self[key] = gamma(key)
            return self[key]

    gamma_of = Gammas()
    return everlong_form(torch) | {"fla": fla}


def gate(torch, forms, heads, dim, slopes, scale, train):
    """max relative norm error of outputs and, where asked, gradients, over 300 tokens; by name."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 300, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    weight = torch.randn_like(v)
    expected, _ = recurrence(torch, q, k, v, slopes, scale)
    wanted = None
    if train:
        wanted = gradients(lambda *x: recurrence(torch, *x, slopes, scale)[0], [x.double() for x in (q, k, v)],
                           weight.double())
    errors = {}
    for name, form in forms.items():
        errors[name] = relative(form(q, k, v, slopes, scale)[0], expected)
        if train:
            got = gradients(lambda *x: form(*x, slopes, scale)[0], (q, k, v), weight.double())
            errors[name] = max([errors[name]] + [relative(a, b) for a, b in zip(got, wanted)])
    return errors


class WriteBehind:
    """Steps whose states are written once in `ring` tokens."""

    def __init__(self, torch, batch, heads, dim, state, ring=16):
        self.torch, self.ring, self.state = torch, ring, state.clone()
        rows = (batch, heads, ring, dim)
        self.keys, self.values = (torch.zeros(rows, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.waiting = torch.zeros(batch, device="cuda", dtype=torch.int32)

    def __call__(self, q, k, v, slopes, scale):
        return self.torch.ops.everlong.decay_linear_attention_step(q, k, v, slopes, scale, self.state, self.keys,
                                                                   self.values, self.waiting)

    def fold(self, slopes):
        self.torch.ops.everlong.decay_linear_attention_fold(slopes, self.state, self.keys, self.values, self.waiting)
        self.waiting.zero_()


def gate_write_behind(torch, heads, dim, slopes, scale):
    """Relative norm errors of 40 steps from a state, and of the state after a fold."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(3, 40, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    step = WriteBehind(torch, 3, heads, dim, torch.zeros(3, heads, dim, dim, device="cuda"))
    rows = []
    for t in range(40):
        rows.append(step(*(x[:, t:t + 1] for x in (q, k, v)), slopes, scale))
        step.waiting = (step.waiting + 1) % step.ring
    step.fold(slopes)
    expected, state = recurrence(torch, q, k, v, slopes, scale)
    return relative(torch.cat(rows, 1), expected), relative(step.state, state)


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
    parser.add_argument("--factor", type=float, default=1.0, help="layer factor on the ALiBi slopes")
    parser.add_argument("--seconds", type=float, default=1.0, help="a case")
    parser.add_argument("--json", help="file of one JSON object a line")
    args = parser.parse_args()

    import torch
    torch.ops.load_library(args.library)
    forms = everlong_form(torch) if args.alone else competitors(torch, args.peers)
    timer = Timer(torch)
    slopes = [args.factor * s for s in alibi(args.heads)]
    scale, bandwidth = args.head_dim**-0.5, copy_bandwidth(torch, timer)
    print(f"{torch.cuda.get_device_name()}; copy {bandwidth / 1e12:.2f} TB/s; H {args.heads}, d {args.head_dim}, "
          f"layer factor {args.factor}", file=sys.stderr)
    log = open(args.json, "w") if args.json else None
    failed = False
    for task in args.passes.split(","):
        if task == "packed":
            for sequences, longest in ((1000, 4096), (67, 4096), (526, 512)):
                tokens, mine, dense, error = packed(torch, timer, forms["everlong"], args.heads, args.head_dim, slopes,
                                                    scale, sequences, longest, args.seconds)
                failed = failed or not error < TOLERANCE
                print(f"packed   {sequences:4} of 1..{longest:,}, {tokens:,} tokens: {mine * 1e3:9.3f} ms, dense "
                      f"{dense * 1e3:9.3f} ms, {mine / dense:5.2f}x; one of them alone: {error:.1e} off", flush=True)
                if log:
                    log.write(json.dumps({"pass": "packed", "sequences": sequences, "longest": longest,
                                          "tokens": tokens, "seconds": mine, "dense_seconds": dense,
                                          "relative_error": error}) + "\n")
            continue
        errors = gate(torch, forms, args.heads, args.head_dim, slopes, scale, task == "train")
        for name, error in errors.items():
            if error > TOLERANCE and name == "everlong":
                print(f"{task}: {name} is wrong: relative norm error {error:.2e}, allowed {TOLERANCE:.0e}",
                      file=sys.stderr)
                failed = True
        if task == "step":
            for what, error in zip(("outputs", "states"),
                                   gate_write_behind(torch, args.heads, args.head_dim, slopes, scale)):
                if not error < (TOLERANCE if what == "outputs" else 1e-5):
                    print(f"step: {what} of states written behind are wrong: relative norm error {error:.2e}",
                          file=sys.stderr)
                    failed = True
        if failed:
            continue
        cases = [(int(s), 1) for s in args.sessions.split(",")] if task == "step" else [
            (int(s.split("x")[0]), parse_count(s.split("x")[1])) for s in args.shapes.split(",")]
        for batch, tokens in cases:
            shape = (batch, tokens, args.heads, args.head_dim)
            q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            elements = math.prod(shape)
            state_bytes = 8 * batch * args.heads * args.head_dim**2  # read and written, fp32
            if task == "forward":
                runs = {n: (lambda f=f: f(q, k, v, slopes, scale)) for n, f in forms.items()}
                floor = 8 * elements
            elif task == "step":
                state = torch.randn(batch, args.heads, args.head_dim, args.head_dim, device="cuda")
                runs = {n: (lambda f=f: f(q, k, v, slopes, scale, state)) for n, f in forms.items()}
                behind = WriteBehind(torch, batch, args.heads, args.head_dim, state)
                behind.waiting = (torch.arange(batch, device="cuda") % behind.ring).int()
                runs["write_behind"] = lambda: behind(q, k, v, slopes, scale)
                floor = 8 * elements + state_bytes
            else:
                weight = torch.randn_like(v)

                def train(form):
                    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                    form(*leaves, slopes, scale)[0].backward(weight)

                runs = {n: (lambda f=f: train(f)) for n, f in forms.items()}
                floor = 22 * elements  # forward 4 streams; backward reads 4, writes 3
            if task != "train":
                with torch.no_grad():
                    times = timer.rounds(runs, args.seconds)
            else:
                times = timer.rounds(runs, args.seconds)
            median = {n: statistics.median(t) for n, t in times.items()}
            line = {"pass": task, "batch": batch, "tokens": tokens, "heads": args.heads, "head_dim": args.head_dim,
                    "layer_factor": args.factor, "clock_mhz": clock(), "bytes": floor, "copy_bandwidth": bandwidth}
            for name in runs:
                line[name] = {"seconds": median[name], "seconds_min": min(times[name]), "seconds_max": max(times[name]),
                              "rounds": len(times[name]), "relative_error": errors.get(name)}
            behind_note = ""
            if task == "step":
                behind_note = (f"; written behind {median['write_behind'] * 1e3:.3f} ms, "
                               f"{median['everlong'] / median['write_behind']:.2f}x ours")
            peer_note = ""
            if not args.alone:
                line["ratio"] = median["fla"] / median["everlong"]
                peer_note = f"  fla {median['fla'] * 1e3:9.3f} ms  {line['ratio']:5.2f}x"
            line["fraction_of_ceiling"] = floor / median["everlong"] / bandwidth
            print(f"{task:8} {batch:4} x {tokens:8,}  everlong {median['everlong'] * 1e3:9.3f} ms{peer_note}  "
                  f"{line['fraction_of_ceiling'] * 100:5.1f} % of copy{behind_note}", flush=True)
            if log:
                log.write(json.dumps(line) + "\n")
                log.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
