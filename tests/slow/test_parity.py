"""The first losses of our fit are those of sentence-transformers' own trainer.

Dropout off, fp32, the same rows in the same order, AdamW at 5e-5, linear schedule, clip 1.0: what is left is
the order of additions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from peer import Fit, Task, fit_ours, fit_peer, in_our_order, load_peer, peer_loss

STEPS = 50
STSB = "sts/stsb-en.train.jsonl.gz"
PAIR = {"anchor": "sentence1", "positive": "sentence2"}
TASKS = {
    "CosineSimilarity": Task(STSB, {**PAIR, "score": "score"}, "CosineSimilarity", score_range=(0.0, 5.0)),
    "InfoNCE": Task(STSB, PAIR, "InfoNCE"),
    "BatchHardTriplet": Task(
        "labelled/intents-ko.train.jsonl.gz", {"text": "text", "label": "label"}, "BatchHardTriplet"
    ),
    "CoSENT": Task(STSB, {**PAIR, "score": "score"}, "CoSENT", score_range=(0.0, 5.0)),
    "Softmax": Task(
        "nli/nli-3way.train.jsonl.gz",
        {"anchor": "premise", "positive": "hypothesis", "label": "label"},
        "Softmax",
        label_map={"entailment": 0, "neutral": 1, "contradiction": 2},
        num_labels=3,
    ),
}


class _CopyHead(Callback):
    """Starts our classifier where the other side's started."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        module.loss.classifier.load_state_dict(self.state)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TASKS)
def test_first_losses_equal_those_of_sentence_transformers(
    name: str, data_dir: Path, minilm: Path, tmp_path: Path
) -> None:
    task, backbone = TASKS[name], str(minilm)
    # Its trainer leaves the head out of the norm it clips, ours clips all that is trained: none with a head.
    clip = 0.0 if name == "Softmax" else 1.0
    theirs, ours = (Fit(steps=STEPS, dropout=0.0, clip=clip, record_losses=True) for _ in ("theirs", "ours"))
    model = load_peer(backbone, task.max_length, theirs)
    loss = peer_loss(task, model)
    callbacks = []
    if name == "Softmax":
        callbacks.append(_CopyHead({k: v.clone() for k, v in loss.classifier.state_dict().items()}))
    fit_peer(model, loss, in_our_order(task.rows(data_dir), STEPS, theirs.seed), theirs, shuffle=False)
    fit_ours(task, data_dir, backbone, ours, tmp_path, callbacks)

    first, second = torch.tensor(ours.losses), torch.tensor(theirs.losses)
    assert len(first) == len(second) == STEPS
    difference = (first - second).abs()
    print(f"\n{name}: losses {first[0]:.4f} .. {first[-1]:.4f}, largest difference {difference.max():.2e}")
    assert difference.max() <= 1e-4, f"at step {int(difference.argmax())}: {first.tolist()} {second.tolist()}"
    # A fit that does not train, or a loss that is constant, would agree with itself.
    assert len(set(ours.losses)) > STEPS // 2
