"""Lightning attention by ours, by its peers and by float64, behind one call, and whether they agree."""
import math, pathlib, sys, zipfile

TOLERANCE = 4e-3  # relative norm, bf16 outputs: one rounding of o and of p and S each, 2^-9 a time


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


def everlong_form(torch):
    def everlong(q, k, v, slopes, scale, state=None, offsets=(), final_state=True, **fused):
        return torch.ops.everlong.decay_linear_attention_fused(q, k, v, slopes, scale, list(offsets), state,
                                                               final_state=final_state, **fused)

    return {"everlong": everlong}


class Authors:
    """lightning_attn2: [B, H, T, D], no scale, no state, fewer than 2^31 elements."""

    def __init__(self, torch):
        from lightning_attn.ops.triton import lightning_attn2
        self.torch, self.run, self.slopes, self.ready = torch, lightning_attn2, {}, {}

    def __call__(self, q, k, v, slopes, scale, state=None, final_state=True):
        key = tuple(slopes)
        if key not in self.slopes:
            self.slopes[key] = self.torch.tensor(slopes, dtype=self.torch.float32, device="cuda").view(-1, 1, 1)
        if q.requires_grad:  # the gate: layout and scale belong to the graph
            return self.run(*(x.transpose(1, 2).contiguous() for x in (scale * q, k, v)),
                            self.slopes[key]).transpose(1, 2), None
        own = (q.data_ptr(), q.shape)
        if own not in self.ready:
            self.ready = {own: [x.transpose(1, 2).contiguous() for x in (scale * q, k, v)]}
        return self.run(*self.ready[own], self.slopes[key]).transpose(1, 2), None

    def leaves(self, q, k, v, scale):
        return [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (scale * q, k, v)]

    def train(self, leaves, slopes, weight):
        self.run(*leaves, self.slopes[tuple(slopes)]).backward(weight.transpose(1, 2))

    @staticmethod
    def takes(q):
        return q.shape[1] > 1 and q.numel() < 2**31


def competitors(torch, peers):
    if peers:
        for wheel in pathlib.Path(peers).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(pathlib.Path(peers) / "unpacked")
        sys.path[:0] = [str(pathlib.Path(peers) / "unpacked"), peers]
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    def gamma(slopes):
        return -torch.tensor(slopes, dtype=torch.float32, device="cuda")

    def fla(q, k, v, slopes, scale, state=None, final_state=True):
        run = fused_recurrent_simple_gla if q.shape[1] == 1 else chunk_simple_gla
        return run(q, k, v, g_gamma=gamma_of[tuple(slopes)], scale=scale, initial_state=state,
                   output_final_state=final_state)

    gamma_of = {}

    class Gammas(dict):  # the table of slopes lies on the device before any timing
        def __missing__(self, key):
            self[key] = gamma(key)
            return self[key]

    gamma_of = Gammas()
    forms = everlong_form(torch) | {"fla": fla}
    try:
        forms["authors"] = Authors(torch)
    except Exception as error:  # not there, or not for this Triton
        print(f"the authors' kernel is left out: {error}", file=sys.stderr)
    return forms


def inputs_of(torch, batch, tokens, heads, key_dim, value_dim):
    return [torch.randn(batch, tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
            for dim in (key_dim, key_dim, value_dim)]


def gate(torch, forms, heads, key_dim, value_dim, slopes, scale, train):
    """max relative norm error of outputs and, where asked, gradients, over 300 tokens; by name."""
    torch.manual_seed(1)
    q, k, v = inputs_of(torch, 2, 300, heads, key_dim, value_dim)
    weight = torch.randn_like(v)
    expected, _ = recurrence(torch, q, k, v, slopes, scale)
    wanted = None
    if train:
        wanted = gradients(lambda *x: recurrence(torch, *x, slopes, scale)[0], [x.double() for x in (q, k, v)],
                           weight.double())
    errors = {}
    for name, form in list(forms.items()):
        try:
            errors[name] = relative(form(q, k, v, slopes, scale)[0], expected)
            if train:
                got = gradients(lambda *x: form(*x, slopes, scale)[0], (q, k, v), weight.double())
                errors[name] = max([errors[name]] + [relative(a, b) for a, b in zip(got, wanted)])
        except Exception as error:  # a peer that does not run here is left out
            if name == "everlong":
                raise
            print(f"{name} does not run: {error}", file=sys.stderr)
            del forms[name]
    return errors


def gate_fused(torch, everlong, heads, dim, slopes, scale):
    """Relative norm errors of outputs and row squares with silu of q, k, v as bf16 rounds it, over 300 tokens."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 300, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    o, _, squares = everlong(q, k, v, slopes, scale, silu_q=True, silu_k=True, silu_v=True, row_squares=True)
    turned = [torch.nn.functional.silu(x.double()).bfloat16() for x in (q, k, v)]
    expected, _ = recurrence(torch, *turned, slopes, scale)
    return max(relative(o, expected), relative(squares, expected.square().sum(-1)) / 2)


def gate_far(torch, everlong, q, k, v, slopes, scale, tokens=512):
    """Relative norm error over the last tokens of a row's slowest head; what lies before them in one float64 sum."""
    n, head, s = q.shape[1], len(slopes) - 1, slopes[-1]
    out = everlong(q, k, v, slopes, scale)[0][:, n - tokens:, head].clone()
    own_q, own_k, own_v = (x[:, n - tokens:, head].double() for x in (q, k, v))
    far_k, far_v = (x[:, :n - tokens, head].double() for x in (k, v))
    age = torch.arange(n - tokens, device="cuda", dtype=torch.float64)
    state = (far_k * torch.exp(-s * (n - tokens - 1 - age))[:, None]).mT @ far_v
    i = torch.arange(tokens, device="cuda", dtype=torch.float64)
    decay = torch.exp(-s * (i[:, None] - i).clamp_min(0)).tril()
    expected = (own_q @ own_k.mT * decay) @ own_v + torch.exp(-s * (i + 1))[:, None] * (own_q @ state)
    return relative(out, scale * expected)


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
