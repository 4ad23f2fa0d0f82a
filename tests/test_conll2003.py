"""tasks/sources/conll2003.py, on small files in the layout of the real ones."""

import sys
import types

import numpy as np
import pytest

from tasks.sources import conll2003

# The opening of the training text, as the shared task has it: IOB1, where only an entity that
# touches another of its type starts with B- (here "Bonn" after "Brussels").
IOB1 = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER

-DOCSTART- -X- O O

New NNP I-NP I-LOC
Delhi NNP I-NP I-LOC
Bonn NNP I-NP B-LOC
Ajax NNP I-NP I-ORG
United NNP I-NP I-ORG
World NNP I-NP I-MISC
Cup NNP I-NP I-MISC
. . O O
"""
IOB2 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC
call NN I-NP O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER

-DOCSTART- -X- -X- O

New NNP B-NP B-LOC
Delhi NNP I-NP I-LOC
Bonn NNP B-NP B-LOC
Ajax NNP B-NP B-ORG
United NNP I-NP I-ORG
World NNP B-NP B-MISC
Cup NNP I-NP I-MISC
. . O O
"""
SENTENCES = [
    (["EU", "rejects", "German", "call"], ["B-ORG", "O", "B-MISC", "O"]),
    (["Peter", "Blackburn"], ["B-PER", "I-PER"]),
    (
        ["New", "Delhi", "Bonn", "Ajax", "United", "World", "Cup", "."],
        ["B-LOC", "I-LOC", "B-LOC", "B-ORG", "I-ORG", "B-MISC", "I-MISC", "O"],
    ),
]
NAMES = ["B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]


def characters(texts):
    """A tokenizer that can be checked by eye: a character is a token, the space included."""
    return [[ord(character) for character in text] for text in texts]


def whole_words(texts):
    """Another: a word is a token, its number is its length."""
    return [[len(text) - 1] for text in texts]


def text(x):
    return ["".join(map(chr, row)) for row in x]


def put(root, name, content=IOB1):
    (root / "conll2003").mkdir(exist_ok=True)
    (root / "conll2003" / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


@pytest.mark.parametrize("name", ["train.txt", "eng.train"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("content", [IOB1, IOB2, IOB2.strip(), "\n\n" + IOB1, "\ufeff" + IOB1])
def test_sentences_are_read_as_iob2(tmp_path, name, ends, content):
    put(tmp_path, name, content.replace("\n", ends))
    assert conll2003.sentences("train", tmp_path) == SENTENCES


def test_an_entity_does_not_run_on_into_the_next_sentence(tmp_path):
    put(tmp_path, "train.txt", "Bonn NNP I-NP I-LOC\n\nParis NNP I-NP I-LOC\nNice NNP I-NP I-PER\n")
    got = conll2003.sentences("train", tmp_path)
    assert [tags for _, tags in got] == [["B-LOC"], ["B-LOC", "B-PER"]]


@pytest.mark.parametrize("names", [("train.txt", "valid.txt"), ("eng.train", "eng.testa")])
def test_splits_come_from_their_own_files(tmp_path, names):
    put(tmp_path, names[0], IOB1)
    put(tmp_path, names[1], IOB1.replace("EU", "UN"))
    seen = {}
    for split in ("train", "val"):
        x, _, _ = conll2003.load(characters, 80, 20, split=split, root=tmp_path)
        seen[split] = " ".join(text(x))
    assert "EU" in seen["train"] and "UN" not in seen["train"]
    assert "UN" in seen["val"] and "EU" not in seen["val"]


def test_windows_and_labels_by_hand(tmp_path):
    put(tmp_path, "train.txt")
    x, y, names = conll2003.load(characters, 400, 12, root=str(tmp_path))
    assert names == NAMES
    assert (
        x.shape == (400, 12) and x.dtype == np.int64 and y.shape == (400,) and y.dtype == np.int64
    )
    stream = " EU rejects German call Peter Blackburn New Delhi Bonn Ajax United World Cup ."
    assert len(stream) > 12 and all(row in stream for row in text(x))
    # the entity word's first character (its space) is the seventh of twelve; the very first word
    # has no six characters before it, so its window starts where the text does
    want = {
        "B-PER": {"n call Peter"},
        "I-PER": {" Peter Black"},
        "B-ORG": {" EU rejects ", "i Bonn Ajax "},
        "I-ORG": {"n Ajax Unite"},
        "B-LOC": {"ckburn New D", " Delhi Bonn "},
        "I-LOC": {"rn New Delhi"},
        "B-MISC": {"ejects Germa", "United World"},
        "I-MISC": {" World Cup ."},
    }
    for label, name in enumerate(names):
        assert set(text(x[y == label])) == want[name], name


def test_a_window_at_the_end_of_the_text_is_full(tmp_path):
    put(tmp_path, "train.txt", IOB1.replace(". . O O\n", ""))
    x, y, names = conll2003.load(characters, 80, 12, root=tmp_path)
    assert set(text(x[y == names.index("I-MISC")])) == {"ed World Cup"}


def test_whole_text_as_one_window(tmp_path):
    put(tmp_path, "train.txt")
    x, _, _ = conll2003.load(whole_words, 16, 14, root=tmp_path)
    assert (x == [2, 7, 6, 4, 5, 9, 3, 5, 4, 4, 6, 5, 3, 1]).all()
    with pytest.raises(ValueError, match="the text has 14 tokens, fewer than one window of 15"):
        conll2003.load(whole_words, 16, 15, root=tmp_path)


@pytest.mark.parametrize("n", [5, 8, 16, 21])
def test_classes_are_balanced(tmp_path, n):
    put(tmp_path, "train.txt")
    _, y, _ = conll2003.load(characters, n, 10, root=tmp_path)
    counts = np.bincount(y, minlength=8)
    assert counts.sum() == n and counts.max() - counts.min() <= 1


def test_a_seed_fixes_the_windows(tmp_path):
    put(tmp_path, "train.txt")
    put(tmp_path, "valid.txt")
    x, y, _ = conll2003.load(characters, 64, 10, seed=3, root=tmp_path)
    again = conll2003.load(characters, 64, 10, seed=3, root=tmp_path)
    assert (x == again[0]).all() and (y == again[1]).all()
    for other in (
        conll2003.load(characters, 64, 10, seed=4, root=tmp_path),
        conll2003.load(characters, 64, 10, seed=3, split="val", root=tmp_path),
    ):
        assert (y != other[1]).any()


def test_words_are_tokenized_with_their_space_and_need_not_have_a_token(tmp_path):
    put(tmp_path, "train.txt")
    seen = []

    def tokenize(texts):
        seen.extend(texts)
        return [[] if text == " New" else [len(text)] for text in texts]

    x, y, _ = conll2003.load(tokenize, 80, 3, root=tmp_path)
    assert sorted(seen) == sorted(" " + word for words, _ in SENTENCES for word in words)
    # B-LOC: "New" has no token to be labelled, which leaves "Delhi [Bonn] Ajax"
    assert (x[y == 4] == [6, 5, 5]).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("German JJ I-NP", "line 5: got 'German JJ I-NP', expected 'word POS chunk NER'"),
        ("German JJ I-NP I-MISC O", "line 5: got 'German JJ I-NP I-MISC O', expected"),
        ("German JJ I-NP S-MISC", "line 5: got 'German JJ I-NP S-MISC', expected .* B-MISC I-MISC"),
        ("German JJ I-NP 7", "line 5: got 'German JJ I-NP 7', expected"),
        (b"Gr\xfcn JJ I-NP I-MISC", "line 5: not UTF-8 text"),
    ],
)
def test_malformed_lines(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    put(tmp_path, "train.txt", IOB1.encode().replace(b"German JJ I-NP I-MISC", line))
    with pytest.raises(ValueError, match=f"train.txt, {message}"):
        conll2003.load(characters, 8, 10, root=tmp_path)


def test_a_tag_that_never_occurs(tmp_path):
    put(tmp_path, "eng.testa", IOB1.replace("Blackburn NNP I-NP I-PER", "Blackburn NNP I-NP O"))
    with pytest.raises(ValueError, match="no word is tagged I-PER in the 'val' text"):
        conll2003.load(characters, 8, 10, split="val", root=tmp_path)


def test_an_empty_file(tmp_path):
    put(tmp_path, "train.txt", "")
    with pytest.raises(ValueError, match="the text has 0 tokens"):
        conll2003.load(characters, 8, 10, root=tmp_path)


# ---- the hub ----


def write_parquet(path, sentences=SENTENCES, tags="ner_tags"):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    numbers = [[conll2003.TAGS.index(tag) for tag in some] for _, some in sentences]
    words = [some for some, _ in sentences]
    pos = [[0] * len(some) for some in words]
    table = pyarrow.table({"tokens": words, "pos_tags": pos, tags: numbers})
    parquet.write_table(table, path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that gives hub.parquet, and expects in it what SENTENCES has; the files asked for."""
    asked = []

    def fetch(root, name, remote, instead):
        asked.append(remote.url)
        return tmp_path / "hub.parquet"

    counts = {"sentences": 3, "PER": 1, "ORG": 2, "LOC": 2, "MISC": 2}
    monkeypatch.setattr(conll2003, "COUNTS", dict.fromkeys(conll2003.COUNTS, counts))
    monkeypatch.setattr(conll2003, "fetch", fetch)
    return asked


def test_from_the_hub(tmp_path, hub):
    write_parquet(tmp_path / "hub.parquet")
    assert conll2003.sentences("train", tmp_path / "none") == SENTENCES
    put(tmp_path, "train.txt")
    from_text = conll2003.load(characters, 24, 10, root=tmp_path)
    assert len(hub) == 1  # files that are there come first
    from_hub = conll2003.load(characters, 24, 10, root=tmp_path / "none")
    np.testing.assert_array_equal(from_hub[0], from_text[0])
    conll2003.load(characters, 24, 10, split="val", root=tmp_path / "none")
    names = ["train", "train", "validation"]
    assert [url.rsplit("/", 1)[1] for url in hub] == [f"{n}-00000-of-00001.parquet" for n in names]
    assert all(f"/resolve/{conll2003.REVISION}/" in url for url in hub)


def test_the_hub_has_something_else(tmp_path, hub):
    path = tmp_path / "hub.parquet"
    write_parquet(path, SENTENCES[1:])
    with pytest.raises(ValueError, match="not CoNLL-2003: got {'sentences': 2, .*expected {'sen"):
        conll2003.sentences("train", tmp_path)
    wrong = [(words, [tag.replace("PER", "LOC") for tag in tags]) for words, tags in SENTENCES]
    write_parquet(path, wrong)
    with pytest.raises(ValueError, match="got {'sentences': 3, 'PER': 0, "):
        conll2003.sentences("train", tmp_path)
    write_parquet(path, tags="labels")
    with pytest.raises(ValueError, match="hub.parquet: not CoNLL-2003 as parquet .*ner_tags"):
        conll2003.sentences("train", tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="hub.parquet: not CoNLL-2003 as parquet .*delete it"):
        conll2003.sentences("train", tmp_path)


def test_no_files_and_no_network(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):  # as if installed
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    message = (
        r"^no file .*train-00000-of-00001.parquet \(.*Reuters.* cannot be had: no connection.* put "
        r"train.txt or eng.train of the shared task into .*conll2003, or choose --source words, "
        r"which needs no download$"
    )
    with pytest.raises(FileNotFoundError, match=message) as error:
        conll2003.load(characters, 8, 10, root=tmp_path)
    assert "\n" not in str(error.value)


def test_no_files_and_no_pyarrow(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):  # as if not installed
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(conll2003, "fetch", None)  # nor is downloaded what cannot be read
    message = r"no file train.txt or eng.train in .*conll2003.*pip install pyarrow, or .* words"
    with pytest.raises(FileNotFoundError, match=message):
        conll2003.load(characters, 8, 10, root=tmp_path)
