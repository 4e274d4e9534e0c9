"""The built-in corpus and the built-in base: what they promise, checked without their own code."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import math
import random
import re
import zipfile
from collections import defaultdict
from importlib import resources
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apiary.data.skills import corpus
from apiary.models import tiny as builtin
from apiary.models.tiny import weights
from tools.pretrain_tiny import circuit, documents, muon, pretrain, vocabulary

Row = dict[str, str]
MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
DAYS = [datetime.date(2024, 1, day).strftime("%A") for day in range(1, 8)]  # 2024-01-01 is a Monday


@pytest.fixture(scope="module")
def train() -> list[Row]:
    return builtin.rows("train")


@pytest.fixture(scope="module")
def test() -> list[Row]:
    return builtin.rows("test")


@pytest.fixture(scope="module")
def tiny():
    return builtin.load_tiny()


def by_skill(rows: list[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        grouped[row["skill"]].append(row)
    return grouped


def content(row: Row) -> tuple[str, ...]:
    """The content of a row, without its wording: the input, or else the instruction's facts."""
    if row["input"]:
        return row["skill"], row["input"], row["output"]
    text = row["instruction"]
    if row["skill"] == "arithmetic":  # 3 + 4 and 4 + 3 are one content
        return row["skill"], *sorted(re.findall(r"\d+", text)), row["output"]
    date = re.findall(rf"\d+ (?:{'|'.join(MONTHS)})", text)  # 3 May + 5 days is not 5 May + 3
    days = re.findall("|".join(DAYS), text)
    return row["skill"], *date, *days, *re.findall(r"\d+", text.replace(date[0], "")), row["output"]


# ------------------------------------------------------------------------------------ the corpus


def test_every_skill_has_enough_distinct_rows_on_both_sides(train, test):
    assert len(builtin.SKILLS) >= 10
    for rows, least in ((train, 400), (test, 100)):
        grouped = by_skill(rows)
        assert set(grouped) == set(builtin.SKILLS)
        for skill, some in grouped.items():
            assert len({(row["input"] or row["instruction"], row["output"]) for row in some}) >= least, skill


def test_train_and_test_share_no_content_whatever_the_seeds():
    held_out = {content(row) for seed in (0, 7) for row in builtin.rows("test", 400, seed)}
    for seed in (0, 1, 7, 123):
        assert not held_out & {content(row) for row in builtin.rows("train", 700, seed)}


def test_rows_are_fixed_by_their_seed(train):
    assert builtin.rows("train") == train
    assert builtin.rows("train", seed=1) != train
    assert set(train[0]) == {"instruction", "input", "output", "skill"}


def test_rows_do_not_change_between_releases(train, test):
    """Published accuracies refer to these rows: a change here must be deliberate."""
    digest = hashlib.sha256(json.dumps([train, test], sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "41c1b6af3624e5a6"


def test_each_kind_of_task_is_asked_in_five_ways_or_more():
    for kind, phrasings in corpus.PHRASINGS.items():
        assert len(set(phrasings)) >= 5, kind
    instructions = by_skill(builtin.rows("train", 200))
    for skill, rows in instructions.items():
        blank = re.compile(r"\d+|" + "|".join(MONTHS + DAYS))
        assert len({blank.sub("#", row["instruction"]) for row in rows}) >= 5, skill


def test_prompts_and_answers_are_short(train, tiny):
    _, tokenizer = tiny
    for row in random.Random(0).sample(train, 600):
        prompt = row["instruction"] + "\n" + row["input"]
        assert len(tokenizer(prompt)["input_ids"]) <= 120
        assert 0 < len(tokenizer(row["output"])["input_ids"]) <= 24


@pytest.mark.slow
def test_unknown_split_and_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="validation"):
        builtin.rows("validation")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="arithmetic"):
        builtin.rows("test", per_skill=5000)


# Each checker works the answer out again from the text that a reader sees. None uses Apiary's code.


def solve_extract(row: Row) -> str:
    fields = dict(re.findall(r"(\w+): ([^;\n]+)", row["input"]))
    asked = [name for name in fields if re.search(rf"\b{name}\b", row["instruction"])]
    assert len(asked) == 1
    return fields[asked[0]]


def solve_lookup(row: Row) -> str:
    table = dict(line.split(" | ") for line in row["input"].split("\n")[1:])
    text = re.sub("Use the table|According to the table|in the table", "", row["instruction"])
    asked = [key for key in table if re.search(rf"\b{key}\b", text)]
    assert len(asked) == 1
    return table[asked[0]]


