#!/usr/bin/env python3
"""What Hugging Face's transformers makes of the folders that `everlong convert` writes, and we of torch's pickles.

  transformers_test.py EVERLONG GOLDEN     the program, and the folder tests/golden

Needs the packages of requirements/interop.txt; `make interop` installs them and runs this.
"""
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import unittest

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

everlong, golden = sys.argv[1], pathlib.Path(sys.argv[2])
CASES = {"llama, untied head": ("softmax/llama_model__untied.safetensors", "softmax/llama_tiny/untied"),
         "llama, tied head": ("softmax/llama_model__tied.safetensors", "softmax/llama_tiny/tied"),
         "minimax": ("lightning/minimax_model__minimax_tiny.safetensors", "lightning/minimax_tiny")}
TOLERANCE = 1e-4  # fp32 logits of order 10, summed in another order

RUN = """
[model]
block = "llama"
vocab_size = 259
hidden_size = 48
intermediate_size = 80
num_hidden_layers = 2
layer_types = "softmax"
[model.softmax]
num_heads = 4
num_kv_heads = 2
[data]
row_tokens = 64
rows = 4
[train]
steps = 30
warmup_steps = 2
learning_rate = 1e-2
device = "cpu"
threads = 1
eval_tokens = 100
"""


def run(*arguments):
    done = subprocess.run([everlong, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"everlong {' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def load(folder, **options):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    # transformers makes the decays of lightning layers from config.json; nothing else may be absent.
    derived = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    missing = [name for name in report["missing_keys"] if not name.endswith(derived)]
    if missing or report["unexpected_keys"] or report["mismatched_keys"]:
        raise AssertionError(f"{folder}: missing {missing}, unexpected {report['unexpected_keys']}, "
                             f"misshapen {report['mismatched_keys']}")
    return model.eval()


def logits(folder, ids, **options):
    with torch.no_grad():
        return load(folder, **options)(ids).logits


class Transformers(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="everlong_transformers_"))
        self.addCleanup(shutil.rmtree, self.folder)

    def test_gives_the_golden_logits_with_what_we_save(self):
        for name, (case, model) in CASES.items():
            with self.subTest(name):
                stored = load_file(golden / case)
                ids, expected = stored["in.input_ids"], stored["out.logits"]
                ours, theirs = self.folder / f"{name} ours", self.folder / f"{name} theirs"
                run("convert", golden / model, ours)
                run("convert", ours, theirs, "--to", "hf", "--max-shard-size", "60KB")
                self.assertTrue((theirs / "model.safetensors.index.json").exists())
                got, original = logits(theirs, ids), logits(golden / model, ids)
                error = (got - expected).abs().max().item()
                print(f"{name}: largest logit {expected.abs().max():.3f}, largest difference from golden {error:.2e}, "
                      f"from the original folder {(got - original).abs().max():.2e}")
                self.assertLess(error, TOLERANCE)
                # Same weights and config: same numbers. (Decays, which the original folder holds and transformers
                # else makes itself, come out an ulp apart.)
                self.assertTrue(torch.equal(got, original) or name == "minimax")
                self.assertLess((got - original).abs().max().item(), TOLERANCE)

    def test_reads_a_model_that_we_trained(self):
        words = random.Random(1)
        text = " ".join(words.choice(["stream", "state", "never", "ends", "token"]) for _ in range(6000))
        (self.folder / "text.txt").write_text(text)
        (self.folder / "held.txt").write_text(text[-700:])
        (self.folder / "run.toml").write_text(RUN)
        run("data", "prepare", self.folder / "text.txt", "--out", self.folder / "tokens", "--valid-fraction", "0")
        run("train", self.folder / "run.toml", "--set", f"data.path={self.folder}/tokens", "--out", self.folder / "run")
        for dtype in ("fp32", "bf16"):
            with self.subTest(dtype):
                ours, out = self.folder / f"{dtype}_ours", self.folder / dtype
                run("convert", self.folder / "run", ours, "--dtype", dtype)
                run("convert", self.folder / "run", out, "--to", "hf", "--dtype", dtype)
                config = json.loads((out / "config.json").read_text())
                self.assertEqual(config["eos_token_id"], 256)
                measured = json.loads(run("eval", "perplexity", "--model", ours, "--text", self.folder / "held.txt",
                                          "--json", "--device", "cpu", "--dtype", "fp32"))
                ids = torch.tensor([list((self.folder / "held.txt").read_bytes())])
                guess = logits(out, ids, dtype=torch.float32)
                nats = torch.nn.functional.cross_entropy(guess[0, :-1].double(), ids[0, 1:]).item()
                print(f"trained, {dtype}: nats per token {measured['nats_per_token']:.6f} here, {nats:.6f} in transformers")
                self.assertLess(measured["nats_per_token"], 3)
                self.assertLess(abs(nats - measured["nats_per_token"]), 1e-5)

    def test_generates_from_what_we_save(self):
        case, model = CASES["llama, untied head"]
        stored = load_file(golden / case)
        ids, expected = stored["in.input_ids"], stored["out.greedy"]
        run("convert", golden / model, self.folder / "out", "--to", "hf")
        got = load(self.folder / "out").generate(ids, do_sample=False, max_new_tokens=expected.shape[1],
                                                 min_new_tokens=expected.shape[1], eos_token_id=-1, pad_token_id=0)
        self.assertTrue(torch.equal(got[:, ids.shape[1]:], expected))

    def test_pickles_of_torch_hold_the_same_weights(self):
        source = golden / CASES["llama, untied head"][1]
        state = load_file(source / "model.safetensors")
        name = "model.layers.0.mlp.down_proj.weight"
        for form in ("plain", "bf16", "strided", "parameters"):
            with self.subTest(form):
                saved, out = self.folder / form, self.folder / (form + "_out")
                saved.mkdir()
                shutil.copy(source / "config.json", saved)
                changed = dict(state)
                if form == "bf16":
                    changed = {key: value.bfloat16() for key, value in state.items()}
                if form == "strided":
                    changed[name] = state[name].t().contiguous().t()
                if form == "parameters":
                    changed = {key: torch.nn.Parameter(value) for key, value in state.items()}
                torch.save(changed, saved / "pytorch_model.bin")
                run("convert", saved, out)
                read = load_file(out / "model.safetensors")
                self.assertEqual(set(read), set(state))
                for key, value in changed.items():
                    self.assertEqual(read[key].dtype, value.dtype)
                    self.assertTrue(torch.equal(read[key], value), key)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
