"""A megabyte of mixed scripts through `everlong data tokenize` and through the tokenizers package: the same ids, and the speed of both.
The vocabularies are the golden ones and one that `everlong data train-tokenizer` makes here.

  tokenizers_test.py EVERLONG TESTS_GOLDEN          in the environment of `make interop`
"""
import pathlib, random, subprocess, sys, tempfile, time

import tokenizers

RANGES = [(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F),
          (0xE00, 0xE7F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x300, 0x36F), (0x30, 0x39), (0x660, 0x669),
          (0x2150, 0x218B), (0x1F300, 0x1FAFF), (0x2000, 0x206F), (0x21, 0x2F), (0x1800, 0x180F), (0x10000, 0x1007F), (0x80, 0xA0)]
SPECIALS = ["'s", "'RE", "'ll", "\u017f", "'\u017f", " 's", "12345", "DON'T", "\u180e", "\x00", "\x1f", "e\u0301", "<think>", " <think>\n", "<thinking>"]


def mixed(size, seed):
    choose = random.Random(seed)
    parts, bytes_so_far = [], 0
    while bytes_so_far < size:
        kind = choose.random()
        if kind < 0.7:
            first, last = choose.choice(RANGES)
            part = "".join(chr(choose.randint(first, last)) for _ in range(choose.randrange(1, 9)))
        elif kind < 0.9:
            part = "".join(choose.choice(" \t\n\r\u00a0\u3000\u2009\u0085") for _ in range(choose.randrange(1, 7)))
        else:
            part = choose.choice(SPECIALS)
        parts.append(part)
        bytes_so_far += len(part.encode())
    return "".join(parts)


everlong, golden = sys.argv[1], pathlib.Path(sys.argv[2])
text = mixed(1 << 20, 7)
failed = False
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "text"
    file.write_bytes(text.encode())
    made = pathlib.Path(folder) / "trained.json"
    subprocess.run([everlong, "data", "train-tokenizer", golden.parent.parent / "README.md", golden / "tokenizers" / "text", "--vocab-size", "2000",
                    "--out", made, "--python", sys.executable], check=True, capture_output=True)
    for path in [*sorted((golden / "tokenizers").glob("*.json")), made]:
        package = tokenizers.Tokenizer.from_file(str(path))
        start = time.monotonic()
        wanted = package.encode(text, add_special_tokens=False).ids
        theirs = time.monotonic() - start
        start = time.monotonic()
        printed = subprocess.run([everlong, "data", "tokenize", "--tokenizer", path, file], check=True, capture_output=True, text=True).stdout
        ours = time.monotonic() - start
        same = [int(line) for line in printed.split()] == wanted
        failed |= not same
        print(f"{path.stem}: {len(wanted)} ids {'the same' if same else 'DIFFER'}; tokenizers {theirs:.2f} s, everlong with its start {ours:.2f} s")
sys.exit(failed)
