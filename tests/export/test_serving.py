"""Exports as servers take them: scale, rank and names, what is warned of, and the check of what was written."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import served_models
import small_models
import torch
from command_line import apiary
from model_families import make_folder
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from apiary.config import loading
from apiary.config.schema import AdapterConfig, ModelConfig, PromptConfig, RunConfig
from apiary.core import lora
from apiary.core.errors import UserError
from apiary.core.lora import Factors
from apiary.core.tensors import StateDict
from apiary.export import adapter_folder, export, gguf_files, serving
from apiary.export.tuned import open_tuned
from apiary.models import adapter_files, adapters
from apiary.models.adapter_files import Written
from apiary.models.adapters import LanguageModel

IDS = list(range(4, 44))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_models.make_folder("Llama", tmp_path_factory.mktemp("models") / "llama")


def tuned(
    folder: Path, to: Path, *, grown: int = 0, dtype: str = "float32", **adapter: Any
) -> tuple[LanguageModel, StateDict]:
    """An adapter folder of a model; grown: the rank of what its method has put into the base besides."""
    model = ModelConfig(name=str(folder), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    shape = AdapterConfig(**{"rank": 8, "alpha": 8.0, **adapter})
    config = RunConfig(model=model, adapter=shape, prompt=PromptConfig(template="alpaca"))
    lm = adapters.load(config.model, config.adapter)
    state = small_models.random_state(adapters.get_adapter(lm), 0.2)
    if grown:
        wide = {m: Factors(f.b[:, :grown] * 0.5, f.a[:grown].flip(1)) for m, f in lora.split(state).items()}
        state = lora.whole(state, lora.join(wide))
    adapter_folder.save_adapter_folder(lm, state, to, config, to.parent)
    return lm, state


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0].float()
    return found


def own(lm: LanguageModel, state: StateDict) -> Tensor:
    adapters.set_adapter(lm, state)
    return logits(lm.model)


def by_peft(folder: Path, base: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval())


def as_a_plain_server(folder: Path, base: Path) -> Tensor:
    """What a server says that adds alpha / r B A, and has not heard of any other key of adapter_config.json."""
    config = json.loads((folder / "adapter_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            b, a = tensors[f"{module}.lora_B.weight"].numpy(), tensors[name].numpy()
            moved = int(config["lora_alpha"]) / config["r"] * b @ a
            layer = model.get_submodule(module.removeprefix("base_model.model."))
            layer.weight.data += torch.from_numpy(moved)
    return logits(model)


@pytest.mark.parametrize(
    ("shape", "alpha", "words"),
    [
        ({"rank": 16, "alpha": 16.0}, 64, "the factors are as they were"),  # 16 / sqrt(16) * 16
        ({"rank": 8, "alpha": 8.0}, 8, "the scale 2.82843 is in the factors B"),  # 8 / sqrt(8)
        ({"rank": 4, "alpha": 2.5, "scaling": "lora"}, 4, "the scale 0.625 is in the factors B"),
        ({"rank": 4, "alpha": 8.0, "grown": 2}, 6, "the scale 4 is in the factors B"),
    ],
)
def test_a_plain_scale_says_the_same_to_a_server_that_knows_no_other(
    shape: dict[str, Any], alpha: int, words: str, base: Path, tmp_path: Path
) -> None:
    if "grown" in shape:
        alpha, words = 24, "the factors are as they were"  # 4 * (4 + 2)
    lm, state = tuned(base, tmp_path / "adapter", **shape)
    expected = own(lm, state)
    export.export_run(tmp_path / "adapter", tmp_path / "as-it-was")
    done = export.export_run(tmp_path / "adapter", tmp_path / "plain", plain_scale=True)
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (alpha, False) and isinstance(config["lora_alpha"], int)
    assert len(done.said) == 1 and words in done.said[0]
    for found in (
        as_a_plain_server(tmp_path / "plain", base),
        by_peft(tmp_path / "plain", base),
        by_peft(tmp_path / "as-it-was", base),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if shape.get("scaling") != "lora":
        assert (as_a_plain_server(tmp_path / "as-it-was", base) - expected).abs().max() > 1e-2
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("as-it-was", "plain"))
    assert small_models.same(before, after) == words.startswith("the factors are")
    opened = open_tuned(tmp_path / "plain", [f"model.name={base}"])  # with the settings that were written beside it
    torch.testing.assert_close(own(opened.lm, opened.adapter), expected, rtol=1e-4, atol=1e-4)


def test_a_cut_costs_what_it_says() -> None:
    """By hand: singular values 4 and 3 in one module, 1 in the other, which has no second direction."""
    a = {"one": Factors(torch.tensor([[0.0, 3.0], [4.0, 0.0]]), torch.eye(2))}
    a["two"] = Factors(torch.tensor([[0.6, 0.0], [0.8, 0.0]]), torch.eye(2))
    narrow, lost = serving.cut(Written(lora.join(a), 2, 6.0, rslora=False), 1)
    assert lost is not None and (lost.before, lost.rank, lost.module) == (2, 1, "one")
    assert lost.error == pytest.approx(3 / math.sqrt(26)) and lost.worst == pytest.approx(3 / 5)
    assert "rank 2 was cut to 1" in lost.words and "lose 59%" in lost.words and "60%" in lost.words
    assert (narrow.rank, narrow.scale) == (1, pytest.approx(3.0))
    found = lora.split(narrow.factors)
    torch.testing.assert_close(found["one"].b @ found["one"].a, torch.tensor([[0.0, 0.0], [4.0, 0.0]]))
    torch.testing.assert_close(found["two"].b @ found["two"].a, torch.tensor([[0.6, 0.0], [0.8, 0.0]]))
    whole = Written(lora.join(a), 2, 6.0, rslora=True)
    assert serving.cut(whole, 2) == (whole, None)
    assert serving.cut(whole, 1)[0].scale == pytest.approx(whole.scale)


@pytest.mark.parametrize("plain", [False, True])
def test_no_rank_is_above_the_one_that_was_asked_for(plain: bool, base: Path, tmp_path: Path) -> None:
    """A grown adapter of rank 8 + 4, cut by dense SVD in numpy, and read by plain peft."""
    lm, state = tuned(base, tmp_path / "adapter", grown=4)
    done = export.export_run(tmp_path / "adapter", tmp_path / "out", max_rank=6, plain_scale=plain, check=True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 6
    assert "rank 12 was cut to 6" in done.said[0]
    assert "cut to rank 6 from a higher one" in (tmp_path / "out" / "README.md").read_text()
    trained, added = (lora.split(part) for part in lora.parts(state))
    model, lost, norm = AutoModelForCausalLM.from_pretrained(base).eval(), 0.0, 0.0
    for module, (b, a) in trained.items():
        product = (lm.scale * b @ a + added[module].b @ added[module].a).double().numpy()
        u, s, vt = np.linalg.svd(product)
        lost, norm = lost + float((s[6:] ** 2).sum()), norm + float((s**2).sum())
        layer = model.get_submodule(module.removeprefix("base_model.model."))
        layer.weight.data += torch.from_numpy(u[:, :6] * s[:6] @ vt[:6]).float()
    assert f"lose {100 * math.sqrt(lost / norm):.2g}%" in done.said[0]
    torch.testing.assert_close(by_peft(tmp_path / "out", base), logits(model), rtol=1e-4, atol=1e-4)
    opened = open_tuned(tmp_path / "out", [f"model.name={base}"])
    torch.testing.assert_close(own(opened.lm, opened.adapter), logits(model), rtol=1e-4, atol=1e-4)
    moved = float((own(lm, state) - logits(model)).abs().max())
    told = next(line for line in done.said if line.startswith("the cut moves logits"))
    assert moved > 0.01 and float(told.split(" at most")[0].rpartition(" ")[2]) > 0.01


def test_a_rank_that_is_low_enough_is_left_alone(base: Path, tmp_path: Path) -> None:
    _, state = tuned(base, tmp_path / "adapter")
    done = export.export_run(tmp_path / "adapter", tmp_path / "out", max_rank=8)
    assert done.said == [] and small_models.same(load_file(tmp_path / "out" / "adapter_model.safetensors"), dict(state))


@pytest.mark.parametrize(
    ("family", "adapter", "words"),
    [
        ("Llama", {}, ()),
        ("Qwen3", {}, ()),
        ("GPT-2", {}, ("(Conv1D), and neither vLLM nor TGI", "TGI passes adapters on c_attn, c_fc, c_proj by")),
        ("Falcon", {}, ("vLLM takes no adapters for FalconForCausalLM", "TGI passes adapters on dense")),
        ("Phi-3", {}, ("TGI passes adapters on gate_up_proj, qkv_proj by without a word",)),
        ("Mixtral", {}, ("the adapters of experts are in peft's own form",)),
        ("Mixtral", {"targets": ["q_proj", "v_proj"]}, ()),
        (
            "Llama",
            {"targets": ["q_proj", "0.self_attn.v_proj"]},
            ("TGI passes adapters on v_proj by without a word, as not every",),
        ),
        ("Llama", {"targets": ["q_proj", "lm_head"]}, ("an adapter is on the head 'lm_head'",)),
        ("Llama", {"rank": 600, "targets": ["q_proj"]}, ("rank 600: vLLM takes none above 512",)),
    ],
)
def test_what_a_server_cannot_take_is_told(
    family: str, adapter: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    model = ModelConfig(name=str(make_folder(family, tmp_path / "base")), dtype="float32", device="cpu")
    lm = adapters.load(model, AdapterConfig(**{"rank": 2, **adapter}))
    written = adapter_files.as_written(lm, adapters.get_adapter(lm))
    lines = serving.remarks(adapters.load_base(model)[0], written)
    assert len(lines) == (len(words) + 1 if words else 0)
    assert all(any(word in line for line in lines) for word in words)
    assert not lines or lines[-1] == "where a server cannot take the adapter, export with --merge"


def test_commands_fit_what_was_written(base: Path, tmp_path: Path) -> None:
    assert [serving.vllm_rank(rank) for rank in (1, 4, 8, 9, 200, 257, 512, 513)] == [1, 8, 8, 16, 256, 320, 512, None]
    assert serving.adapter_command(Path("/srv/my bees"), "org/model", "abc123", 12) == (
        "vllm serve org/model --revision abc123 --enable-lora --lora-modules 'my bees=/srv/my bees' --max-lora-rank 16"
    )
    tuned(base, tmp_path / "adapter")
    done = export.export_run(tmp_path / "adapter", tmp_path / "out")
    assert done.commands == [serving.adapter_command(tmp_path / "out", str(base), None, 8)]
    merged = export.export_run(tmp_path / "adapter", tmp_path / "merged", merge=True)
    assert merged.commands == [f"vllm serve {tmp_path / 'merged'}"]
    (line,) = merged.warnings
    assert "prompt.template = 'alpaca'" in line and "has no chat template" in line


def test_gguf_files_are_checked_and_served(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tuned(base, tmp_path / "adapter")
    done = export.export_run(tmp_path / "adapter", tmp_path / "out", gguf="f32", check=True)
    assert done.commands[1] == f"llama-server -m BASE.gguf --lora {tmp_path / 'out' / 'adapter.gguf'}"
    assert [line.partition(":")[0] + ":" + line.split(":")[1] for line in done.said] == [
        "checked: adapter read by plain peft",
        "checked: GGUF adapter read back",
    ]
    for kind in ("f32", "f16", "q8_0"):
        to = tmp_path / kind
        done = export.export_run(tmp_path / "adapter", to, merge=True, gguf=kind, check=True)  # type: ignore[arg-type]
        assert done.commands == [f"vllm serve {to}", f"llama-server -m {to / 'model.gguf'}"]
        assert [line.split(":")[0] for line in done.said[1:]] == ["checked", "checked"]
        assert f"GGUF model ({kind}) read by Transformers" in done.said[2]
        moved = float(re.match(rf"rounding to {kind} moves logits by ([\d.e-]+) at most", done.said[0])[1])  # type: ignore[index]
        assert (moved > 1e-3) == (kind != "f32")


def test_what_is_not_equal_is_not_handed_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is spoiled a little on its way to the disk, and the command ends with one line and exit code 1."""
    pytest.importorskip("gguf")
    _, state = tuned(base, tmp_path / "adapter")
    name = next(n for n in state if n.endswith("q_proj.lora_B.weight"))
    write, merge, rows = adapter_files.write_adapter, adapter_files.merged, gguf_files._rows

    def spoiled(lm: LanguageModel, written: Written, *rest: Any) -> None:
        write(lm, written._replace(factors={**written.factors, name: written.factors[name] * 1.05}), *rest)

    def half(lm: LanguageModel, state: StateDict) -> Any:
        return merge(lm, {**state, name: state[name] * 1.05})

    def half_way(config: Any, path: str, x: Tensor, *, back: bool = False) -> Tensor:
        return rows(config, path, x, back=True) if back else x

    for options, module, attribute, change, what in (
        ([], adapter_files, "write_adapter", spoiled, "adapter read by plain peft"),
        (["--merge"], adapter_files, "merged", half, "merged model read by plain Transformers"),
        (
            ["--gguf"],
            gguf_files,
            "_rows",
            lambda c, p, x, back=False: x if not back else rows(c, p, x, back=True),
            "GGUF",
        ),
        (["--gguf", "--merge"], gguf_files, "_rows", lambda c, p, x: x, "GGUF model (f16) read by Transformers"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, attribute, change)
            done = apiary("export", tmp_path / "adapter", "--to", tmp_path / "out", "--check", *options)
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        last = done.stderr.splitlines()[-1]
        assert re.match(r"apiary: --check: not equal, so nothing was written: " + re.escape(what), last)
        assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_check_leaves_the_settings_as_they_are(base: Path, tmp_path: Path) -> None:
    """It computes in float32, and the folder still says in which bits the run held its base."""
    tuned(base, tmp_path / "adapter", dtype="bfloat16")
    done = export.export_run(tmp_path / "adapter", tmp_path / "out", check=True)
    assert "(0.0001 of the largest logit)" in done.said[0]
    assert loading.load(tmp_path / "out" / "apiary.toml").model.dtype == "bfloat16"


def test_the_command_line_says_how_it_was_written_and_how_to_serve_it(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "adapter")
    done = apiary(
        "export", tmp_path / "adapter", "--to", tmp_path / "out", "--plain-scale", "--max-rank", "4", "--check"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[-3:]] == ["checked", "written", "serve it"]
    assert lines[0].startswith("rank 8 was cut to 4: ") and "plain scale: lora_alpha = r = 4" in lines[1]
    assert lines[-1].endswith("--max-lora-rank 8")
    assert "warning: tuned with prompt.template = 'alpaca'" in done.stderr


def test_options_that_cannot_be_met_are_refused_before_any_work(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(base, tmp_path / "adapter")
    for options, said in (
        (["--merge", "--plain-scale"], "--plain-scale and --max-rank are of an adapter"),
        (["--merge", "--max-rank", "4"], "--plain-scale and --max-rank are of an adapter"),
        (["--gguf-type", "f16"], "--gguf-type is of a merged model in a GGUF file"),
        (["--gguf", "--gguf-type", "f16"], "--gguf-type is of a merged model in a GGUF file"),
    ):
        done = apiary("export", tmp_path / "adapter", "--to", tmp_path / "out", *options)
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf \(pip install 'apiary\[gguf\]'\)"):
        export.export_run(tmp_path / "adapter", tmp_path / "out", gguf="f16")


def test_a_family_that_llama_cpp_has_otherwise_is_refused_before_it_is_written(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    tuned(make_folder("Phi-3", tmp_path / "base"), tmp_path / "adapter")
    for options in ({}, {"merge": True}):
        with pytest.raises(UserError, match="phi3 is not one of the architectures"):
            export.export_run(tmp_path / "adapter", tmp_path / "out", gguf="f16", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()
