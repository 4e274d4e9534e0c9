"""The plan of a run as plain values, for `apiary doctor --json`: numbers, and no words of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from apiary.config.schema import RunConfig
from apiary.data.examples import FileReport
from apiary.data.federation import Federation
from apiary.doctor import forecast
from apiary.doctor.plan import Cost, PreparedRun, length_bins
from apiary.models import base
from apiary.tracking import environment


def machine_values(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """The device and its arithmetic."""
    dtype = str(base.resolve_dtype(config.model, device)).removeprefix("torch.")
    machine = environment.machine()
    return {
        "device": str(device),
        "name": machine["gpu"] if device.type != "cpu" else machine["cpu"],
        "cores": machine["cores"],
        "memory_bytes": forecast.device_bytes(device),
        "dtype": dtype,
    }


def rows_values(federation: Federation, turns: Mapping[str, int]) -> dict[str, Any]:
    """How many rows and turns there are, how files were read, and which rows of them are left out or read otherwise."""
    return {
        "rows": sum(report.rows for report in federation.reports),
        "usable": sum(report.usable for report in federation.reports),
        "train": sum(len(client.train) for client in federation.clients),
        "held_out_at_clients": sum(len(client.test) for client in federation.clients),
        "held_out": len(federation.test),
        **turns,
        "notes": [{"file": report.name, "note": note} for report in federation.reports for note in report.notes],
        "left_out": _reasons((report, report.problems) for report in federation.reports),
        "remarks": _reasons((report, report.remarks) for report in federation.reports),
    }


def _reasons(found: Iterable[tuple[FileReport, Mapping[str, tuple[int, tuple[int, ...]]]]]) -> list[dict[str, Any]]:
    return [
        {"file": report.name, "reason": reason, "rows": count, "first": list(first)}
        for report, reasons in found
        for reason, (count, first) in reasons.items()
    ]


def run_values(run: PreparedRun, cost: Cost) -> dict[str, Any]:
    """The clients, and what the run will take."""
    work, traffic = cost.work, cost.traffic
    stats, whole = [corpus.stats for corpus in run.corpora], [corpus.whole for corpus in run.corpora]
    return {
        "clients": [
            {
                "name": client.name,
                "examples": len(corpus),
                "cut": corpus.stats.cut,
                "dropped": corpus.stats.dropped,
                "cut_within_an_answer": corpus.stats.cut_within,
                "trained_tokens_cut": corpus.stats.trained_cut,
                "trained_tokens_dropped": corpus.stats.trained_dropped,
                "turns": sum(len(row.turns) for row in client.train),
                "spell_control_tokens": len(corpus.spelled),
                "tokens": corpus.stats.tokens,
                "trained_tokens": corpus.stats.response_tokens,
                "steps_per_epoch": epoch,
                "steps_per_round": steps,
            }
            for client, corpus, epoch, steps in zip(
                run.federation.clients, run.corpora, work.per_epoch, work.per_round, strict=True
            )
        ],
        "lengths": [each._asdict() for each in length_bins(np.concatenate(whole), run.config.prompt.max_tokens)],
        "cost": {
            "trained_parameters": forecast.adapter_size(run.lm),
            "adapted_share": run.lm.coverage.share,
            "cohort": work.cohort,
            "steps": work.total,
            "tokens": sum(each.tokens for each in stats),
            "trained_tokens": sum(each.response_tokens for each in stats),
            "bytes_down": traffic.down,
            "bytes_up": traffic.up,
            "bytes": traffic.total,
            "processes": cost.processes,
            "memory_bytes": cost.processes * cost.memory,
            "seconds": cost.seconds,
            "seconds_with_baselines": cost.copies * cost.seconds,
        },
    }
