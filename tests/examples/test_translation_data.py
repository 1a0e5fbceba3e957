"""The text, the batches and the rows of examples/translation, in this process."""

import gettext
import io
import os
import re
import shutil
import struct
import subprocess
import sys
from argparse import Namespace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_texts import write_parallel_text

import lentando.torch as lt

FOLDER = str(Path(__file__).parents[2] / "examples" / "translation")
sys.path.insert(0, FOLDER)
try:
    import catalogues
    import parallel_text
    import token_batches
    import translation_recipes
    import translation_training
finally:
    sys.path.remove(FOLDER)


def write_vocabulary(folder: Path, **special: int) -> None:
    made = BytesIO()
    numbers = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | special
    with (folder / "train.en").open() as english, (folder / "train.de").open() as german:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*english, *german]), model_writer=made, vocab_size=60, model_type="bpe",
            minloglevel=2, **numbers,
        )  # fmt: skip
    (folder / "vocabulary.model").write_bytes(made.getvalue())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = write_parallel_text(tmp_path / "text", train=30)
    write_vocabulary(folder)
    return folder


def test_text_becomes_sub_words_and_text_again(text: Path) -> None:
    corpus = parallel_text.load(text, "en", "de")
    assert [len(corpus.train), len(corpus.valid), len(corpus.test)] == [30, 12, 12]
    for side, language in ((corpus.train.source, "en"), (corpus.train.target, "de")):
        expected = (text / f"train.{language}").read_text().splitlines()
        rows = side.padded(np.arange(30))
        assert rows.shape == (30, side.lengths.max())
        for row, length, sentence in zip(rows, side.lengths, expected, strict=True):
            assert row[length - 1] == parallel_text.EOS
            assert not row[length:].any()
            assert corpus.vocabulary.decode(row[: length - 1].tolist()) == sentence
    assert corpus.references["test"] == (text / "test.de").read_text().splitlines()


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    """Others, such as U+2028, occur within sentences of crawled text."""
    file = tmp_path / "text"
    file.write_bytes("a\u2028b\x0bc\u0085d\r\ne\n".encode())
    assert list(parallel_text.lines(file)) == ["a\u2028b\x0bc\u0085d", "e"]


DAMAGED = {
    "cut": r"train\.de is cut: line 30 has no end\. Copy it again",
    "cut within a character": r"train\.de is cut: line 30",
    "no UTF-8": r"train\.de is damaged: line 2 is no UTF-8 text",
    "empty": r"train\.de is empty",
    "gone": r"holds no parallel text: .*train\.de missing",
    "a line is missing": r"train\.en has 30 lines and .*train\.de has 29: line N of one",
    "no vocabulary": r"no vocabulary .*vocabulary\.model: python examples/translation/vocabulary\.py --data",
    "cut vocabulary": r"vocabulary\.model is no sentencepiece vocabulary, or it is damaged: python examples",
    "other vocabulary": r"vocabulary\.model has other numbers for padding, end and unknown than 0, 1, 2: python",
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGED.items())
def test_damaged_text_is_refused_with_what_to_do(damage: str, reason: str, text: Path) -> None:
    file, vocabulary = text / "train.de", text / "vocabulary.model"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "cut within a character":
        file.write_bytes(content + "ü".encode()[:1])
        file.write_bytes(b"".join(content.splitlines(keepends=True)[:29]) + "ü".encode()[:1])
    elif damage == "no UTF-8":
        first, _, rest = content.partition(b"\n")
        file.write_bytes(first + b"\n\xfc" + rest)
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "gone":
        file.unlink()
    elif damage == "a line is missing":
        file.write_bytes(content.partition(b"\n")[2])
    elif damage == "no vocabulary":
        vocabulary.unlink()
    elif damage == "cut vocabulary":
        vocabulary.write_bytes(vocabulary.read_bytes()[:100])
    else:
        write_vocabulary(text, pad_id=-1, bos_id=1, eos_id=2, unk_id=0)
    with pytest.raises(parallel_text.DataError, match=reason):
        parallel_text.load(text, "en", "de")


