"""Safetensors folders: what is written is what the safetensors package reads, and each way in which one can be wrong."""

from __future__ import annotations

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from neo.errors import InputError
from neo.models.hf.arrays import ahead, contiguous, in_order
from neo.models.hf.files import INDEX, ONE_FILE, SafetensorsFolder, ShardWriter, plan_shards, read_header

BF16 = np.dtype(ml_dtypes.bfloat16)
SECOND = "model-00002-of-00003.safetensors"


def drawn():
    """Tensors of several types and shapes, some of them transposed views."""
    rng = np.random.default_rng(0)
    return {
        "embed": rng.standard_normal((40, 6)).astype(BF16),
        "a.weight": rng.standard_normal((5, 7)).astype(BF16).T,
        "a.bias": rng.standard_normal(7).astype(np.float32),
        "b.weight": rng.standard_normal((4, 3, 2)).astype(np.float32).transpose(2, 0, 1),
        "half": rng.standard_normal((10, 10)).astype(np.float16),
        "gain": np.float32(3.5).reshape(()),
        "count": np.arange(30),
        "nothing": np.zeros((0, 4), BF16),
    }


def write(folder, tensors, shard_bytes=10**9):
    writer = ShardWriter(folder, {name: (array.shape, array.dtype) for name, array in tensors.items()}, shard_bytes)
    for name in writer.pending:
        writer.write(name, tensors[name])
    return writer.close()


@pytest.fixture
def sharded(tmp_path):
    """Three shards and their index, to be damaged."""
    files = write(tmp_path / "model", drawn(), 500)
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]
    return tmp_path / "model"


@pytest.mark.parametrize("shard_bytes", [10**9, 500])
def test_the_safetensors_package_reads_what_is_written(tmp_path, shard_bytes):
    from safetensors import safe_open
    tensors = drawn()
    files = write(tmp_path, tensors, shard_bytes)
    assert sorted(os.listdir(tmp_path)) == sorted(files)
    found = {}
    for file in files:
        if file == INDEX:
            continue
        with safe_open(tmp_path / file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: (file, opened.get_tensor(name)) for name in opened.keys()}   # noqa: SIM118  not iterable otherwise
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name][1].dtype == array.dtype and found[name][1].shape == array.shape
        assert found[name][1].tobytes() == array.tobytes()
    if shard_bytes == 500:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"] == {"total_size": sum(a.nbytes for a in tensors.values()),
                                     "total_parameters": sum(a.size for a in tensors.values())}
        assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    else:
        assert files == [ONE_FILE]


@pytest.mark.parametrize("shard_bytes", [10**9, 500])
def test_what_is_written_is_read_back(tmp_path, shard_bytes):
    tensors = drawn()
    write(tmp_path, tensors, shard_bytes)
    folder = SafetensorsFolder(tmp_path)
    assert folder.tensors.keys() == tensors.keys() and folder.num_bytes == sum(a.nbytes for a in tensors.values())
    for name, array in tensors.items():
        assert folder[name].dtype == array.dtype
        assert folder[name].begin % array.dtype.itemsize == 0   # so that a file mapped into memory can be used in place
        np.testing.assert_array_equal(folder.read(name), array, strict=True)
    np.testing.assert_array_equal(folder.read("embed", 3, 11), tensors["embed"][3:11])
    np.testing.assert_array_equal(folder.read("embed", 38, 99), tensors["embed"][38:])
    assert "embed" in folder and "other" not in folder
    with pytest.raises(InputError, match=r"has no tensor embd \(did you mean 'embed'"):
        folder.read("embd")


def test_what_the_safetensors_package_writes_is_read(tmp_path):
    from safetensors.numpy import save_file
    tensors = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in drawn().items()}
    save_file(tensors, tmp_path / ONE_FILE)
    folder = SafetensorsFolder(tmp_path)
    assert folder.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(folder.read(name), array, strict=True)


def test_a_new_file_begins_where_one_would_grow_too_large():
    gb = 10**9
    sizes = {"a": 3 * gb, "b": 2 * gb, "c": 1, "d": 7 * gb, "e": gb}
    assert plan_shards(sizes, 5 * gb) == {
        "model-00001-of-00004.safetensors": ("a", "b"), "model-00002-of-00004.safetensors": ("c",),
        "model-00003-of-00004.safetensors": ("d",), "model-00004-of-00004.safetensors": ("e",)}
    assert plan_shards(sizes, 99 * gb) == {ONE_FILE: tuple("abcde")}
    assert len(plan_shards(sizes)) == 4   # 5 GB is the default


