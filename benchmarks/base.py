"""What the built-in base knows, and what it answers after tuning on all skills pooled.

python -m benchmarks.base [--steps 400] [--prose FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from apiary.config import loading
from apiary.core.tensors import add
from apiary.data import tokenization
from apiary.data.federation import federate
from apiary.evaluation import comparison
from apiary.models import adapters, tiny
from apiary.tracking import environment
from client.training import trainer
from tools.pretrain_tiny import pretrain

RESULTS = Path(__file__).parent / "results" / "base.json"


def losses(prose: Path | None) -> dict[str, float]:
    """Held-out loss by kind of document, in nats per token; of prose, the end of each book in the folder."""
    model, tokenizer = tiny.load_tiny()
    books = pretrain.read_prose(prose)[1] if prose else []
    return pretrain.held_out_losses(model, pretrain.held_out_sets(pretrain.Recipe(), tokenizer, books))


def tuned(steps: int) -> dict[str, Any]:
    """Loss and exact answers, over all held-out rows and by skill, after `steps` on the pooled corpus."""
    run = loading.load(None, ["train.batch_tokens=2048", "evaluate.max_examples=600", f"train.steps={steps}"])
    federation = federate(run.data, run.seed)
    lm = adapters.load(run.model, run.adapter)
    template = tokenization.make_template(run.prompt, lm.tokenizer)
    held_out = comparison.prepare(federation.test, template, lm, run)
    rows = [example for client in federation.clients for example in client.train]
    start = adapters.fresh_adapter(lm, run.seed)
    corpus = tokenization.encode_all(rows, template, lm.tokenizer, run.prompt)
    plan = trainer.VisitPlan(run.seed, "central", steps=steps, total_steps=steps)
    result = trainer.fit(lm, start, corpus, run.train, plan)
    measured = comparison.measure(lm, add(start, result.delta), held_out, run)
    skills = comparison.by_kind(lambda example: example.tags["skill"], {"tuned": measured}, held_out)
    return {
        "steps": steps,
        "rows_per_step": round(result.report.examples / steps),
        "rank": run.adapter.rank,
        "lr": run.train.lr,
        "n": len(held_out.examples),
        "loss": measured.loss,
        "accuracy": measured.accuracy,
        "skills": {skill: values["tuned"] for skill, values in skills.items()},
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--prose", type=Path, help="the books it was trained on, to measure their held-out ends too")
    args = parser.parse_args()
    facts = environment.start_fields(loading.load(None, []))
    found = {
        "machine": facts["machine"],
        "versions": facts["versions"],
        "losses": losses(args.prose),
        "tuned": tuned(args.steps),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
