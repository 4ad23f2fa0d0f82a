"""Small inputs that several tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import bodies
import run
from tasks import satellite

# One thread each, where several processes run the tests; also in what they start.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

# No test is to reach the network, and none to wait for it: the way out is a port that is closed.
# What tests start inherits it; a server that a test starts itself is reached directly.
os.environ |= dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")


@pytest.fixture(scope="session")
def series(tmp_path_factory):
    """A file of 4 classes of satellite series: 96 to train on, 64 to test on."""

    def part(n, seed):
        x, y = satellite.simulate(6 * n, seed)
        keep = np.flatnonzero(np.isin(y, (0, 10, 15, 20)))[:n]
        return x[keep, 0], np.searchsorted((0, 10, 15, 20), y[keep])

    path = tmp_path_factory.mktemp("data") / "series.npz"
    (x_train, y_train), (x_test, y_test) = part(96, 1), part(64, 2)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture(scope="session")
def small_body(tmp_path_factory):
    """A RoBERTa of two layers of width 16, for runs in which it does not matter what g is.

    It is untrained and has the tokenizer of tiny_roberta. A run takes a third of the time.
    """
    from transformers import AutoTokenizer, RobertaConfig, RobertaModel

    folder = tmp_path_factory.mktemp("bodies") / "small"
    sizes = {"vocab_size": 4096, "hidden_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 130}
    torch.manual_seed(0)
    body = RobertaModel(RobertaConfig(**sizes), add_pooling_layer=False)
    body.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bodies.FOLDER / "tiny_roberta").save_pretrained(folder)
    return folder


tokens = {}  # (the tokenizer's file, texts): their tokens
make_tokenizer = bodies._tokenizer


def remembering(name: str, *given, **which):
    """bodies._tokenizer, whose function takes the whole text of a source once, not in every run."""
    tokenize, file = make_tokenizer(name, *given, **which), Path(name) / "tokenizer.json"
    if not file.is_file():
        return tokenize
    rules = file.read_bytes()

    def looked_up(texts: list[str]) -> list[list[int]]:
        key = (rules, *texts)
        if key not in tokens:
            tokens[key] = tokenize(texts)
        return tokens[key]

    return looked_up


@pytest.fixture(scope="session", autouse=True)
def texts_are_tokenized_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "_tokenizer", remembering)
        yield


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """The curves of a run take as long as a short run; those of fixtures are drawn, and looked at.

    A fixture of a module is made before this one: the first run of each script's tests draws them.
    """
    monkeypatch.setattr(run, "draw_curves", lambda *given: None)