def test_an_interrupted_folder_goes_on_after_its_last_whole_file(sharded, tmp_path):
    tensors, out = drawn(), tmp_path / "out"
    specs = {name: (array.shape, array.dtype) for name, array in tensors.items()}
    first = ShardWriter(out, specs, 500)
    assert first.pending_bytes == first.num_bytes
    whole = first.plan["model-00001-of-00003.safetensors"]
    for name in first.pending[:len(whole) + 1]:   # and one of the second file
        first.write(name, tensors[name])
    before = (out / "model-00001-of-00003.safetensors").stat()
    assert sorted(os.listdir(out)) == ["model-00001-of-00003.safetensors", SECOND + ".partial"]
    second = ShardWriter(out, specs, 500)
    assert set(second.pending) == set(tensors) - set(whole)
    assert second.pending_bytes == second.num_bytes - sum(tensors[name].nbytes for name in whole)
    with pytest.raises(ValueError, match="was never written"):
        second.close()
    third = ShardWriter(out, specs, 500)
    for name in third.pending:
        third.write(name, tensors[name])
    third.close()
    assert (out / "model-00001-of-00003.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in sharded.iterdir()}


def test_a_file_of_another_header_or_size_is_written_again(sharded):
    specs = {name: (array.shape, array.dtype) for name, array in drawn().items()}
    assert ShardWriter(sharded, specs, 500).pending == ()
    os.truncate(sharded / SECOND, (sharded / SECOND).stat().st_size - 1)
    lost = ShardWriter(sharded, specs, 500)
    assert set(lost.pending) == set(lost.plan[SECOND])
    other = ShardWriter(sharded, {name + "x": spec for name, spec in specs.items()}, 500)
    assert len(other.pending) == len(specs)


def test_the_writer_takes_only_what_was_planned(tmp_path):
    def writer():
        return ShardWriter(tmp_path, {"a": ((2, 3), np.float32), "b": ((2,), np.float32)})
    with pytest.raises(ValueError, match="b is written out of turn: a is next"):
        writer().write("b", np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"a: float64\(2, 3\) was given, float32\(2, 3\) was planned"):
        writer().write("a", np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"a: float32\(3, 2\) was given"):
        writer().write("a", np.zeros((3, 2), np.float32))
    with pytest.raises(InputError, match="tensor c: safetensors has no type for complex64"):
        ShardWriter(tmp_path, {"c": ((1,), np.complex64)})
    with pytest.raises(InputError, match="shard size 0"):
        ShardWriter(tmp_path, {}, 0)


def edit_index(change):
    def damage(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))
    return damage


@pytest.mark.parametrize("damage,named", [
    (lambda folder: (folder / SECOND).unlink(), f"{SECOND} is missing; {INDEX} puts . tensors there"),
    (edit_index(lambda m: m.update(ghost=SECOND)), f"{SECOND} has no tensor ghost, which {INDEX} puts there"),
    (edit_index(lambda m: m.pop("half")), f"holds the tensor half, which {INDEX} does not put there"),
    (edit_index(lambda m: m.update(embed=SECOND)), "has no tensor embed"),
    (edit_index(lambda m: m.update(embed="../x.safetensors")), "names the file '../x.safetensors'; only"),
    (edit_index(lambda m: m.update(embed="pytorch_model.bin")), "names the file 'pytorch_model.bin'; only"),
    (edit_index(lambda m: m.update(embed=7)), "is not an index of safetensors files"),
    (edit_index(lambda m: m.clear()), "is not an index of safetensors files"),
    (lambda folder: (folder / INDEX).write_text("{"), "is not an index of safetensors files"),
    (lambda folder: (folder / INDEX).write_text("[]"), "is not an index of safetensors files"),
    (lambda folder: (folder / INDEX).unlink(), f"has model-00001-of-00003.safetensors, but neither {ONE_FILE} nor {INDEX}"),
    (lambda folder: os.truncate(folder / SECOND, 300), f"{SECOND}: .* it is cut short"),
    (lambda folder: os.truncate(folder / SECOND, 20), f"{SECOND}: the header should have [\\d,]+ bytes, the file has 20 bytes"),
    (lambda folder: os.truncate(folder / SECOND, 0), f"{SECOND}: the header should have 0 bytes, the file has 0"),
    (lambda folder: (folder / SECOND).open("ab").write(b"more"), f"{SECOND}: its tensors need .* it is damaged"),
    (lambda folder: shutil.rmtree(folder), "is not a folder"),
])
def test_a_damaged_folder_is_refused(sharded, damage, named):
    damage(sharded)
    with pytest.raises(InputError, match=named) as caught:
        SafetensorsFolder(sharded)
    assert "\n" not in str(caught.value)


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def text(**entries):
    return json.dumps(entries).encode()


