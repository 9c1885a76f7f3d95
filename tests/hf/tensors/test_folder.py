"""safetensors folders: against the library's own reader and writer, then what must be refused."""

import errno
import json
import os
import re
from pathlib import Path

import ml_dtypes  # noqa: F401, gives numpy the name bfloat16
import numpy as np
import pytest

from lm.errors import UserError
from lm.hf.tensors.folder import TensorInfo, open_tensors
from lm.hf.tensors.write import write_folder, write_tensors

safetensors_numpy = pytest.importorskip("safetensors.numpy")

DTYPES = "f8 f4 f2 bfloat16 i8 i4 i2 i1 u8 u4 u2 u1 bool".split()
DTYPES = [np.dtype(d) if d in ("bfloat16", "bool") else np.dtype(f"<{d}") for d in DTYPES]


def random_tensors(dtypes=DTYPES) -> dict[str, np.ndarray]:
    """One of each dtype, of sizes that leave the next one unaligned if nothing is done; a scalar; an empty one."""
    rng = np.random.default_rng(0)
    out = {f"b.{i}.{d.name}": (rng.standard_normal((3, 1 + i)) * 50).astype(d) for i, d in enumerate(dtypes)}
    out["a.scalar"] = np.array(2.5, np.float32)
    out["z.empty"] = np.zeros((0, 7), np.float16)
    return out


def infos(tensors):
    return {name: (a.shape, a.dtype) for name, a in tensors.items()}


def write(folder, tensors, **options):
    write_tensors(folder, tensors.items(), infos=infos(tensors), **options)


def assert_bits(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert actual.tobytes() == expected.tobytes()


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def header(path) -> tuple[dict, bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def make(path, head: dict | str | bytes, data: bytes = b""):
    raw = head if isinstance(head, bytes) else (head if isinstance(head, str) else json.dumps(head)).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(folder, message):
    with pytest.raises(UserError, match=message) as e:
        open_tensors(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_reads_what_the_library_writes(tmp_path):
    tensors = random_tensors()
    safetensors_numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with open_tensors(tmp_path) as folder:
        assert folder.names() == tuple(sorted(tensors)) == tuple(folder)
        assert len(folder) == len(tensors) and "a.scalar" in folder and "a.scale" not in folder
        assert folder.n_bytes == sum(a.nbytes for a in tensors.values())
        for name, expected in tensors.items():
            assert folder.info(name) == TensorInfo(expected.shape, expected.dtype, tmp_path / "model.safetensors")
            assert_bits(folder.read(name), expected)
            assert_bits(folder[name], expected)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 150, 1])
def test_the_library_reads_what_is_written(tmp_path, max_shard_bytes):
    tensors = random_tensors()
    write(tmp_path, tensors, max_shard_bytes=max_shard_bytes)
    read = {}
    for path in tmp_path.glob("*.safetensors"):
        read |= safetensors_numpy.load_file(path)
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert_bits(read[name], expected)
    assert (max_shard_bytes == 10**9) == (len(list(tmp_path.glob("*.safetensors"))) == 1)
    with open_tensors(tmp_path) as folder:
        for name, expected in tensors.items():
            assert_bits(folder.read(name), expected)


@pytest.mark.hf
@pytest.mark.parametrize("max_shard_bytes", [10**9, 150])
def test_torch_reads_what_is_written(tmp_path, max_shard_bytes):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    tensors = random_tensors([d for d in DTYPES if d.kind != "u" or d.itemsize == 1])
    write(tmp_path, tensors, max_shard_bytes=max_shard_bytes)
    read = {}
    for path in tmp_path.glob("*.safetensors"):
        read |= load_file(path)
    assert read.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert tuple(read[name].shape) == expected.shape and str(read[name].dtype) == f"torch.{expected.dtype.name}"
        assert read[name].reshape(-1).view(torch.uint8).numpy().tobytes() == expected.tobytes()


@pytest.mark.hf
def test_transformers_reads_what_is_written_and_writes_what_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=12, n_head=3, vocab_size=31, n_positions=7, bos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="9KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    with open_tensors(tmp_path / "theirs") as folder, write_folder(tmp_path / "ours") as ours:
        state = model.state_dict()
        assert set(folder) == state.keys() - {"lm_head.weight"}
        for name in folder:
            np.testing.assert_array_equal(folder[name], state[name].numpy())
        config.save_pretrained(ours)
        plan = {name: (folder.info(name).shape, folder.info(name).dtype) for name in folder}
        write_tensors(ours, ((name, folder[name]) for name in folder), infos=plan, max_shard_bytes=5000)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    for name, expected in state.items():
        assert torch.equal(again.state_dict()[name], expected)


@pytest.mark.hf
@pytest.mark.parametrize("max_shard_bytes", [1, 13, 24, 40, 100, 1000])
def test_shards_are_those_of_huggingface_hub(tmp_path, max_shard_bytes):
    hub = pytest.importorskip("huggingface_hub")
    torch = pytest.importorskip("torch")
    sizes = [5, 1, 2, 7, 2, 3, 11, 1, 1]
    theirs = hub.split_torch_state_dict_into_shards(
        {f"{i}": torch.ones(n) for i, n in enumerate(sizes)},
        max_shard_size=max_shard_bytes,
        filename_pattern="model{suffix}.safetensors",
    )
    write(tmp_path, {f"{i}": np.ones(n, np.float32) for i, n in enumerate(sizes)}, max_shard_bytes=max_shard_bytes)
    for name, tensors in theirs.filename_to_tensors.items():
        assert set(header(tmp_path / name)[0]) == {*tensors, "__metadata__"}
    if theirs.is_sharded:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}
    assert len(files(tmp_path)) == len(theirs.filename_to_tensors) + theirs.is_sharded


