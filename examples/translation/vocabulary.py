"""Make the vocabulary of a parallel text: byte-pair encoding of both languages together, by sentencepiece.

    python examples/translation/vocabulary.py --data data/gettext-en-de --size 4000
    python examples/translation/vocabulary.py --data ~/wmt16 --size 32000

It is written to vocabulary.model in that folder, and depends on the training text alone. The paper of SlowMo follows
Ott et al. (2018), who share 32,000 sub-words between the languages.
"""

import argparse
from io import BytesIO
from itertools import chain
from pathlib import Path

import sentencepiece
from parallel_text import EOS, PAD, UNKNOWN, DataError, lines


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of train.en and train.de")
    parser.add_argument("--size", type=int, default=32_000, metavar="N", help="sub-words (default: 32000)")
    parser.add_argument("--source", default="en", metavar="ENDING", help="of the files to translate (default: en)")
    parser.add_argument("--target", default="de", metavar="ENDING", help="of their translations (default: de)")
    options = parser.parse_args()
    made = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(
                lines(options.data / f"train.{language}") for language in (options.source, options.target)
            ),
            model_writer=made, vocab_size=options.size, model_type="bpe", character_coverage=1.0, minloglevel=2,
            pad_id=PAD, eos_id=EOS, unk_id=UNKNOWN, bos_id=-1,
        )  # fmt: skip
    except DataError as error:
        parser.error(str(error))
    except RuntimeError as error:  # sentencepiece says which sizes are possible, behind a place in its source
        parser.error(str(error).rpartition("] ")[2])
    file = options.data / "vocabulary.model"
    unfinished = file.with_suffix(".part")
    unfinished.write_bytes(made.getvalue())
    unfinished.replace(file)
    print(f"{file}: {options.size} sub-words")


if __name__ == "__main__":
    main()
