"""PyTorch's files: against torch itself, and against pickles assembled by hand, most of which must be refused."""

import json
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes  # noqa: F401, gives numpy the name bfloat16
import numpy as np
import pytest

from lm.errors import UserError
from lm.hf.tensors.folder import open_tensors

MAGIC = 0x1950A86A20F9469CFC6C
FLOATS = np.arange(24, dtype=np.float32)
V2, V3 = (f"torch._utils._rebuild_tensor_{v}" for v in ("v2", "v3"))


# The opcodes that torch.save uses, by hand: what pickle itself will not write without torch.
def name(dotted: str) -> bytes:
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def value(x) -> bytes:
    if isinstance(x, bytes):
        return x
    if isinstance(x, str):
        return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
    if isinstance(x, tuple):
        return b"(" + b"".join(map(value, x)) + b"t"
    if isinstance(x, dict):
        return b"}" + b"".join(value(k) + value(v) + b"s" for k, v in x.items())
    return {None: b"N", True: b"\x88", False: b"\x89"}[x] if x is None or isinstance(x, bool) else b"I%d\n" % x


def call(dotted: str, *args) -> bytes:
    return name(dotted) + value(args) + b"R"


def storage(n=24, kind="torch.FloatStorage", key="0", *view) -> bytes:
    return value(("storage", name(kind), key, "cpu", n, *view)) + b"Q"


def tensor(shape, strides, first=0, of=None, rebuild=V2, *more) -> bytes:
    return call(rebuild, of or storage(), first, shape, strides, False, call("collections.OrderedDict"), *more)


def archive(path, tree, data=None, order="little", root="model", compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr(f"{root}/data.pkl", b"\x80\2" + value(tree) + b".")
        if order:
            z.writestr(f"{root}/byteorder", order)
        for key, array in ({"0": FLOATS} if data is None else data).items():
            z.writestr(f"{root}/data/{key}", array.tobytes())


def stream(path, tree, data=None, version=1001):
    data = {"0": FLOATS} if data is None else data
    head = [pickle.dumps(x, 2) for x in (MAGIC, version, {"little_endian": True})]
    body = [struct.pack("<q", a.size) + a.tobytes() for a in data.values()]
    path.write_bytes(b"".join([*head, b"\x80\2" + value(tree) + b".", pickle.dumps(list(data), 2), *body]))


WRITERS = pytest.mark.parametrize("write", [archive, stream])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def refused(path, message):
    with pytest.raises(UserError, match=message) as e:
        open_tensors(path.parent)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def torch_tensors(torch):
    torch.manual_seed(0)
    base = torch.randn(5, 7, 3)
    kinds = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64".split()
    out = {f"kind.{kind}": (base * 50).abs().to(getattr(torch, kind)) for kind in kinds}
    out |= {"whole": base, "shared": base, "slice": base[1:4, ::3, 1], "turned": base.permute(2, 0, 1)}
    out |= {"wide": base[:, :1].expand(5, 4, 3), "scalar": base[2, 3, 1], "empty": torch.zeros(0, 3)}
    out["parameter"] = torch.nn.Parameter(torch.randn(2, 3))
    return out


def bits(torch, t) -> bytes:
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.hf
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_torch_saves(path, zipped):
    torch = pytest.importorskip("torch")
    expected = torch_tensors(torch)
    torch.save(expected, path, _use_new_zipfile_serialization=zipped)
    with open_tensors(path.parent) as folder:
        assert folder.names() == tuple(sorted(expected))
        for key, t in expected.items():
            assert folder.info(key).shape == tuple(t.shape) and folder.info(key).file == path
            assert folder.info(key).dtype.name == str(t.dtype).removeprefix("torch.")
            array = folder.read(key)
            assert (array.shape, array.dtype) == folder.info(key)[:2] and not (array.size and array.flags.writeable)
            assert array.tobytes() == bits(torch, t), key


@pytest.mark.hf
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_the_state_of_a_module_with_tied_weights(path, zipped):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)).bfloat16()
    model[1].weight = model[0].weight
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=zipped)
    with open_tensors(path.parent) as folder:
        assert set(folder) == model.state_dict().keys()
        for key, t in model.state_dict().items():
            assert folder[key].tobytes() == bits(torch, t)


