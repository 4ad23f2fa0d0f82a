"""bodies/tiny_roberta: loads as roberta-base does, is small, and knows what its card says."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bodies" / "tiny_roberta"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("maker", ROOT / "bodies/make_tiny_roberta.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_loads_by_the_code_path_of_the_hub():
    from transformers import AutoModel, AutoTokenizer, RobertaModel

    model = AutoModel.from_pretrained(FOLDER, add_pooling_layer=False)
    assert isinstance(model, RobertaModel)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer("The quick brown fox", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "The quick brown fox" and max(ids) < model.config.vocab_size
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (1, 4)
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    assert size < 8e6 and not list(FOLDER.glob("*.bin"))


def card_number(pattern: str) -> float:
    return float(re.search(pattern, (FOLDER / "README.md").read_text(encoding="utf-8"))[1])


def test_the_card_shows_that_it_learnt():
    loss = card_number(r"masked-LM loss, held-out text \| ([\d.]+) nats")
    unigram = card_number(r"unigram model \| ([\d.]+) nats")
    probe = card_number(r"linear probe on `words` \| accuracy ([\d.]+)")
    random = card_number(r"same on a random body \| accuracy ([\d.]+)")
    assert loss < unigram - 0.5 and probe > random + 0.05


@pytest.mark.slow
def test_the_card_s_probe_comes_out_again(maker):
    """Within 0.03: another Python has a little other text."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(FOLDER, add_pooling_layer=False)
    probe = maker.probe(model, AutoTokenizer.from_pretrained(FOLDER))
    assert probe == pytest.approx(
        card_number(r"linear probe on `words` \| accuracy ([\d.]+)"), abs=0.03
    )


def test_masks_are_80_10_10(maker):
    x = torch.full((200, 500), 7)
    x_in, chosen = maker.masked(x, torch.Generator().manual_seed(0))
    share = lambda what: float(what[chosen].float().mean())  # noqa: E731
    assert float(chosen.float().mean()) == pytest.approx(maker.SHARE, abs=0.01)
    assert share(x_in == maker.MASK) == pytest.approx(0.8, abs=0.01)
    assert share(x_in == 7) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(x_in[~chosen], x[~chosen])


@pytest.mark.slow
def test_the_script_makes_a_body_and_goes_on_after_a_break(maker, tmp_path, monkeypatch):
    """Six steps in one go, and six with a break after five, make the same weights."""
    from safetensors.torch import load_file

    small = {"steps": 6, "batch": 4, "length": 16, "lr": 1e-3, "seed": 0, "threads": 2}
    arguments = lambda out: maker.argparse.Namespace(**small, save_every=3, out=tmp_path / out)  # noqa: E731
    maker.main(arguments("whole"))
    card = (tmp_path / "whole" / "README.md").read_text(encoding="utf-8")
    assert "6 steps of 4 windows" in card and "unigram" in card

    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def breaks_in_step_5(*args):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", breaks_in_step_5)
    with pytest.raises(KeyboardInterrupt):
        maker.main(arguments("broken"))
    maker.main(arguments("broken"))
    assert len(steps) == 5 + 3  # from step 3 on
    whole, broken = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
