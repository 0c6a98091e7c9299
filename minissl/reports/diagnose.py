"""Diagnose a run: read its options, log, metrics and features, and report what is wrong and which option to change."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from minissl.data.images import Images
from minissl.evaluation import extract_features, rank_me
from minissl.methods.base import Method
from minissl.training import checkpoint, diagnostics
from minissl.training.logger import read_log
from minissl.training.run import RunConfig, load_run_method, random_init_encoder, read_run

NUM_IMAGES = 500  # test images whose features are measured


def diagnose_run(run_dir: Path) -> list[diagnostics.Finding]:
    """Print and return what is wrong with a run, its meaning and the option to change. The run may still be going on.

    The options are checked first, then the log, the metrics and the features. Metrics and features are checked only
    while there is no finding, because what they show follows from earlier causes. A loss that is not finite is always
    reported.

    Raises:
        InputError: if the folder holds no run, or its files are damaged.
    """
    run, plan = read_run(run_dir)
    lines, method, checked = read_log(run_dir / "log.jsonl"), run.build(), ["options", "log"]
    findings = diagnostics.check_options(asdict(run), plan.steps, method)
    num_candidates = method.num_candidates(run.train["batch_size"])
    log_findings = diagnostics.check_log(lines, plan.steps, run.method_options, num_candidates)
    findings += [finding for finding in log_findings if not findings or finding.name == "non-finite loss"]
    past_warmup = diagnostics.past_warmup(lines, plan.steps)
    if not findings and (run_dir / "metrics.json").exists() and past_warmup:
        checked.append("metrics")
        findings = diagnostics.check_metrics(checkpoint.read_json(run_dir / "metrics.json"))
    if not findings and (run_dir / "checkpoint.safetensors").exists() and past_warmup:
        checked.append("features")
        images = run.load_dataset("test").subsample(NUM_IMAGES)
        findings = diagnostics.check_encoder(**_measure_encoder(run, load_run_method(run_dir), images))
    for finding in findings:
        print(finding)
    if not findings:
        print(f"No problem found in {run_dir}; checked: {', '.join(checked)}.")
    return findings


@torch.no_grad()
def _measure_encoder(run: RunConfig, method: Method, dataset: Images) -> dict[str, Any]:
    """Return the arguments of `diagnostics.check_encoder`."""
    images, size, pooling = dataset.images, run.crop_size, run.feature_pooling
    features = extract_features(method.encoder, images, size, pooling=pooling)
    random_features = extract_features(random_init_encoder(run), images, size, pooling=pooling)
    probs = method.target_probs(extract_features(method.encoder, images, size))  # (N, K)
    return {
        "rank": rank_me(features),
        "random_rank": rank_me(random_features),
        "num_used_prototypes": None if probs is None else len(probs.argmax(dim=1).unique()),
        "num_prototypes": 0 if probs is None else probs.shape[1],
        "num_images": len(images),
    }
