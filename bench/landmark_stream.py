#!/usr/bin/env python3
"""One stream through a tiny Landmark model whose past lies in pages: memory, file and time beside their formulas.

  bench/landmark_stream.py [--tokens 1M] [--block 64] [--layers 2] [--heads 1] [--head-dim 16] [--top-k 4] [--megabytes 8]
                           [--folder runs/landmark_stream] [--everlong build/release/bin/everlong] [--json FILE]

Makes a model (two steps of training: weights do not matter here) and a text, then feeds it with `everlong stream` on one
thread and prints, by position: microseconds a token over the stretch that ends there, memory of the state and its bound,
resident memory of the process, bytes of the files and their bound. Then time against length: a token scores every landmark,
so it grows by `landmarks x layers x heads x (a constant)`; the constant comes from a straight line through the stretches
of the last three quarters (before that, reads of pages that have left memory become more frequent, too).
Formulas (README.md of src/mechanisms/landmark, section 4): a block of L tokens keeps, for each layer and key head, its
landmark's key in memory (4 K + 8 bytes) and a table entry (24); its page, (L - 1)(K + V) 4 bytes, is in memory while the
budget lasts and in the file (with a head of 40 bytes, rounded up to 4,096) from then on. Exit code 1 when a bound is broken.
A first layer alone would read little: all its landmarks have one key, so its picks are always the youngest.
"""
import argparse, json, pathlib, subprocess, sys

from counts import count_by_1000

ROOT = pathlib.Path(__file__).resolve().parent.parent


def line_through(points):
    """Least squares of y = a + b x, each point weighed by its tokens."""
    weight = sum(w for _, _, w in points)
    x0, y0 = sum(w * x for x, _, w in points) / weight, sum(w * y for _, y, w in points) / weight
    slope = sum(w * (x - x0) * (y - y0) for x, y, w in points) / sum(w * (x - x0) ** 2 for x, _, w in points)
    return y0 - slope * x0, slope


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=count_by_1000, default=10**6, help="of text; K and M are thousands and millions")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=8, help="of pages in memory, each layer")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "runs/landmark_stream")
    parser.add_argument("--everlong", default=str(ROOT / "build/release/bin/everlong"))
    parser.add_argument("--json", type=pathlib.Path, help="write what `everlong stream` answered")
    given = parser.parse_args()
    folder, text = given.folder, given.folder / "text"

    def everlong(*arguments, answers=False):
        done = subprocess.run([given.everlong, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"landmark_stream: everlong {arguments[0]} failed with {done.returncode}")
        return json.loads(done.stdout) if answers else None

    folder.mkdir(parents=True, exist_ok=True)
    if not (text / "dataset.json").exists() or json.loads((folder / "made.json").read_text()) < given.tokens:
        everlong("data", "synthetic", "passkey", "--lengths", 4096, "--filler", "shuffled", "--tokens",
                 int(given.tokens * 1.01) + 8192, "--valid-documents", 2, "--force", "--out", text)
        (folder / "made.json").write_text(json.dumps(given.tokens))
    width = max(given.heads * given.head_dim, 16)
    (folder / "run.toml").write_text(f"""[model]
block = "llama"
vocab_size = 87
hidden_size = {width}
intermediate_size = {2 * width}
num_hidden_layers = {given.layers}
layer_types = "landmark"
tokenizer = "words"
landmark_id = 86
[model.landmark]
num_heads = {given.heads}
head_dim = {given.head_dim}
block = {given.block}
top_k = {given.top_k}
window = 1
[data]
path = "{text}"
row_tokens = 128
rows = 1
[train]
steps = 2
warmup_steps = 1
eval_tokens = 0
threads = 1
""")
    everlong("train", folder / "run.toml", "--restart", "--out", folder / "model")
    marks = sorted({given.tokens, *(10**e * m for e in range(4, 9) for m in (1, 2, 5) if 10**e * m < given.tokens)})
    answer = everlong("stream", "--model", folder / "model", "--data", text, "--split", "train", "--tokens", given.tokens,
                      "--marks", ",".join(map(str, marks)), "--no-score", "--rounds", 0, "--threads", 1, "--json",
                      "--set", f"landmark.pages={folder / 'pages'}", "--set", f"landmark.page_megabytes={given.megabytes}",
                      answers=True)
    if given.json:
        given.json.write_text(json.dumps(answer, indent=1))

    def blocks(tokens):  # of text
        return tokens // (given.block - 1)

    each = given.layers * given.heads
    points = [((w["begin"] + w["end"]) / 2, 1e6 / w["tokens_per_second"], w["end"] - w["begin"])
              for w in answer["windows"] if 4 * w["begin"] >= given.tokens]
    broken = False
    print("| tokens | us a token | state MiB | bound | keys + entries by formula | resident MiB | file MiB | by formula | bound |")
    print("|---" * 9 + "|")
    mib = lambda value: f"{value / 2**20:.2f}"
    before = 0
    for mark in answer["marks"]:
        stretch = [w for w in answer["windows"] if before < w["end"] <= mark["tokens"]]
        seconds = sum((w["end"] - w["begin"]) / w["tokens_per_second"] for w in stretch)
        tokens = sum(w["end"] - w["begin"] for w in stretch)
        before = mark["tokens"]
        here = each * blocks(mark["tokens"])
        page = (given.block - 1) * 2 * given.head_dim * 4
        record = -(-(40 + page) // 4096) * 4096
        in_memory = given.layers * (given.megabytes * 2**20 // page)
        file, bound = mark.get("file_bytes", 0), mark.get("file_bytes_bound", 0)
        broken |= mark["state_bytes"] > mark["state_bytes_bound"] or file > bound
        print(f"| {mark['tokens']:,} | {1e6 * seconds / max(tokens, 1):.1f} | {mib(mark['state_bytes'])} | "
              f"{mib(mark['state_bytes_bound'])} | {mib(here * (4 * given.head_dim + 8 + 24))} | {mib(mark['resident_bytes'])} | "
              f"{mib(file)} | {mib(max(here - in_memory, 0) * record)} | {mib(bound)} |")
    if len(points) > 2:
        start, slope = line_through(points)
        landmark = slope * (given.block - 1) / each * 1e3
        print(f"\n{start:.1f} us a token, and {landmark:.3f} ns more for each landmark, layer and head "
              f"(head dim {given.head_dim}: {4 * given.head_dim / landmark:.1f} GB/s of keys)")
    counts = answer.get("counts", {})
    print(f"{answer['tokens']:,} tokens in {answer['seconds']:.0f} s; {counts.get('page_hits', 0):,.0f} pages read from memory, "
          f"{counts.get('page_misses', 0):,.0f} from the file, {counts.get('pages_spilled', 0):,.0f} written")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
