"""What keys and classes of other trainers are called here: people bring their configs along."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

# Last part of the key -> the key here, and in words what is not the same.
KEY_HERE: Mapping[str, tuple[str, str]] = {
    "per_device_train_batch_size": ("data.batch_size", "rows over all ranks"),
    "train_batch_size": ("data.batch_size", "rows over all ranks"),
    "gradient_accumulation_steps": (
        "data.batch_size",
        "the rows of one optimizer step; model.max_tokens bounds memory",
    ),
    "gradient_checkpointing": ("model.max_tokens", "a batch over it runs in chunks whose activations are not kept"),
    "mini_batch_size": ("model.max_tokens", "in tokens, for every loss"),
    "num_train_epochs": ("trainer.max_epochs", ""),
    "num_epochs": ("trainer.max_epochs", ""),
    "epochs": ("trainer.max_epochs", ""),
    "lr": ("model.learning_rate", ""),
    "warmup_steps": ("model.warmup_ratio", "a share of the steps"),
    "lr_scheduler_type": ("model.schedule", ""),
    "optim": ("model.optimizer", ""),
    "max_grad_norm": ("trainer.gradient_clip_val", ""),
    "bf16": ("trainer.precision", "bf16-mixed"),
    "fp16": ("trainer.precision", "16-mixed"),
    "output_dir": ("trainer.default_root_dir", ""),
    "logging_steps": ("trainer.log_every_n_steps", ""),
    "eval_steps": ("trainer.val_check_interval", ""),
    "eval_strategy": ("trainer.val_check_interval", "a number of steps, or 1.0 for each epoch"),
    "per_device_eval_batch_size": ("model.max_tokens", "in tokens, of training and evaluation"),
    "save_steps": ("checkpoint.save_every_steps", ""),
    "save_total_limit": ("checkpoint.keep", ""),
    "metric_for_best_model": ("checkpoint.monitor", ""),
    "load_best_model_at_end": ("checkpoint.monitor", "the best checkpoint by it is exported"),
    "resume_from_checkpoint": ("ckpt_path", "auto takes the newest"),
    "dataloader_num_workers": ("data.num_workers", ""),
    "batch_sampler": ("data.no_duplicates", "or rows_per_label of a source, for batches by label"),
    "multi_dataset_batch_sampler": ("data.mixing", ""),
    "report_to": ("tracking.wandb", ""),
    "run_name": ("tracking.name", "trainer.default_root_dir is the folder"),
    "seed": ("seed_everything", ""),
    "deepspeed": ("trainer.strategy", "see configs/hardware/zero*.yaml"),
    "model_name_or_path": ("model.encoder.backbone", ""),
    "max_seq_length": ("model.encoder.max_length", ""),
    "temperature": ("model.loss", "InfoNCE has a scale, 1 / temperature"),
}

_SYMMETRIC = "InfoNCE with directions: [query_to_doc, doc_to_query] and partition: per_direction"

# Losses and evaluators of sentence-transformers 6.2 whose name here is not theirs without Loss or Evaluator: the class
# here, and its settings; empty where there is none.
CLASS_HERE: Mapping[str, str] = {
    "AdaptiveLayerLoss": "",
    "BatchAllTripletLoss": "BatchTriplet with mining: all",
    "BatchHardSoftMarginTripletLoss": "BatchTriplet with mining: hard and margin: soft",
    "BatchSemiHardTripletLoss": "BatchTriplet with mining: semi_hard",
    "CachedGISTEmbedLoss": "GISTEmbed; model.max_tokens bounds the memory of every loss",
    "CachedMultipleNegativesRankingLoss": "InfoNCE; model.max_tokens bounds the memory of every loss",
    "CachedMultipleNegativesSymmetricRankingLoss": f"{_SYMMETRIC}; model.max_tokens bounds the memory of every loss",
    "ContrastiveTensionLoss": "",
    "ContrastiveTensionLossInBatchNegatives": "",
    "DenoisingAutoEncoderLoss": "",
    "Matryoshka2dLoss": "",
    "MegaBatchMarginLoss": "",
    "MultipleNegativesRankingLoss": "InfoNCE",
    "MultipleNegativesSymmetricRankingLoss": _SYMMETRIC,
    "EmbeddingSimilarityEvaluator": "STS",
    "MSEEvaluatorFromDataFrame": "MSE, in a validation source for each pair of languages",
    "NanoBEIREvaluator": "InformationRetrieval with path: sentence-transformers/NanoBEIR-en",
    "ParaphraseMiningEvaluator": "",
    "SequentialEvaluator": "",
}


def class_here(name: str, known: Collection[str]) -> str | None:
    """The sentence for a class that is none of ``known``, empty where none is like it; None: nothing is known of it."""
    plain = _plain(name)
    named = {_plain(there): here for there, here in CLASS_HERE.items()} | {_plain(one): one for one in known}
    here = named.get(plain)
    if here is None or (here and re.split(r"\W", here)[0] not in known):  # of no kind, or of the other kind
        return None
    return f"; here it is {here}" if here else ""


def _plain(name: str) -> str:
    """Without what is often left out or added."""
    return name.lower().removesuffix("loss").removesuffix("evaluator")


def name_here(key: str) -> str:
    """The sentence for an unknown key, empty where nothing is known of it."""
    if key not in KEY_HERE:
        return ""
    here, meaning = KEY_HERE[key]
    return f"; here it is {here}{f' ({meaning})' if meaning else ''}"
