"""Turns FOLDER/model.safetensors into pickles as torch.save writes them, with Python's own library.

  make_pickles.py FOLDER [VARIANT...]
  shards     two files and an index          strided   matrices lie transposed in their storage
  shared     all tensors of a dtype in one storage
  evil       names os.system                 nested    the dictionary holds a dictionary
  compressed, past_end, big_endian, legacy   what must be refused
"""
import collections
import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile

folder, variants = sys.argv[1], set(sys.argv[2:])
KINDS = {"F32": ("FloatStorage", 4), "BF16": ("BFloat16Storage", 2), "F16": ("HalfStorage", 2), "F64": ("DoubleStorage", 8)}

# What the pickles name: modules of these names, so that the pickler writes the names of torch.
torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
sys.modules["torch"], sys.modules["torch._utils"] = torch, utils
for name, _ in KINDS.values():
    setattr(torch, name, type(name, (), {"__module__": "torch"}))


def _rebuild_tensor_v2(*arguments):
    raise NotImplementedError


_rebuild_tensor_v2.__module__ = "torch._utils"
utils._rebuild_tensor_v2 = _rebuild_tensor_v2


class Storage:
    def __init__(self, dtype, data):
        self.dtype, self.data = dtype, data


class Tensor:
    def __init__(self, storage, first, shape, stride):
        self.arguments = (storage, first, tuple(shape), tuple(stride), False, collections.OrderedDict())

    def __reduce__(self):
        return _rebuild_tensor_v2, self.arguments


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + os.path.join(folder, "was_run"),)


class Pickler(pickle.Pickler):
    def __init__(self, file, storages):
        super().__init__(file, protocol=2)
        self.storages = storages

    def persistent_id(self, thing):
        if not isinstance(thing, Storage):
            return None
        if thing not in self.storages:
            self.storages.append(thing)
        kind, width = KINDS[thing.dtype]
        return "storage", getattr(torch, kind), str(self.storages.index(thing)), "cpu", len(thing.data) // width


def strides(shape):
    steps, step = [], 1
    for extent in reversed(shape):
        steps.insert(0, step)
        step *= max(extent, 1)
    return steps


def transposed(data, rows, columns, width):
    cells = [data[i : i + width] for i in range(0, len(data), width)]
    return b"".join(cells[r * columns + c] for c in range(columns) for r in range(rows))


def save(path, state):
    storages, content = [], io.BytesIO()
    Pickler(content, storages).dump(state)
    if "legacy" in variants:
        open(path, "wb").write(content.getvalue())
        return
    how = zipfile.ZIP_DEFLATED if "compressed" in variants else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("pytorch_model/data.pkl", content.getvalue())
        archive.writestr("pytorch_model/byteorder", "big" if "big_endian" in variants else "little")
        for key, storage in enumerate(storages):
            archive.writestr(f"pytorch_model/data/{key}", storage.data[:-4] if "past_end" in variants else storage.data)
        archive.writestr("pytorch_model/version", "3\n")


source = os.path.join(folder, "model.safetensors")
with open(source, "rb") as file:
    header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    data = file.read()
header.pop("__metadata__", None)
os.remove(source)

state, common = collections.OrderedDict(), {}
for name, about in header.items():
    begin, end = about["data_offsets"]
    dtype, shape = about["dtype"], about["shape"]
    steps, piece = strides(shape), data[begin:end]
    if "strided" in variants and len(shape) == 2:
        piece, steps = transposed(piece, *shape, KINDS[dtype][1]), [1, shape[0]]
    storage = common.setdefault(dtype, Storage(dtype, b"")) if "shared" in variants else Storage(dtype, b"")
    first = len(storage.data) // KINDS[dtype][1]
    storage.data += piece
    state[name] = Tensor(storage, first, shape, steps)
if "evil" in variants:
    state["model.norm.weight"] = Evil()
if "nested" in variants:
    state = {"model": state}

if "shards" in variants:
    names = list(state)
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves):
        save(os.path.join(folder, file), collections.OrderedDict((name, state[name]) for name in half))
    where = {name: file for file, half in zip(files, halves) for name in half}
    json.dump({"metadata": {}, "weight_map": where}, open(os.path.join(folder, "pytorch_model.bin.index.json"), "w"))
else:
    save(os.path.join(folder, "pytorch_model.bin"), state)