def test_every_written_tensor_is_aligned_to_its_dtype(tmp_path):
    write(tmp_path, random_tensors(DTYPES[::-1]))
    head, data = header(tmp_path / "model.safetensors")
    assert head.pop("__metadata__") == {"format": "pt"}
    assert ((tmp_path / "model.safetensors").stat().st_size - len(data)) % 8 == 0
    with open_tensors(tmp_path) as folder:
        assert all(head[name]["data_offsets"][0] % folder.info(name).dtype.itemsize == 0 for name in folder)
        assert all(folder[name].flags.aligned for name in folder)


def test_reads_tensors_off_their_alignment(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    make(
        tmp_path / "model.safetensors",
        {"a": entry([3], 0, 3, "U8"), "w": entry([2, 3], 3, 27)},
        b"\1\2\3" + values.tobytes(),
    )
    with open_tensors(tmp_path) as folder:
        np.testing.assert_array_equal(folder["w"], values)
        np.testing.assert_array_equal(folder["w"].T @ folder["w"], values.T @ values)


def test_arrays_are_read_only_and_outlive_the_folder(tmp_path):
    tensors = random_tensors()
    write(tmp_path, tensors)
    with open_tensors(tmp_path) as folder:
        name = "b.1.float32"
        whole, part = folder.read(name), folder.read(name)[1:, ::2]
        with pytest.raises(ValueError, match="read-only"):
            whole[0, 0] = 1
    del whole
    np.testing.assert_array_equal(part, tensors[name][1:, ::2])


def test_more_tensors_than_open_files_can_be_held(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    tensors = {f"{i}": np.full(3, i, np.int16) for i in range(700)}
    write(tmp_path, tensors)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(500, limits[0]), limits[1]))
    try:
        with open_tensors(tmp_path) as folder:
            held = {name: folder.read(name) for name in folder}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all((held[name] == int(name)).all() for name in tensors)


def test_what_was_read_leaves_memory_with_its_last_view(tmp_path):
    def resident_mb() -> float:
        status = Path("/proc/self/status")
        sizes = re.findall(r"RssFile:\s+(\d+) kB", status.read_text()) if status.exists() else []
        return int(sizes[0]) / 1024 if sizes else pytest.skip("the system does not tell resident file pages")

    write(tmp_path, {f"{i}": np.ones(2**23, np.float32) for i in range(2)})
    with open_tensors(tmp_path) as folder:
        before = resident_mb()
        assert folder["0"].sum() + folder["1"].sum() == 2**24
        assert resident_mb() - before < 8
        view = folder["0"][1:]
        assert view.sum() == 2**23 - 1 and resident_mb() - before > 24
        del view
        assert resident_mb() - before < 8


def test_writing_takes_one_item_at_a_time_and_any_memory_layout(tmp_path):
    base = np.arange(35, dtype=np.float32).reshape(5, 7)
    tensors = {"t": base.T, "step": base[::2, 1::3], "back": base[::-1]}
    alive = []

    def items():
        for name, a in tensors.items():
            alive.append((tmp_path / f".model.safetensors.{os.getpid()}").stat().st_size)
            yield name, a

    write_tensors(tmp_path, items(), infos=infos(tensors))
    opening = (tmp_path / "model.safetensors").stat().st_size - sum(a.nbytes for a in tensors.values())
    assert np.subtract(alive, opening).tolist() == [0, 35 * 4, 35 * 4 + 6 * 4]
    with open_tensors(tmp_path) as folder:
        for name, expected in tensors.items():
            assert_bits(folder.read(name), expected)


