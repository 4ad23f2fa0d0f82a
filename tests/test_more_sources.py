"""The other embedded sources: code, textures and noise, made as stated, with classes to learn."""

import ast
import importlib
import inspect
import io
import re
import tokenize
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import bodies
import tasks
from tasks.sources import code, noise, textures, words

SEEDS = ((0, "train"), (1, "train"), (0, "val"))


def characters(texts):
    """A tokenizer that needs no body: a character is a token, so that windows can be read."""
    return [[ord(c) for c in text] for text in texts]


def pieces(texts):
    """Another: words and signs, by a hash of 4096 values."""
    return [[zlib.crc32(w.encode()) % 4096 for w in re.findall(r"\w+|\S", t)] for t in texts]


def naive_bayes(x, y, x_val, y_val, vocabulary=4096):
    """The accuracy of a linear probe of token counts."""
    counts = np.stack([np.bincount(x[y == k].ravel(), minlength=vocabulary) for k in range(8)])
    log_p = np.log((counts + 0.1) / (counts + 0.1).sum(axis=1, keepdims=True))
    return (log_p[:, x_val].sum(axis=2).argmax(axis=0) == y_val).mean()


def nearest(features, x, y, x_val, y_val):
    """The accuracy of the nearest neighbour by standardised features."""
    a, b = features(x), features(x_val)
    mean, std = a.mean(axis=0), a.std(axis=0)
    D = torch.cdist(torch.from_numpy((b - mean) / std), torch.from_numpy((a - mean) / std))
    return (y[D.argmin(dim=1).numpy()] == y_val).mean()


def colours(x):
    return np.concatenate([x.mean(axis=(2, 3)), x.std(axis=(2, 3))], axis=1)


# ---- the lists of sources ----


def test_the_lists_are_the_files():
    folder = Path(tasks.__file__).parent / "sources"
    files = {file.stem for file in folder.glob("*.py")} - {"__init__"}
    assert set(tasks.SOURCES) == files and len(tasks.SOURCES) == len(files)
    assert set(tasks.TEXTS) & set(tasks.IMAGES) == {"noise"}
    assert set(tasks.TEXTS) | set(tasks.IMAGES) == set(tasks.SOURCES)


def test_sources_of_a_kind_are_called_alike():
    for names, kind in ((tasks.TEXTS, "load_text"), (tasks.IMAGES, "load_images")):
        modules = [importlib.import_module(f"tasks.sources.{name}") for name in names]
        loads = [getattr(module, kind, None) or module.load for module in modules]
        calls = {tuple(inspect.signature(load).parameters) for load in loads}
        if kind == "load_text":  # conll2003 alone reads files
            calls = {tuple(name for name in call if name != "root") for call in calls}
        assert len(calls) == 1


def test_load_source_tells_texts_from_images_by_the_tokenizer():
    text = tasks.load_source("noise", 16, tokenize=pieces, length=20)
    assert text.x.shape == (16, 20) and text.x.dtype == torch.int64 and text.out_shape == (8,)
    for name in ("noise", "textures"):
        image = tasks.load_source(name, 20, size=32)
        assert image.x.shape == (20, 3, 32, 32) and image.out_shape == (10,)
        assert image.name == name and image.y.dtype == torch.int64
        dense = tasks.load_source(name, 20, size=32, masks=True)
        assert dense.out_shape == (1, 32, 32) and dense.y.dtype == torch.float32
    with pytest.raises(ValueError, match="takes text; choose one of words, code, .*noise$"):
        tasks.load_source("textures", tokenize=characters)
    with pytest.raises(ValueError, match="takes images; choose one of shapes, textures, .*noise$"):
        tasks.load_source("code")


@pytest.mark.parametrize("name", ["code", "noise"])
def test_texts_are_made_of_a_body_s_own_tokens(name):
    from transformers import AutoTokenizer

    model, tokenizer = bodies.load_body("tiny_roberta", (1, 46), 32)
    source = tasks.load_source(name, 40, tokenize=tokenizer, length=48)
    assert source.x.shape == (40, 48) and source.out_shape == (8,)
    assert torch.bincount(source.y).tolist() == [5] * 8
    special = AutoTokenizer.from_pretrained(bodies.FOLDER / "tiny_roberta").all_special_ids
    assert not set(source.x.flatten().tolist()) & set(special)
    assert 0 <= source.x.min() and source.x.max() < model.config.vocab_size


