"""The archives and the loader of examples/cifar, in this process."""

import pickle  # noqa: TID251 - of what these tests made themselves
import sys
import tarfile
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import image_archives as made
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

FOLDER = str(Path(__file__).parents[2] / "examples" / "cifar")
sys.path.insert(0, FOLDER)
try:
    import archives
    import loader
    import recipes
    import training
finally:
    sys.path.remove(FOLDER)


def test_cifar_10_in_both_versions_and_packed_is_the_same(tmp_path: Path) -> None:
    binary = made.write_cifar10_binary(tmp_path / "binary")
    python = tmp_path / "python" / "cifar-10-batches-py"
    python.mkdir(parents=True)
    for file in binary.iterdir():
        pixels, labels = archives.read_binary(file.read_bytes(), 1)
        (python / file.stem).write_bytes(made.python_file(pixels, labels, b"labels"))
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "cifar-10-python.tar.gz", "w:gz") as packed:
        packed.add(python, "cifar-10-batches-py")
    expected = [made.images(20, seed=number) for number in range(1, 6)]
    for version in ("binary", "python", "packed"):
        data = archives.load("cifar10", tmp_path / version, any_size=True)
        assert data.classes == 10
        np.testing.assert_array_equal(data.train[0], np.concatenate([pixels for pixels, _ in expected]), version)
        np.testing.assert_array_equal(data.train[1], np.concatenate([labels for _, labels in expected]), version)
        np.testing.assert_array_equal(data.test[0], made.images(40, seed=6)[0], version)


def test_made_python_files_are_pickles_of_arrays() -> None:
    """What the reader takes from the opcodes is what Python itself would load."""
    pixels, labels = made.images(7, 100)
    content = made.python_file(pixels, labels, b"fine_labels")
    loaded = pickle.loads(content, encoding="bytes")
    read = archives.read_python(content, b"fine_labels")
    np.testing.assert_array_equal(read[0].reshape(7, -1), loaded[b"data"])
    assert read[1].tolist() == loaded[b"fine_labels"] == labels.tolist()


def test_an_array_in_fortrans_order_is_read_by_columns() -> None:
    pixels, labels = made.images(7)
    array = np.asfortranarray(pixels.reshape(7, -1))
    content = pickle.dumps({"data": array, "labels": labels.tolist()}, protocol=2)
    np.testing.assert_array_equal(archives.read_python(content, b"labels")[0], pixels)


def test_a_folder_that_cannot_be_read_ends_all_ranks(tmp_path: Path) -> None:
    """The name is too long: root could read a folder without permissions."""
    recipe = recipes.PRESETS["slowmo-cifar10"]["sgp"]
    options = Namespace(recipe=recipe, data=tmp_path / ("x" * 300), any_size=False, limit=None)
    others = SimpleNamespace(allgather_object=lambda problem: [problem, None])
    with pytest.raises(SystemExit, match="rank 0: .*File name too long"):
        training.load_data(others, options)


def test_ranks_with_different_images_end(tmp_path: Path) -> None:
    """And a run does not continue with other images."""
    made.write_cifar10_binary(tmp_path)
    recipe = recipes.PRESETS["slowmo-cifar10"]["sgp"]
    options = Namespace(recipe=recipe, data=tmp_path, any_size=True, limit=None)
    checksum = archives.load("cifar10", tmp_path, any_size=True).checksum
    others = SimpleNamespace(allgather_object=lambda mine: [mine, None if mine is None else "00000000"])
    with pytest.raises(SystemExit, match=rf"differ between the ranks, by checksum rank 0: {checksum}, rank 1: 0{{8}}"):
        training.load_data(others, options)
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    archives.load.cache_clear()
    assert archives.load("cifar10", tmp_path, any_size=True).checksum != checksum


