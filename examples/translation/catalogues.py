"""English-German sentence pairs from the gettext catalogues (.mo) of Debian packages: parallel text for small machines.

    make data                                                                    # downloads the packages, calls this
    python examples/translation/catalogues.py --packages DIR --output data/gettext-en-de

Messages are cleaned (no keyboard shortcuts, markup or lines of their own), kept if they are sentences of 3 to 60 words
that a translator has changed, and written to train.en, train.de, valid.en, ... Validation and test sentences are those
of packages of their own, and no sentence of theirs occurs in the training text, in either language. The texts have the
licences of their programs.
"""

import argparse
import re
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "apt", "aptitude-common", "ardour-data", "audacity-data", "bash", "binutils-common", "cantor", "claws-mail-i18n",
    "darktable", "dia-common", "digikam-data", "dolphin", "dpkg", "evolution-common", "filezilla-common",
    "fontforge-common", "freeciv-data", "geany-common", "gimp-data", "git", "gnome-control-center-data",
    "gnucash-common", "gnumeric-common", "gnupg-l10n", "gramps", "grisbi-common", "gthumb-data", "hexchat-common",
    "homebank-data", "hugin-data", "inkscape", "kdenlive-data", "kmail", "kmymoney-common", "konsole", "korganizer",
    "krita-l10n", "libc-l10n", "lyx-common", "mc-data", "mutt", "nautilus-data", "okular", "pidgin-data",
    "poedit-common", "pychess", "shotwell-common", "siril-common", "skrooge-common", "step", "tellico-data",
    "texinfo", "util-linux-locales", "vlc-l10n", "wget", "wxmaxima",
)  # fmt: skip
"""Programs with long texts. Those that a release of Debian does not have are left out."""
VALIDATION = ("homebank-data", "okular", "step")
TEST = ("hugin-data", "kmail")
WORDS = (3, 60)
TIMES_LONGER = 2.5
"""How many times longer one side may be than the other, in characters."""
CHARSET = re.compile(r"charset=([-\w]+)")
CATALOGUE = re.compile(r"/de(_DE)?/(LC_MESSAGES/)?[^/]*\.mo$")
MARKUP = re.compile(r"[<>{}\\^|@\x00-\x1f]|https?:|\S{40}")


def read_catalogue(content: bytes) -> Iterator[tuple[str, str]]:
    """The pairs of a compiled catalogue (GNU gettext's manual, section "MO files"), plural forms one by one.

    Raises:
        ValueError: if it is none, or is damaged.
    """
    if content[:4] == b"\xde\x12\x04\x95":
        order = "<"
    elif content[:4] == b"\x95\x04\x12\xde":
        order = ">"
    else:
        raise ValueError("it does not begin as a catalogue")
    charset = "utf-8"
    try:
        count, originals, translations = struct.unpack_from(f"{order}3I", content, 8)
        for number in range(count):
            sides = []
            for table in (originals, translations):
                length, begin = struct.unpack_from(f"{order}2I", content, table + 8 * number)
                if begin + length > len(content):
                    raise ValueError(f"message {number} lies beyond its end")
                sides.append(content[begin : begin + length].decode(charset).split("\0"))
            original, translated = sides
            if original == [""]:  # the header, which comes first
                charset = found[1] if (found := CHARSET.search(translated[0])) else charset
            else:
                original[0] = original[0].rpartition("\x04")[2]  # without its context
                yield from zip(original, translated, strict=False)  # languages differ in their number of plural forms
    except struct.error as error:
        raise ValueError("it ends early") from error
    except LookupError as error:
        raise ValueError(f"its text is in {charset}, which Python does not know") from error


def cleaned(text: str) -> str:
    """Without marks of keyboard shortcuts, and on one line."""
    text = re.sub(r"&(?=\w)", "", text)
    return " ".join((text.replace("_", "") if text.count("_") == 1 else text).split())


def is_sentence_pair(english: str, german: str) -> bool:
    if english == german or any(MARKUP.search(text) for text in (english, german)):
        return False
    if not all(WORDS[0] <= len(text.split()) <= WORDS[1] for text in (english, german)):
        return False
    if sum(character.isalpha() or character.isspace() for character in english) < 0.75 * len(english):
        return False
    longer, shorter = max(len(english), len(german)), min(len(english), len(german))
    return longer <= TIMES_LONGER * shorter


def pairs_of(package: Path) -> list[tuple[str, str]]:
    """The cleaned sentence pairs of a Debian package."""
    found: list[tuple[str, str]] = []
    unpacking = ["dpkg-deb", "--fsys-tarfile", str(package)]
    try:
        with (
            subprocess.Popen(unpacking, stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as files,
        ):
            for member in files:
                if CATALOGUE.search(member.name) and (file := files.extractfile(member)) is not None:
                    found += read_catalogue(file.read())
            while process.stdout is not None and process.stdout.read(1 << 20):  # to the end, so that it can finish
                pass
    except (tarfile.TarError, ValueError) as error:
        raise SystemExit(f"{package} is damaged, download it again: {error}") from error
    if process.returncode:
        raise SystemExit(f"{package} is damaged, download it again: dpkg-deb ended with status {process.returncode}")
    pairs = [(cleaned(english), cleaned(german)) for english, german in found]
    return [pair for pair in pairs if is_sentence_pair(*pair)]


def split(by_package: dict[str, list[tuple[str, str]]]) -> dict[str, list[tuple[str, str]]]:
    """Training, validation and test pairs. Each sentence occurs once, in the first part of test, valid, train."""
    parts: dict[str, list[tuple[str, str]]] = {"test": [], "valid": [], "train": []}
    seen: set[str] = set()
    for part, pairs in parts.items():
        for package in sorted(by_package):
            if part == ("test" if package in TEST else "valid" if package in VALIDATION else "train"):
                for pair in by_package[package]:
                    keys = {re.sub(r"\W", "", text).lower() for text in pair}
                    if not keys & seen:
                        seen |= keys
                        pairs.append(pair)
    return parts


def write(parts: dict[str, list[tuple[str, str]]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, pairs in parts.items():
        for language, texts in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
            (folder / f"{part}.{language}").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="print the names of the packages that are meant, and end")
    parser.add_argument("--packages", type=Path, metavar="DIR", help="folder of Debian packages (.deb)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the parallel text")
    options = parser.parse_args()
    if options.names:
        print(*PACKAGES, sep="\n")
        parser.exit()
    if options.packages is None or options.output is None:
        parser.error("--packages and --output are needed")
    by_package = {}
    for package in sorted(options.packages.glob("*.deb")):
        name = package.name.partition("_")[0]
        by_package[name] = pairs_of(package)
        print(f"{name}: {len(by_package[name])} pairs", flush=True)
    parts = split(by_package)
    if not all(parts.values()):
        parser.error(f"{options.packages} has no sentences for {', '.join(name for name in parts if not parts[name])}")
    write(parts, options.output)
    print(", ".join(f"{name}: {len(pairs)}" for name, pairs in parts.items()))


if __name__ == "__main__":
    main()
