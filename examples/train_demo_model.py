"""Train the demo model: a Llama of about two million parameters on the Python standard library's own source.

    python examples/train_demo_model.py                 # 20 minutes on two cores; writes examples/demo_model/
    python examples/train_demo_model.py --steps 20 --out .demo/try    # a quick try

The text is every `.py` file of the running interpreter's standard library, less its tests, its bundled third-party
packages and its data modules; one file in 25 (by a hash of its name) is held out. The tokenizer is a byte-level BPE
of 2,048 entries trained on the same text. The checkpoint is in Hugging Face format with weights in bfloat16; the loss
curve goes to `docs/demo_model_loss.csv` and `docs/demo_model_loss.svg`. See `docs/demo_model.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent

SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
    "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "lib-dynload", "encodings",
}  # fmt: skip
BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
VOCAB_SIZE = 2048


@dataclass
class Recipe:
    steps: int = 5500
    warmup: int = 200
    batch: int = 8
    context: int = 384
    peak_lr: float = 4e-3
    final_lr: float = 1e-4
    weight_decay: float = 0.1
    seed: int = 0
    log_every: int = 50
    evaluate_every: int = 250


def model_config() -> LlamaConfig:
    """Eight query heads over two KV heads of 64: the attention shapes of the big models, in two million parameters."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype="float32",
    )


# ------------------------------------------------------------------------------------------------ text and tokenizer