def test_a_new_save_replaces_the_old_in_whatever_shards(tmp_path):
    old, new = ({"a": np.full(5, v, np.float32), "b": np.full(7, v, np.float32)} for v in (1, 2))
    for first, second in ((10**6, 20), (20, 10**6), (20, 20)):
        write(tmp_path, old | {"c": np.zeros(3, np.int8)}, max_shard_bytes=first)
        (tmp_path / "model-card.safetensors").write_bytes(b"not ours")
        write(tmp_path, new, max_shard_bytes=second)
        with open_tensors(tmp_path) as folder:
            assert folder.names() == ("a", "b")
            assert all((folder[name] == 2).all() for name in folder)
        sharded = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        expected = ["model.safetensors"] if second > 20 else [*sharded, "model.safetensors.index.json"]
        assert sorted(files(tmp_path)) == sorted([*expected, "model-card.safetensors"])


@pytest.mark.parametrize("max_shard_bytes", [10**6, 20])
@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("b", np.ones(7, np.float32))], "expected tensor 'a' next, got tensor 'b'"),
        ([("a", np.ones(5, np.float32))], "expected tensor 'b' next, got no more"),
        ([("a", np.ones(6, np.float32))], r"a: expected float32 \[5\], got float32 \[6\]"),
        ([("a", np.ones(5, np.float64))], r"a: expected float32 \[5\], got float64 \[5\]"),
        (
            [("a", np.ones(5, np.float32)), ("b", np.ones(7, np.float32)), ("a", np.ones(5, np.float32))],
            "expected no more next, got tensor 'a'",
        ),
    ],
)
def test_an_error_leaves_the_folder_as_it_was(tmp_path, items, message, max_shard_bytes):
    tensors = {"a": np.ones(5, np.float32), "b": np.ones(7, np.float32)}
    write(tmp_path, tensors, max_shard_bytes=max_shard_bytes)
    before = files(tmp_path)
    with pytest.raises(UserError, match=message):
        write_tensors(tmp_path, iter(items), infos=infos(tensors), max_shard_bytes=max_shard_bytes)
    assert files(tmp_path) == before


def test_an_error_of_the_source_passes_and_leaves_nothing(tmp_path):
    def items():
        yield "a", np.ones(5, np.float32)
        raise RuntimeError("source")

    with pytest.raises(RuntimeError, match="source"):
        write_tensors(tmp_path, items(), infos={"a": ((5,), "f4"), "b": ((3,), "f4")}, max_shard_bytes=20)
    assert not files(tmp_path)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    def items():
        yield "a", np.ones(5, np.float32)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="disk full while writing: nothing was kept; free space"):
        write_tensors(tmp_path, items(), infos={"a": ((5,), "f4"), "b": ((3,), "f4")})
    assert not files(tmp_path)


def test_refuses_to_write_what_safetensors_has_not(tmp_path):
    for name, dtype, message in (
        ("w", "c16", "w: expected a dtype of float64, .*bfloat16.*got complex128; cast it first"),
        ("w", ">f4", "w: expected a dtype of .* got >f4"),
        ("__metadata__", "f4", "__metadata__: expected the name of a tensor"),
    ):
        with pytest.raises(UserError, match=message):
            write_tensors(tmp_path, [], infos={name: ((3,), np.dtype(dtype))})
    with pytest.raises(UserError, match="expected max_shard_bytes of at least 1, got 0"):
        write_tensors(tmp_path, [], infos={"w": ((3,), "f4")}, max_shard_bytes=0)
    assert not files(tmp_path)


def test_no_tensors_make_a_file_that_reads_as_none(tmp_path):
    write(tmp_path, {})
    assert safetensors_numpy.load_file(tmp_path / "model.safetensors") == {}
    assert open_tensors(tmp_path).names() == ()


