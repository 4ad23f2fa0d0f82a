"""Pretrained bodies: the tiny ones and their cards; which others are taken, and how; what g is."""

import copy
import functools
import importlib.util
import json
import re
import shutil
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
    """Six steps in one go, and six with a break after five, make the same weights.

    Of a smaller body, with less text and a fiftieth of the windows of the probe.
    """
    from safetensors.torch import load_file

    texts = {name: text[:20_000] for name, text in maker.words.texts().items()}
    load = maker.words.load
    monkeypatch.setattr(maker.words, "texts", lambda: texts)
    monkeypatch.setattr(maker.words, "load", lambda tokens, n, *how: load(tokens, n // 50, *how))
    for name, size in {"VOCABULARY": 600, "LAYERS": 2, "D": 16, "INNER": 32}.items():
        monkeypatch.setattr(maker, name, size)
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
    """Four steps in one go, and four with a break after three, make the same weights.

    The accuracy, which is measured beside them, is that in 20 images instead of 2000.
    """
    monkeypatch.setattr(swin_maker, "accuracy", functools.partial(swin_maker.accuracy, n=20))
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


# ---- Bodies of transformers ----------------------------------------------------------------------

SMALL = {"vocab_size": 4096, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
SMALL |= {"intermediate_size": 96, "max_position_embeddings": 80}


def series_body(place: Path, kind: str, tokenizer: bool = True, **sizes) -> torch.nn.Module:
    """A folder with an untrained body; the model in it, in evaluation mode, without dropout."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, **(SMALL | sizes))
    model = AutoModel.from_config(config, add_pooling_layer=False)
    for name, weight in model.named_parameters():  # biases and norms, too
        torch.nn.init.normal_(weight, mean=float("LayerNorm.weight" in name), std=0.2)
    model.save_pretrained(place)
    if tokenizer:
        for file in FOLDER.glob("tokenizer*.json"):
            shutil.copy(file, place)
    return model.eval()


def rewrite(place: Path, change) -> None:
    """Write the weights of a folder again, as a function of them."""
    from safetensors.torch import load_file, save_file

    file = place / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", bodies.SERIES)
@torch.no_grad()
def test_f_s_and_g_of_a_series_body_are_the_library_s_own_forward(kind, tmp_path):
    """Words, token types, positions and layers, from token ids to the last one, to 1e-5."""
    theirs = series_body(tmp_path, kind)
    net, tokenize = bodies.load_body(str(tmp_path), (1, 46), 32)
    first = bodies.first_position(net)
    assert first == (0 if kind == "bert" else 2) and tokenize(["a word"])[0]
    ids = torch.randint(5, 4096, (3, 80 - first))  # as many as there are positions
    g = bodies.adapt(net, (80 - first,)).eval()
    want = theirs(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(net.embeddings.eval()(ids), want[0], atol=1e-5, rtol=0)
    for ours, layer in zip(g(net.embeddings(ids)), want[1:], strict=True):
        torch.testing.assert_close(ours, layer, atol=1e-5, rtol=0)
    table = net.embeddings  # the first positions are those that the library gives to embeddings
    words = torch.zeros(1, 10, 48)
    z = table.token_type_embeddings.weight[0] + table.position_embeddings.weight[first : first + 10]
    torch.testing.assert_close(table(inputs_embeds=words)[0], table.LayerNorm(z))


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_random_series_bodies_and_rebuild(kind, tmp_path):
    """random:NAME has other weights; describe() is plain data and enough to build it anew."""
    theirs = series_body(tmp_path, kind)
    net, _ = bodies.load_body(f"random:{tmp_path}", (1, 46), 32, dropout=0.5)
    shapes = {name: weight.shape for name, weight in theirs.named_parameters()}
    assert {name: weight.shape for name, weight in net.named_parameters()} == shapes
    own, other = (m.encoder.layer[0].intermediate.dense.weight for m in (net, theirs))
    assert float((own - other).detach().abs().mean()) > 0.05
    again = bodies.rebuild(json.loads(json.dumps(bodies.describe(net)))).train()
    again.load_state_dict(net.state_dict())
    ids = torch.randint(5, 4096, (2, 20))
    with torch.no_grad():
        want = net.eval()(ids).last_hidden_state
        assert torch.equal(again(ids).last_hidden_state, want)  # no dropout, though training


def test_dropout_is_in_the_layers_of_g_alone():
    """At the rate asked for; none by default. f^s gives the same in every call."""
    for rate in (0.0, 0.3):
        net, _ = bodies.load_body("tiny_roberta", (1, 46), 32, dropout=rate)
        ids, g = torch.arange(5, 45)[None], bodies.adapt(net, (40,))
        net.train()
        assert {m.p for m in g.modules() if isinstance(m, torch.nn.Dropout)} == {rate}
        z = net.embeddings(ids)
        assert torch.equal(z, net.embeddings(ids))
        assert torch.equal(g(z)[-1], g(z)[-1]) == (rate == 0)


def as_of_old(weights: dict) -> dict:
    """The names of bert-base-uncased: a prefix, gamma and beta, a pooler, heads."""
    old = {"bert.pooler.dense.bias": torch.ones(48), "cls.predictions.bias": torch.ones(9)}
    for name, weight in weights.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = weight
    return old


def test_prefixes_heads_and_poolers_are_fine(tmp_path):
    theirs = series_body(tmp_path, "bert").state_dict()
    rewrite(tmp_path, as_of_old)
    net, _ = bodies.load_body(str(tmp_path), (1, 46), 32)
    assert all(torch.equal(weight, theirs[name]) for name, weight in net.state_dict().items())


WRONG = {
    "another prefix": lambda w: {f"model.{name}": weight for name, weight in w.items()},
    "a layer missing": lambda w: {name: w[name] for name in w if ".1." not in name},
    "one missing": lambda w: {name: w[name] for name in list(w)[1:]},
    "another shape": lambda w: w | {n: torch.zeros(7) for n in w if n.endswith("bias")},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_weights_that_do_not_fit_are_an_error_that_names_three(library, wrong, tmp_path):
    if library == "timm":
        shutil.copytree(SWIN, tmp_path / "body")
    else:
        series_body(tmp_path / "body", "roberta")
    rewrite(tmp_path / "body", WRONG[wrong])
    shape = (1, 46) if library == "transformers" else (3, 20, 20)
    with pytest.raises(ValueError, match="of its weights are not in its file") as error:
        bodies.load_body(str(tmp_path / "body"), shape, 64)
    message = str(error.value)
    named = message.split("shape there: ")[1].split("; the file")[0].split(", ")
    if wrong == "one missing":
        assert "(1 of its weights" in message and len(named) == 1
    else:
        assert len(named) == 4 and named[3] == "..."
    names = dict(bodies.load_body("random:" + str(tmp_path / "body"), shape, 64)[0].state_dict())
    assert set(named) - {"..."} <= set(names) and "\n" not in message


def test_a_vit_with_other_names_is_an_error(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert bodies.load_body(str(tmp_path), (3, 20, 20), 36)[0].patch_embed.img_size == (96, 96)
    rewrite(tmp_path, lambda w: {name.replace("blocks.", "layers."): w[name] for name in w})
    with pytest.raises(ValueError, match=r"144 of its weights .*: blocks.0.attn.proj.bias, "):
        bodies.load_body(str(tmp_path), (3, 20, 20), 36)


def test_a_head_in_the_file_of_an_image_body_is_fine(tmp_path):
    shutil.copytree(SWIN, tmp_path / "body")
    extra = {"head.fc.weight": torch.ones(10, 192), "head.fc.bias": torch.ones(10)}
    rewrite(tmp_path / "body", lambda w: w | extra | {"decoder.bias": torch.ones(3)})
    net, _ = bodies.load_body(str(tmp_path / "body"), (3, 20, 20), 256)
    own = bodies.load_body("tiny_swin", (3, 20, 20), 256)[0].state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in net.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_become_float32(dtype, tmp_path):
    half = lambda w: {name: weight.to(dtype) for name, weight in w.items()}  # noqa: E731
    theirs = series_body(tmp_path / "series", "bert").to(dtype)
    theirs.save_pretrained(tmp_path / "series")
    assert json.loads((tmp_path / "series/config.json").read_text())["dtype"] in str(dtype)
    shutil.copytree(SWIN, tmp_path / "images")
    rewrite(tmp_path / "images", half)
    for name, shape in (("series", (1, 46)), ("images", (3, 20, 20))):
        for prefix in ("", "random:"):
            net, _ = bodies.load_body(f"{prefix}{tmp_path / name}", shape, 64)
            assert {w.dtype for w in net.parameters()} == {torch.float32}
            again = bodies.rebuild(bodies.describe(net))
            assert {w.dtype for w in again.parameters()} == {torch.float32}
    net = bodies.load_body(str(tmp_path / "series"), (1, 46), 32)[0]
    ours, own = (model.encoder.layer[1].output.dense.weight for model in (net, theirs))
    assert torch.equal(ours.to(dtype), own)


def test_a_series_body_that_lacks_something_says_what(tmp_path):
    def reason(name: str) -> str:
        with pytest.raises(ValueError) as error:
            bodies.load_body(str(tmp_path / name), (1, 46), 32)
        assert "\n" not in str(error.value)
        return str(error.value)

    for kind in bodies.SERIES:
        series_body(tmp_path / kind, kind, tokenizer=False)
        assert "it has no tokenizer" in reason(kind), kind
    series_body(tmp_path / "short", "roberta", max_position_embeddings=22)
    assert "it has 20 positions, but a window of a source's text has 64 tokens" in reason("short")
    series_body(tmp_path / "words", "bert", vocab_size=4000)
    want = "its tokenizer is larger than its vocabulary: ids up to 4095, but vocab_size is 4000"
    assert want in reason("words")
    (tmp_path / "nothing").mkdir()
    assert "it holds no config.json; series take a RoBERTa or a BERT" in reason("nothing")
    series_body(tmp_path / "damaged", "bert")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"no weights")
    assert "damaged cannot be loaded (" in reason("damaged")


NOT_TAKEN = ["distilbert", "modernbert", "clip", "gpt2", "vit", "swin", "convnext", "electra"]


@pytest.mark.parametrize("kind", NOT_TAKEN)
def test_other_models_of_transformers_are_refused_by_their_name(kind, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"it is a {kind}; series take a RoBERTa or a BERT of tr"):
        bodies.load_body(str(tmp_path), (1, 46), 32)
    want = f"it is a {kind} of transformers; images take a Swin transformer or a ViT of timm"
    with pytest.raises(ValueError, match=want):
        bodies.load_body(str(tmp_path), (3, 20, 20), 64)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("tiny_swin", (1, 46), "it is a swin_tiny_patch4_window7_224 of timm, for images; series"),
        ("resnet18", (1, 46), "it is a resnet18 of timm, for images; series take a RoBERTa"),
        ("tiny_roberta", (3, 20, 20), "it is a roberta of transformers; images take a Swin"),
        ("random:vit_tiny_r_s16_p8_224", (3, 20, 20), "a ViT on the features of a convolutional"),
        ("random:vit_base_patch16_rope_reg1_gap_256", (3, 9, 9), "it is a Eva; images take a Sw"),
    ],
)
def test_a_body_for_the_other_kind_of_data_is_refused_by_its_name(name, shape, reason):
    with pytest.raises(ValueError, match=reason):
        bodies.load_body(name, shape, 64)


def test_names_of_the_hub_without_an_owner(tmp_path, monkeypatch):
    """bert-base-uncased is where its owner has put it; distilbert is refused as what it is."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, kind in (
        ("google-bert/bert-base-uncased", "bert"),
        ("distilbert/distilbert-base", 0),
    ):
        folder = tmp_path / ("models--" + name.replace("/", "--"))
        place = folder / "snapshots" / commit
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        place.mkdir(parents=True)
        if kind:
            series_body(place, kind)
        else:
            (place / "config.json").write_text('{"model_type": "distilbert"}')
    net, _ = bodies.load_body("bert-base-uncased", (1, 46), 32)
    assert net.config.model_type == "bert" and bodies.describe(net)["commit"] == commit
    with pytest.raises(ValueError, match="it is a distilbert; series take a RoBERTa or a BERT"):
        bodies.load_body("distilbert-base", (1, 46), 32)
    with pytest.raises(ValueError, match="no folder bodies/bert or bert; give tiny_roberta"):
        bodies.load_body("bert", (1, 46), 32)


# ---- Bodies of timm ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patches", "pixels"),
    [("tiny_swin", 256, 64), ("vit_tiny_patch16_224", 196, 224), ("vit_tiny_patch16_224", 36, 96)],
)
def test_the_size_of_images_is_the_body_s(name, patches, pixels):
    net, _ = bodies.load_body(f"random:{name}", (3, 20, 20), patches)
    assert bodies.image_size(net) == pixels
    assert net.eval()(torch.zeros(1, 3, pixels, pixels)).shape == (1, 192)


@pytest.mark.parametrize("name", ["tiny_swin", "random:vit_tiny_patch16_224"])
def test_stochastic_depth_is_that_of_the_last_block_and_off_by_default(name):
    for rate in (0.0, 0.1):
        net, _ = bodies.load_body(name, (3, 20, 20), 64, drop_path=rate)
        rates = [m.drop_prob for m in net.modules() if type(m).__name__ == "DropPath"]
        assert rates[-1:] == ([pytest.approx(0.1)] if rate else []) and rates == sorted(rates)
        described = bodies.describe(net)
        assert "drop_path_rate" not in described["sizes"]
        again = bodies.rebuild(described)
        again.load_state_dict(net.state_dict())
        assert not [m for m in again.modules() if type(m).__name__ == "DropPath"]


# ---- Frozen queries and keys ---------------------------------------------------------------------


def is_fixed(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Which entries of a weight of g belong to queries and keys."""
    fixed = torch.zeros(weight.shape, dtype=torch.bool)
    if ".qkv." in name:
        fixed[: len(weight) // 3 * 2] = True
    return fixed if not re.search(r"\.(query|key)\.", name) else ~fixed


@pytest.mark.parametrize("name", ["tiny_swin", "random:vit_tiny_patch16_224", "tiny_roberta"])
def test_frozen_queries_and_keys_stay_bit_equal_under_weight_decay(name):
    """And values change; nothing else of g is different, in what it gives, saves and loads."""
    shape, patches = ((1, 46), 32) if name == "tiny_roberta" else ((3, 20, 20), 64)
    net, _ = bodies.load_body(name, shape, patches)
    model = orca.Model(net, shape, (4,), patches)
    plain = copy.deepcopy(model.g).train()
    before, z = copy.deepcopy(model.g.state_dict()), model.f_t(torch.randn(2, *shape)).detach()
    bodies.freeze_queries_and_keys(model.g)
    g = copy.deepcopy(model.g).train()  # and copies work, too
    assert torch.equal(g(z)[-1], plain(z)[-1])
    assert all(torch.equal(w, before[name]) for name, w in g.state_dict().items())
    assert set(before) == set(g.state_dict())
    learn = [w for w in g.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(learn, lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        sum(part.square().mean() for part in g(z)).backward()
        optimizer.step()
    after, seen = g.state_dict(), 0
    for key, weight in before.items():
        fixed = is_fixed(key, weight)
        assert torch.equal(after[key][fixed], weight[fixed]), key
        seen += int(fixed.sum())
        if weight.is_floating_point() and ("qkv" in key or ".value." in key):
            assert not (after[key] == weight)[~fixed].any(), key
    assert seen > 0
    plain.load_state_dict(after)  # as load() does, which knows of nothing frozen
    assert torch.equal(plain.eval()(z)[-1], g.eval()(z)[-1])
    model.g.load_state_dict(after)
    assert torch.equal(model.g.eval()(z)[-1], g(z)[-1])


@pytest.mark.parametrize(("name", "shape"), [("tiny_roberta", (1, 46)), ("tiny_swin", (3, 64, 64))])
def test_weights_that_are_not_finite_or_of_another_prefix_are_one_line(
    name, shape, tmp_path, capfd
):
    """NaN was found as a run that diverged; timm printed all names before the error."""

    def hole(weights):
        key = sorted(weights)[5]
        return weights | {key: weights[key] * float("nan")}

    changes = {
        r"its weight .* holds NaN or infinite": hole,
        r"of its weights are not in its file": lambda weights: {
            f"model.{key}": w for key, w in weights.items()
        },
    }
    for message, change in changes.items():
        place = tmp_path / message[:3]
        shutil.copytree(bodies.FOLDER / name, place)
        rewrite(place, change)
        with pytest.raises(ValueError, match=message):
            bodies.load_body(str(place), shape, 256 if len(shape) == 3 else 32)
        assert capfd.readouterr().err == ""