def standard_library_text() -> tuple[list[str], list[str]]:
    """The standard library's source files in a fixed order, split into training and held-out files."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in name.parts[:-1]):
            continue
        if name.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        digest = hashlib.sha256(name.as_posix().encode()).digest()
        (held_out if digest[0] % 25 == 0 else train).append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for encoded in tokenizer.backend_tokenizer.encode_batch(texts):
        ids += [tokenizer.bos_token_id, *encoded.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


# ------------------------------------------------------------------------------------------------ training


def learning_rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warmup:
        return recipe.peak_lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.final_lr + 0.5 * (recipe.peak_lr - recipe.final_lr) * (1 + math.cos(math.pi * done))


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.97), fused=True)


def loss_of(model: LlamaForCausalLM, window: torch.Tensor, autocast: bool) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: torch.Tensor, context: int, windows: int = 96) -> float:
    """Mean loss in fp32 over evenly spaced windows of the held-out files."""
    starts = torch.linspace(0, len(stream) - context - 1, windows).long()
    total = 0.0
    for chunk in starts.split(8):
        total += loss_of(model, torch.stack([stream[s : s + context + 1] for s in chunk]), False).item() * len(chunk)
    return total / windows


Curve = list[tuple[int, float, float | None]]  # step, training loss since the last point, held-out loss


def train(model: LlamaForCausalLM, train_stream, held_out_stream, recipe: Recipe, autocast: bool) -> Curve:
    optimizer = make_optimizer(model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    curve: Curve = []
    recent: list[float] = []
    began = time.time()
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        starts = torch.randint(len(train_stream) - recipe.context - 1, (recipe.batch,), generator=generator)
        window = torch.stack([train_stream[s : s + recipe.context + 1] for s in starts])
        loss = loss_of(model, window, autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        last = step == recipe.steps - 1
        if step == 0 or (step + 1) % recipe.log_every == 0 or last:
            held_out = None
            if step == 0 or (step + 1) % recipe.evaluate_every == 0 or last:
                held_out = held_out_loss(model, held_out_stream, recipe.context)
            curve.append((step + 1, sum(recent) / len(recent), held_out))
            recent = []
            seconds = time.time() - began
            left = seconds / (step + 1) * (recipe.steps - step - 1)
            shown = "" if held_out is None else f"  held out {held_out:.3f}"
            rate = (step + 1) * recipe.batch * recipe.context / seconds
            print(
                f"step {step + 1:5d}/{recipe.steps}  loss {curve[-1][1]:.3f}{shown}  {rate:,.0f} tokens/s  "
                f"{seconds / 60:.1f} min, {left / 60:.1f} to go",
                flush=True,
            )
    return curve


# ------------------------------------------------------------------------------------------------ what is written


def loss_svg(curve: Curve) -> str:
    """The loss curve as a hand-drawn SVG: training loss (mean of the steps since the last point) and held-out loss."""
    width, height, left, right, top, bottom = 640, 360, 48, 16, 28, 36
    last = curve[-1][0]
    low = math.floor(2 * min(min(t, h if h is not None else t) for _, t, h in curve)) / 2
    high = math.ceil(max(t for _, t, _ in curve))

    def x(step: float) -> float:
        return left + (width - left - right) * step / last

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (high - loss) / (high - low)

    def line(points: list[tuple[int, float]], colour: str) -> str:
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
        return f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"/>'

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for tick in range(math.ceil(low), high + 1):
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for i in range(5):
        step = round(last * i / 4)
        out.append(f'<text x="{x(step):.1f}" y="{height - bottom + 16}" text-anchor="middle">{step}</text>')
    out.append(line([(s, t) for s, t, _ in curve], "#1f77b4"))
    out.append(line([(s, h) for s, _, h in curve if h is not None], "#d62728"))
    final = [h for _, _, h in curve if h is not None][-1]
    key = width - right - 190
    out.append(f'<text x="{key}" y="{top + 12}" fill="#1f77b4">training loss, nats a token</text>')
    out.append(f'<text x="{key}" y="{top + 28}" fill="#d62728">held-out files, {final:.2f} at the end</text>')
    out.append(f'<text x="{(width + left) / 2:.0f}" y="{height - 6}" text-anchor="middle">step</text>')
    return "\n".join([*out, "</svg>", ""])


def save_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Write the Hugging Face files, weights in bfloat16; returns their size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=False)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # 4.x knows it too
    settings.write_text(json.dumps(named, indent=2) + "\n", "utf-8")
    (folder / "model.safetensors").chmod(0o644)
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> int:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--batch", type=int, default=recipe.batch)
    parser.add_argument("--context", type=int, default=recipe.context)
    parser.add_argument("--lr", type=float, default=recipe.peak_lr)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fp32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument("--eager", action="store_true", help="train without torch.compile (twice as slow)")
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "demo_model")
    parser.add_argument("--curve", type=Path, help="folder of the loss curve (docs/; with another --out, that folder)")
    args = parser.parse_args()
    recipe.steps, recipe.batch, recipe.context, recipe.peak_lr = args.steps, args.batch, args.context, args.lr
    default_out = args.out.resolve() == (ROOT / "examples" / "demo_model").resolve()
    curve_folder = args.curve or (ROOT / "docs" if default_out else args.out)

    torch.set_num_threads(args.threads)
    torch.manual_seed(recipe.seed)
    texts, held_out_texts = standard_library_text()
    size = sum(map(len, texts)) / 1e6
    print(f"{len(texts)} files, {size:.1f} M characters to train on; {len(held_out_texts)} files held out", flush=True)
    tokenizer = train_tokenizer(texts)
    train_stream, held_out_stream = token_stream(tokenizer, texts), token_stream(tokenizer, held_out_texts)
    print(f"{len(tokenizer)} BPE entries; {len(train_stream):,} training tokens, {len(held_out_stream):,} held out")

    model = LlamaForCausalLM(model_config())
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters; {recipe}", flush=True)
    model.set_attn_implementation("eager")  # at this context faster to train, compiled, than SDPA's backward on CPU
    if not args.eager:
        model.forward = torch.compile(model.forward)
    curve = train(model, train_stream, held_out_stream, recipe, autocast=not args.fp32)
    if not args.eager:
        del model.forward

    bytes_written = save_checkpoint(model, tokenizer, args.out)
    rounded = held_out_loss(model.float(), held_out_stream, recipe.context)
    bits = rounded / math.log(2) * len(held_out_stream) / sum(len(t.encode()) for t in held_out_texts)
    print(f"held-out loss of the saved bfloat16 weights {rounded:.3f}, {bits:.2f} bits a byte")
    print(f"{args.out}: {bytes_written / 1e6:.2f} MB")
    curve_folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{step},{t:.4f},{'' if h is None else f'{h:.4f}'}" for step, t, h in curve]
    (curve_folder / "demo_model_loss.csv").write_text("\n".join(["step,train,held_out", *rows, ""]))
    (curve_folder / "demo_model_loss.svg").write_text(loss_svg(curve))
    prompt = tokenizer("<|begin|>import os\n\n\nclass ", return_tensors="pt").input_ids
    print(tokenizer.decode(model.generate(prompt, max_new_tokens=120, do_sample=False)[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
