#!/usr/bin/env python3
"""One long stream through a tiny model whose state is bounded: time a token, state and memory by position.

  bench/bounded_stream.py [--mechanism longnet] [--tokens 1M] [--feed 2K] [--threads 1]
                          [--folder runs/bounded_stream] [--everlong build/release/bin/everlong] [--json FILE]

Makes a model (two steps of training: weights do not matter here) and a text of random letters, then feeds it with
`everlong stream` and prints, by position: microseconds a token over the stretch that ends there, bytes of the state beside
the formula in the README.md of its room, and resident memory of the process. Exit code 1 when the state is not what the
formula says, or above its bound. --mechanism: infini, lightning, longnet or megalodon.
"""
import argparse, base64, json, pathlib, random, subprocess, sys

from counts import count_by_1000

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAYERS, HEADS, DIM, WIDTH = 2, 2, 16, 32
PATTERNS = [(256, 1), (512, 2), (1024, 4), (2048, 8), (4096, 16)]
SEGMENT, CHUNK, MODES, GROUPS = 256, 256, 8, 2

SETTINGS = {
    "longnet": f"num_heads = {HEADS}\nsegment_length = {[w for w, _ in PATTERNS]}\ndilated_ratio = {[r for _, r in PATTERNS]}",
    "infini": f"num_heads = {HEADS}\nhead_dim = {DIM}\nsegment = {SEGMENT}",
    "lightning": f"num_heads = {HEADS}\nhead_dim = {DIM}",
    "megalodon": f"num_heads = 1\nz_dim = {DIM}\nvalue_dim = {2 * WIDTH}\ncema_ndim = {MODES}\nnorm_num_groups = {GROUPS}\n"
                 f"chunk_size = {CHUNK}",
}


def power_of_two(n):
    return 1 << max(n - 1, 0).bit_length()


def formula(mechanism, tokens):
    """Bytes of the state of one sequence after so many tokens, fp32: section 4 of each room's README.md."""
    if mechanism == "longnet":
        rows = sum(min(power_of_two(-(-w // r)), power_of_two(-(-(min(tokens, w)) // r))) for w, r in PATTERNS)
        return LAYERS * (8 + HEADS * 2 * DIM * 4 * rows)
    if mechanism == "infini":
        return LAYERS * (4 * HEADS * DIM * (DIM + 1) + SEGMENT * (2 * HEADS * DIM * 4 + 4) + 8)
    if mechanism == "lightning":
        return LAYERS * (4 * HEADS * DIM * DIM)
    return LAYERS * (16 * GROUPS + 8 * WIDTH * MODES + CHUNK * (DIM + 2 * WIDTH) * 4 + 8) + 16 * GROUPS + 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mechanism", choices=sorted(SETTINGS), default="longnet")
    parser.add_argument("--tokens", type=count_by_1000, default=10**6, help="of text; K and M are thousands and millions")
    parser.add_argument("--feed", type=count_by_1000, default=2048, help="tokens fed at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs/bounded_stream")
    parser.add_argument("--everlong", default=str(ROOT / "build/release/bin/everlong"))
    parser.add_argument("--json", type=pathlib.Path, help="write what `everlong stream` answered")
    given = parser.parse_args()
    folder = given.folder / given.mechanism

    def everlong(*arguments, answers=False):
        done = subprocess.run([given.everlong, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"bounded_stream: everlong {arguments[0]} failed with {done.returncode}")
        return json.loads(done.stdout) if answers else None

    folder.mkdir(parents=True, exist_ok=True)
    text = given.folder / "text"
    made = given.folder / "made.json"
    if not made.exists() or json.loads(made.read_text()) < given.tokens:
        source = given.folder / "letters" / "letters.txt"
        source.parent.mkdir(exist_ok=True)
        letters = random.Random(1)
        with source.open("wb") as out:
            for _ in range(-(-given.tokens // 4_000_000) + 1):
                out.write(base64.encodebytes(letters.randbytes(3_000_000)))
        everlong("data", "prepare", source.parent, "--valid-fraction", 0, "--force", "--out", text)
        source.unlink()
        made.write_text(json.dumps(given.tokens))
    (folder / "run.toml").write_text(f"""[model]
block = "{'megalodon' if given.mechanism == 'megalodon' else 'llama'}"
vocab_size = 259
hidden_size = {WIDTH}
intermediate_size = {2 * WIDTH}
num_hidden_layers = {LAYERS}
layer_types = "{given.mechanism}"
[model.{given.mechanism}]
{SETTINGS[given.mechanism]}
[data]
path = "{text}"
row_tokens = 128
rows = 1
[train]
steps = 2
warmup_steps = 1
eval_tokens = 0
threads = {given.threads}
""")
    everlong("train", folder / "run.toml", "--restart", "--out", folder / "model")
    marks = sorted({given.tokens, *(10**e * m for e in range(4, 9) for m in (1, 2, 5) if 10**e * m < given.tokens)})
    answer = everlong("stream", "--model", folder / "model", "--data", text, "--split", "train", "--tokens", given.tokens,
                      "--marks", ",".join(map(str, marks)), "--no-score", "--rounds", 0, "--threads", given.threads,
                      "--feed", given.feed, "--json", answers=True)
    if given.json:
        given.json.write_text(json.dumps(answer, indent=1))
    broken = False
    print("| tokens | us a token | state bytes | by formula | bound | resident MiB |")
    print("|---" * 6 + "|")
    before = 0
    for mark in answer["marks"]:
        stretch = [w for w in answer["windows"] if before < w["end"] <= mark["tokens"]]
        seconds = sum((w["end"] - w["begin"]) / w["tokens_per_second"] for w in stretch)
        tokens = sum(w["end"] - w["begin"] for w in stretch)
        before = mark["tokens"]
        wanted = formula(given.mechanism, mark["tokens"])
        broken |= mark["state_bytes"] != wanted or mark["state_bytes"] > mark["state_bytes_bound"]
        print(f"| {mark['tokens']:,} | {1e6 * seconds / max(tokens, 1):.2f} | {mark['state_bytes']:,} | {wanted:,} | "
              f"{mark['state_bytes_bound']:,} | {mark['resident_bytes'] / 2**20:.1f} |")
    rates = sorted(w["tokens_per_second"] for w in answer["windows"] if w["begin"] >= given.tokens // 10)
    if rates:
        print(f"\n{given.mechanism}: {answer['tokens']:,} tokens in {answer['seconds']:.0f} s; windows after the first tenth: "
              f"{1e6 / rates[-1]:.2f} to {1e6 / rates[0]:.2f} us a token, median {1e6 / rates[len(rates) // 2]:.2f}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
