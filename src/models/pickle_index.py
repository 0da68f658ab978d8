"""Where the tensors of torch's pickles lie.  python3 - FOLDER < pickle_index.py

FOLDER holds pytorch_model.bin, or pytorch_model.bin.index.json and its shards. Prints one JSON object:
  {"files": [name, ...], "tensors": {name: {"file": i, "dtype": "BF16", "shape": [..], "stride": [..], "offset": n}}}
stride in elements, offset in bytes from the first byte of the file. Tensors themselves are not read.

Weights only: a pickle is a program, and this one may name nothing but what a dictionary of tensors needs. Needs only
Python's own library. The message of a failure is the last line on stderr.
"""
import collections
import json
import os
import pickle
import struct
import sys
import zipfile

STORAGES = {"FloatStorage": ("F32", 4), "DoubleStorage": ("F64", 8), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
            "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
            "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1)}
MAX_PICKLE = 1 << 28  # bytes: names and shapes, no weights


class Refused(Exception):
    pass


Storage = collections.namedtuple("Storage", "dtype width key count")
Tensor = collections.namedtuple("Tensor", "storage first shape stride")


def rebuild_tensor(storage, first, shape, stride, *_):
    return Tensor(storage, first, tuple(shape), tuple(stride))


def rebuild_parameter(data, *_):
    return data


ALLOWED = {("collections", "OrderedDict"): collections.OrderedDict,
           ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
           ("torch._utils", "_rebuild_parameter"): rebuild_parameter}
ALLOWED.update({("torch", name): about for name, about in STORAGES.items()})


class WeightsOnly(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise Refused(f"names {module}.{name}, which no weights need: it is not read, as it could run a program. "
                          "Get the weights as safetensors, or from a source you trust load and save them with torch")
        return ALLOWED[module, name]

    def persistent_load(self, about):
        kind, (dtype, width), key, _, count = about
        if kind != "storage" or not isinstance(key, str):
            raise Refused(f"names {kind!r}, which is no storage of a tensor")
        return Storage(dtype, width, key, count)


def data_offset(file, record):
    """The first byte of a stored record: its local header has fields of its own length."""
    if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
        raise Refused(f"record {record.filename} is compressed or encrypted; torch writes plain ones")
    file.seek(record.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\3\4":
        raise Refused(f"record {record.filename} has no header where the directory says")
    return record.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))


def extent(tensor):
    """Elements of the storage that a tensor reaches, from its first one."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride))


def read_file(path):
    """{name: (dtype, shape, stride, offset)} of one pickle."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise Refused("is not a zip archive: torch before 1.6 wrote it, or it was cut short. "
                          "Load and save it again with a newer torch")
        with zipfile.ZipFile(file) as archive:
            records = {record.filename: record for record in archive.infolist()}
            pickles = [name for name in records if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise Refused(f"holds {len(pickles)} records named data.pkl; one is needed")
            root = pickles[0][: -len("data.pkl")]
            order = records.get(root + "byteorder")
            if order is not None and order.file_size < 16 and archive.read(order) != b"little":
                raise Refused("was written on a machine that is not little endian")
            if records[pickles[0]].file_size > MAX_PICKLE:
                raise Refused(f"data.pkl has {records[pickles[0]].file_size} bytes; at most {MAX_PICKLE}")
            with archive.open(pickles[0]) as content:
                state = WeightsOnly(content).load()
        if not isinstance(state, dict):
            raise Refused(f"holds a {type(state).__name__}; a dictionary of tensors is needed")
        tensors, offsets = {}, {}
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor) or not isinstance(tensor.storage, Storage):
                raise Refused(f"entry {name!r} is no tensor; a dictionary of tensors is needed")
            numbers = (tensor.first, *tensor.shape, *tensor.stride)
            if len(tensor.shape) != len(tensor.stride) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
                raise Refused(f"tensor {name!r} has shape {tensor.shape} and strides {tensor.stride}")
            dtype, width, key, _ = tensor.storage
            record = records.get(f"{root}data/{key}")
            if record is None:
                raise Refused(f"tensor {name!r}: the archive holds no record data/{key}")
            if (tensor.first + extent(tensor)) * width > record.file_size:
                raise Refused(f"tensor {name!r} reaches past the end of its storage, {record.file_size} bytes")
            if key not in offsets:
                offsets[key] = data_offset(file, record)
            tensors[name] = (dtype, tensor.shape, tensor.stride, offsets[key] + tensor.first * width)
        return tensors


def names_of(folder):
    """The pickles of a folder, and the tensors that its index names (None without one)."""
    index = os.path.join(folder, "pytorch_model.bin.index.json")
    if not os.path.exists(index):
        return ["pytorch_model.bin"], None
    with open(index, encoding="utf-8") as file:
        try:
            where = json.load(file)["weight_map"]
            files = sorted(set(where.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Refused(f"{index}: has no \"weight_map\" of tensors and their files") from None
    for name in files:
        if not isinstance(name, str) or os.path.basename(name) != name or name.startswith("."):
            raise Refused(f"{index}: {name!r} is no name of a file in the same folder")
    return files, where


def main(folder):
    files, where = names_of(folder)
    found = {}
    for number, name in enumerate(files):
        path = os.path.join(folder, name)
        try:
            tensors = read_file(path)
        except Refused as problem:
            raise Refused(f"{path}: {problem}") from None
        except FileNotFoundError:
            raise Refused(f"{path}: is missing") from None
        except OSError as problem:
            raise Refused(f"{path}: {problem.strerror}") from None
        except Exception as problem:  # whatever a broken archive or pickle makes the library raise
            raise Refused(f"{path}: is not a readable pickle of tensors ({type(problem).__name__}: {problem})") from None
        for tensor, (dtype, shape, stride, offset) in tensors.items():
            if tensor in found:
                raise Refused(f"tensor {tensor!r} is in two files: {files[found[tensor]['file']]} and {name}")
            if where is not None and where.get(tensor) != name:
                raise Refused(f"{path}: tensor {tensor!r} is not where the index says: the two do not belong together")
            found[tensor] = {"file": number, "dtype": dtype, "shape": shape, "stride": stride, "offset": offset}
    for tensor in where or {}:
        if tensor not in found:
            raise Refused(f"{os.path.join(folder, where[tensor])}: does not hold tensor {tensor!r}, but the index says so")
    json.dump({"files": files, "tensors": found}, sys.stdout)


try:
    main(sys.argv[1])
except Refused as problem:
    sys.exit(str(problem).replace("\n", " "))