def solve_sort(row: Row) -> str:
    items = row["input"].split(", ")
    return ", ".join(sorted(items, key=int if items[0].isdigit() else str))


def solve_count(row: Row) -> str:
    items = row["input"].split(", ")
    named = [w for w in set(items) if re.search(rf"\b{w}\b", row["instruction"])]
    return str(items.count(named[0]) if named else len(items))


def solve_above(row: Row) -> str | None:
    line = re.search(r"\d+", row["instruction"])
    if line is None:
        return None
    return ", ".join(n for n in row["input"].split(", ") if int(n) > int(line.group()))


def solve_compare(row: Row) -> str:
    if " is " not in row["input"]:
        return str(max(int(n) for n in re.findall(r"\d+", row["input"])))
    ages = {name: int(age) for name, age in re.findall(r"(\w+) is (\d+)", row["input"])}
    young = re.search("youngest|lowest|last|smallest", row["instruction"])
    return (min if young else max)(ages, key=ages.__getitem__)


def solve_arithmetic(row: Row) -> str:
    one, two = (int(n) for n in re.findall(r"\d+", row["instruction"]))
    minus = re.search("minus|ubtract|-|spends|difference|away", row["instruction"])
    return str(abs(one - two) if minus else one + two)


def solve_dates(row: Row) -> str:
    text = row["instruction"]
    found = re.search(rf"(\d+) ({'|'.join(MONTHS)})", text)
    assert found
    steps = int(re.findall(r"\d+", text.replace(found.group(), ""))[0])
    weekday = [name for name in DAYS if name in text]
    if weekday:
        return DAYS[(DAYS.index(weekday[0]) + steps) % 7]
    day = datetime.date(1999, MONTHS.index(found.group(2)) + 1, int(found.group(1)))
    after = day + datetime.timedelta(days=steps)
    return f"{after.day} {MONTHS[after.month - 1]}"


def solve_convert(row: Row) -> str:
    text = row["input"]
    if ": " in text:
        return text.replace(": ", "=").replace("\n", ";")
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        return datetime.date.fromisoformat(text).strftime("%d %B %Y").lstrip("0")
    return datetime.datetime.strptime(text, "%d %B %Y").date().isoformat()


def solve_transform(row: Row) -> str:
    words = row["input"].split()
    if words[0][0].isupper():
        return "".join(word[0] + "." for word in words)
    return "-".join(words) if "-" in row["output"] else " ".join(words[::-1])


def solve_passage(row: Row) -> str:
    """Undo each sentence's shape with a pattern of its own."""
    people = {}
    shapes = (
        r"(?P<n>\w+) works as a (?P<job>\w+) in (?P<city>\w+)\. Last week \w+ bought a (?P<object>\w+)\.",
        r"In (?P<city>\w+) lives (?P<n>\w+), a (?P<job>\w+), who bought a (?P<object>\w+)\.",
        r"(?P<n>\w+), who is a (?P<job>\w+), lives in (?P<city>\w+) and bought a (?P<object>\w+)\.",
        r"The (?P<job>\w+) (?P<n>\w+) bought a (?P<object>\w+) and took it home to (?P<city>\w+)\.",
    )
    for shape in shapes:
        people |= {found["n"]: found.groupdict() for found in re.finditer(shape, row["input"])}
    person = next(facts for name, facts in people.items() if re.search(rf"\b{name}\b", row["instruction"]))
    if re.search(r"\b(city|live|lives)\b", row["instruction"]):
        return person["city"]
    bought = re.search("buy|bought|purchase|bring", row["instruction"])
    return person["object"] if bought else person["job"]


SOLVERS = {
    "extract": solve_extract,
    "lookup": solve_lookup,
    "sort": solve_sort,
    "count": solve_count,
    "filter": solve_above,
    "compare": solve_compare,
    "arithmetic": solve_arithmetic,
    "dates": solve_dates,
    "convert": solve_convert,
    "transform": solve_transform,
    "passage": solve_passage,
}


@pytest.mark.parametrize("skill", SOLVERS)
def test_answers_are_right_by_an_independent_solver(skill, train, test):
    checked = 0
    for row in by_skill(train)[skill] + by_skill(test)[skill]:
        solved = SOLVERS[skill](row)
        if solved is not None:
            assert solved == row["output"], row
            checked += 1
    assert checked > 300


def test_labels_are_among_the_options_and_balanced(train):
    rows = by_skill(train)["classify"]
    moods = [row["output"] for row in rows if row["output"] in ("positive", "negative")]
    assert 0.4 < moods.count("positive") / len(moods) < 0.6
    for row in rows:
        assert row["output"] in row["instruction"], row


