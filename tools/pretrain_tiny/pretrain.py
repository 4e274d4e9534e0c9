"""Makes the tiny base: `python -m tools.pretrain_tiny.pretrain --prose DIR --minutes 45 --out DIR`.

The text is generated documents (`documents.py`) and some prose from the files of `--prose`. The run
is fixed by its seed and its number of steps; with `--minutes` the number of steps is what the
machine manages in that time. Hidden matrices are trained with Muon (Jordan et al. 2024, with the
step size of Liu et al. 2025, arXiv:2502.16982), embeddings and norms with AdamW.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from apiary.models.tiny import weights
from tools.pretrain_tiny import documents, vocabulary
from tools.pretrain_tiny.circuit import lay_copying_circuit
from tools.pretrain_tiny.muon import Muon

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the machine's speed.

    Attributes:
        vocabulary: tokens of the tokenizer.
        rope_theta: base of the rotary embedding; with heads as narrow as these, the usual 10,000
            leaves too few slow planes for a head to find the same word at any distance.
        window: tokens of a training window; one step in eight has windows of `context` instead.
        step_tokens: tokens of one optimizer step.
        prose_share: share of the windows that hold prose.
        cue_weight: weight of the loss on a drill's cue, most of which nobody could foresee; the
            result and all other text count fully.
        peak_rate: learning rate after the warm-up; it falls to a fiftieth of it along a cosine.
        warm_up: share of the run.
    """

    seed: int = 0
    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    inner: int = 512
    context: int = 512
    rope_theta: float = 1e6
    window: int = 256
    step_tokens: int = 3072
    prose_share: float = 0.12
    cue_weight: float = 0.3
    peak_rate: float = 3e-3
    warm_up: float = 0.012
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
    """Returns an untrained Llama of the recipe's size, with a copying circuit in its first two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            intermediate_size=recipe.inner,
            max_position_embeddings=recipe.context,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    lay_copying_circuit(model, recipe.rope_theta)
    return model


def encode(
    tokenizer: PreTrainedTokenizerFast, marked: list[str], cue_weight: float
) -> Iterator[tuple[list[int], list[float]]]:
    """Yields (token ids, weights) of each marked document, between <bos> and <eos>; see `documents.OPEN`."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [documents.unmarked(text) for text in marked]
    for text, encoding in zip(marked, tokenizer.backend_tokenizer.encode_batch(texts), strict=True):
        spans = documents.result_spans(text)
        told = [not spans or any(first <= start < last for first, last in spans) for start, _ in encoding.offsets]
        scale = [0.0, *(1.0 if it else cue_weight for it in told)]
        if encoding.ids[-1] == eos:
            yield [bos, *encoding.ids], scale
        else:
            yield [bos, *encoding.ids, eos], [*scale, 1.0]


