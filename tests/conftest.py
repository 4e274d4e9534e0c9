"""Small things that many tests need: a tiny model folder, a data set, and where the real data lies if it is there."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure() -> None:
    """Processes that tests start compute with one thread, as the tests themselves do: sums keep one order."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import apiary.cli.main  # noqa: F401  # sets what Flower, Ray and the tokenizers read when they are imported


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models, or a skip."""
    if not SHARED.exists():
        pytest.skip("the shared data is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised two-layer Llama with a byte-level tokenizer, saved as Hugging Face does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([row["instruction"] for row in instruction_rows(50)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def instruction_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of two easy skills."""
    rng = random.Random(seed)
    words = ["bee", "hive", "wax", "comb", "honey", "queen", "drone", "nectar"]
    rows = []
    for i in range(n):
        pick = rng.sample(words, 3)
        if i % 2:
            rows.append(
                {"instruction": "Say the last word: " + " ".join(pick) + f" {i}", "output": pick[-1], "skill": "last"}
            )
        else:
            rows.append(
                {"instruction": "Say the first word: " + " ".join(pick) + f" {i}", "output": pick[0], "skill": "first"}
            )
    return rows


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 120 rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows(120)), encoding="utf-8")
    return path


@pytest.fixture
def small_run(tiny_model: Path, rows_file: Path) -> list[str]:
    """Overrides for a federated run of a few seconds in fp32."""
    return overrides_for(tiny_model, rows_file)


def overrides_for(model: Path, rows: Path) -> list[str]:
    """Overrides for a federated run of a few seconds in fp32."""
    return [
        "rounds=3",
        f"model.name={model}",
        "model.dtype=float32",
        "model.device=cpu",
        "adapter.rank=4",
        f"data.source={rows}",
        "data.clients=3",
        "data.test_fraction=0.1",
        "data.partition=iid",
        "prompt.template=plain",
        "prompt.max_tokens=96",
        "train.steps=2",
        "train.batch_tokens=256",
        "train.lr=5e-3",
        "train.threads=1",
        "strategy.server_optimizer=none",
        "evaluate.max_examples=8",
        "evaluate.max_new_tokens=4",
    ]