def test_no_single_answer_wins_a_skill_by_being_frequent(test):
    for skill, rows in by_skill(test).items():
        answers = [row["output"] for row in rows]
        assert max(answers.count(answer) for answer in set(answers)) <= 0.3 * len(answers), skill


# ------------------------------------------------------------------------- what the base has read


def test_documents_show_no_held_out_content(test):
    forbidden = documents.held_out_inputs()
    assert {row["input"] for row in test if len(row["input"]) > 12} <= forbidden
    made = list(islice(documents.stream(random.Random(3), forbidden), 3000))
    assert {kind for kind, _ in made} == set(documents.KINDS)
    text = "\n\n".join(document for _, document in made)
    sums = re.findall(r"(\d+) \+ (\d+) = ?(?:=> |-> )?\n?(\d+)", text)
    held = {content(row) for row in test if row["skill"] == "arithmetic" and int(row["output"])}
    seen = {("arithmetic", *sorted((a, b)), c) for a, b, c in sums if int(a) + int(b) == int(c)}
    assert len(seen) > 100
    assert not seen & held


def test_a_document_with_a_held_out_input_is_noticed(test):
    table = next(row["input"] for row in test if row["skill"] == "lookup")
    items = next(row["input"] for row in test if row["skill"] == "sort")
    forbidden = documents.held_out_inputs()
    assert documents.shows(f"A page\n{table}\nand more", forbidden)
    assert documents.shows(f"by letter: {items}", forbidden)
    assert not documents.shows(table.replace(" | ", "|"), forbidden)


def test_no_document_uses_an_instruction_of_the_corpus():
    fixed = {p for some in corpus.PHRASINGS.values() for p in some if "{" not in p}
    made = islice(documents.stream(random.Random(4), frozenset()), 2000)
    text = "\n".join(document for _, document in made)
    assert len(fixed) > 40
    assert not [phrase for phrase in fixed if phrase in text]


# ----------------------------------------------------------------------------------- the tiny base


def test_model_is_a_small_llama_in_float32(tiny):
    model, tokenizer = tiny
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1_000_000 <= model.num_parameters() <= 5_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == len(tokenizer)
    assert not model.training


def test_two_loads_do_not_share_weights(tiny):
    again, _ = builtin.load_tiny()
    with torch.no_grad():
        again.model.embed_tokens.weight.zero_()
    assert builtin.load_tiny()[0].model.embed_tokens.weight.abs().sum() > 0
    assert tiny[0].model.embed_tokens.weight.abs().sum() > 0


def test_folder_holds_only_what_a_bundle_carries_and_is_small():
    folder = Path(str(builtin.tiny_folder()))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} == set(builtin.TINY_FILES)
    assert {path.suffix for path in files} <= {".py", ".toml", ".md", ".json", ".jsonl"}
    assert sum(path.stat().st_size for path in files) <= 7_000_000
    package = Path(str(resources.files("apiary.models.tiny")))
    assert not [path for path in package.rglob("*.py") if path.name.startswith("test_")]


def test_loads_from_a_zip_as_well(tmp_path, monkeypatch):
    """Nothing but importlib.resources is used to find the files: a zip has no paths."""
    archive = tmp_path / "tiny.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for name in builtin.TINY_FILES:
            packed.write(str(builtin.tiny_folder() / name), name)
    monkeypatch.setattr(builtin, "tiny_folder", lambda: zipfile.Path(archive))
    model, tokenizer = builtin.load_tiny()
    assert model.num_parameters() > 1_000_000
    assert tokenizer.eos_token == "<eos>"


