"""Data sets, their files and readers."""

import gzip
import hashlib
import io
import pathlib
import struct
import sys
import types

import numpy as np
import pytest

from distilljax import data
from distilljax.data import sources
from tests.helpers import one_line_error

_FILES = pathlib.Path(data.__file__).parent / "files"
_ORIGINALS = pathlib.Path("/usr/share/datasets/fashion-mnist")


def _idx(array):
  head = b"\x00\x00\x08" + bytes([array.ndim])
  return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _folder(path, n=5, zipped=True, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
  labels = rng.integers(0, 10, n, dtype=np.uint8)
  for prefix in ("train", "t10k"):
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
      file = path / f"{prefix}-{name}-ubyte"
      if zipped:
        file = file.with_name(file.name + ".gz")
        file.write_bytes(gzip.compress(_idx(array)))
      else:
        file.write_bytes(_idx(array))
  return images, labels


@pytest.mark.parametrize(
    "name, split",
    [(n, s) for n in ("digits", "fashion14") for s in ("train", "test")],
)
def test_packaged_sets_keep_the_contract(name, split):
  arrays, info = data.load(name, split), data.info(name)
  assert set(arrays) == {"x", "label"}
  x, label = arrays["x"], arrays["label"]
  assert x.shape == (info.rows[split], *info.sample_shape)
  assert x.dtype == np.float32 and label.dtype == np.int32
  assert label.shape == x.shape[:1]
  assert x.min() == -1.0 and x.max() == 1.0
  assert sorted(set(label)) == list(range(info.num_classes))
  assert len(info.class_names) == info.num_classes


def test_digits_are_the_file_shuffled_into_two_parts():
  text = gzip.decompress((_FILES / "digits.csv.gz").read_bytes()).decode()
  rows = [[int(v) for v in line.split(",")] for line in text.split()]
  want = sorted(tuple(row) for row in rows)
  train, test = data.load("digits", "train"), data.load("digits", "test")
  assert (len(train["x"]), len(test["x"])) == (1400, 397)
  got = []
  for part in (train, test):
    pixels = (part["x"].reshape(-1, 64).astype(np.float64) + 1) * 8
    got += [
        (*(int(v) for v in row), int(label))
        for row, label in zip(pixels, part["label"])
    ]
  assert sorted(got) == want
  # The file is sorted by writer and runs through the classes in order.
  order = {tuple(row): i for i, row in enumerate(rows)}
  positions = np.asarray([order[row] for row in got[:1400]])
  assert abs(np.corrcoef(positions, np.arange(1400))[0, 1]) < 0.1
  np.testing.assert_array_equal(
      data.load("digits")["x"], data.load("digits", "train")["x"]
  )


def test_fashion14_is_balanced_and_small():
  for split, each in (("train", 1000), ("test", 200)):
    label = data.load("fashion14", split)["label"]
    np.testing.assert_array_equal(np.bincount(label), np.full(10, each))
  assert (_FILES / "fashion14.npz").stat().st_size < 2e6
  assert (_FILES / "digits.csv.gz").stat().st_size < 65e3


def test_fashion14_values_are_whole_numbers_of_255():
  x = data.load("fashion14", "test")["x"].astype(np.float64)
  pixels = (x + 1) * 127.5
  np.testing.assert_allclose(pixels, np.round(pixels), atol=2e-5)


@pytest.mark.skipif(
    not _ORIGINALS.is_dir(), reason="dataset-fashion-mnist is not installed"
)
def test_fashion14_is_made_from_the_originals_by_the_script():
  from experiments import make_fashion14

  made = make_fashion14.make(str(_ORIGINALS))
  with np.load(_FILES / "fashion14.npz") as file:
    assert set(file.files) == set(made)
    for key in made:
      np.testing.assert_array_equal(file[key], made[key])
  # The rule again, in words: the first 200 of a class, means rounded half up.
  images, labels = data.read_fashion_mnist("test", folder=_ORIGINALS)
  chosen = [i for c in range(10) for i in np.flatnonzero(labels == c)[:200]]
  row = sorted(chosen)[123]
  image = images[row].astype(np.float64)
  for y, x in ((3, 4), (7, 7), (9, 2)):
    mean = image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean()
    assert made["test_x"][123, y, x] == np.floor(mean + 0.5)
  assert made["test_label"][123] == labels[row]


def test_every_file_has_its_checksum_and_its_licence():
  readme = (_FILES / "README.md").read_text()
  for file, digest in sources._SHA256.items():
    content = (_FILES / file).read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    assert digest in readme and f"`{file}`" in readme
    assert (_FILES / f"{file.split('.')[0]}.LICENSE").read_text()
  others = {p.name for p in _FILES.iterdir()} - set(sources._SHA256)
  assert others == {"README.md", "digits.LICENSE", "fashion14.LICENSE"}


@pytest.mark.parametrize("name", ("digits.csv.gz", "fashion14.npz"))
def test_a_damaged_or_missing_file_is_one_line(name, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "_FILES", tmp_path)
  dataset = name.split(".")[0]
  with one_line_error(f"load: .*{name} is missing", FileNotFoundError):
    data.load(dataset)
  content = bytearray((_FILES / name).read_bytes())
  (tmp_path / name).write_bytes(content[:-1])
  with one_line_error(f"load: .*{name} is corrupt: SHA-256 must be .*, got"):
    data.load(dataset)
  content[len(content) // 2] ^= 1
  (tmp_path / name).write_bytes(content)
  with one_line_error(f"load: .*{name} is corrupt"):
    data.load(dataset)


def test_unknown_names_are_one_line():
  with one_line_error("load: name must be one of .*; did you mean 'fashion14'"):
    data.load("fashion-14")
  with one_line_error("load: split must be one of 'train', 'test', got 'tset'"):
    data.load("digits", "tset")
  with one_line_error("info: name must be one of 'digits'"):
    data.info("digit")
  with one_line_error("load: folder must be None for 'digits', got '/x'"):
    data.load("digits", folder="/x")
  with one_line_error("read_fashion_mnist: split must be one of"):
    data.read_fashion_mnist("val")
  assert data.names() == ("digits", "fashion14", "fashion28")


# The idx reader.


@pytest.mark.parametrize("zipped", (True, False))
def test_fashion28_reads_the_named_folder(tmp_path, zipped):
  images, labels = _folder(tmp_path, zipped=zipped)
  for split in ("train", "test"):
    arrays = data.load("fashion28", split, folder=tmp_path)
    want = images.astype(np.float64)[..., None] / 127.5 - 1
    np.testing.assert_allclose(arrays["x"], want, atol=1e-6)
    np.testing.assert_array_equal(arrays["label"], labels)
    assert arrays["x"].dtype == np.float32
    assert arrays["label"].dtype == np.int32


def test_fashion28_looks_in_the_environment_then_in_debians_place(
    tmp_path, monkeypatch
):
  named, debian = tmp_path / "named", tmp_path / "debian"
  for place in (named / "fashion-mnist", debian):
    place.mkdir(parents=True)
  monkeypatch.setattr(sources, "_DEBIAN", debian)
  monkeypatch.delenv("DISTILLJAX_DATA", raising=False)
  with one_line_error(
      "fashion28: no train-images-idx3-ubyte.* in .*debian; apt-get install"
      " dataset-fashion-mnist, or name the folder.*DISTILLJAX_DATA",
      FileNotFoundError,
  ):
    data.load("fashion28")
  _, second = _folder(debian, seed=2)
  np.testing.assert_array_equal(data.load("fashion28")["label"], second)
  monkeypatch.setenv("DISTILLJAX_DATA", str(named))
  np.testing.assert_array_equal(data.load("fashion28")["label"], second)
  _, first = _folder(named / "fashion-mnist", seed=1)
  assert not np.array_equal(first, second)
  np.testing.assert_array_equal(data.load("fashion28")["label"], first)
  # A folder named by the user is the only one looked at.
  with one_line_error("fashion28: no train-images", FileNotFoundError):
    data.load("fashion28", folder=tmp_path)
  (named / "fashion-mnist" / "train-labels-idx1-ubyte.gz").unlink()
  with one_line_error("fashion28: no train-images.*labels", FileNotFoundError):
    data.load("fashion28", folder=named)


def test_fashion28_refuses_files_of_another_set(tmp_path):
  _folder(tmp_path, zipped=False)
  labels = tmp_path / "train-labels-idx1-ubyte"
  labels.write_bytes(_idx(np.zeros(3, np.uint8)))
  with one_line_error(r"must hold images .*\[5, 28, 28\] and \[3\]"):
    data.load("fashion28", folder=tmp_path)
  images = tmp_path / "train-images-idx3-ubyte"
  images.write_bytes(_idx(np.zeros((3, 14, 28), np.uint8)))
  with one_line_error(r"must hold images .*\[3, 14, 28\] and \[3\]"):
    data.load("fashion28", folder=tmp_path)


def test_read_idx_reads_any_shape_and_refuses_damage(tmp_path):
  array = np.arange(2 * 3 * 300, dtype=np.uint8).reshape(2, 3, 300)
  path = tmp_path / "a"
  path.write_bytes(_idx(array))
  np.testing.assert_array_equal(data.read_idx(path), array)
  for content, message in (
      (_idx(array)[:-1], r"corrupt: \[2, 3, 300\] needs 1800 values, got 1799"),
      (_idx(array) + b"x", "corrupt: .* needs 1800 values, got 1801"),
      (_idx(array)[:10], "is no idx file"),
      (b"\x00\x00\x0d" + _idx(array)[3:], "is no idx file"),
      (b"\x00\x00\x08\x00", "is no idx file"),
      (b"\x00\x00", "is no idx file"),
      (b"", "is no idx file"),
  ):
    path.write_bytes(content)
    with one_line_error(f"read_idx: .*{message}"):
      data.read_idx(path)
  zipped = tmp_path / "a.gz"
  whole = gzip.compress(_idx(array))
  for content in (whole[:-10], b"nothing", whole[:20] + b"zz" + whole[22:]):
    zipped.write_bytes(content)
    with one_line_error("read_idx: .*a.gz is corrupt: not a whole gzip file"):
      data.read_idx(zipped)
  with one_line_error("read_idx: no file .*missing", FileNotFoundError):
    data.read_idx(tmp_path / "missing")


# TensorFlow Datasets.


def _fake_tfds(records, calls):
  def data_source(name, **options):
    calls.append((name, options))
    return records

  return types.SimpleNamespace(data_source=data_source)


def test_from_tfds_reads_a_prepared_source_and_downloads_nothing(monkeypatch):
  rng = np.random.default_rng(0)
  records = [
      {"image": rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), "label": i % 3}
      for i in range(7)
  ]
  records[0]["image"][0, 0] = (0, 255, 51)
  calls = []
  monkeypatch.setitem(
      sys.modules, "tensorflow_datasets", _fake_tfds(records, calls)
  )
  arrays = data.from_tfds("set", "test", data_dir="/d", limit=5)
  assert calls == [
      ("set", {"split": "test", "data_dir": "/d", "download": False})
  ]
  assert arrays["x"].shape == (5, 4, 5, 3) and arrays["x"].dtype == np.float32
  np.testing.assert_allclose(arrays["x"][0, 0, 0], [-1, 1, -0.6], atol=1e-6)
  np.testing.assert_array_equal(arrays["label"], [0, 1, 2, 0, 1])
  assert arrays["label"].dtype == np.int32
  assert len(data.from_tfds("set", limit=100)["x"]) == 7
  assert len(data.from_tfds("set")["x"]) == 7
  # The same rows without loading them, in the same batches.
  source = data.tfds_source("set", "test", data_dir="/d")
  assert source is records and calls[-1] == calls[0]
  iterator = data.source_iterator(
      source, 3, seed=1, transform=data.image_rows()
  )
  memory = data.make_iterator(data.from_tfds("set"), 3, seed=1)
  for _ in range(5):
    ours, theirs = next(iterator), next(memory)
    for key in ("x", "label"):
      np.testing.assert_array_equal(ours[key], theirs[key])
      assert ours[key].dtype == theirs[key].dtype


def test_from_tfds_takes_grey_images_and_other_names(monkeypatch):
  records = [{"pixels": np.full((4, 5), 255, np.uint8), "digit": 8}]
  monkeypatch.setitem(
      sys.modules, "tensorflow_datasets", _fake_tfds(records, [])
  )
  arrays = data.from_tfds("set", image="pixels", label="digit")
  np.testing.assert_array_equal(arrays["x"], np.ones((1, 4, 5, 1)))
  np.testing.assert_array_equal(arrays["label"], [8])
  with one_line_error("image_rows: feature must be one of 'pixels', 'digit'"):
    data.from_tfds("set")
  with one_line_error("image_rows: feature must be one of .*got 'label'"):
    data.from_tfds("set", image="pixels")
  records[0]["pixels"] = np.zeros((4, 5), np.float32)
  with one_line_error(
      r"image_rows: feature 'pixels' must be uint8 \[h, w\] or \[h, w, c\], got"
      r" float32 \[4, 5\]"
  ):
    data.from_tfds("set", image="pixels", label="digit")
  records[0]["pixels"] = np.zeros(4, np.uint8)
  with one_line_error("image_rows: feature 'pixels' must be uint8"):
    data.from_tfds("set", image="pixels", label="digit")


def test_from_tfds_without_the_package_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with one_line_error(r"tfds_source: .* pip install 'distilljax\[data\]'",
                      ImportError):
    data.from_tfds("mnist")


def test_npz_is_plain_numpy():
  content = (_FILES / "fashion14.npz").read_bytes()
  with np.load(io.BytesIO(content), allow_pickle=False) as file:
    assert {k: file[k].dtype for k in file.files} == dict.fromkeys(
        ("train_x", "train_label", "test_x", "test_label"), np.uint8
    )
