"""Makes the tiny base from nothing: `python -m apiary.builtin.pretrain --prose DIR --minutes 45 --out DIR`.

The text is three parts generated documents (`documents.py`) and one part prose from the files of `--prose`. The run is
fixed by its seed and its number of steps; with `--minutes` the number of steps is what the machine manages in that time.
Hidden matrices are trained with Muon (Jordan et al. 2024, with the step size of Liu et al. 2025, arXiv:2502.16982),
which on this model needs far fewer tokens than AdamW; embeddings and norms are trained with AdamW.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from apiary.builtin import documents, vocabulary, weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

Batches = Iterator[Tensor]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the machine's speed.

    Attributes:
        vocabulary: tokens of the tokenizer.
        window: tokens of a training window; one step in eight has windows of `context` instead.
        step_tokens: tokens of one optimizer step.
        prose_share: share of the windows that hold prose.
        peak_rate: learning rate after the warm-up; it falls to a fiftieth of it along a cosine.
        warm_up: share of the run.
    """

    seed: int = 0
    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    inner: int = 512
    context: int = 512
    window: int = 256
    step_tokens: int = 4096
    prose_share: float = 0.17
    peak_rate: float = 4e-3
    warm_up: float = 0.02
    weight_decay: float = 0.05


def read_prose(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the books' text for training, and the last twentieth of each book, held out."""
    books = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*")) if path.suffix in (".md", ".txt")]
    if not books:
        raise SystemExit(f"--prose {folder}: no .md or .txt file there; give a folder of plain text")
    cuts = [len(book) * 19 // 20 for book in books]
    return (
        [book[:cut] for book, cut in zip(books, cuts, strict=True)],
        [book[cut:] for book, cut in zip(books, cuts, strict=True)],
    )


def make_tokenizer(recipe: Recipe, prose: list[str]) -> PreTrainedTokenizerFast:
    """Returns the tokenizer, learnt from the word banks, 15,000 documents and the prose."""
    made = documents.stream(random.Random(f"{recipe.seed}/vocabulary"), documents.held_out_inputs())
    texts = [text for _, text in islice(made, 15_000)]
    return vocabulary.learn([*documents.vocabulary_drill(), *texts, *prose], recipe.vocabulary, recipe.context)


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Returns an untrained Llama of the recipe's size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            intermediate_size=recipe.inner,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def document_tokens(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Iterator[int]:
    """Yields the tokens of one document after another, each between <bos> and <eos>."""
    made = documents.stream(rng, documents.held_out_inputs())
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while True:
        texts = [text.removesuffix(documents.END) for _, text in islice(made, 1000)]
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts):
            yield bos
            yield from encoding.ids
            yield eos


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, prose: Tensor) -> Batches:
    """Yields batches of token ids, shape (rows, window): document windows and prose windows mixed."""
    rng = random.Random(f"{recipe.seed}/batches")
    flow = document_tokens(tokenizer, random.Random(f"{recipe.seed}/documents"))
    step = 0
    while True:
        width = recipe.context if step % 8 == 7 else recipe.window
        rows = []
        for _ in range(recipe.step_tokens // width):
            if rng.random() < recipe.prose_share:
                start = rng.randrange(len(prose) - width)
                rows.append(prose[start : start + width])
            else:
                rows.append(torch.tensor(list(islice(flow, width))))
        yield torch.stack(rows)
        step += 1


def token_loss(model: PreTrainedModel | Any, ids: Tensor) -> Tensor:
    """Returns the mean loss in nats per token, without padding; bfloat16 products."""
    pad = 0
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == pad, -100)
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())


def held_out_sets(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, prose: list[str]) -> dict[str, Tensor]:
    """Returns padded token batches by kind of document, from a seed that training never uses, and of held-out prose."""
    made = documents.stream(random.Random(f"{recipe.seed}/held-out"), documents.held_out_inputs())
    texts: dict[str, list[str]] = {kind: [] for kind in documents.KINDS}
    while min(map(len, texts.values())) < 48:
        kind, text = next(made)
        texts[kind].append(text)
    texts = {kind: [vocabulary.BOS + text for text in some[:48]] for kind, some in texts.items()}
    texts["prose"] = [book[start : start + 900] for book in prose for start in (0, 2000, 4000)]
    sets = {}
    for kind, some in texts.items():
        encoded = tokenizer(some, padding=True, truncation=True, max_length=recipe.window, return_tensors="pt")
        sets[kind] = encoded["input_ids"]
    return sets


