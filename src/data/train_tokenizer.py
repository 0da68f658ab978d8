"""Trains a byte-level BPE with the tokenizers package.

Reads {"files": [...], "vocab_size": N} from stdin. Writes lines: "read BYTES" as it goes, then the tokenizer as one line
of JSON. Exit code 3: the package is not there.
"""
import json
import sys

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError:
    sys.exit(3)

PIECE = 1 << 20  # characters handed over at a time; a word that is cut there counts as two

task = json.load(sys.stdin)
done = 0


def pieces():
    global done
    for path in task["files"]:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            while text := file.read(PIECE):
                done += len(text.encode("utf-8", "replace"))
                yield text
                print("read", done, flush=True)


tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    pieces(),
    trainers.BpeTrainer(
        vocab_size=task["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)
print(json.dumps(json.loads(tokenizer.to_str())))
