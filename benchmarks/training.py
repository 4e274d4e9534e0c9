"""Local training against TRL's SFTTrainer: the same model, data, LoRA and trained tokens, on this machine's CPU.

    python -m benchmarks.training [--quick] [--threads N] [--repeats N] [--out FILE]

Contenders take turns, so that a machine that slows down slows all of them; what counts is the
ratio of their medians. Each trains one epoch over the same examples, whose lengths are spread like
those of databricks-dolly-15k, once untimed and at once again timed: matrix products are compiled
when their shape is first met, and contenders push each other's out of the cache. TRL (`pip install
trl`) runs as it comes and with its two kinds of packing; its loss is set to the responses alone, as
ours is, and its batches stay at 8 rows, about the tokens of one of ours.

Beside the ratios stands the share of the machine's measured bfloat16 matrix-product peak: the
useful floating-point operations of the epoch (`useful_flops`; no padding, no recomputation) by the
seconds it took.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from apiary.config.schema import AdapterConfig, ModelConfig, TrainConfig
from apiary.data.batches import Corpus, Encoded, gather
from apiary.models import adapters
from client.training import trainer

RANK, LEARNING_RATE, VOCABULARY, LONGEST = 16, 1e-3, 4096, 512
LAYERS, WIDTH, INNER, HEADS = 3, 512, 1280, 8


@dataclasses.dataclass
class Setting:
    """One measured configuration: where the model lies, the data, and the arithmetic."""

    folder: Path
    corpus: Corpus
    dtype: str
    threads: int


def make_model(folder: Path) -> None:
    """A randomly initialised Llama of about 11 million parameters with a tokenizer of as many words as it has rows."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    core = Tokenizer(WordLevel(words, unk_token="<pad>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def make_corpus(rows: int) -> Corpus:
    """Random tokens with dolly's lengths, at most 512.

    At 4.2 characters a token and 12 tokens of template, dolly's prompts have a mean log length of 3.92
    with deviation 1.12, its responses 3.77 with 1.21, hardly correlated.
    """
    rng = np.random.default_rng(0)
    prompts = np.exp(rng.normal(3.92, 1.12, rows)).clip(8, LONGEST - 1).astype(int)
    answers = np.exp(rng.normal(3.77, 1.21, rows)).clip(1, LONGEST).astype(int)
    encoded = []
    for prompt, answer in zip(prompts, answers, strict=True):
        length = min(prompt + answer, LONGEST)
        ids = rng.integers(2, VOCABULARY, length).astype(np.int32)
        encoded.append(Encoded(ids, np.arange(length) >= prompt, length < prompt + answer))
    return gather(encoded)


def useful_flops(corpus: Corpus) -> float:
    """Floating-point operations that one epoch of LoRA training needs.

    For T tokens, R of them trained, in rows of lengths t, with N weights in the frozen linear layers:
    2NT forwards and 2NT for the gradient of their inputs (less the first layer's q, k and v, whose
    input needs none); 6 r (in + out) T for LoRA, three products with A and three with B; 6 d t^2
    for the causal half of the attention of each row in each layer (2 forwards, 4 backwards); and 4
    d V R for the head, forwards and backwards, where a token is trained.
    """
    tokens, trained = int(corpus.offsets[-1]), int(corpus.trained.sum())
    shapes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, INNER)] * 2 + [(INNER, WIDTH)]
    linear = LAYERS * sum(a * b for a, b in shapes)
    low_rank = LAYERS * sum(RANK * (a + b) for a, b in shapes)
    squares = float(np.square(corpus.lengths.astype(float)).sum())
    return (
        4.0 * linear * tokens
        - 2.0 * 3 * WIDTH * WIDTH * tokens
        + 6.0 * low_rank * tokens
        + 6.0 * WIDTH * LAYERS * squares
        + 4.0 * WIDTH * VOCABULARY * trained
    )