def test_ranks_with_different_text_end(text: Path) -> None:
    def gathered(mine: object) -> list[object]:
        return [mine, None if mine is None else "00000000"]

    others = SimpleNamespace(allgather_object=gathered, rank=lambda: 0, size=lambda: 2)
    recipe = translation_recipes.Recipe(batch_tokens=80)
    options = Namespace(recipe=recipe, data=text, source="en", target="de", seed=0)
    with pytest.raises(SystemExit, match=r"differ between the ranks, by checksum rank 0: \w{8}, rank 1: 00000000"):
        translation_training.TranslationCourse(others, options)


def pairs_of(lengths: list[tuple[int, int]]) -> parallel_text.Pairs:
    """Pairs whose sub-words are their number."""
    sides = []
    for side in zip(*lengths, strict=True):
        numbers = np.repeat(np.arange(1, len(side) + 1, dtype=np.int32), side)
        sides.append(parallel_text.Sentences(numbers, np.cumsum([0, *side])))
    return parallel_text.Pairs(*sides)


LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 7), st.integers(12, 60), st.integers(0, 2), st.booleans())
def test_ranks_share_each_epoch_without_loss_or_repetition(
    lengths: list[tuple[int, int]], size: int, batch_tokens: int, epoch: int, shuffle: bool
) -> None:
    pairs = pairs_of(lengths)
    given_to = {"batch_tokens": batch_tokens, "size": size, "seed": 3, "shuffle": shuffle}
    needed = len(token_batches._counts(np.sort(pairs.lengths), batch_tokens))
    if -(-needed // size) * size > len(pairs):
        with pytest.raises(parallel_text.DataError, match=f"{len(pairs)} sentence pairs are too few for {size} ranks"):
            token_batches.TokenBatches(pairs, **given_to, rank=0)
        return
    ranks = [token_batches.TokenBatches(pairs, **given_to, rank=rank) for rank in range(size)]
    by_rank = [rank.indices(epoch) for rank in ranks]
    assert {len(batches) for batches in by_rank} == {ranks[0].steps} == {rank.steps for rank in ranks}
    taken = [number for batches in by_rank for batch in batches for number in batch]
    assert sorted(taken) == list(range(len(lengths)))
    for rank, batches in zip(ranks, by_rank, strict=True):
        for chosen, (source, target) in zip(batches, rank.batches(epoch), strict=True):
            assert 0 < max(source.size, target.size) <= batch_tokens
            np.testing.assert_array_equal(np.unique(source[source != 0]), np.sort(chosen + 1))
            np.testing.assert_array_equal((target != 0).sum(axis=1), pairs.target.lengths[chosen])


@given(st.integers(20, 60), st.integers(1, 3), st.data())
def test_an_epoch_continues_from_any_step(count: int, size: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, size - 1))
    lengths = np.random.default_rng(count).integers(1, 5, (count, 2)).tolist()
    loader = token_batches.TokenBatches(pairs_of(lengths), batch_tokens=24, rank=rank, size=size)
    batches = list(loader.batches(1))
    first = data.draw(st.integers(0, len(batches)))
    rest = list(loader.batches(1, first))
    assert len(rest) == len(batches) - first
    for (source, target), (expected, expected_target) in zip(rest, batches[first:], strict=True):
        assert source.tobytes() == expected.tobytes()
        assert target.tobytes() == expected_target.tobytes()


