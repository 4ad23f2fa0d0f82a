"""CoNLL-2003: the real 1D source of the papers. Newspaper English with its named entities tagged.

Tjong Kim Sang and De Meulder 2003, "Introduction to the CoNLL-2003 shared task". The classes are
the eight tags of words in a name: B- for its first word, I- for the others, of persons (PER),
organisations (ORG), places (LOC) and others (MISC). A sample is a window of the running text with
an entity word in its middle, and the word's tag is the label: this reproduces the shape and the
number of classes of the features that ORCA and PaRe publish without the script that made them.

The text is Reuters', and its licence lets nobody pass it on. It is read from the shared task's own
files in data/conll2003/ (TEXT) if they are there, else from a copy on the Hugging Face hub (FILES),
which is downloaded into the same folder.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tasks.download import Remote, fetch

TAGS = ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
CLASSES = TAGS[1:]  # TAGS is also what the hub's numbers mean
TEXT = {"train": ("train.txt", "eng.train"), "val": ("valid.txt", "eng.testa")}
HUB = "https://huggingface.co/datasets/lhoestq/conll2003"
REVISION = "19edcb426bfd625c275c17b9a99b2239243f4377"
LICENCE = "of Reuters' text, a research agreement; nobody may pass it on"
FILES = {
    f"conll2003/{name}": Remote(f"{HUB}/resolve/{REVISION}/data/{name}", None, LICENCE, HUB)
    for name in ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet")
}
PARQUET = dict(zip(TEXT, FILES, strict=True))  # the file of each split
# split: what the paper counts in it, sentences and entities of each type
COUNTS = {
    "train": {"sentences": 14041, "PER": 6600, "ORG": 6321, "LOC": 7140, "MISC": 3438},
    "val": {"sentences": 3250, "PER": 1842, "ORG": 1341, "LOC": 1837, "MISC": 922},
}
Sentences = list[tuple[list[str], list[str]]]  # words and tags


def sentences(split: str, root: Path) -> Sentences:
    """All sentences of a split, tagged IOB2, from root/conll2003/, downloaded if need be.

    Raises: FileNotFoundError if there are neither; ValueError if what there is is damaged.
    """
    folder = Path(root) / "conll2003"
    for name in TEXT[split]:
        if (folder / name).is_file():
            return _from_text(folder / name)
    instead = f"put {' or '.join(TEXT[split])} of the shared task into {folder}, or choose "
    instead += "--source words, which needs no download"
    try:  # first, so as not to download what cannot be read
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise FileNotFoundError(
            f"no file {' or '.join(TEXT[split])} in {folder}, and those that could be downloaded "
            f"need pyarrow: pip install pyarrow, or {instead}"
        ) from None
    name = PARQUET[split]
    return _from_parquet(fetch(root, name, FILES[name], instead), COUNTS[split])


def _from_text(path: Path) -> Sentences:
    """Sentences of a file of the shared task: "word POS chunk NER" lines, blank between sentences.

    The task's own files (eng.*) are IOB1, where B- only separates two neighbours of one type; most
    copies are IOB2, where every entity starts with B-. The result is IOB2, whichever it was.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; get the file again") from None
    found: Sentences = [([], [])]
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            found.append(([], []))
            continue
        if len(fields) != 4 or fields[3] not in TAGS:
            raise ValueError(
                f"{path}, line {number}: got {line.strip()[:60]!r}, expected 'word POS chunk NER' "
                f"with one of the tags {' '.join(TAGS)}; get the file again"
            )
        words, tags = found[-1]
        previous, tag = tags[-1] if tags else "O", fields[3]
        if tag.startswith("I-") and previous[2:] != tag[2:]:  # IOB1: an entity that starts with I-
            tag = "B" + tag[1:]
        words.append(fields[0])
        tags.append(tag)
    return [sentence for sentence in found if sentence[0]]


def _from_parquet(path: Path, counts: dict[str, int]) -> Sentences:
    """Sentences of a parquet file of the hub, if they are as many as the paper says."""
    import pyarrow.parquet

    remedy = f"delete it and run again, or put text files in its place ({TEXT['train'][0]}, ...)"
    try:
        table = pyarrow.parquet.read_table(path, columns=["tokens", "ner_tags"]).to_pydict()
        found = [
            (words, [TAGS[tag] for tag in tags])
            for words, tags in zip(table["tokens"], table["ner_tags"], strict=True)
        ]
    except (pyarrow.ArrowException, OSError, LookupError, TypeError) as error:
        raise ValueError(f"{path}: not CoNLL-2003 as parquet ({error!r:.100}); {remedy}") from None
    starts = Counter(tag[2:] for _, tags in found for tag in tags if tag.startswith("B-"))
    got = {"sentences": len(found), **{kind: starts[kind] for kind in list(counts)[1:]}}
    if got != counts:
        raise ValueError(f"{path}: not CoNLL-2003: got {got}, expected {counts}; {remedy}")
    return found


def load(
    tokenize: Callable[[list[str]], list[list[int]]],
    n: int,
    length: int,
    seed: int = 0,
    split: str = "train",
    root: Path | str = "data",
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """n windows of `length` tokens around random entity words, as many of each tag as of any other.

    Sentences and documents run on as one stream, so that every window is full. The entity word's
    first token is at position length // 2, except in a window at either end of the stream.

    Args:
        tokenize: texts to lists of token ids; the tokenizer of the body the windows are for,
            without special tokens.
        n, length: how many windows, and tokens in each.
        seed, split: which windows ("train" or "val").
        root: the data folder; the files are in its folder conll2003.
    Returns: token ids, int64 (n, length); labels, int64 (n,), 0..7; the names of the classes.
    Raises: FileNotFoundError if the data cannot be had; ValueError if a file is damaged, if no word
        has one of the tags, or if the text is shorter than one window.
    """
    rng = np.random.default_rng([seed, list(TEXT).index(split)])
    words, tags = [], []
    for some_words, some_tags in sentences(split, Path(root)):
        words += some_words
        tags += some_tags
    vocabulary = sorted(set(words))
    # " " + word: byte-level BPE has other tokens for the start of a word than for its inside
    pieces = dict(zip(vocabulary, tokenize([" " + word for word in vocabulary]), strict=True))
    stream = np.array([token for word in words for token in pieces[word]], dtype=np.int64)
    if len(stream) < length:
        raise ValueError(
            f"source 'conll2003': the text has {len(stream)} tokens, fewer than one window of "
            f"{length}; ask for shorter windows"
        )
    firsts = np.cumsum([0] + [len(pieces[word]) for word in words])[:-1]  # each word's first token
    whole = np.array([len(pieces[word]) > 0 for word in words])  # has a token at all
    x = np.empty((n, length), dtype=np.int64)
    y = rng.permutation(np.arange(n) % len(CLASSES))
    for label, name in enumerate(CLASSES):
        places = firsts[whole & (np.array(tags) == name)]
        if len(places) == 0:
            raise ValueError(
                f"source 'conll2003': no word is tagged {name} in the '{split}' text; "
                "get the complete files of the shared task"
            )
        rows = np.flatnonzero(y == label)
        starts = np.clip(rng.choice(places, size=len(rows)) - length // 2, 0, len(stream) - length)
        x[rows] = stream[starts[:, None] + np.arange(length)]
    return x, y, list(CLASSES)
