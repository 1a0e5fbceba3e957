"""ImageNet of examples/cifar: three forms on disk, the loader, and the recipe on small JPEG files."""

import json
import re
import struct
import sys
import tarfile
from pathlib import Path

import image_files_made as made
import numpy as np
import pytest
from case_selection import thoroughly
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_runs import alone, on_ranks, resumed_after_a_kill, weights

ROOT = Path(__file__).parents[2]
FOLDER = str(ROOT / "examples" / "cifar")
TORCH, KERAS, LOADER = (f"{FOLDER}/{name}.py" for name in ("train_torch", "train_keras", "jpeg_loader"))
SMALL = ["--preset", "slowmo-imagenet", "--any-size", "--model", "resnet8", "--pixels", "32", "--batch-size", "3"]
SMALL += ["--workers", "2", "--threads", "2"]
SHORT = ["--warmup-epochs", "1", "--epochs", "3", "--lr", "0.05", "--reduction", "ring", "--no-progress"]
FORMS = {"folder": made.write_folder, "shards": made.write_shards, "records": made.write_records}

sys.path.insert(0, FOLDER)
try:
    import image_files
    import jpeg_loader
finally:
    sys.path.remove(FOLDER)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_images_and_classes(form: str, tmp_path: Path) -> None:
    data = image_files.load(FORMS[form](tmp_path), any_size=True)
    for part, count in ((data.train, 24), (data.test, 9)):
        found = sorted((part.read(number), int(part.labels[number])) for number in range(len(part.labels)))
        assert found == sorted((made.jpeg(number), number % made.CLASSES) for number in range(count))


def test_records_are_those_of_tensorflow(tmp_path: Path) -> None:
    """A file that TensorFlow writes is read, and TensorFlow understands what the tests make."""
    import tensorflow as tf

    parsed = tf.train.Example.FromString(made.example(5))
    assert parsed.features.feature["image/class/label"].int64_list.value == [3]
    file = tmp_path / "train-00000-of-00001"
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(parsed.SerializeToString())
    (place,) = image_files._records(file)
    assert file.read_bytes()[place.offset : place.offset + place.length] == made.jpeg(5)
    assert place.label == 2


