"""What keys of other trainers are called here: people bring their configs along."""

from __future__ import annotations

from collections.abc import Mapping

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
    "save_steps": ("checkpoint.save_every_steps", ""),
    "save_total_limit": ("checkpoint.keep", ""),
    "metric_for_best_model": ("checkpoint.monitor", ""),
    "resume_from_checkpoint": ("ckpt_path", "auto takes the newest"),
    "dataloader_num_workers": ("data.num_workers", ""),
    "multi_dataset_batch_sampler": ("data.mixing", ""),
    "report_to": ("tracking.wandb", ""),
    "deepspeed": ("trainer.strategy", "see configs/hardware/zero*.yaml"),
    "model_name_or_path": ("model.encoder.backbone", ""),
    "max_seq_length": ("model.encoder.max_length", ""),
    "temperature": ("model.loss", "InfoNCE has a scale, 1 / temperature"),
}


def name_here(key: str) -> str:
    """The sentence for an unknown key, empty where nothing is known of it."""
    if key not in KEY_HERE:
        return ""
    here, meaning = KEY_HERE[key]
    return f"; here it is {here}{f' ({meaning})' if meaning else ''}"