def test_epochs_and_seeds_differ_and_repeat_and_ranks_take_equally_long() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, (500, 2)).tolist()

    def loader(rank: int = 0, seed: int = 0) -> token_batches.TokenBatches:
        return token_batches.TokenBatches(pairs_of(lengths), batch_tokens=200, rank=rank, size=4, seed=seed)

    orders = [np.concatenate(loader(seed=seed).indices(epoch)).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert np.concatenate(loader().indices(0)).tolist() == orders[0]
    longest = np.array(
        [[max(pair.shape[1] for pair in batch) for batch in loader(rank).batches(0)] for rank in range(4)]
    )
    assert np.mean(longest.max(axis=0) - longest.min(axis=0)) < 2


def test_a_pair_that_fits_into_no_batch_is_named() -> None:
    with pytest.raises(parallel_text.DataError, match="a sentence of 30 sub-words does not fit into batches of 20"):
        token_batches.TokenBatches(pairs_of([(3, 30), (2, 2)]), batch_tokens=20, rank=0, size=1)
    kept = pairs_of([(3, 30), (2, 5), (7, 1)]).up_to(7)
    assert kept.source.lengths.tolist() == [2, 7]
    assert kept.target.padded(np.arange(2)).tolist() == [[2, 2, 2, 2, 2], [3, 0, 0, 0, 0]]


def test_the_schedule_is_that_of_transformers() -> None:
    row = translation_recipes.PRESETS["slowmo-wmt16"]["ar-adam"]
    assert [row.learning_rate(step) for step in (0, 1999, 3999, 15_999)] == pytest.approx(
        [5e-4 / 4000, 2.5e-4, 5e-4, 2.5e-4]
    )


@pytest.mark.parametrize(("name", "row"), translation_recipes.PRESETS["slowmo-wmt16"].items())
def test_rows_are_the_methods_of_their_names(name: str, row: translation_recipes.Recipe) -> None:
    lt.init()
    model = torch.nn.Linear(3, 2)
    shown = repr(row.optimizer(lt, torch.optim.Adam(model.parameters(), 1e-3), model, "auto"))
    base = "AllReduce" if "ar-" in name else "OSGP" if "osgp" in name else "SGP" if "sgp" in name else "LocalSGD"
    assert f"base={base}(" in shown, shown
    assert ("SlowMomentum" in shown) == ("slowmo" in name)
    assert f"exact_average={'noaverage' not in name}" in shown or "exact_average" not in shown
    for strategy in ("reset", "average"):
        assert (f"base_buffers='{strategy}'" in shown) == name.endswith(f"-{strategy}")


def catalogue(messages: dict[str, str], order: str = "<", charset: str = "utf-8") -> bytes:
    """A compiled catalogue, as msgfmt writes it."""
    begin = 28 + 16 * len(messages)
    tables, texts = b"", b""
    for side in (sorted(messages), [messages[key] for key in sorted(messages)]):
        for text in (each.encode(charset) for each in side):
            tables += struct.pack(f"{order}2I", len(text), begin + len(texts))
            texts += text + b"\0"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(messages), 28, 28 + 8 * len(messages), 0, 0)
    return header + tables + texts


MESSAGES = {
    "": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n",
    "Save the _document now": "Das _Dokument jetzt sichern",
    "menu\x04Open the file": "Die Datei öffnen",
    "%d file was found\0%d files were found": "%d Datei wurde gefunden\0%d Dateien wurden gefunden",
}


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues_are_read_as_gettext_reads_them(order: str) -> None:
    content = catalogue(MESSAGES, order)
    found = dict(catalogues.read_catalogue(content))
    theirs = gettext.GNUTranslations(io.BytesIO(content))
    assert found == {
        "Save the _document now": theirs.gettext("Save the _document now"),
        "Open the file": theirs.pgettext("menu", "Open the file"),
        "%d file was found": theirs.ngettext("%d file was found", "%d files were found", 1),
        "%d files were found": theirs.ngettext("%d file was found", "%d files were found", 2),
    }


def test_catalogues_are_decoded_by_their_header() -> None:
    for charset in ("ISO-8859-1", "latin1", "UTF-8"):
        messages = {"": f"Content-Type: text/plain; charset={charset}\n", "Open it": "Öffnen"}
        content = catalogue(messages, charset=charset)
        assert list(catalogues.read_catalogue(content)) == [("Open it", "Öffnen")]
    unknown = catalogue({"": "Content-Type: text/plain; charset=CHARSET\n", "Open it": "Oeffnen"})
    with pytest.raises(ValueError, match="its text is in CHARSET, which Python does not know"):
        list(catalogues.read_catalogue(unknown))


