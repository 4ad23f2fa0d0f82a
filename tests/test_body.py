"""bodies/tiny_roberta: loads as roberta-base does, is small, and knows what its card says."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import bodies
import orca

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


SWIN = ROOT / "bodies" / "tiny_swin"


def swin_number(pattern: str) -> float:
    return float(re.search(pattern, (SWIN / "README.md").read_text(encoding="utf-8"))[1])


def test_tiny_swin_loads_by_the_code_path_of_the_hub():
    import timm

    model = timm.create_model(f"local-dir:{SWIN}", pretrained=True)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 192)
    large = timm.create_model(f"local-dir:{SWIN}", pretrained=True, img_size=128)
    assert large.forward_features(torch.zeros(1, 3, 128, 128)).shape == (1, 8, 8, 192)
    assert sum(file.stat().st_size for file in SWIN.iterdir()) < 8e6


def test_the_card_of_tiny_swin_shows_that_it_learnt():
    probe = swin_number(r"held-out classes \| accuracy ([\d.]+)")
    random = swin_number(r"same on a random body \| accuracy ([\d.]+)")
    assert probe > 3 * random and swin_number(r"images \| ([\d.]+) of outline") > 0.5


@pytest.fixture(scope="module")
def swin_maker():
    spec = importlib.util.spec_from_file_location("swin", ROOT / "bodies/make_tiny_swin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_held_out_classes_are_not_shown(swin_maker):
    seen, held_out = (set(map(tuple, kinds)) for kinds in swin_maker.classes())
    assert not seen & held_out and len(seen) == 200 and len(held_out) == 40
    for part in (0, 1):  # but every outline and every texture is, in other pairs
        assert {k[part] for k in held_out if k[1] >= 0} <= {k[part] for k in seen}


@pytest.mark.slow
def test_the_card_of_tiny_swin_s_probe_comes_out_again(swin_maker):
    import timm

    model = timm.create_model(f"local-dir:{SWIN}", pretrained=True)
    card = swin_number(r"held-out classes \| accuracy ([\d.]+)")
    assert swin_maker.probe(model) == pytest.approx(card, abs=0.02)


@pytest.mark.slow
def test_pretraining_of_tiny_swin_goes_on_where_it_stopped(swin_maker, tmp_path, monkeypatch):
    """Four steps in one go, and four with a break after three, make the same weights."""
    kinds, (clip, steps) = swin_maker.classes()[0], (torch.nn.utils.clip_grad_norm_, [])
    args = type("args", (), {"seed": 0, "lr": 1e-3, "batch": 8, "save_every": 2, "steps": 4})

    def trained(name):
        torch.manual_seed(0)
        (tmp_path / name).mkdir(exist_ok=True)
        model = swin_maker.Namer()
        swin_maker.train(model, kinds, args, tmp_path / name)
        return model.state_dict()

    def breaks_in_step_3(*given):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return clip(*given)

    whole = trained("whole")
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", breaks_in_step_3)
    with pytest.raises(KeyboardInterrupt):
        trained("broken")
    broken = trained("broken")
    assert len(steps) == 3 + 2  # from step 2 on
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


VITS = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2"]


@pytest.mark.parametrize("name", [*VITS, "swin_tiny_patch4_window7_224"])
def test_bodies_of_other_widths_are_the_library_s_own_forward(name):
    """Embedder and g together give what timm gives; and describe() is enough to build it anew."""
    import timm

    patches = 3136 if name.startswith("swin") else 36
    torch.manual_seed(0)
    net, _ = bodies.load_body(f"random:{name}", (3, 20, 20), patches)
    model = orca.Model(net, (3, 20, 20), (4,), patches).eval()
    x = torch.randn(1, 3, *net.patch_embed.img_size)
    with torch.no_grad():
        theirs = net.eval().forward_features(x)
        theirs = theirs[:, getattr(net, "num_prefix_tokens", 0) :] if theirs.ndim == 3 else theirs
        ours = model.g(model.f_t(x))
        torch.testing.assert_close(ours[-1].flatten(1, 2), theirs.reshape(1, -1, ours[-1].shape[3]))
        assert [(tuple(z.shape[1:3]), z.shape[3]) for z in ours] == list(model.g.maps)
        again = orca.Model(bodies.rebuild(bodies.describe(net)), (3, 20, 20), (4,), patches)
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(again.eval()(x), model(x))
    assert timm.is_model(name)


def test_series_take_a_roberta_of_any_width_and_its_twins(tmp_path):
    """As the MiniBERTas: fewer layers, another width, saved in the Hugging Face form."""
    from transformers import AutoModel, AutoTokenizer, CamembertConfig, RobertaConfig

    sizes = {"vocab_size": 4096, "hidden_size": 48, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 3, "intermediate_size": 96, "max_position_embeddings": 80}
    for config in (RobertaConfig(**sizes), CamembertConfig(**sizes)):
        place = tmp_path / config.model_type
        AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(place)
        AutoTokenizer.from_pretrained(bodies.FOLDER / "tiny_roberta").save_pretrained(place)
        net, tokenize = bodies.load_body(str(place), (1, 46), 32)
        model = orca.Model(net, (1, 46), (1, 46), 32)
        assert model(torch.randn(2, 1, 46)).shape == (2, 1, 46) and len(model.g.maps) == 3
        assert tokenize(["a word"])[0]
        again = orca.Model(bodies.rebuild(bodies.describe(net)), (1, 46), (1, 46), 32)
        again.load_state_dict(model.state_dict())


def test_another_kind_of_vision_model_is_refused():
    with pytest.raises(ValueError, match="it is a ResNet; images take a Swin transformer or a ViT"):
        bodies.load_body("random:resnet18", (3, 32, 32), 64)