DAMAGED = {
    ("shards", "train-00001.tar", "cut"): r"train-00001\.tar is damaged: .*Copy it again",
    ("shards", "train-00001.tar", "cut between images"): r"train-00001\.tar is damaged: it ends early",
    ("records", "train-00001-of-00002", "cut"): r"train-00001-of-00002 is damaged: it ends early\. Copy it again",
    ("folder", "train/n1/0001.JPEG", "empty"): r"0001\.JPEG is empty: copy it again",
    ("folder", "val/n1", "gone"): "folders of different classes, such as n1",
    ("folder", "val", "gone"): r"24 training and 0 validation images\. Get ILSVRC 2012 from https://image-net\.org",
    ("folder", "", "too few"): "has 24 images for training and 9 for validation, not 1281167 and 50000",
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGED.items())
def test_damaged_data_is_refused_with_what_to_do(damage: tuple[str, str, str], reason: str, tmp_path: Path) -> None:
    form, name, kind = damage
    file = FORMS[form](tmp_path) / name
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-12_000])
    elif kind == "cut between images":
        places = list(image_files._shard(file))
        file.write_bytes(file.read_bytes()[: places[2].offset + -(-places[2].length // 512) * 512])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "gone":
        file.rename(tmp_path / "elsewhere")
    with pytest.raises(image_files.DataError, match=reason):
        image_files.load(tmp_path, any_size=kind != "too few")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> image_files.FileData:
    return image_files.load(made.write_shards(tmp_path_factory.mktemp("shards")), any_size=True)


def loader_of(files: image_files.ImageFiles, rank: int, size: int, batch_size: int = 3) -> jpeg_loader.JpegLoader:
    return jpeg_loader.JpegLoader(
        files,
        image_files.MEAN,
        image_files.DEVIATION,
        pixels=16,
        threads=2,
        batch_size=batch_size,
        rank=rank,
        size=size,
    )


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2), st.data())
def test_ranks_share_each_epoch_and_continue_it(
    shards: image_files.FileData, size: int, batch_size: int, epoch: int, data: st.DataObject
) -> None:
    """An image is the same, whichever rank decodes it: the batches of one rank are those of all ranks."""
    loaders = [loader_of(shards.train, rank, size, batch_size) for rank in range(size)]
    chosen = np.concatenate([np.concatenate(loader.indices(epoch)) for loader in loaders])
    assert sorted(chosen) == list(range(24))
    images = np.concatenate([images for loader in loaders for images, _ in loader.batches(epoch)])
    labels = np.concatenate([labels for loader in loaders for _, labels in loader.batches(epoch)])
    np.testing.assert_array_equal(labels, shards.train.labels[chosen])
    whole = loader_of(shards.train, 0, 1, 24)
    ((expected, _),) = whole.batches(epoch)
    np.testing.assert_array_equal(images[np.argsort(chosen)], expected[np.argsort(whole.indices(epoch)[0])])
    first = data.draw(st.integers(0, loaders[0].steps))
    rest = [images for images, _ in loaders[0].batches(epoch, first)]
    assert len(rest) == loaders[0].steps - first
    for found, before in zip(rest, [images for images, _ in loaders[0].batches(epoch)][first:], strict=True):
        assert found.tobytes() == before.tobytes()


def test_images_are_cut_as_they_should(shards: image_files.FileData) -> None:
    (images, labels), *_ = loader_of(shards.train, 0, 1, 24).batches(0)
    colours = images.mean(axis=(2, 3)) * np.array(image_files.DEVIATION) + np.array(image_files.MEAN)
    assert (colours.argmax(axis=1) == labels).all()
    middle = jpeg_loader._middle(jpeg_loader.Image.fromarray(np.arange(64, dtype=np.uint8).repeat(8).reshape(8, 64)), 7)
    assert middle.size == (7, 7)


@thoroughly
def test_ranks_learn_from_shards_and_resume_bit_identically(tmp_path: Path) -> None:
    made.write_shards(tmp_path)
    common = [*SMALL, *SHORT, "--row", "sgp-slowmo", "--period", "2", "--data", str(tmp_path)]
    simulated = alone(TORCH, *common, "--simulate", "2")
    output = tmp_path / "run"
    saving = [*common, "--output", str(output), "--save-every", "1"]
    resumed = resumed_after_a_kill(2, 1, 6, TORCH, *saving)
    assert re.search("resumed in epoch 2 after [12] steps", resumed)
    assert json.loads((output / "results.json").read_text())["weights"] == weights(simulated)


def test_a_cut_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    file = made.write_folder(tmp_path) / "train" / "n1" / "0004.JPEG"
    file.write_bytes(file.read_bytes()[:700])
    loader = loader_of(image_files.load(tmp_path, any_size=True).train, 0, 1)
    with pytest.raises(image_files.DataError, match=r"0004\.JPEG is damaged: image file is truncated.*Copy it again"):
        list(loader.batches(0))


def test_images_that_are_no_jpeg_files_or_too_large(tmp_path: Path) -> None:
    """One of ImageNet's files is a PNG file of the name of a JPEG file."""
    first, second = (made.write_folder(tmp_path) / "train" / "n1" / f"000{number}.JPEG" for number in (1, 4))
    with jpeg_loader.Image.open(first) as image:
        image.load()
        image.save(first, "PNG")
    files = image_files.load(tmp_path, any_size=True).train
    assert sum(len(labels) for _, labels in loader_of(files, 0, 1).batches(0)) == 24
    content = second.read_bytes()
    size = content.index(b"\xff\xc0") + 5
    for damaged, reason in (
        (content[:size] + struct.pack(">2H", 30_000, 30_000) + content[size + 4 :], "damaged: .*900000000 pixels"),
        (b"text" + content[4:], "no JPEG file, or is damaged"),
    ):
        second.write_bytes(damaged)
        with pytest.raises(image_files.DataError, match=rf"0004\.JPEG is {reason}.*Copy it again"):
            list(loader_of(files, 0, 1).batches(0))


def test_shards_that_tar_makes_of_a_folder(tmp_path: Path) -> None:
    """Their names begin with ./, and folders may have dots."""
    made.write_shards(tmp_path)
    for file in tmp_path.glob("*.tar"):
        with tarfile.open(file) as plain:
            members = [(member, plain.extractfile(member)) for member in plain]
            with tarfile.open(file.with_suffix(".new"), "w") as archive:
                for member, content in members:
                    member.name = f"./v1.0/{member.name}"
                    archive.addfile(member, content)
        file.with_suffix(".new").replace(file)
    data = image_files.load(tmp_path, any_size=True)
    assert sorted(map(data.train.read, range(24))) == sorted(map(made.jpeg, range(24)))


def test_two_images_of_one_name_in_a_shard_are_refused(tmp_path: Path) -> None:
    made.write_shards(tmp_path)
    with tarfile.open(tmp_path / "train-00001.tar", "a") as archive:
        first = archive.getmembers()[0].name
        archive.add(__file__, f"{first.partition('.')[0]}.JPG")
    with pytest.raises(image_files.DataError, match=r"train-00001\.tar is damaged: it has two images with the name"):
        image_files.load(tmp_path, any_size=True)


def test_too_few_images_end_every_rank_with_one_sentence(tmp_path: Path) -> None:
    made.write_folder(tmp_path)
    few = on_ranks(2, TORCH, *SMALL, "--limit", "1", "--data", str(tmp_path))
    assert few.status not in (0, None)
    assert len(re.findall("rank 0, 1: 1 images are too few for 2 ranks and batches of 3", few.output)) == 2, few.output
    assert "Traceback" not in few.output


def test_keras_trains_on_records(tmp_path: Path) -> None:
    made.write_records(tmp_path, train=12, test=4)
    common = [*SMALL, *SHORT, "--row", "ar-sgd", "--epochs", "1", "--data", str(tmp_path)]
    assert "accuracy" in alone(KERAS, *common, "--simulate", "1")


def test_missing_data_ends_every_rank_with_one_sentence(tmp_path: Path) -> None:
    missing = on_ranks(2, TORCH, *SMALL, "--data", str(tmp_path))
    assert missing.status not in (0, None)
    assert len(re.findall(r"rank 0, 1: .* holds no ImageNet: it has 0 training and 0", missing.output)) == 2
    assert "Traceback" not in missing.output


def test_the_speed_of_the_loader_is_compared_with_training() -> None:
    command = [LOADER, "--fabricate", "12", "--pixels", "64", "--batch-size", "4", "--threads", "1", "--seconds", "0.5"]
    shown = alone(*command, "--train")
    (times,) = re.findall(r"a second: the loader is ([\d.,]+) times as fast", shown)
    assert float(times.replace(",", "")) > 1, shown