def test_cut_catalogues_are_refused() -> None:
    content = catalogue(MESSAGES)
    for length in range(len(content) - 1):  # the last byte only ends a text
        with pytest.raises(ValueError, match="it does not begin as|it ends early|lies beyond its end"):
            list(catalogues.read_catalogue(content[:length]))


def test_messages_that_are_no_sentences_are_left_out() -> None:
    assert catalogues.cleaned("Sa&ve  the\n_file") == "Save the file"
    assert catalogues.cleaned("set user_name and host_name") == "set user_name and host_name"
    assert catalogues.is_sentence_pair("Save the file", "Die Datei sichern")
    for english, german in (
        ("Save file", "Datei sichern"),
        ("Save the file", "Save the file"),
        ("Save <b>the</b> file", "Die Datei sichern"),
        ("one two three", "eins"),
        ("see https://x.org for more", "siehe mehr auf dieser Seite"),
        ("1 2 3 4 5", "1 2 3 4 6"),
        ("It is so", "Das ist aber wirklich eine sehr viel längere Übersetzung davon"),
    ):
        assert not catalogues.is_sentence_pair(english, german), english


def test_no_test_sentence_is_in_the_training_text() -> None:
    shared, german = ("Open the file", "Die Datei öffnen"), ("Please open it", "Die Datei öffnen")
    parts = catalogues.split(
        {
            "apt": [shared, ("open THE file!", "Datei bitte öffnen"), german, ("A new one", "Ein neuer")],
            catalogues.TEST[0]: [shared, shared],
            catalogues.VALIDATION[0]: [("Close the file", "Die Datei schließen"), shared],
        }
    )
    assert parts == {
        "test": [shared], "valid": [("Close the file", "Die Datei schließen")], "train": [("A new one", "Ein neuer")]
    }  # fmt: skip


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="there is no dpkg-deb")
def test_packages_become_parallel_text(tmp_path: Path) -> None:
    for number, name in enumerate((catalogues.TEST[0], catalogues.VALIDATION[0], "apt")):
        tree = tmp_path / "trees" / name
        file = tree / "usr" / "share" / "locale" / "de" / "LC_MESSAGES" / "x.mo"
        file.parent.mkdir(parents=True)
        word = "abc"[number]
        file.write_bytes(catalogue({f"{word} is for you": f"{word} ist für dich"}))
        (tree / "DEBIAN").mkdir()
        about = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: someone <n@example.org>\nDescription: x\n"
        (tree / "DEBIAN" / "control").write_text(about)
        built = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(tmp_path / f"{name}_1_all.deb")]
        subprocess.run(built, check=True, capture_output=True)
    command = [
        sys.executable,
        f"{FOLDER}/catalogues.py",
        "--packages",
        str(tmp_path),
        "--output",
        str(tmp_path / "text"),
    ]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "apt: 1 pairs" in shown
    assert (tmp_path / "text" / "train.de").read_text() == "c ist für dich\n"
    failing = tmp_path / "programs" / "dpkg-deb"  # a disk that fails cannot be had here
    failing.parent.mkdir()
    failing.write_text(f'#!/bin/sh\n{shutil.which("dpkg-deb")} "$@"\nexit 2\n')
    failing.chmod(0o755)
    path = {"PATH": f"{failing.parent}:{os.environ['PATH']}"}
    failed = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=os.environ | path)
    assert failed.returncode == 1
    assert re.search(r"apt_1_all\.deb is damaged, .*: dpkg-deb ended with status 2", failed.stderr), failed.stderr
    package = tmp_path / "apt_1_all.deb"
    package.write_bytes(package.read_bytes()[:-200])
    cut = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert cut.returncode == 1
    assert "apt_1_all.deb is damaged, download it again" in cut.stderr
