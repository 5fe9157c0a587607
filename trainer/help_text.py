"""Makes the screens of ``trainer --help`` from the live parser: ``python -m trainer.help_text`` writes them.

Importing Lightning takes seconds, and its own help has hundreds of lines; a test holds these to the parser.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "help"
WIDTH, HEIGHT, KEY_WIDTH = 80, 40, 35

# Our keys speak for themselves: the sentence is that of the docstring. Lightning's need a shorter one.
OTHER_SENTENCES = {
    "seed_everything": "of all randomness",
    "model.warmup_ratio": "share of the steps in which the rate rises",
    "tracking.wandb": "online, offline (send it later), off",
    "watch.timeout_s": "without progress until a run counts as hung",
    "trainer.max_epochs": "1 where no other limit is given",
    "trainer.val_check_interval": "steps, or a fraction of an epoch (1.0)",
    "trainer.precision": "32-true, bf16-mixed, 16-mixed",
    "trainer.devices": "ranks per node",
    "trainer.default_root_dir": "run directory (runs/<recipe>/<name>)",
    "ckpt_path": "a folder; auto (the newest), best: of the run directory",
}
REQUIRED = {"model.encoder.backbone", "model.loss", "data.train"}
KEYS = {
    "fit": """
        seed_everything
        model.encoder.backbone model.encoder.max_length model.encoder.pooling
        model.loss model.learning_rate model.warmup_ratio model.schedule model.max_tokens
        data.train data.validation data.batch_size
        trainer.max_epochs trainer.val_check_interval trainer.precision trainer.devices
        trainer.default_root_dir
        checkpoint.save_every_steps checkpoint.keep checkpoint.monitor
        tracking.wandb watch.timeout_s
        ckpt_path
    """,
    "validate": """
        model.encoder.backbone model.encoder.max_length model.encoder.pooling model.max_tokens
        data.validation
        trainer.precision trainer.devices trainer.default_root_dir
        ckpt_path
    """,
}
KEYS["test"] = KEYS["validate"]

PREDICT = """\
usage: trainer predict --model M --data FILE --text COLUMN --out DIR [--FLAG]

Embeds a column of texts into numbered files, rows in their order, the same on
any number of ranks. Finished files stay: after a stop or a kill the same
command goes on; a folder with another run's files is refused.

  trainer predict --model runs/qa/seed=42 --data docs.jsonl --text body \\
    --out vectors
  sbatch --nodes 2 slurm/train.sh predict --model runs/qa/seed=42 ...
"""
MINE = """\
usage: trainer mine --model M --data PAIRS --anchor A --positive P --out FILE

Finds hard negatives for pairs by exact search (cosine), on any number of ranks,
and writes JSON lines to train on. Never a positive of the anchor, nor its text.

  trainer mine --model runs/qa/seed=42 --data qa.jsonl --anchor question \\
    --positive answer --relative-margin 0.05 --out mined.jsonl.gz
"""
MINE_TAIL = """\
and --precision, --max-tokens, --devices, ...: see trainer predict --help
"""
HEADS = {
    "fit": """\
usage: trainer fit --config RECIPE.yaml [--config HARDWARE.yaml] [--KEY VALUE]

  trainer fit --config configs/stsb.yaml                      as the recipe says
  trainer fit --config configs/stsb.yaml --data.batch_size 64 any key overridden
  sbatch --nodes 2 slurm/train.sh configs/stsb.yaml           on a cluster
""",
    "validate": """\
usage: trainer validate --config RECIPE.yaml [--ckpt_path best] [--KEY VALUE]

Evaluates on data.validation: the backbone as it is, or with --ckpt_path a
checkpoint of a run.

  trainer validate --config configs/stsb.yaml
  trainer validate --config runs/stsb/seed=42/config.yaml --ckpt_path best
""",
    "test": """\
usage: trainer test --config RECIPE.yaml [--ckpt_path best] [--KEY VALUE]

As trainer validate, but into test.json, not metrics.json. It also uses the sets
of data.validation, which chose the best checkpoint: give the file of another.

  trainer test --config runs/stsb/seed=42/config.yaml --ckpt_path best \\
    --data.validation.path test.jsonl.gz --data.validation.name test
""",
}


def render(command: str, parser: Any) -> str:
    """The screen of one subcommand, from its parser."""
    actions = {action.dest: action for action in parser._actions}
    lines = [HEADS[command], "keys, in YAML or as flags, with defaults (* must be given):"]
    for key in KEYS[command].split():
        lines += _line(key, actions[key])
    if command == "fit":
        lines += textwrap.wrap("losses: " + " ".join(_losses()), WIDTH, subsequent_indent="        ")
    return "\n".join([*lines, "--help-all lists every key, --model.loss.help NAME what a loss takes."]) + "\n"


def render_flags(head: str, flags: Any, without: Container[str] = (), tail: str = "") -> str:
    """The screen of a subcommand that takes no config, from its parser."""
    lines = [head.rstrip("\n"), "flags, with defaults (* must be given):"]
    for action in flags._actions:
        key = action.option_strings[0].removeprefix("--")
        if key not in without:
            lines += _line(key, action)
    return "\n".join(lines) + "\n" + tail


def _line(key: str, action: Any) -> list[str]:
    default = "" if action.default is None or action.default is False else f" {action.default}"
    sentence = OTHER_SENTENCES.get(key) or re.split(r"[;:.](?:\s|$)", action.help or "")[0]
    flag = f"{'*' if key in REQUIRED or action.required else ' '} --{key}{default}"
    texts = textwrap.wrap(sentence, WIDTH - KEY_WIDTH - 1, break_on_hyphens=False)
    return [f"{flag:<{KEY_WIDTH}} {texts[0]}"] + [" " * (KEY_WIDTH + 1) + text for text in texts[1:]]


def _losses() -> list[str]:
    from trainer import losses

    return sorted(name for name in losses.__all__ if name != "Loss")


def live_parsers() -> Mapping[str, Any]:
    """The parsers of fit, validate and test, as a command line would meet them."""
    from trainer.config_files import Written
    from trainer.lightning_cli import TrainerCLI

    class Built(Exception):  # noqa: N818 - no error: it carries the parsers out before anything is parsed
        pass

    class ParsersOnly(TrainerCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise Built(self._subcommand_parsers)

    try:
        ParsersOnly([], Written())
    except Built as built:
        return built.args[0]
    raise AssertionError("LightningCLI did not parse")


def screens() -> dict[str, str]:
    """File stem -> text of every screen that shows flags; the others are written by hand, in FOLDER."""
    from trainer.mine.command import flags as mine_flags
    from trainer.predict.command import flags as predict_flags

    predict, mine = predict_flags(), mine_flags()
    said_there = {option.removeprefix("--") for option in predict._option_string_actions}
    said_there -= {"model", "data", "text", "out"}  # which mean something else
    parsers = live_parsers()
    rendered = {command: render(command, parsers[command]) for command in KEYS}
    rendered["predict"] = render_flags(PREDICT, predict)
    rendered["mine"] = render_flags(MINE, mine, said_there, MINE_TAIL)
    return rendered


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in screens().items():
        (FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")
