"""``trainer check``: the report on a run's data before a GPU is spent; needs no GPU, no weights, no network."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from trainer.config_files import read_command


def check(args: Sequence[str]) -> int:
    """Prints the report on what ``trainer fit ARGS`` would train on; 1 where it would be refused.

    Args:
        args: of fit, and --json for the report as JSON, --probe for one real step.

    Raises:
        ConfigError, ValueError: as fit, before it trains.
    """
    flags = [arg for arg in args if arg not in ("--json", "--probe")]
    written = read_command(flags)
    from trainer.check.probe import probe
    from trainer.check.render import print_report
    from trainer.check.report import make_report
    from trainer.data.steps import limit_steps
    from trainer.distributed.launch import device_count
    from trainer.evaluation.runner import refuse_monitors
    from trainer.lightning_cli import Parts
    from trainer.optimizer import count_steps

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # "Seed set to": nothing is drawn here
    parts = Parts(["fit", *flags], written, execute=False)
    data, module, options = parts.datamodule, parts.model, parts.options.trainer
    num_ranks = (device_count(options.devices) or 1) * options.num_nodes  # of "auto" no login node knows
    precision = parts.precision_of(parts.trainer)
    data.refuse_ranks(num_ranks)
    data.prepare_data()  # a damaged file of the cache is made again, as by fit
    data.setup("fit")
    parts.config_init[parts.subcommand].checkpoint.refuse_monitor(data.validation_sets)
    refuse_monitors(parts.trainer, data.validation_sets)
    if data.stream is not None:
        raise ValueError(
            f"{data.stream.source.path}: a stream without an index can't be looked at before it is read; "
            "convert it to Parquet, or check the first rows of it: set streaming: false and max_rows"
        )
    limit = 1.0 if options.limit_train_batches is None else options.limit_train_batches
    steps_per_epoch = limit_steps(data.order.steps_per_epoch, limit)
    max_epochs = -1 if options.max_epochs is None else options.max_epochs
    report = make_report(
        module,
        data,
        steps_per_epoch=steps_per_epoch,
        num_steps=count_steps(steps_per_epoch, max_epochs, options.max_steps),
        num_ranks=num_ranks,
        is_half="16" in precision,
        strategy=parts.config_init[parts.subcommand].trainer.strategy,
        allow=parts.config_init[parts.subcommand].check.names,
    )
    measured = probe(module, data, num_ranks, precision) if "--probe" in args else ""
    if "--json" in args:
        print(report.to_json(measured))
    else:
        print_report(report, measured=measured)
    return 1 if report.errors else 0
