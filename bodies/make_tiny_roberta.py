"""Make bodies/tiny_roberta: a small RoBERTa, pretrained on the English of tasks/sources/words.py.

Masked language modelling (Devlin et al. 2019; Liu et al. 2019: dynamic masks, no next-sentence
task) on Python's documentation, with a byte-level BPE vocabulary of its own. The result is a
folder in the Hugging Face form, so that AutoModel.from_pretrained("bodies/tiny_roberta") is the
very code path of "roberta-base"; its README.md is the model card that this script writes.

    python bodies/make_tiny_roberta.py              # about 25 minutes on two CPU cores
    python bodies/make_tiny_roberta.py --steps 300 --out bodies/tiny_roberta_10pct    # less of it

The state is saved beside the result every --save-every steps; run the script again to resume.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tasks.sources import words  # noqa: E402 (the repository's root has to be on the path first)

# B batch, L length, D width, M masked tokens of a batch
VOCABULARY = 4096
LAYERS, D, HEADS, INNER = 4, 128, 4, 512
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0..4, in RoBERTa's order
PAD, MASK = 1, 4
SHARE = 0.25  # of the tokens that are chosen for prediction


def make_tokenizer(out: Path):
    """Train the byte-level BPE on the training text and save it as a RoBERTa tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus("train"), VOCABULARY, 2, special_tokens=SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=512,
    )
    fast.save_pretrained(out)
    return AutoTokenizer.from_pretrained(out)


def corpus(split: str) -> list[str]:
    """All texts of `words`, the "other" docstrings included, cut as the source cuts them."""
    low, high = words.SPLITS[split]
    return [text[int(low * len(text)) : int(high * len(text))] for text in words.texts().values()]


def make_config():
    from transformers import RobertaConfig

    return RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=INNER,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,  # a third faster, and the model is too small to overfit
        attention_probs_dropout_prob=0.0,
        bos_token_id=0,
        pad_token_id=PAD,
        eos_token_id=2,
    )