def test_a_pickle_that_runs_a_program_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.mkdir, (tmp_path / "run",)  # type: ignore[return-value]

    content = pickle.dumps({"labels": [1], "data": Hostile()}, protocol=2)
    with pytest.raises(ValueError, match="labels and"):
        archives.read_python(content, b"labels")
    assert not (tmp_path / "run").exists()
    pickle.loads(content)  # it would have run
    assert (tmp_path / "run").exists()


def test_cifar_100_takes_the_fine_labels(tmp_path: Path) -> None:
    made.write_cifar100_python(tmp_path)
    assert (archives.load("cifar100", tmp_path, any_size=True).train[1] == made.images(24, 100, 0)[1]).all()
    pixels, labels = made.images(9, 100)
    np.testing.assert_array_equal(archives.read_binary(made.binary_file(pixels, labels, coarse=True), 2)[1], labels)


def test_fashion_mnist_is_padded_to_32_pixels(tmp_path: Path) -> None:
    made.write_fashion_mnist(tmp_path)
    data = archives.load("fashion-mnist", tmp_path, any_size=True)
    assert data.train[0].shape == (100, 1, 32, 32)
    assert not data.train[0][:, :, :2].any()
    np.testing.assert_array_equal(data.train[0][:, :, 2:-2, 2:-2], made.images(100, channels=1)[0][:, :, 2:-2, 2:-2])


DAMAGED = {
    "cut": "data_batch_3.bin: its 61000 bytes are not a whole number of records of 3073 bytes",
    "gone": "it has no file data_batch_3.bin",
    "a label of 11": "labels beyond 9",
    "too few": "has 100 images for training and 40 for tests, not 50000 and 10000",
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGED.items())
def test_damaged_cifar_is_refused_with_what_to_do(damage: str, reason: str, tmp_path: Path) -> None:
    file = made.write_cifar10_binary(tmp_path) / "data_batch_3.bin"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:61_000])
    elif damage == "gone":
        file.unlink()
    elif damage == "a label of 11":
        file.write_bytes(b"\x0b" + file.read_bytes()[1:])
    with pytest.raises(archives.DataError, match=reason) as error:
        archives.load("cifar10", tmp_path, any_size=damage != "too few")
    assert "et it again" in str(error.value) or "again from https://www.cs.toronto.edu" in str(error.value)