def test_every_cut_of_a_file_is_noticed_at_open(tmp_path):
    path = tmp_path / "model.safetensors"
    write(tmp_path, {"a": np.ones(3, np.float32), "b": np.ones((2, 5), np.int16)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        message = refused(tmp_path, rf"model.safetensors: truncated: expected \d+ bytes.*, got {size}, which end in")
        assert message.endswith("download it again")
    path.write_bytes(whole[:-1])
    refused(tmp_path, rf"expected {len(whole)} bytes, got {len(whole) - 1}, which end in b;")
    path.write_bytes(whole + b"\0")
    refused(tmp_path, rf"expected {len(whole)} bytes, got {len(whole) + 1}, more than the header tells of")


@pytest.mark.parametrize(
    ("head", "data", "message"),
    [
        (b"{", b"", "header: expected JSON"),
        (b"\xff{}", b"", "header: expected JSON"),
        (b"[" * 100_000, b"", "header: expected JSON"),
        ("[]", b"", "header: expected a JSON object, got list"),
        ({"w": 3}, b"", "expected a header of safetensors, got .* `3`, expected struct TensorInfo"),
        (
            {"w": {"dtype": "F32", "shape": [1]}},
            b"",
            "expected a header of safetensors, got .* missing field `data_offsets`",
        ),
        ({"w": entry([-1, -1], 0, 4)}, bytes(4), ".* got .* `-1`, expected usize"),
        ({"w": entry([True], 0, 4)}, bytes(4), ".* got .* `true`, expected usize"),
        ({"w": entry([1.0], 0, 4)}, bytes(4), ".* got .* `1.0`, expected usize"),
        (
            {"w": entry([3], 0, 8)},
            bytes(8),
            "expected a header of safetensors, got invalid shape, data type, or offset",
        ),
        ({"w": entry([4], 8, -8)}, b"", ".* got .* `-8`, expected usize"),
        ({"w": entry([3], 0, 12, "I33")}, bytes(12), ".* got .* unknown variant `I33`"),
        ({"w": entry([2**62, 16], 0, 4)}, bytes(4), ".* got overflow computing buffer size"),
        ({"w": entry([3], 0, 3, "F8_E4M3")}, bytes(3), "w: expected a dtype of F64, .*got F8_E4M3; quantized"),
        (
            {"w": entry([1], 4, 8)},
            bytes(8),
            "expected a header of safetensors, got invalid offset for tensor `w`; the file is damaged",
        ),
        (
            {"v": entry([2], 0, 8), "w": entry([1], 4, 8)},
            bytes(8),
            "expected a header of safetensors, got invalid offset for tensor `w`; the file is damaged",
        ),
        (
            f'{{"w": {json.dumps(entry([1], 0, 4))}, "w": {json.dumps(entry([1], 4, 8))}}}',
            bytes(8),
            "header: expected each name once, got 'w' duplicated",
        ),
        (
            '{"w": {"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}',
            bytes(4),
            "header: expected each name once, got 'dtype' duplicated",
        ),
    ],
)
def test_refuses_damaged_headers(tmp_path, head, data, message):
    make(tmp_path / "model.safetensors", head, data)
    refused(tmp_path, f"model.safetensors: {message}")


def test_refuses_files_of_another_kind(tmp_path):
    (tmp_path / "model.safetensors").write_text("<!DOCTYPE html><html>Not found</html>")
    refused(tmp_path, "expected a safetensors header of at most 100000000 bytes, got .*another kind")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 7\n")
    refused(tmp_path, "model.safetensors: expected tensors, got a Git LFS pointer to them; run `git lfs pull`")


def shards(folder):
    """Two shards of two tensors and their index."""
    write(folder, {name: np.full(5, i, np.float32) for i, name in enumerate("abcd")}, max_shard_bytes=40)
    return [folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], folder / "model.safetensors.index.json"


def edit(index, **weights):
    content = json.loads(index.read_text())
    weight_map = content["weight_map"] | weights
    content["weight_map"] = {name: shard for name, shard in weight_map.items() if shard}
    index.write_text(json.dumps(content))


def test_refuses_shards_that_differ_from_their_index(tmp_path):
    (first, second), index = shards(tmp_path / "missing")
    second.unlink()
    refused(
        index.parent,
        f"index.json: expected the shard {second.name} beside it, with 2 of 4 tensors, got no such file; .*start",
    )
    (first, second), index = shards(tmp_path / "absent")
    edit(index, e=second.name)
    refused(index.parent, f"{second.name}: e: expected as model.safetensors.index.json tells, got none; ")
    (first, second), index = shards(tmp_path / "elsewhere")
    edit(index, a=second.name)
    refused(index.parent, f"index.json: a: expected in {second.name}, got it in {first.name}; ")
    (first, second), index = shards(tmp_path / "unnamed")
    edit(index, d=None)
    refused(index.parent, f"{second.name}: d: expected only tensors of model.safetensors.index.json, got this one; ")
    (first, second), index = shards(tmp_path / "twice")
    edit(index, c=None, d=None, e=second.name)
    second.write_bytes(first.read_bytes())
    refused(index.parent, f"{second.name}: expected each tensor in one shard, got 'a' duplicated: .*{first.name}")
    (first, second), index = shards(tmp_path / "cut")
    second.write_bytes(second.read_bytes()[:-1])
    refused(index.parent, f"{second.name}: truncated: ")


def test_refuses_indices_of_another_kind(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ("{", "index: expected JSON"),
        ("[1]", "index: expected a JSON object, got list"),
        ("{}", "expected 'weight_map' with the file of each tensor, got none"),
        ('{"weight_map": []}', "expected 'weight_map'"),
        ('{"weight_map": {"a": 1}}', "a: expected the name of a file in its folder, got 1"),
        ('{"weight_map": {"a": "../m.safetensors"}}', "a: expected the name of a file in its folder, got '../m"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "index: expected each name once, got 'a' duplicated"),
    ):
        index.write_text(content)
        refused(tmp_path, f"index.json: {re.escape(message)}")


def test_the_whole_file_goes_before_the_index_and_safetensors_before_pickles(tmp_path):
    shards(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_tensors(tmp_path).names() == ("a", "b", "c", "d")
    safetensors_numpy.save_file({"whole": np.ones(3)}, tmp_path / "model.safetensors")
    assert open_tensors(tmp_path).names() == ("whole",)


def test_tells_what_is_there_where_there_are_no_weights(tmp_path):
    wanted = "model.safetensors, model.safetensors.index.json, pytorch_model.bin, pytorch_model.bin.index.json"
    refused(tmp_path, f"expected one of {wanted}, got an empty folder; download the folder again")
    (tmp_path / "config.json").touch()
    refused(tmp_path, "got config.json; download")
    (tmp_path / "tf_model.h5").touch()
    refused(tmp_path, "got config.json, tf_model.h5; get the safetensors version")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    refused(tmp_path, "shards are read through their index")
    (tmp_path / "adapter_config.json").touch()
    refused(tmp_path, "this is an adapter")
    refused(tmp_path / "config.json", f"got a file; give the folder {tmp_path}")
    refused(tmp_path / "gpt2", "gpt2: expected a model folder .*, got nothing there; download the model")


def test_names_the_nearest_tensor(tmp_path):
    write(tmp_path, {"wte.weight": np.ones(3, np.float32)})
    for method in ("read", "info"):
        with pytest.raises(UserError, match="no tensor 'wte.wieght'; did you mean 'wte.weight'?"):
            getattr(open_tensors(tmp_path), method)("wte.wieght")


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with write_folder(target) as temporary:
        assert temporary.parent == target.parent and not target.exists()
        (temporary / "config.json").write_text("{}")
    assert files(target) == {"config.json": b"{}"} and list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode == target.parent.stat().st_mode


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_left_as_it_was_by_an_error(tmp_path, overwrite):
    target = tmp_path / "out"
    if overwrite:
        target.mkdir()
        (target / "old").write_text("kept")
    with pytest.raises(RuntimeError), write_folder(target, overwrite=overwrite) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == ([target] if overwrite else [])
    assert not overwrite or files(target) == {"old": b"kept"}


def test_a_full_folder_is_replaced_only_when_asked(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    with write_folder(target) as temporary:  # empty: nothing to lose
        (temporary / "old").touch()
    with pytest.raises(UserError, match="out: expected a new or empty folder, got old in it; .*overwrite"):
        with write_folder(target):
            pytest.fail("entered")
    with write_folder(target, overwrite=True) as temporary:
        assert (target / "old").exists()
        (temporary / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [target]
    with pytest.raises(UserError, match="new: expected a folder, got a file; name another"):
        with write_folder(target / "new"):
            pytest.fail("entered")
    monkeypatch.chdir(target)
    with pytest.raises(UserError, match="got one around the working directory"):
        with write_folder(target, overwrite=True):
            pytest.fail("entered")


def test_a_folder_filled_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(UserError, match="expected a new or empty folder, got theirs in it"):
        with write_folder(target):
            target.mkdir()
            (target / "theirs").touch()
    assert list(tmp_path.iterdir()) == [target]