def measure_peak() -> float:
    """The best bfloat16 (or, without it, float32) matrix-product rate of a few large squares, in FLOP/s."""
    best = 0.0
    for size in (1024, 2048, 3072):
        a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
        a @ b
        for _ in range(6):
            began = time.perf_counter()
            a @ b
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def load_model(setting: Setting) -> adapters.LanguageModel:
    """The model with its adapter; loaded once for each dtype."""
    base = {"name": str(setting.folder), "dtype": setting.dtype, "device": "cpu"}
    return adapters.load(ModelConfig.model_validate(base), AdapterConfig(rank=RANK, alpha=RANK))


def run_apiary(setting: Setting) -> Callable[[], int]:
    """One epoch of ours; the call returns the trained tokens."""
    lm = load_model(setting)
    config = TrainConfig(epochs=1, batch_tokens=2048, lr=LEARNING_RATE, schedule="constant", warmup=0.0)
    start = adapters.fresh_adapter(lm, 0)
    steps = trainer.steps_per_round(config, setting.corpus)

    def run() -> int:
        plan = trainer.VisitPlan(seed=0, client="bench", steps=steps, total_steps=steps)
        return trainer.fit(lm, start, setting.corpus, config, plan).report.tokens

    return run


def run_trl(setting: Setting, **kind: Any) -> Callable[[], int]:
    """One epoch of TRL's SFTTrainer; the call returns the trained tokens."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    bounds = list(zip(setting.corpus.offsets[:-1], setting.corpus.offsets[1:], strict=True))
    data = Dataset.from_dict(
        {
            "input_ids": [setting.corpus.ids[a:b].tolist() for a, b in bounds],
            "completion_mask": [setting.corpus.trained[a:b].astype(int).tolist() for a, b in bounds],
        }
    )
    options = {"bf16": True} if setting.dtype == "bfloat16" else {"bf16": False}

    def run() -> int:
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                output_dir=folder,
                num_train_epochs=1,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                completion_only_loss=True,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **options,
                **kind,
            )
            lora = LoraConfig(
                r=RANK, lora_alpha=RANK, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            theirs = SFTTrainer(model=str(setting.folder), args=config, train_dataset=data, peft_config=lora)
            run.start = time.perf_counter(), time.process_time()  # type: ignore[attr-defined]
            theirs.train()
            run.stop = time.perf_counter(), time.process_time()  # type: ignore[attr-defined]
        return int(setting.corpus.trained.sum())

    return run


def timed(run: Callable[[], int]) -> dict[str, float]:
    """Wall and processor seconds of one epoch, without building what is trained, and its trained tokens."""
    start = time.perf_counter(), time.process_time()
    tokens = run()
    stop = time.perf_counter(), time.process_time()
    start, stop = getattr(run, "start", start), getattr(run, "stop", stop)
    return {"seconds": stop[0] - start[0], "processor_seconds": stop[1] - start[1], "tokens": tokens}


def contenders(setting: Setting, with_trl: bool) -> dict[str, Callable[[], int]]:
    """Everyone who trains, by name."""
    found = {"apiary": run_apiary(setting)}
    if with_trl:
        found["trl"] = run_trl(setting)
        found["trl packing"] = run_trl(setting, packing=True)  # its default kind: whole rows, best fit
        found["trl packing wrapped"] = run_trl(setting, packing=True, packing_strategy="wrapped")
    return found


def compare(setting: Setting, repeats: int, with_trl: bool) -> dict[str, Any]:
    """All contenders in turn, `repeats` times."""
    runs = contenders(setting, with_trl)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    peaks = []
    for _ in range(repeats):
        for name, run in runs.items():
            peaks.append(measure_peak())
            run()
            taken[name].append(timed(run))
            seconds = taken[name][-1]["seconds"]
            print(f"  {setting.dtype} {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
    return summary(setting, taken, max(peaks))


def summary(setting: Setting, taken: dict[str, list[dict[str, float]]], peak: float) -> dict[str, Any]:
    """Medians, ratios to ours, and the share of the peak."""
    flops = useful_flops(setting.corpus)
    rows = {}
    ours = statistics.median(r["seconds"] for r in taken["apiary"])
    ours_cpu = statistics.median(r["processor_seconds"] for r in taken["apiary"])
    for name, results in taken.items():
        seconds = statistics.median(r["seconds"] for r in results)
        cpu = statistics.median(r["processor_seconds"] for r in results)
        rows[name] = {
            "seconds": [round(r["seconds"], 3) for r in results],
            "median_seconds": round(seconds, 3),
            "trained_tokens": int(results[0]["tokens"]),
            "trained_tokens_per_second": round(results[0]["tokens"] / seconds, 1),
            "times_ours": round(seconds / ours, 2),
            "times_ours_processor": round(cpu / ours_cpu, 2),
            "share_of_peak": round(flops / seconds / peak, 3),
        }
    return {"contenders": rows, "peak_tflops": round(peak / 1e12, 3), "useful_tflop": round(flops / 1e12, 3)}


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    names = (
        [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "bfloat16": [name for name in ("avx512_bf16", "amx_bf16", "bf16") if known.get(name)],
        "load_before": round(os.getloadavg()[0], 2),
    }


def versions(with_trl: bool) -> dict[str, str]:
    """Of the packages that do the work."""
    import peft

    found = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    if with_trl:
        import trl

        found["trl"] = trl.__version__
    return found


def describe(setting: Setting) -> dict[str, Any]:
    """The model and the data of a measurement."""
    lm = load_model(setting)
    adapter = sum(p.numel() for p in lm.adapter.values())
    return {
        "model": {
            "parameters": sum(p.numel() for p in lm.model.parameters()) - adapter,
            "adapter_parameters": adapter,
            "layers": LAYERS,
            "width": WIDTH,
            "inner": INNER,
            "heads": HEADS,
            "vocabulary": VOCABULARY,
        },
        "data": {
            "examples": len(setting.corpus),
            "tokens": setting.corpus.stats.tokens,
            "trained_tokens": setting.corpus.stats.response_tokens,
        },
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The whole result as plain values."""
    with_trl = "trl" in options.only.split(",")
    result: dict[str, Any] = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(options.threads),
        "versions": versions(with_trl),
        "lora": {"rank": RANK, "targets": "all-linear"},
    }
    corpus = make_corpus(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        for dtype in options.dtypes.split(","):
            setting = Setting(Path(folder), corpus, dtype, options.threads)
            result |= describe(setting) | {dtype: compare(setting, options.repeats, with_trl)}
    return result | {"readme": readme(result, options.dtypes.split(","))}


def readme(result: dict[str, Any], dtypes: list[str]) -> str:
    """The result as a Markdown table and a sentence."""
    lines = ["| | " + " | ".join(f"{d}, tokens/s | {d}, Apiary is" for d in dtypes) + " |"]
    lines.append("|---" * (1 + 2 * len(dtypes)) + "|")
    for name in result[dtypes[0]]["contenders"]:
        cells = []
        for row in (result[dtype]["contenders"][name] for dtype in dtypes):
            faster = "" if name == "apiary" else f"{row['times_ours']:.1f}x as fast"
            cells.append(f"{row['trained_tokens_per_second']:,.0f} | {faster}")
        lines.append(f"| {name.replace('apiary', 'Apiary').replace('trl', 'TRL')} | " + " | ".join(cells) + " |")
    share = result[dtypes[0]]["contenders"]["apiary"]["share_of_peak"]
    size, machine = result["model"]["parameters"] / 1e6, result["machine"]
    lines += [
        "",
        f"Trained tokens per second, medians of one run. A random Llama of {size:.0f} million parameters, LoRA of rank "
        f"{RANK} on all linear layers, rows as long as dolly's, {machine['threads']} threads on {machine['cores']} "
        f"cores of an {machine['cpu']}. In {dtypes[0]} Apiary does useful work at {share:.0%} of the rate of large "
        "bfloat16 matrix products.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the result, and writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the data, once, and nothing written")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--only", default="apiary,trl", help="`apiary` alone needs no TRL")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/training.json, unless --quick")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.repeats = 32, 1
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    text = json.dumps(measure(options), indent=2)
    out = options.out or (None if options.quick else Path(__file__).parent / "results" / "training.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