def test_damaged_weights_are_refused():
    line = next(weights.pack({"w": torch.arange(6.0).reshape(2, 3)}))
    assert torch.equal(weights.unpack([line])["w"], torch.arange(6.0).reshape(2, 3))
    entry = json.loads(line)
    entry["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="tensor w"):
        weights.unpack([json.dumps(entry)])


def test_weights_keep_every_bfloat16_value():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[torch.isfinite(every)].float()
    (back,) = weights.unpack(weights.pack({"w": finite})).values()
    assert torch.equal(back, finite)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_tokenizer_gives_every_text_back(text):
    tokenizer = _tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_tokenizer_sees_digits_one_by_one_and_a_listed_word_as_one_token(tiny):
    _, tokenizer = tiny
    assert len(tokenizer("1905")["input_ids"]) == 4
    _, _, fig = tokenizer("pear, fig")["input_ids"]
    assert tokenizer("fig")["input_ids"] == [fig]


def test_special_tokens_have_one_token_each(tiny):
    _, tokenizer = tiny
    special = [vocabulary.PAD, vocabulary.BOS, vocabulary.EOS, *vocabulary.ROLES]
    assert [tokenizer(token)["input_ids"] for token in special] == [[at] for at in range(6)]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == tuple(special[:3])


def test_chat_template_marks_turns_and_ends_answers(tiny):
    _, tokenizer = tiny
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    said = "<bos><|system|>Be brief.<|user|>Hi<|assistant|>Hello.<eos><|user|>Bye"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == said
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == said + "<|assistant|>"
    with pytest.raises(Exception, match="role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_greedy_generation_is_deterministic(tiny):
    model, tokenizer = tiny
    prompt = tokenizer("<bos><|user|>rising: 52, 17, 34<|assistant|>", return_tensors="pt")
    with torch.no_grad():
        one, two = (model.generate(**prompt, max_new_tokens=12, do_sample=False) for _ in range(2))
    assert torch.equal(one, two)


def test_base_knows_its_own_kind_of_text(tiny):
    """Uniform guessing costs ln 2048 = 7.62 nats a token; random lists keep some of it for ever."""
    model, tokenizer = tiny
    made = islice(documents.stream(random.Random("unread"), documents.held_out_inputs()), 24)
    total = count = 0.0
    for _, text in made:
        ids = tokenizer(vocabulary.BOS + text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        total, count = total + loss * (ids.shape[1] - 1), count + ids.shape[1] - 1
    assert total / count < 0.4 * math.log(2048)


# --------------------------------------------------------------------------------------- the maker


@pytest.fixture(scope="module")
def untrained():
    return pretrain.make_model(pretrain.Recipe(), builtin.load_tiny_tokenizer())


@torch.no_grad()
def share_repeated(model, run: torch.Tensor, at: slice) -> float:
    """How often the most likely token is the right one at the places `at`, when `run` is said a second time."""
    said = model(torch.cat([run, run], 1)).logits.argmax(-1)[:, run.shape[1] - 1 : -1]
    return (said == run)[:, at].float().mean().item()


@pytest.mark.parametrize("length", [10, 60, 200])
def test_an_untrained_base_repeats_random_tokens_from_any_distance(untrained, length):
    """One in 2048 is right by chance."""
    run = torch.randint(20, 2048, (8, length), generator=torch.Generator().manual_seed(0))
    assert share_repeated(untrained, run, slice(1, None)) > 0.6


def test_an_untrained_base_repeats_a_list_across_its_commas(untrained):
    """Any of twenty words has followed a comma; only the word before the comma tells which comes next."""
    run = torch.randint(20, 2048, (16, 40), generator=torch.Generator().manual_seed(1))
    run[:, 1::2] = 11
    assert share_repeated(untrained, run, slice(2, None, 2)) > 0.6


def test_training_keeps_the_columns_of_the_copying_circuit(untrained):
    model = copy.deepcopy(untrained)
    circuit.lay_copying_circuit(model, 1e6)  # a copy has no hooks
    embedding = model.get_input_embeddings().weight
    ids = torch.randint(20, 2048, (2, 12), generator=torch.Generator().manual_seed(2))
    before = embedding.detach().clone()
    optimizer = torch.optim.AdamW([embedding], lr=0.1, weight_decay=0.0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(embedding[:, :65], before[:, :65])
    assert (embedding[:, 65:] != before[:, 65:]).all()


@pytest.mark.parametrize("shape", [(2, 8, 8), (3, 6, 20), (1, 20, 6)])
def test_orthogonal_keeps_singular_vectors_and_evens_out_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    matrices = left @ torch.diag_embed(values.clamp(min=0.3)) @ right  # away from zero
    turned = torch.linalg.svdvals(muon.orthogonal(matrices).float())
    assert turned.min() > 0.5
    assert turned.max() < 1.4
    exact = left @ right
    assert torch.nn.functional.cosine_similarity(muon.orthogonal(matrices).flatten(), exact.flatten(), dim=0) > 0.95


def test_muon_finds_the_least_squares_solution():
    torch.manual_seed(1)
    wanted = torch.randn(6, 4)
    found = torch.nn.Parameter(torch.zeros(6, 4))
    optimizer = muon.Muon([found], lr=0.2)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        optimizer.zero_grad()
        (found - wanted).square().sum().backward()
        optimizer.step()
    assert (found - wanted).abs().max() < 0.05


def _tokenizer():
    if not hasattr(_tokenizer, "kept"):
        _tokenizer.kept = builtin.load_tiny_tokenizer()
    return _tokenizer.kept