@pytest.mark.hf
def test_reads_shards_that_transformers_would(path):
    torch = pytest.importorskip("torch")
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for i, shard in enumerate(names):
        torch.save({f"w{i}": torch.full((2, 3), i + 1.0)}, path.parent / shard, _use_new_zipfile_serialization=i == 0)
    index = path.parent / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(zip(["w0", "w1"], names))}))
    with open_tensors(path.parent) as folder:
        assert [(folder[n] == i + 1).all() and folder.info(n).file.name for i, n in enumerate(folder)] == names


@pytest.mark.hf
@pytest.mark.parametrize("zipped", [True, False])
def test_refuses_pickled_modules_and_checkpoints(path, zipped):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 3), path, _use_new_zipfile_serialization=zipped)
    refused(path, r"wants to run code \(torch.nn.modules.linear.Linear\): refused; get the safetensors version")
    torch.save({"model": {"w": torch.ones(3)}, "step": 7}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "model: expected a tensor under a name, got a dict: a training checkpoint")
    torch.save(torch.ones(3), path, _use_new_zipfile_serialization=zipped)
    refused(path, "expected a dict of tensors, got a tensor")
    torch.save({"w": torch.ones(3).to(torch.float8_e4m3fn)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "expected tensors of torch.bfloat16, .*got torch.float8_e4m3fn; get the safetensors version .* BF16")
    torch.save({"w": torch.ones(3, dtype=torch.complex64)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "expected tensors of .*got torch.ComplexFloatStorage")
    torch.save({"w": torch.eye(3).to_sparse()}, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"wants to run code \(torch._utils._rebuild_sparse_tensor\): refused")


@WRITERS
def test_strides_offsets_and_shared_storages_are_honoured(path, write):
    of = storage()
    tensors = {
        "rows": tensor((4, 6), (6, 1), 0, of),
        "columns": tensor((3, 2), (1, 7), 5, of),
        "plain": call("torch._utils._rebuild_tensor", of, 2, (5,), (2,)),
        "size": tensor(call("torch.Size", (2, 3)), (3, 1), 18, of),
        "parameter": call("torch._utils._rebuild_parameter", tensor((24,), (1,), 0, of), True, None),
        "untyped": tensor((3,), (2,), 1, storage(12, "torch.storage.UntypedStorage", "u"), V3, name("torch.int16")),
    }
    shorts = np.arange(6, dtype=np.int16)
    write(path, tensors, {"0": FLOATS, "u": shorts.view(np.uint8)})
    expected = {
        "rows": FLOATS.reshape(4, 6),
        "columns": np.array([[5, 12], [6, 13], [7, 14]], np.float32),
        "plain": FLOATS[2:11:2],
        "size": FLOATS[18:].reshape(2, 3),
        "parameter": FLOATS,
        "untyped": shorts[1::2],
    }
    with open_tensors(path.parent) as folder:
        assert set(folder) == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(folder[key], array)
            assert folder[key].dtype == array.dtype
        assert np.shares_memory(folder["rows"], folder["columns"])


def test_the_old_stream_may_view_a_part_of_a_storage(path):
    part = storage(24, "torch.FloatStorage", "0", ("1", 4, 6))
    stream(path, {"w": tensor((2, 2), (3, 1), 1, part)})
    np.testing.assert_array_equal(open_tensors(path.parent)["w"], [[5, 6], [8, 9]])
    stream(path, {"w": tensor((2, 3), (3, 1), 1, part)})
    refused(path, "w: expected its storage 0 to hold 44 bytes .*, got 40")
    stream(path, {"w": tensor((2, 3), (3, 1), 0, storage(24, "torch.FloatStorage", "0", ("1", 20, 6)))})
    refused(path, "a view of storage 0 that does not fit it")


def test_archives_of_either_byte_order_are_read(path):
    for order, stored in ((None, FLOATS), ("little", FLOATS), ("big", FLOATS.astype(">f4"))):
        archive(path, {"w": tensor((4, 3), (1, 4), 2)}, {"0": stored}, order)
        array = open_tensors(path.parent)["w"]
        assert array.dtype == np.float32 and not array.flags.writeable
        np.testing.assert_array_equal(array, FLOATS[2:14].reshape(3, 4).T)
    shorts = np.array([1.5, -3], "bfloat16")
    archive(
        path, {"w": tensor((), (), 1, storage(2, "torch.BFloat16Storage"))}, {"0": shorts.view("u2").byteswap()}, "big"
    )
    assert open_tensors(path.parent)["w"] == -3
    archive(path, {"w": tensor((4, 3), (1, 4))}, order="middle")
    refused(path, "expected byteorder little or big, got b'middle'")


def test_a_name_given_twice_in_a_pickle_is_its_last_as_in_torch(path):
    twice = b"}" + value("w") + tensor((3,), (1,)) + b"s" + value("w") + tensor((2,), (1,)) + b"s"
    archive(path, twice)
    assert open_tensors(path.parent).info("w").shape == (2,)


@WRITERS
@pytest.mark.parametrize(
    ("dotted", "args"),
    [
        ("os.system", ("touch {path}.ran",)),
        ("posix.system", ("touch {path}.ran",)),
        ("builtins.eval", ("open('{path}.ran', 'w')",)),
        ("builtins.getattr", (name("collections.OrderedDict"), "fromkeys")),
        ("__builtin__.eval", ("1",)),
        ("torch.storage._load_from_bytes", ("1",)),
        ("torch._utils._rebuild_tensor_v2.__globals__", ()),
        ("collections.OrderedDict.fromkeys", ()),
        ("torch.load", ("x",)),
        ("torch.nn.modules.linear.Linear", ()),
        ("lm.hf.tensors.unpickle.Tensor", (1, 2, 3, 4, 5)),
        ("copyreg._reconstructor", ()),
    ],
)
def test_refuses_every_other_name_before_anything_runs(path, write, dotted, args):
    args = tuple(a.format(path=path) if isinstance(a, str) else a for a in args)
    module, _, attribute = dotted.rpartition(".")
    module = "torch._utils" if attribute == "__globals__" else module
    attribute = "_rebuild_tensor_v2.__globals__" if attribute == "__globals__" else attribute
    named = value(module) + value(attribute) + b"\x93"  # STACK_GLOBAL, which takes dotted attributes
    for code in (call(dotted, *args), named + value(args) + b"R"):
        write(path, {"w": tensor((3,), (1,)), "x": code})
        refused(
            path, r"wants to run code \(" + dotted.replace(".", r"\.") + r"\): refused; get the safetensors version"
        )
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_refuses_code_before_the_first_tensor_and_in_plain_pickles(path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (f"{path}.ran",)

    path.write_bytes(pickle.dumps(Attack()))
    refused(path, r"wants to run code \((posix|nt).mkdir\)")
    path.write_bytes(pickle.dumps(MAGIC, 2) + pickle.dumps(1001, 2) + pickle.dumps(Attack(), 2))
    refused(path, r"wants to run code \((posix|nt).mkdir\)")
    assert not path.with_suffix(".bin.ran").exists()


@pytest.mark.parametrize(
    "code",
    [
        name(V2) + value(({}, {"__call__": 1})) + b"b",  # BUILD: attributes for what stands for a function
        name(V2) + value({"name": "os.system"}) + b"b",
        name("torch.FloatStorage") + value((3,)) + b"R",
        name("torch.float32") + value(()) + b"R",
        name(V2) + value(()) + b"\x81",  # NEWOBJ
        call("collections.OrderedDict", name(V2)),
        call(V2, 1, 2, 3, 4, 5, 6),
        call(V2, *range(3)),
        call(V2, storage(), 0, (3,), (1,), False, None, {"conj": True}),
        call(V3, storage(), 0, (3,), (1,), False, None, name("torch.Size")),
        call(V3, storage(), 0, (3,), (1,), False, None, name("torch.float32"), {"neg": True}),
        call("torch._utils._rebuild_parameter", 1, False, None),
        call("torch.Size", 3),
        value(("storage", "torch.FloatStorage", "0", "cpu", 24)) + b"Q",
        value(("module", name("torch.Size"), "x", "y")) + b"Q",
        value(7) + b"Q",
        storage(-1),
        tensor((3,), (1,), 0, storage(23)) + b"0" + tensor((3,), (1,)),
        b"0" * 9,
        b"h\x07",
        b"\xff",
    ],
)
@WRITERS
def test_refuses_other_uses_of_the_names_it_knows(path, write, code):
    write(path, {"x": code, "w": tensor((3,), (1,))})
    refused(path, "expected a dict of tensors as torch.save writes it, got |expected a tensor under a name")
    write(path, {"w": tensor((3,), (1,))})
    assert open_tensors(path.parent).names() == ("w",)


def test_attributes_of_a_dict_do_not_hide_its_methods(path):
    tree = call("collections.OrderedDict") + value("w") + tensor((3,), (1,)) + b"s"
    archive(path, tree + value({"items": name(V2), "_metadata": 1}) + b"b")
    assert open_tensors(path.parent).names() == ("w",)


@WRITERS
@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"w": tensor((5, 5), (5, 1))}, r"w: expected its storage 0 to hold 100 bytes for shape \[5, 5\].*, got 96"),
        ({"w": tensor((24,), (1,), 1)}, "w: expected its storage 0 to hold 100 bytes .*, got 96"),
        ({"w": tensor((2, 2), (23, 1), 0)}, "w: expected its storage 0 to hold 100 bytes .*, got 96"),
        ({"w": tensor((2,), (1,), -1)}, "w: expected sizes, strides and an offset"),
        ({"w": tensor((2,), (-1,), 3)}, "w: expected sizes, strides and an offset"),
        ({"w": tensor((-2, -3), (3, 1))}, "w: expected sizes, strides and an offset"),
        ({"w": tensor((2, 3), (1,))}, "w: expected sizes, strides and an offset"),
        ({"w": tensor(3, 1)}, "w: expected sizes, strides and an offset"),
        ({"w": tensor(("3",), (1,))}, "w: expected sizes, strides and an offset"),
        ({3: tensor((3,), (1,))}, "a name of type int: expected a tensor under a name"),
        ({"v": tensor((3,), (1,)), "w": None}, "w: expected a tensor under a name, got a NoneType"),
        ({"w": storage()}, "w: expected a tensor under a name, got a Storage"),
        (
            {"w": tensor((3,), (1,), 0, storage(24, "torch.QInt8Storage"))},
            "got torch.QInt8Storage; get the safetensors",
        ),
        (storage() + b"0" + value(7), "expected a dict of tensors, got a int"),
    ],
)
def test_refuses_tensors_that_do_not_fit_and_trees_of_other_things(path, write, tree, message):
    write(path, tree)
    with pytest.raises(UserError, match=message):
        open_tensors(path.parent)