def batch_of(stream: Tensor, B: int, L: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """B windows of the stream at random places, (B, L), and positions for them, (B, L).

    careful: a quarter of the windows get positions that start anywhere, so that all 512 are
    trained though L is shorter; else tasks with more than L patches would meet untrained ones.
    """
    start = torch.randint(len(stream) - L, (B, 1), generator=rng)
    first = torch.randint(512 - L + 1, (B, 1), generator=rng)
    first = torch.where(torch.rand(B, 1, generator=rng) < 0.25, first, 0)
    return stream[start + torch.arange(L)], PAD + 1 + first + torch.arange(L)


def masked(x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """SHARE of the tokens chosen; of these 80 % masked, 10 % random, 10 % kept: input, choice."""
    chosen = torch.rand(x.shape, generator=rng) < SHARE
    how = torch.rand(x.shape, generator=rng)
    anything = torch.randint(len(SPECIAL), VOCABULARY, x.shape, generator=rng)
    x_in = torch.where(chosen & (how < 0.8), torch.full_like(x, MASK), x)
    return torch.where(chosen & (how >= 0.9), anything, x_in), chosen


def mlm_loss(model, x: Tensor, positions: Tensor, rng: torch.Generator) -> Tensor:
    """Mean cross-entropy, in nats, of the chosen tokens."""
    x_in, chosen = masked(x, rng)
    features = model.roberta(input_ids=x_in, position_ids=positions).last_hidden_state
    return F.cross_entropy(model.lm_head(features[chosen]), x[chosen])  # (M, D) -> (M, V)


@torch.no_grad()
def evaluate(model, stream: Tensor, L: int, batches: int = 20) -> float:
    """The masked-LM loss on the held-out text, on the same windows and masks every time."""
    model.eval()
    rng = torch.Generator().manual_seed(1)
    losses = [mlm_loss(model, *batch_of(stream, 96, L, rng), rng) for _ in range(batches)]
    model.train()
    return float(torch.stack(losses).mean())


def unigram_loss(train: Tensor, val: Tensor) -> float:
    """Nats a token of a model that knows only how frequent each token is (add-one smoothing)."""
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return float(-(counts / counts.sum()).log()[val].mean())


def probe(model, tokenizer, seed: int = 0) -> float:
    """Accuracy of multinomial logistic regression on the mean last features of `words`.

    4000 windows of 64 tokens to fit, 2000 of the held-out text to score; ridge 1e-3.
    """
    tokenize = lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    sets = []
    model.eval()
    for split, n in (("train", 4000), ("val", 2000)):
        x, y, _ = words.load(tokenize, n, 64, seed, split)
        with torch.no_grad():
            parts = [model(b).last_hidden_state.mean(1) for b in torch.from_numpy(x).split(250)]
        sets.append((torch.cat(parts), torch.from_numpy(y)))
    (x, y), (x_val, y_val) = sets
    mean, std = x.mean(0), x.std(0) + 1e-6
    head = torch.nn.Linear(x.shape[1], len(words.CLASSES))
    solver = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        ridge = 1e-3 * head.weight.square().sum()
        loss = F.cross_entropy(head((x - mean) / std), y) + ridge
        loss.backward()
        return loss

    solver.step(closure)
    return float((head((x_val - mean) / std).argmax(1) == y_val).float().mean())


def train(model, streams: dict[str, Tensor], args, work: Path) -> list[dict]:
    """AdamW with linear warm-up and decay. Returns the log; resumes from work/state.pt."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6)
    warmup = max(1, args.steps // 15)
    rate = lambda s: min((s + 1) / warmup, (args.steps - s) / max(1, args.steps - warmup))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng, log, state = torch.Generator().manual_seed(args.seed), [], work / "state.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        rng.set_state(saved["rng"])
        torch.set_rng_state(saved["torch_rng"])
        log = saved["log"]
    start = time.time() - (log[-1]["time_s"] if log else 0)
    model.train()
    for step in range(log[-1]["step"] if log else 0, args.steps):
        loss = mlm_loss(model, *batch_of(streams["train"], args.batch, args.length, rng), rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            row = {"step": step + 1, "train_loss": loss.item()}
            row["val_loss"] = evaluate(model, streams["val"], args.length)
            log.append({**row, "time_s": time.time() - start})
            print(json.dumps(log[-1]), flush=True)
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            saved = {name: part.state_dict() for name, part in parts.items()}
            saved |= {"rng": rng.get_state(), "torch_rng": torch.get_rng_state(), "log": log}
            torch.save(saved, work / "state.tmp")
            (work / "state.tmp").replace(state)
    return log


def card(args, streams, log, unigram, probes, size_mb, params) -> str:
    """The model card: what it was trained on, for how long, and what it is worth."""
    version, chars = platform.python_version(), sum(map(len, corpus("train"))) / 1e6
    tokens, minutes = args.steps * args.batch * args.length / 1e6, log[-1]["time_s"] / 60
    val = log[-1]["val_loss"]
    rows = {
        "corpus": f"documentation of Python {version}: language reference and docstrings of the "
        f"standard library (`tasks/sources/words.py`), {chars:.2f} M characters, "
        f"{len(streams['train']) / 1e3:.0f} k tokens; the last tenth of each class is held out",
        "objective": f"masked language modelling, {SHARE:.0%} of the tokens, new masks every time",
        "training": f"{args.steps} steps of {args.batch} windows of {args.length} tokens "
        f"({tokens:.1f} M tokens); AdamW, learning rate {args.lr:g} with linear warm-up and decay; "
        f"seed {args.seed}; torch {torch.__version__.split('+')[0]}; {minutes:.0f} minutes on "
        f"{torch.get_num_threads()} CPU threads",
        "masked-LM loss, held-out text": f"{val:.3f} nats a token (perplexity {math.exp(val):.1f})",
        "the same of a unigram model": f"{unigram:.3f} nats a token "
        f"(perplexity {math.exp(unigram):.0f})",
        "linear probe on `words`": f"accuracy {probes['pretrained']:.3f} from its features "
        "(8 classes, chance 0.125, windows of held-out text)",
        "the same on a random body": f"accuracy {probes['random']:.3f} (same architecture and "
        "vocabulary, untrained)",
    }
    table = "\n".join(f"| {name} | {text} |" for name, text in rows.items())
    made = f"python bodies/make_tiny_roberta.py --steps {args.steps} --out bodies/{args.out.name}"
    return f"""# {args.out.name}

A small RoBERTa for two CPU cores: {LAYERS} layers, width {D}, {HEADS} heads, feed-forward {INNER},
512 positions, byte-level BPE vocabulary of {VOCABULARY}; {params / 1e6:.2f} M parameters,
{size_mb:.1f} MB of safetensors. It stands in for `roberta-base` where nothing can be downloaded.
Made by `{made}`; nothing of it comes from anywhere else.

| | |
|---|---|
{table}

A quarter of the training windows sit at random positions, so that all 512 are trained. It has read
nothing but documentation of Python, and is good for nothing but this project.

The corpus is copyright Python Software Foundation (PSF licence); the weights are under this
project's licence.
"""


def main(args) -> None:
    from transformers import RobertaForMaskedLM, RobertaModel

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    work = args.out.parent / f".{args.out.name}.work"
    work.mkdir(parents=True, exist_ok=True)
    make_config().save_pretrained(args.out)
    tokenizer = make_tokenizer(args.out)
    streams = {}
    for split in words.SPLITS:
        ids = tokenizer(corpus(split), add_special_tokens=False, verbose=False)["input_ids"]
        streams[split] = torch.tensor([token for text in ids for token in text])
    model = RobertaForMaskedLM(make_config())
    print({k: len(v) for k, v in streams.items()}, "tokens", flush=True)
    log = train(model, streams, args, work)
    body = RobertaModel(make_config(), add_pooling_layer=False)
    probes = {"random": probe(body, tokenizer)}
    body.load_state_dict(model.roberta.state_dict())
    body.save_pretrained(args.out)
    probes["pretrained"] = probe(body, tokenizer)
    unigram = unigram_loss(streams["train"], streams["val"])
    size_mb = (args.out / "model.safetensors").stat().st_size / 1e6
    params = sum(p.numel() for p in body.parameters())
    text = card(args, streams, log, unigram, probes, size_mb, params)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(json.dumps({"unigram_loss": unigram, **probes, "size_mb": size_mb}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "bodies" / "tiny_roberta")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=96, help="windows per step")
    parser.add_argument("--length", type=int, default=64, help="tokens per window")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=250)
    main(parser.parse_args())