# ---- code ----


def test_code_is_balanced_windows_of_one_module_each():
    x, y, names = code.load(characters, 80, 50, seed=0)
    assert x.shape == (80, 50) and x.dtype == np.int64 and y.dtype == np.int64
    assert np.bincount(y).tolist() == [10] * 8 and names == list(code.CLASSES)
    for window, label in zip(x, y, strict=True):
        window = "".join(map(chr, window))
        assert any(window in text[: int(0.9 * len(text))] for text in code.programs()[names[label]])


def test_code_follows_the_seed_and_keeps_the_held_out_part_apart():
    a, b, c = (code.load(characters, 40, 50, seed=s)[0] for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    x, y, names = code.load(characters, 40, 50, split="val")
    for window, label in zip(x, y, strict=True):
        window = "".join(map(chr, window))
        assert any(window in text[int(0.9 * len(text)) :] for text in code.programs()[names[label]])


def test_code_has_classes_that_can_be_learnt_but_not_at_sight():
    accuracy = naive_bayes(
        *code.load(pieces, 4000, 64)[:2], *code.load(pieces, 800, 64, 0, "val")[:2]
    )
    assert 0.4 < accuracy < 0.9  # by chance: 0.125


def test_no_docstring_and_no_comment_is_left():
    for text in code.programs()["data structures"]:
        kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)}
        assert tokenize.COMMENT not in kinds
        for node in ast.walk(ast.parse(text)):
            assert not (isinstance(node, ast.Expr) and code._is_text(node))