def test_refuses_archives_whose_storages_differ_from_the_pickle(path):
    tree = {"w": tensor((3,), (1,))}
    archive(path, tree, {})
    refused(path, "model/data/0: expected 96 bytes, not compressed, got none")
    archive(path, tree, {"0": FLOATS[:-1]})
    refused(path, "model/data/0: expected 96 bytes, not compressed, got 92 bytes, compression 0")
    archive(path, tree, compression=zipfile.ZIP_DEFLATED)
    refused(path, "model/data/0: expected 96 bytes, not compressed, got 96 bytes, compression 8")
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("readme.txt", "no model")
    refused(path, "expected the archive of torch.save with one data.pkl")


def test_refuses_streams_whose_storages_differ_from_the_pickle(path):
    tree = {"w": tensor((3,), (1,))}
    stream(path, tree, {})
    refused(path, "a list of storages that is not that of the tensors")
    stream(path, tree, {"1": FLOATS})
    refused(path, "a list of storages that is not that of the tensors")
    stream(path, tree, {"0": FLOATS[:-1]})
    refused(path, "truncated: ")
    stream(path, tree, {"0": np.append(FLOATS, FLOATS)})
    refused(path, "storage 0: expected 24 elements, got 48")
    stream(path, tree, version=1002)
    refused(path, "expected torch.save's protocol 1001, got 1002")
    path.write_bytes(pickle.dumps(OrderedDict(w=1)))
    refused(path, "expected the file of torch.save, got another kind of pickle")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(path, "expected tensors, got a Git LFS pointer")
    path.write_bytes(b"<html>")
    refused(path, "expected a dict of tensors as torch.save writes it")


@WRITERS
def test_every_cut_of_a_file_is_noticed_at_open(path, write):
    write(path, {"w": tensor((4, 6), (6, 1)), "b": tensor((3,), (1,), 5)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refused(path, "truncated: .*download it again")


@WRITERS
def test_a_damaged_byte_gives_a_user_error_or_none(path, write):
    write(path, {"w": tensor((4, 6), (6, 1)), "b": tensor((3,), (1,), 5)})
    whole, rng, refusals = path.read_bytes(), random.Random(0), 0
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            with open_tensors(path.parent) as folder:
                for tensor_name in folder:
                    folder.read(tensor_name).tobytes()
        except UserError as e:
            assert "\n" not in str(e)
            refusals += 1
    assert refusals > len(whole) // 3