@pytest.mark.parametrize("length", [0, 3, 1000, -1])
def test_cut_archives_are_refused(length: int, tmp_path: Path) -> None:
    archive = made.write_cifar100_python(tmp_path / "cifar")
    archive.write_bytes(archive.read_bytes()[:length])
    with pytest.raises(archives.DataError, match=r"cifar-100-python\.tar\.gz is damaged: .* again from https"):
        archives.load("cifar100", tmp_path / "cifar", any_size=True)
    images = made.write_fashion_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:length])
    with pytest.raises(archives.DataError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        archives.load("fashion-mnist", tmp_path, any_size=True)


def test_missing_data_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(archives.DataError, match=r"toronto.*cifar-10-batches-bin/ or .*cifar-10-python\.tar\.gz"):
        archives.load("cifar10", tmp_path)
    with pytest.raises(archives.DataError, match=r"train-images-idx3-ubyte .*make data"):
        archives.load("fashion-mnist", tmp_path)


def loader_of(count: int, rank: int, size: int, batch_size: int, seed: int = 0) -> loader.Loader:
    pixels = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 32, 32), np.uint8)
    part = pixels, (np.arange(count) % 10).astype(np.uint8)
    return loader.Loader(part, (0.5,), (0.25,), batch_size=batch_size, rank=rank, size=size, seed=seed)


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_ranks_share_each_epoch_without_loss_or_repetition(
    count: int, size: int, batch_size: int, seed: int, epoch: int
) -> None:
    steps = -(-count // (batch_size * size))
    if count < steps * size:
        with pytest.raises(archives.DataError, match="too few"):
            loader_of(count, 0, size, batch_size)
        return
    by_rank = [loader_of(count, rank, size, batch_size, seed).indices(epoch) for rank in range(size)]
    assert {len(batches) for batches in by_rank} == {steps}
    lengths = {len(batch) for batches in by_rank for batch in batches}
    assert 0 < min(lengths) <= max(lengths) <= min(batch_size, min(lengths) + 1)
    assert sorted(np.concatenate([np.concatenate(batches) for batches in by_rank])) == list(range(count))


@given(st.integers(8, 60), st.integers(1, 3), st.data())
def test_an_epoch_continues_from_any_step(count: int, size: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, size - 1))
    assume(count >= -(-count // (4 * size)) * size)
    batches = list(loader_of(count, rank, size, 4).batches(1))
    first = data.draw(st.integers(0, len(batches)))
    rest = list(loader_of(count, rank, size, 4).batches(1, first))
    assert len(rest) == len(batches) - first
    for (found, labels), (expected, expected_labels) in zip(rest, batches[first:], strict=True):
        assert found.tobytes() == expected.tobytes()
        assert labels.tolist() == expected_labels.tolist()


def test_epochs_and_seeds_differ_and_repeat() -> None:
    order = [
        np.concatenate(loader_of(60, 0, 1, 7, seed).indices(epoch)).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert order[0] != order[1] != order[2] != order[0]
    assert np.concatenate(loader_of(60, 0, 1, 7).indices(0)).tolist() == order[0]


def test_augmentation_is_a_shift_of_at_most_4_pixels_and_a_flip() -> None:
    image = np.arange(1, 1025, dtype=np.uint16).astype(np.uint8).reshape(1, 1, 32, 32)
    images = np.repeat(image, 400, axis=0)
    found = {crop.tobytes() for crop in loader.augmented(images, np.random.default_rng(0))}
    padded = np.pad(image[0], ((0, 0), (4, 4), (4, 4)))
    crops = [padded[:, top : top + 32, left : left + 32] for top in range(9) for left in range(9)]
    possible = {crop.tobytes() for crop in crops} | {crop[:, :, ::-1].tobytes() for crop in crops}
    assert found <= possible
    assert len(found) > 100  # of 162


def test_batches_are_normalized() -> None:
    ((images, labels),) = loader.Loader(
        (np.full((2, 3, 32, 32), 255, np.uint8), np.array([3, 4], np.uint8)), (0.5, 0.25, 1.0), (0.25, 0.5, 1.0),
        batch_size=2, rank=0, size=1, augment=False,
    ).batches(0)  # fmt: skip
    np.testing.assert_allclose(images[:, :, 0, 0], [[2.0, 1.5, 0.0]] * 2, rtol=0, atol=1e-6)
    assert labels.tolist() == [3, 4]


def test_schedules_are_those_of_the_papers() -> None:
    row = recipes.PRESETS["slowmo-cifar10"]["sgp-slowmo"]
    assert row.learning_rate(0, 0, 100, 32) == pytest.approx(1.6 / 32 + (1.6 - 1.6 / 32) / 500)
    assert row.learning_rate(4, 99, 100, 32) == pytest.approx(1.6)
    rates = {epoch: row.learning_rate(epoch, 0, 100, 32) for epoch in (5, 99, 100, 149, 150, 174, 175, 199)}
    assert list(rates.values()) == pytest.approx([1.6, 1.6, 0.16, 0.16, 0.016, 0.016, 0.0016, 0.0016])
    assert row.learning_rate(50, 0, 100, 8) == pytest.approx(0.4)  # a quarter of the ranks
    decayed = recipes.PRESETS["adacomm-vgg16-cifar10"]["adacomm-decay"]
    assert [decayed.learning_rate(epoch, 0, 100, 4) for epoch in (0, 79, 80, 200)] == pytest.approx(
        [0.2, 0.2, 0.02, 2e-5]
    )


def test_modules_are_the_examples_own() -> None:
    assert all(
        isinstance(module, ModuleType) and FOLDER in str(module.__file__) for module in (archives, loader, recipes)
    )