@torch.no_grad()
def held_out_losses(model: PreTrainedModel, sets: dict[str, Tensor]) -> dict[str, float]:
    """Returns the held-out loss by kind, in nats per token."""
    return {kind: round(token_loss(model, ids.to(model.device)).item(), 3) for kind, ids in sets.items()}


def optimizers(recipe: Recipe, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices between embeddings and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.peak_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.peak_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(done: float, warm_up: float) -> float:
    """Returns the share of the peak rate after the share `done` of the run."""
    if done < warm_up:
        return done / warm_up + 1e-3
    turn = (done - warm_up) / (1 - warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(turn, 1.0)))


@dataclass
class Progress:
    """Where a run stands; its figures end up on the card."""

    step: int = 0
    seconds: float = 0.0
    losses: dict[str, float] | None = None


def train(
    recipe: Recipe,
    model: PreTrainedModel,
    flow: Batches,
    sets: dict[str, Tensor],
    out: Path,
    minutes: float,
    steps: int | None,
    compiled: bool,
) -> Progress:
    """Trains in place for `steps` steps, or else for `minutes`; leaves checkpoints under `out`."""
    forward = torch.compile(model, dynamic=False) if compiled else model
    chain = optimizers(recipe, model)
    progress, began, saved = Progress(), time.monotonic(), time.monotonic()
    while True:
        done = progress.step / steps if steps else progress.seconds / (60 * minutes)
        if done >= 1:
            break
        _step(recipe, forward, chain, next(flow).to(model.device), done, progress)
        progress.seconds = time.monotonic() - began
        if progress.step % 500 == 0:
            progress.losses = held_out_losses(model, sets)
            log.info("held-out %s", json.dumps(progress.losses))
        if time.monotonic() - saved > 120:
            save(model, progress, out)
            saved = time.monotonic()
    progress.losses = held_out_losses(model, sets)
    save(model, progress, out)
    return progress


def _step(
    recipe: Recipe, forward: Any, chain: list[torch.optim.Optimizer], ids: Tensor, done: float, progress: Progress
) -> None:
    for optimizer in chain:
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_rate * rate_factor(done, recipe.warm_up)
    loss = token_loss(forward, ids)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for o in chain for g in o.param_groups for p in g["params"]], 1.0)
    for optimizer in chain:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    if progress.step % 50 == 0:
        rate = progress.step * recipe.step_tokens / max(progress.seconds, 1e-9)
        log.info("step %d (%.0f%%) loss %.3f, %.0f tokens/s", progress.step, 100 * done, loss.item(), rate)


def save(model: PreTrainedModel, progress: Progress, out: Path) -> None:
    """Writes the checkpoint in one move, so that a reader never sees half of one."""
    half = out / "checkpoint.part"
    torch.save({"model": model.state_dict(), "progress": asdict(progress)}, half)
    half.replace(out / "checkpoint.pt")


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the shipped files, all of them text: weights.jsonl, config.json and the tokenizer's two."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (folder / "weights.jsonl").write_text("\n".join(weights.pack(state)) + "\n", encoding="utf-8")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Train the built-in tiny base and write its files.")
    parser.add_argument("--prose", type=Path, required=True, help="folder of public-domain .md or .txt files")
    parser.add_argument("--out", type=Path, required=True, help="gets checkpoint.pt and the folder tiny/")
    parser.add_argument("--minutes", type=float, default=45.0, help="length of the run")
    parser.add_argument("--steps", type=int, help="length of the run in steps instead: the same on any machine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler; 1.4 times as fast on CPU")
    parser.add_argument("--export", type=Path, help="do not train; write tiny/ from this checkpoint")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=args.seed)
    prose, unseen = read_prose(args.prose)
    tokenizer = make_tokenizer(recipe, prose)
    model = make_model(recipe, tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    log.info("%d parameters", model.num_parameters())
    if args.export:
        model.load_state_dict(torch.load(args.export, map_location="cpu", weights_only=True)["model"])
    else:
        tokens = torch.tensor([token for book in prose for token in tokenizer(book)["input_ids"]])
        flow = batches(recipe, tokenizer, tokens)
        sets = held_out_sets(recipe, tokenizer, unseen)
        progress = train(recipe, model, flow, sets, args.out, args.minutes, args.steps, args.compile)
        (args.out / "run.json").write_text(json.dumps(asdict(recipe) | asdict(progress), indent=2))
    export(model, tokenizer, args.out / "tiny")


if __name__ == "__main__":
    main()