def test_statements_are_what_is_left_of_a_file(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        '"""What it is."""\n\n# why\nx = "# no comment"  # a comment\n"a comment as a string"\n\n'
        'class A:\n    """Only a docstring."""\n\n\ndef f(a,\n      b):\n    """Doc."""\n'
        "    return [a,   # first\n            b]\n"
    )
    left = "x = '# no comment'\nclass A:\n    pass\ndef f(a, b):\n    return [a, b]"
    assert code._statements(file) == left
    file.write_text("{{ a template }\n")
    assert code._statements(file) == ""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A Python whose library is tmp_path."""
    monkeypatch.setattr(code.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    code.programs.cache_clear()
    yield tmp_path
    code.programs.cache_clear()


def test_code_does_without_modules_that_a_version_lacks(library):
    for number, modules in enumerate(code.CLASSES.values()):
        module = modules.split()[0]
        (library / f"{module}.py").write_text(f"x{number} = 0\n" * 4000)
        (library / module / "tests").mkdir(parents=True)
        (library / module / "tests" / "a.py").write_text("y = 0\n")
    assert [len(texts) for texts in code.programs().values()] == [1] * 8
    x, y, _ = code.load(characters, 16, 100)
    for window, label in zip(x, y, strict=True):
        assert set(re.findall(r"x(\d)", "".join(map(chr, window)))) == {str(label)}


def test_code_says_when_python_comes_without_sources(library):
    with pytest.raises(ValueError, match="needs the source files of .* none for network, t") as e:
        code.load(characters, 8, 10)
    assert "\n" not in str(e.value) and str(library) in str(e.value)


def test_code_says_when_no_module_is_as_long_as_a_window():
    with pytest.raises(ValueError, match=r"class 'network' has \d+ tokens, fewer than one window"):
        code.load(characters, 8, 10**6)


def test_code_has_windows_as_long_as_a_module(library):
    for modules in code.CLASSES.values():  # 20,004 characters each, of which 18,003 to train on
        (library / f"{modules.split()[0]}.py").write_text("a = 0\n" * 3334 + "b")
    x, _, _ = code.load(characters, 8, 18_004)
    assert (x == x[0]).all()
    with pytest.raises(ValueError, match="18004 tokens, fewer than one window of 18005"):
        code.load(characters, 8, 18_005)


# ---- textures ----


def test_textures_are_balanced_and_follow_the_seed():
    x, y, names = textures.load(60, 32, seed=0)
    assert x.shape == (60, 3, 32, 32) and x.dtype == np.float32 and y.dtype == np.int64
    assert 0 <= x.min() and x.max() <= 1
    assert np.bincount(y).tolist() == [6] * 10 and names == textures.CLASSES
    again, other, held = (textures.load(60, 32, seed=s, split=p)[0] for s, p in SEEDS)
    assert np.array_equal(x, again)
    assert not np.array_equal(x, other) and not np.array_equal(x, held)


@pytest.mark.parametrize("name", textures.CLASSES)
@pytest.mark.parametrize("size", [64, 128])
def test_values_fill_0_to_1_and_are_never_twice_the_same(name, size):
    number = np.full(6, textures.CLASSES.index(name))
    value = textures.texture_values(number, size, np.random.default_rng(0))
    assert value.shape == (6, size, size) and value.min() >= 0 and value.max() <= 1
    assert (value.std(axis=(1, 2)) > 0.1).all()
    assert len({image.tobytes() for image in value}) == 6


@pytest.mark.parametrize("name", textures.CLASSES[:6])  # the others begin with noise of every pixel
def test_a_larger_image_shows_the_same(name):
    number = np.full(8, textures.CLASSES.index(name))
    small, large = (
        textures.texture_values(number, size, np.random.default_rng(3)) for size in (64, 192)
    )
    mean = large.reshape(8, 64, 3, 64, 3).mean(axis=(2, 4))
    assert np.abs(mean - small).mean() < 0.05
    assert np.abs(mean - small[::-1]).mean() > 0.15


def test_noise_has_the_spectrum_that_is_asked_for():
    rng = np.random.default_rng(0)
    image = textures._noise(lambda f: f**-1.5, 200, 64, rng)
    power = np.square(np.abs(np.fft.fft2(image))).mean(axis=0)[0, 1:20]
    slope, _ = np.polyfit(np.log(np.arange(1, 20)), np.log(power), 1)
    assert slope == pytest.approx(-3, abs=0.15)
    np.testing.assert_allclose(image.mean(axis=(1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose(image.std(axis=(1, 2)), 1)


def test_nearest_finds_the_two_nearest_points():
    """Against all distances to the points of the table, which are drawn again here."""
    u = np.random.default_rng(1).uniform(20, 24, (2, 5, 5))
    v = np.random.default_rng(2).uniform(30, 34, (2, 5, 5))
    got = textures._nearest(u, v, np.random.default_rng(3), jitter=0.9)
    table = np.random.default_rng(3).uniform(0, 1, (3, 2, textures._TABLE, textures._TABLE))
    row, column = np.indices(table.shape[2:])
    for i, j, k in np.ndindex(2, 5, 5):
        a = column + 0.5 + 0.9 * (table[0, i] - 0.5)
        b = row + 0.5 + 0.9 * (table[1, i] - 0.5)
        r = np.hypot(a - u[i, j, k], b - v[i, j, k]).ravel()
        order = r.argsort()
        want = (r[order[0]], r[order[1]], table[2, i].ravel()[order[0]])
        np.testing.assert_allclose([part[i, j, k] for part in got], want)


def spectra(x):
    """Power at each frequency, in all directions, of the image's main colour axis."""
    n, _, size, _ = x.shape
    z = x.reshape(n, 3, -1).astype(np.float64)
    z -= z.mean(axis=2, keepdims=True)
    _, axes = np.linalg.eigh(z @ z.transpose(0, 2, 1))
    z = (axes[:, :, -1][:, None] @ z)[:, 0]
    z = (z / z.std(axis=1, keepdims=True)).reshape(n, size, size)
    f = np.fft.fftfreq(size, 1 / size)
    ring = np.rint(np.hypot(f[:, None], f)).astype(int)
    power = np.square(np.abs(np.fft.fft2(z)))
    return np.log([power[:, ring == k].sum(axis=1) for k in range(1, size // 2)]).T


def test_texture_classes_lie_in_the_pattern_and_not_in_the_colour():
    train, val = textures.load(1000, 64)[:2], textures.load(300, 64, split="val")[:2]
    assert 0.6 < nearest(spectra, *train, *val) < 0.99  # by chance: 0.1
    assert nearest(lambda x: x.mean(axis=(2, 3)), *train, *val) < 0.25


def test_regions_are_whole_and_of_a_sensible_size():
    x, mask, _ = textures.load(200, 48, masks=True)
    assert x.shape == (200, 3, 48, 48) and 0 <= x.min() and x.max() <= 1
    assert mask.shape == (200, 1, 48, 48) and mask.dtype == np.float32
    assert set(np.unique(mask)) == {0.0, 1.0}
    cover = mask.mean(axis=(1, 2, 3))
    assert (cover > 0.02).all() and (cover < 0.9).all()
    edges = np.abs(np.diff(mask)).mean() + np.abs(np.diff(mask, axis=2)).mean()
    assert edges < 0.12  # of random pixels: 1
    again, other, held = (textures.load(200, 48, s, p, masks=True)[1] for s, p in SEEDS)
    assert np.array_equal(mask, again)
    assert not np.array_equal(mask, other) and not np.array_equal(mask, held)


def test_the_texture_in_the_region_is_the_class_s_and_around_it_another(monkeypatch):
    seen = []

    def flat(texture, size, rng):  # a texture is a shade of its own
        seen.append(texture)
        return np.broadcast_to(texture[:, None, None] / 9, (len(texture), size, size))

    monkeypatch.setattr(textures, "texture_values", flat)
    monkeypatch.setattr(textures, "_coloured", lambda value, rng: value[:, None].repeat(3, axis=1))
    number = np.arange(200) % 10
    x, mask = textures.draw(number, 32, np.random.default_rng(0), masks=True)
    inside, around = seen
    assert (
        np.array_equal(inside, number) and (around != number).all() and set(around) == {*range(10)}
    )
    want = np.where(mask > 0, inside[:, None, None, None], around[:, None, None, None]) / 9
    np.testing.assert_allclose(x, np.broadcast_to(want, x.shape), atol=1e-6)


def test_blocks_of_images_leave_none_out(monkeypatch):
    monkeypatch.setattr(textures, "_BLOCK", 3 * 16 * 16)
    monkeypatch.setattr(noise, "_BLOCK", 3 * 16 * 16)
    for load in (textures.load, noise.load_images):
        x, mask, _ = load(10, 16, masks=True)
        assert (x.std(axis=(1, 2, 3)) > 0.03).all() and (mask.sum(axis=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("load", [textures.load, noise.load_images])
def test_images_of_the_papers_size(load, masks):
    x, y, _ = load(10, 224, masks=masks)
    assert x.shape == (10, 3, 224, 224) and np.isfinite(x).all()
    assert y.shape == ((10, 1, 224, 224) if masks else (10,))


# ---- noise ----


def test_noise_is_balanced_and_follows_the_seed():
    x, y, names = noise.load_text(pieces, 80, 50)
    assert x.shape == (80, 50) and x.dtype == np.int64 and y.dtype == np.int64
    assert np.bincount(y).tolist() == [10] * 8 and len(names) == 8
    again, other, held = (noise.load_text(pieces, 80, 50, *which)[0] for which in SEEDS)
    assert np.array_equal(x, again)
    assert not np.array_equal(x, other) and not np.array_equal(x, held)
    x, y, names = noise.load_images(60, 32)
    assert x.shape == (60, 3, 32, 32) and x.dtype == np.float32 and y.dtype == np.int64
    assert np.bincount(y).tolist() == [6] * 10 and len(names) == 10
    again, other, held = (noise.load_images(60, 32, *which)[0] for which in SEEDS)
    assert np.array_equal(x, again)
    assert not np.array_equal(x, other) and not np.array_equal(x, held)


def test_tokens_follow_zipf_in_an_order_of_each_class():
    p = noise.frequencies(1000)
    assert p.shape == (8, 1000) and len({row.tobytes() for row in p}) == 8
    want = 1 / np.arange(1, 1001) / (1 / np.arange(1, 1001)).sum()
    np.testing.assert_allclose(-np.sort(-p, axis=1), np.broadcast_to(want, p.shape))
    assert np.array_equal(p, noise.frequencies(1000))


def test_tokens_are_drawn_one_by_one():
    """How often two tokens of a window are the same does not depend on how far apart they are."""
    x, y, _ = noise.load_text(pieces, 4000, 64)
    ids = np.unique(np.concatenate([np.array(i) for i in pieces(words.texts().values())]))
    assert set(np.unique(x)) <= set(ids)
    want = np.square(noise.frequencies(len(ids))).sum(axis=1).mean()
    for apart in (1, 2, 30):
        assert (x[:, apart:] == x[:, :-apart]).mean() == pytest.approx(want, rel=0.05)
    found = np.bincount(x[y == 3].ravel(), minlength=4096)[ids] / x[y == 3].size
    p = noise.frequencies(len(ids))[3]
    np.testing.assert_allclose(found[p > 0.01], p[p > 0.01], rtol=0.15)


def test_noise_texts_can_be_learnt_but_not_at_sight():
    train, val = noise.load_text(pieces, 4000, 64), noise.load_text(pieces, 800, 64, split="val")
    assert 0.4 < naive_bayes(*train[:2], *val[:2]) < 0.9  # by chance: 0.125


def test_noise_says_when_python_was_stripped_of_its_docs(monkeypatch):
    def stripped():
        raise ValueError("source 'words' needs Python's own documentation")

    monkeypatch.setattr(noise.words, "texts", stripped)
    with pytest.raises(ValueError, match="^source 'noise' draws from the tokens of 'words': .*own"):
        noise.load_text(pieces, 8, 10)


def test_noise_images_are_white_and_their_class_is_colour_and_deviation():
    x, y, names = noise.load_images(400, 32)
    inner = x - x.mean(axis=(2, 3), keepdims=True)
    for near in (inner[..., 1:] * inner[..., :-1], inner[:, :, 1:] * inner[:, :, :-1]):
        assert abs(near.mean() / np.square(inner).mean()) < 0.01
    for k, name in enumerate(names):
        strength, colour = name.split()
        np.testing.assert_allclose(x[y == k].mean(axis=(0, 2, 3)), noise.COLOURS[colour], atol=0.04)
        assert inner[y == k].std() == pytest.approx(noise.DEVIATIONS[strength], rel=0.1)
    held = noise.load_images(200, 32, split="val")
    assert 0.6 < nearest(colours, x, y, *held[:2]) < 0.97  # by chance: 0.1


def test_noise_masks_are_where_the_deviation_is_another():
    x, mask, _ = noise.load_images(100, 64, masks=True)
    assert mask.shape == (100, 1, 64, 64) and mask.dtype == np.float32
    assert set(np.unique(mask)) == {0.0, 1.0}
    cover = mask.mean(axis=(1, 2, 3))
    assert (cover > 0.03).all() and (cover < 0.5).all()
    deviation = np.array(
        [
            [image[:, m[0] == side].std(axis=1).mean() for side in (0, 1)]
            for image, m in zip(x, mask, strict=True)
        ]
    )
    np.testing.assert_allclose(deviation.min(axis=1), noise.DEVIATIONS["weak"], rtol=0.15)
    np.testing.assert_allclose(deviation.max(axis=1), noise.DEVIATIONS["strong"], rtol=0.15)
    assert 30 < (deviation[:, 1] > deviation[:, 0]).sum() < 70
    means = np.array(
        [
            [image[:, m[0] == side].mean(axis=1) for side in (0, 1)]
            for image, m in zip(x, mask, strict=True)
        ]
    )
    np.testing.assert_allclose(means[:, 0], means[:, 1], atol=0.07)
