"""Trains, kills the training, goes on, and reads the figures with TensorBoard itself: each step once, each figure that of the log.

  tensorboard_test.py EVERLONG          in the environment of `make interop`
"""
import json, pathlib, random, signal, struct, subprocess, sys, tempfile, time

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RUN = """
[model]
vocab_size = 259
hidden_size = 32
intermediate_size = 48
layer_types = ["lightning"]
[model.lightning]
num_heads = 2
head_dim = 16
[data]
row_tokens = 64
rows = 2
[train]
steps = 300
warmup_steps = 1
learning_rate = 5e-3
device = "cpu"
threads = 1
eval_every = 20
eval_tokens = 500
save_every = 9
"""
everlong = str(pathlib.Path(sys.argv[1]).resolve())


def log_of(run):
    lines = []
    for line in (run / "log.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            pass  # the kill cut it
    return lines


with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    words = random.Random(1)
    (folder / "text").mkdir()
    for i in range(8):
        (folder / "text" / f"{i}.txt").write_text("".join(words.choice(["the ", "stream ", "ends. "]) for _ in range(700)))
    (folder / "run.toml").write_text(RUN)
    tokens, run = folder / "tokens", folder / "run"
    subprocess.run([everlong, "-q", "data", "prepare", str(folder / "text"), "--out", str(tokens), "--valid-fraction", "0.3"], check=True)
    command = [everlong, "-q", "train", str(folder / "run.toml"), "--resume", "--set", f"data.path={tokens}", "--out", str(run)]
    for least in (25, 60):  # lines of the log before the kill
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while training.poll() is None and not ((run / "log.jsonl").exists() and len(log_of(run)) >= least):
            time.sleep(0.002)
        training.send_signal(signal.SIGKILL)
        if training.wait() != -signal.SIGKILL:
            sys.exit(f"tensorboard_test: the training ended with {training.returncode} before its kill")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    log, files = log_of(run), sorted(run.glob("events.out.tfevents.*"))
    if len(log) != 300 or len(files) != 3:
        sys.exit(f"tensorboard_test: {len(log)} lines and {len(files)} files of events; 300 and 3 are right")
    board = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    compared = 0
    for key, tag in [("loss", "train/loss"), ("lr", "train/lr"), ("grad_norm", "train/grad_norm"), ("tokens", "train/tokens"),
                     ("tok_s", "train/tok_s"), ("valid_loss", "valid/loss"), ("valid_bpb", "valid/bpb")]:
        # TensorBoard keeps fp32.
        wanted = {line["step"]: struct.unpack("f", struct.pack("f", line[key]))[0] for line in log if key in line}
        shown = [(event.step, event.value) for event in board.Scalars(tag)]
        steps = [step for step, _ in shown]
        if steps != sorted(set(steps)) or dict(shown) != wanted:
            missing = sorted(set(wanted) ^ set(steps))
            sys.exit(f"tensorboard_test: {tag}: {len(shown)} points, {len(wanted)} in the log; steps that differ: {missing[:10]}")
        compared += len(wanted)
    print(f"{compared} figures of {len(log)} steps, two kills: TensorBoard shows each as the log has it")