@pytest.mark.parametrize("header,named", [
    (text(a=entry()), None),
    (b"[]", "the header is damaged"), (b"{", "the header is damaged"), (b"\xff", "the header is damaged"),
    (b"[" * 20000, "the header is damaged"),
    (b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2), "the header is damaged .a is there 2 times"),
    (text(a=entry(dtype="F6")), "tensor a has type 'F6'; neo reads F64, F32"),
    (text(a=entry(shape=(2, 4))), r"tensor a of type F32 and shape \(2, 4\) needs 32 bytes, the header gives it 24"),
    (text(a=entry(shape=(2**40, 2**40))), "the header gives it 24"),
    (text(a=entry(offsets=(0, 10**15), shape=(10**15 // 4,))), "its tensors need 1,000,000,000,"),
    (text(a=entry(shape=(-2, -3))), "entry of tensor a is damaged"), (text(a=entry(shape=(True, 6))), "tensor a is damaged"),
    (text(a=entry(offsets=(24,))), "tensor a is damaged"), (text(a=7), "tensor a is damaged"),
    (text(a={}), "entry of tensor a is damaged"), (text(a=entry(offsets=("0", "24"))), "tensor a is damaged"),
    (text(a=entry(offsets=(8, 32))), "tensor a begins at byte .* the one before it ends"),
    (text(a=entry(), b=entry()), "tensor b begins at byte"),
])
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, header, named):
    path = tmp_path / ONE_FILE
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    if named is None:
        assert read_header(path)["a"].shape == (2, 3)
        return
    with pytest.raises(InputError, match=named) as caught:
        SafetensorsFolder(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_an_absurd_header_length_allocates_nothing(tmp_path):
    for length in (2**63, 2**40, 10**9):
        (tmp_path / ONE_FILE).write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(InputError, match=f"the header should have {length:,} bytes, the file has 10 bytes"):
            SafetensorsFolder(tmp_path)
    os.truncate(tmp_path / ONE_FILE, 2 * 10**9)   # sparse: long enough for it
    with pytest.raises(InputError, match=r"at most 100,000,000 are allowed"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("names,named", [
    (["pytorch_model.bin", "config.json"], r"only pickled weights \(pytorch_model.bin\).*safetensors.*save_pretrained"),
    (["consolidated.00.pth"], r"only pickled weights \(consolidated.00.pth\)"),
    (["config.json", "training_args.bin"], f"has no weights: neither {ONE_FILE} nor {INDEX}"), ([], "has no weights")])
def test_a_folder_without_safetensors_says_how_to_get_them(tmp_path, names, named):
    for name in names:
        (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=named):
        SafetensorsFolder(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    write(tmp_path, {"a": np.zeros((8, 8), np.float32)})
    folder = SafetensorsFolder(tmp_path)
    os.truncate(tmp_path / ONE_FILE, 200)
    with pytest.raises(InputError, match="became shorter while it was read"):
        folder.read("a")


def test_large_arrays_are_put_in_order_by_parts(tmp_path):
    """Beyond a megabyte several threads share the work, and the writer takes more than one block."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**16, (1100, 70, 9), np.uint16)
    for axes in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2), (0, 2, 1)):
        view = base.transpose(axes)
        for made in (contiguous(view), in_order(view)):
            assert made.flags.c_contiguous
            np.testing.assert_array_equal(made, view, strict=True)
        np.testing.assert_array_equal(contiguous(view, np.int32), view)
        np.testing.assert_array_equal(contiguous(view[::-1, :, ::2]), view[::-1, :, ::2], strict=True)
    small = np.arange(6.0).reshape(2, 3).T
    np.testing.assert_array_equal(contiguous(small, np.float32), small)
    assert contiguous(small.T) is small.T or contiguous(small.T).base is small.base
    assert contiguous(np.float32(2).reshape(())).shape == () and contiguous(np.array(2.0), np.float32).shape == ()
    wide = rng.integers(0, 255, (3000, 12_000), np.uint8).T
    write(tmp_path, {"wide": wide})
    np.testing.assert_array_equal(SafetensorsFolder(tmp_path).read("wide"), wide)


def test_reading_ahead_keeps_the_order_and_stops_at_an_error():
    assert list(ahead(lambda n: n * n, range(5))) == [(n, n * n) for n in range(5)]
    made = []

    def make(n):
        made.append(n)
        return 1 // (3 - n)
    taken = []
    with pytest.raises(ZeroDivisionError):
        for job, _ in ahead(make, range(100)):
            taken.append(job)
    assert taken == [0, 1, 2] and len(made) <= 6