def document_tokens(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, cue_weight: float
) -> Iterator[tuple[int, float]]:
    """Yields (token, weight) of one document after another."""
    made = documents.marked_stream(rng, documents.held_out_inputs())
    while True:
        for ids, scale in encode(tokenizer, [text for _, text in islice(made, 500)], cue_weight):
            yield from zip(ids, scale, strict=True)


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, prose: Tensor, part: str, workers: int) -> Batches:
    """Yields (ids, weights), each (rows, window): windows of documents and of prose, mixed."""
    rng = random.Random(f"{recipe.seed}/batches/{part}")
    documents_rng = random.Random(f"{recipe.seed}/documents/{part}")
    flow = document_tokens(tokenizer, documents_rng, recipe.cue_weight)
    step = 0
    while True:
        width = recipe.context if step % 8 == 7 else recipe.window
        ids, scale = [], []
        for _ in range(recipe.step_tokens // workers // width):
            if rng.random() < recipe.prose_share:
                start = rng.randrange(len(prose) - width)
                ids.append(prose[start : start + width])
                scale.append(torch.ones(width))
            else:
                tokens, told = zip(*islice(flow, width), strict=True)
                ids.append(torch.tensor(tokens))
                scale.append(torch.tensor(told))
        yield torch.stack(ids), torch.stack(scale)
        step += 1


def token_loss(model: PreTrainedModel | Any, ids: Tensor, scale: Tensor) -> Tensor:
    """Returns the weighted mean loss in nats per token; bfloat16 products."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    told = scale[:, 1:].flatten()
    return (losses * told).sum() / told.sum()


def held_out_sets(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, prose: list[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns (ids, weights) by kind of document, never trained on, and of held-out prose.

    Where a document marks its results, only they have weight: the rest is drawn at random.
    """
    made = documents.marked_stream(random.Random(f"{recipe.seed}/held-out"), documents.held_out_inputs())
    texts: dict[str, list[str]] = {kind: [] for kind in documents.KINDS}
    while min(map(len, texts.values())) < 48:
        kind, text = next(made)
        texts[kind].append(text)
    texts = {kind: some[:48] for kind, some in texts.items()}
    texts["prose"] = [book[start : start + 900] for book in prose for start in (0, 2000, 4000) if start < len(book)]
    sets = {}
    for kind, some in texts.items():
        encoded = list(encode(tokenizer, some, cue_weight=0.0))
        ids = [torch.tensor(row[: recipe.window]) for row, _ in encoded]
        told = [torch.tensor(row[: recipe.window]) for _, row in encoded]
        sets[kind] = pad_sequence(ids, batch_first=True), pad_sequence(told, batch_first=True)
    return sets


@torch.no_grad()
def held_out_losses(model: PreTrainedModel, sets: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Returns the held-out loss by kind, in nats per weighted token."""
    return {
        kind: round(token_loss(model, ids.to(model.device), told.to(model.device)).item(), 3)
        for kind, (ids, told) in sets.items()
    }


def optimizers(recipe: Recipe, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices between embeddings and AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=recipe.peak_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.peak_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(done: float, warm_up: float) -> float:
    """Returns the share of the peak rate after the share `done` of the run."""
    if done < warm_up:
        return done / warm_up + 1e-3
    turn = (done - warm_up) / (1 - warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(turn, 1.0)))


@dataclass(frozen=True)
class Run:
    """One invocation: what to train, on what, where to, and for how long."""

    recipe: Recipe
    prose: Path
    out: Path
    minutes: float
    steps: int | None
    compiled: bool
    start: Path | None


@dataclass
class Progress:
    """Where a run stands; its figures end up on the card."""

    step: int = 0
    seconds: float = 0.0
    losses: dict[str, float] | None = None


class Crew:
    """The processes that share a run: each reads its own batches, and gradients are averaged.

    One thread each and one meeting a step keeps two cores busier than two threads that meet at
    every operation, most of all when other programs want the cores too.
    """

    def __init__(self, rank: int, workers: int) -> None:
        self.rank, self.workers = rank, workers
        if workers > 1:
            torch.distributed.init_process_group("gloo", rank=rank, world_size=workers)

    def average(self, parameters: list[Tensor]) -> None:
        """Replaces each gradient by its mean over the processes."""
        if self.workers == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        torch.distributed.all_reduce(flat)
        at = 0
        for p in parameters:
            if p.grad is not None:
                p.grad.copy_(flat[at : at + p.numel()].view_as(p) / self.workers)
                at += p.numel()

    def agree(self, value: float) -> float:
        """Returns the first process's value, in every process."""
        if self.workers == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(shared, 0)
        return float(shared.item())


def train(run: Run, crew: Crew) -> None:
    """Trains one process's copy; the first process logs, saves and at the end exports."""
    recipe, out = run.recipe, run.out
    prose, unseen = read_prose(run.prose)
    tokenizer, model, progress = open_checkpoint(run.start) if run.start else _fresh(recipe, prose)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model, device)
    tokens = torch.tensor([token for book in prose for token in tokenizer(book)["input_ids"]])
    flow = batches(recipe, tokenizer, tokens, f"{progress.step}/{crew.rank}", crew.workers)
    sets = held_out_sets(recipe, tokenizer, unseen)
    forward = torch.compile(model, dynamic=False) if run.compiled else model
    chain = optimizers(recipe, model)
    first, before = progress.step, progress.seconds
    began = saved = time.monotonic()
    while True:
        elapsed = (time.monotonic() - began) / (60 * run.minutes)
        done = crew.agree((progress.step - first) / run.steps if run.steps else elapsed)
        if done >= 1:
            break
        ids, scale = (part.to(device) for part in next(flow))
        loss = _step(recipe, forward, chain, (ids, scale), done, crew)
        progress.step += 1
        progress.seconds = before + time.monotonic() - began
        if crew.rank == 0 and progress.step % 50 == 0:
            rate = progress.step * recipe.step_tokens / progress.seconds
            log.info("step %d %.0f%% loss %.3f %.0f/s", progress.step, 100 * done, loss, rate)
        if crew.rank == 0 and (progress.step % 500 == 0 or time.monotonic() - saved > 180):
            progress.losses = held_out_losses(model, sets)
            log.info("held-out %s", json.dumps(progress.losses))
            save(recipe, model, tokenizer, progress, out)
            saved = time.monotonic()
    if crew.rank == 0:
        progress.losses = held_out_losses(model, sets)
        save(recipe, model, tokenizer, progress, out)
        (out / "run.json").write_text(json.dumps(asdict(recipe) | asdict(progress), indent=2))
        export(model, tokenizer, out / "tiny")


def _step(
    recipe: Recipe,
    forward: Any,
    chain: list[torch.optim.Optimizer],
    batch: tuple[Tensor, Tensor],
    done: float,
    crew: Crew,
) -> float:
    for optimizer in chain:
        for group in optimizer.param_groups:
            group["lr"] = recipe.peak_rate * rate_factor(done, recipe.warm_up)
    loss = token_loss(forward, *batch)
    loss.backward()
    parameters = [p for o in chain for group in o.param_groups for p in group["params"]]
    crew.average(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in chain:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def save(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
    out: Path,
) -> None:
    """Writes the checkpoint in one move, so that a reader never sees half of one."""
    half = out / "checkpoint.part"
    made = {"recipe": asdict(recipe), "progress": asdict(progress)}
    torch.save({"model": model.state_dict(), **made}, half)
    half.replace(out / "checkpoint.pt")
    tokenizer.save_pretrained(out / "tokenizer")


def open_checkpoint(path: Path) -> tuple[PreTrainedTokenizerFast, PreTrainedModel, Progress]:
    """Returns what `save` wrote: the tokenizer (it lies beside the file), model and progress."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent / "tokenizer")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    model = make_model(Recipe(**saved.get("recipe", {})), tokenizer)
    model.load_state_dict(saved["model"])
    return tokenizer, model, Progress(**saved["progress"])


def _fresh(recipe: Recipe, prose: list[str]) -> tuple[PreTrainedTokenizerFast, PreTrainedModel, Progress]:
    tokenizer = make_tokenizer(recipe, prose)
    return tokenizer, make_model(recipe, tokenizer), Progress()


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the shipped files, all text: weights.jsonl, config.json, the tokenizer's two."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (folder / "weights.jsonl").write_text("\n".join(weights.pack(state)) + "\n", encoding="utf-8")


def _work(rank: int, run: Run, workers: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if workers > 1:
        torch.set_num_threads(1)
    train(run, Crew(rank, workers))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Train the built-in tiny base, write its files.")
    parser.add_argument("--prose", type=Path, required=True, help="folder of .md or .txt files")
    parser.add_argument("--out", type=Path, required=True, help="gets checkpoint.pt and tiny/")
    parser.add_argument("--minutes", type=float, default=45.0, help="length of the run")
    parser.add_argument("--steps", type=int, help="length in steps instead: then repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes; one per CPU core")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    parser.add_argument("--start", type=Path, help="train this checkpoint.pt on, on new documents")
    parser.add_argument("--export", type=Path, help="train nothing; write this checkpoint's tiny/")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(seed=args.seed)
    if args.export:
        tokenizer, model, _ = open_checkpoint(args.export)
        export(model, tokenizer, args.out / "tiny")
        return
    run = Run(recipe, args.prose, args.out, args.minutes, args.steps, args.compile, args.start)
    if args.workers == 1:
        _work(0, run, 1)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ.setdefault("MASTER_PORT", str(free.getsockname()[1]))
    spawn(_work, (run, args.workers), nprocs=args.workers)


if __name__ == "__main__":
    main()
