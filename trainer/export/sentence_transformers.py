"""From a run to a folder that sentence-transformers loads; sentence-transformers itself writes it."""

from __future__ import annotations

import argparse
import copy
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router

from trainer.base_weights import BaseWeights
from trainer.check.report import FILE_NAME as CHECK_FILE
from trainer.data.module import PairData
from trainer.data.sources import Source
from trainer.distributed import gather
from trainer.encoder import Encoder
from trainer.encoder.towers import load_encoder
from trainer.export.account import primary_metrics
from trainer.export.curves import FILE as CURVES_FILE
from trainer.export.curves import training_curves
from trainer.export.legacy import rewrite_as_legacy
from trainer.export.model_card import DISTRIBUTION, complete_readme, fill_card
from trainer.export.onnx import FILE as ONNX_FILE
from trainer.export.onnx import OPSET, refuse_missing_packages, write_onnx
from trainer.export.record import Run, fingerprints, read_findings
from trainer.files import share_weights, writing
from trainer.manifest import STATE, best, newest, problem, read_manifest, read_state
from trainer.module import EmbeddingModule
from trainer.run_dir import refuse_folder_of_runs
from trainer.tracking.runs import METRICS_FILE, read_about, read_log

logger = logging.getLogger(__name__)


def export_run(source: Path, out: Path, legacy: bool = False, onnx: bool = False, repo: str | None = None) -> Run:
    """Write a run's model as a sentence-transformers folder with its model card; weights are float32.

    Args:
        source: a run directory (its best checkpoint is taken, else its newest), or a checkpoint in it.
        out: the folder to write. It appears whole or not at all; an older export in its place is replaced.
        legacy: in the layout that sentence-transformers 3 to 5 load.
        onnx: also as an ONNX graph; the layout is the legacy one, for no later version can run it (docs/publishing.md).
        repo: of the hub, as the card shall name the model.

    Returns:
        What the card tells about.

    Raises:
        ValueError: there is nothing to export, the checkpoint does not fit its backbone, ``out`` holds something
            that is no export of ours, or the model has no legacy layout or no ONNX graph.
    """
    if onnx:
        refuse_missing_packages()
    out = out.resolve()
    _refuse_foreign(out)
    run_dir, path, chosen = _choose_checkpoint(source)
    config = _read_config(run_dir)
    module, data = _build(run_dir, copy.deepcopy(config))  # the parser leaves objects in what it is given
    if onnx and module.document_spec is not None:
        raise ValueError(
            "--format onnx: this run has two encoders, and sentence-transformers runs one graph a model; leave it out"
        )
    if reason := problem(path):
        raise ValueError(f"{path} can't be trusted: {reason}; export another checkpoint of its folder")
    checkpoint = read_state(path, mmap=True)  # mapped: the optimizer's two thirds are not wanted here
    _load_encoder(module, checkpoint, path)
    run = Run(
        module=module,
        data=data,
        config=config,
        log=read_log(run_dir / METRICS_FILE),
        checkpoint=path.name,
        step=checkpoint["global_step"],
        name=_name(run_dir),
        reason=_reason(chosen, checkpoint, config),
        findings=read_findings(run_dir / CHECK_FILE),
        fingerprints=fingerprints(read_manifest(path).get("identity") or {}),
        about=read_about(run_dir),
    )
    with module.encoder.as_sentence_transformer() as model:
        if isinstance(module.encoder, Encoder):  # towers have set theirs
            prompt = module.encoder.text.prompt
            if prompt or module.encoder_spec.prompt is not None:  # else nobody chose one, and the folder's stay
                _set_prompt(model, prompt)
            else:
                _warn_of_prompts(model, data.train_sources)
        parts = list(module.encoder.parts.values())
        before = {"query": parts[0].text.prompt, "document": parts[-1].text.prompt}
        _set_column_prompts(model, before, data.train_sources)
        fill_card(model, run)
        if repo is not None:
            model.model_card_data.set_model_id(repo)
        _write(model, run, out, legacy, onnx)
    return run


# -- reading the run --------------------------------------------------------------------------------------


def _choose_checkpoint(source: Path) -> tuple[Path, Path, str]:
    """Run directory, checkpoint and how it was chosen: "named", "best" or "newest"."""
    if (source / STATE).is_file():
        run_dir = source.resolve().parent.parent
        if source.resolve().parent.name != "checkpoints":
            raise ValueError(
                f"{source} does not lie in the checkpoints/ folder of a run, so its config is unknown; "
                "give RUN/checkpoints/STEP or the run directory"
            )
        return run_dir, source, "named"
    if not source.is_dir():
        raise ValueError(f"there is no run or checkpoint {source}; give the folder that a fit wrote")
    if (path := best(source)) is not None:
        return source, path, "best"
    if (path := newest(source)) is not None:
        return source, path, "newest"
    refuse_folder_of_runs(source)
    raise ValueError(
        f"{source} holds no finished checkpoint; give a run directory whose checkpoints/ has a step, "
        "or train until the first one (checkpoint.save_every_steps)"
    )


def _name(run_dir: Path) -> str:
    """What a reader may see of its place: stsb/seed=1 of .../runs/stsb/seed=1, elsewhere the last folder."""
    place = run_dir.resolve()
    _, runs, below = str(place).rpartition("/runs/")
    return below if runs else place.name


def _read_config(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{run_dir} has no config.yaml; give a run directory that a fit wrote") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}; restore the file that the fit wrote") from error
    if not isinstance(config, dict) or not {"model", "data"} <= config.keys():
        raise ValueError(f"{path} has no sections model and data; restore the file that the fit wrote")
    return config


def _build(run_dir: Path, config: dict[str, Any]) -> tuple[EmbeddingModule, PairData]:
    """The module and the data of the run as its config describes them; nothing is loaded yet."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(EmbeddingModule, "model")
    parser.add_class_arguments(PairData, "data")
    # The saved config leaves out what the command line links.
    linked = {name: config["model"].get(name) for name in ("encoder", "document_encoder")}
    linked["seed"] = config.get("seed_everything", 42)
    known = {"model": config["model"], "data": {**config["data"], **linked}}
    try:
        built = parser.instantiate_classes(parser.parse_object(known))
    except argparse.ArgumentError as error:
        path = run_dir / "config.yaml"
        raise ValueError(f"{path} does not fit this version: {error}; restore the file that the fit wrote") from error
    started_in = Path(read_about(run_dir).get("directory", ""))
    for spec in built.model.encoder_specs:
        folder = next((path for path in (started_in / spec.backbone, Path(spec.backbone)) if path.is_dir()), None)
        if folder is not None:
            # A relative path may look like a hub id, which sentence-transformers would then ask the hub about.
            spec.backbone = str(folder.resolve())
    return built.model, built.data


def _load_encoder(module: EmbeddingModule, checkpoint: dict[str, Any], path: Path) -> None:
    """Make the encoder from its backbone and give it the weights of the checkpoint."""
    module.encoder = load_encoder(module.encoder_spec, module.document_spec, module.max_tokens)
    # As when a fit resumes: compact the vocabulary, check that its base is the same.
    BaseWeights(module.encoder_specs, module.encoder.parts).fill_in(checkpoint, is_training=False)
    prefix = "encoder."
    state = checkpoint["state_dict"]
    weights = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    try:
        module.encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        cause = " ".join(" ".join(str(error).splitlines()[1:2]).split())[:300]
        backbones = " and ".join(f"'{spec.backbone}'" for spec in module.encoder_specs)
        raise ValueError(
            f"{path} does not fit the backbone {backbones}: {cause} "
            "Restore the backbone folder, or its revision, that the run was trained from"
        ) from error


def _reason(chosen: str, checkpoint: dict[str, Any], config: dict[str, Any]) -> str:
    """Why this checkpoint, as the second half of a sentence in Markdown."""
    if chosen == "named":
        return "named at export"
    if chosen == "newest":
        return "the newest of the run; no metric chose a best one"
    settings = config.get("checkpoint") or {}
    saved = (checkpoint.get("callbacks") or {}).get("Checkpoints") or {}
    monitor = saved.get("monitor") or settings.get("monitor") or "auto"
    word = "lowest" if settings.get("mode") == "min" else "highest"
    name = "first metric of the first validation set" if monitor == "auto" else f"`{monitor}`"
    value = saved.get("best_value")
    return f"the {word} {name} of the run" + (f", {value:.4f}" if value is not None else "")


# -- writing the folder -----------------------------------------------------------------------------------


def _set_prompt(model: SentenceTransformer, prompt: str) -> None:
    """Make what training put before every text that of queries, documents and all other texts."""
    # encode_query and encode_document take their own entry even if it is empty, never the default.
    model.prompts |= {"query": prompt, "document": prompt} | ({"default": prompt} if prompt else {})
    model.default_prompt_name = "default" if prompt else None


def _warn_of_prompts(model: SentenceTransformer, sources: Sequence[Source]) -> None:
    """Say that the folder's prompts go before texts that were trained without."""
    kept = {name: model.prompts[name] for name in ("query", "document") if model.prompts.get(name)}
    if kept and not any(source.prompts for source in sources):
        gather.warn(
            logger,
            f"the folder has prompts ({', '.join(f'{name}: {prompt!r}' for name, prompt in kept.items())}), training "
            f"put none before a text: {' and '.join(f'encode_{name}' for name in kept)} will; train with them (prompts "
            "of data.train), or set model.encoder.prompt to '', which takes them out",
        )


def _set_column_prompts(model: SentenceTransformer, before: Mapping[str, str], sources: Sequence[Source]) -> None:
    """Give encode_query the prompt of the anchors, and encode_document that of all other columns.

    Args:
        before: put before every query and document, and so before those prompts.
    """
    if not any(source.prompts for source in sources):
        return
    found: dict[str, set[str]] = {"query": set(), "document": set()}
    for source in sources:
        for column in source.text_columns:
            prompt = source.prompt_of(column)
            for name, columns in (("query", ("anchor", "text")), ("document", ("positive", "negative", "text"))):
                if column.startswith(columns):
                    found[name].add(prompt)
    for name, prompts in found.items():
        if len(prompts) == 1:
            model.prompts[name] = before[name] + next(iter(prompts))
        else:
            kept = repr(model.prompts.get(name)) if model.prompts.get(name) else "nothing"
            gather.warn(
                logger,
                f"the training columns of a {name} have {len(prompts)} prompts, and a model has one: encode_{name} "
                f"puts {kept} before a text; name another by encode(..., prompt=...)",
            )
    if found["query"] == found["document"] and len(found["query"]) == 1 and before["query"] == before["document"]:
        model.prompts["default"] = model.prompts["query"]
        model.default_prompt_name = "default"
    elif isinstance(model[0], Router) and model.prompts["document"]:
        model.default_prompt_name = "document"  # plain encode takes the encoder of documents


def _refuse_foreign(out: Path) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    readme = out / "README.md"
    is_model = (out / "modules.json").is_file()
    if not is_model:
        raise ValueError(f"{out} exists and is no exported model; give an empty or a new folder")
    if not readme.is_file() or DISTRIBUTION not in readme.read_text(encoding="utf-8"):
        raise ValueError(f"{out} holds a model that {DISTRIBUTION} did not export; give an empty or a new folder")


def _write(model: SentenceTransformer, run: Run, out: Path, legacy: bool, onnx: bool) -> None:
    """Write beside ``out``, then rename, so that nobody ever loads half a model."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    older = out.with_name(f".{out.name}.{os.getpid()}.older")
    try:
        with writing(out):
            model.save_pretrained(str(partial))
        image = training_curves(run.log, primary_metrics(run))
        if image:
            (partial / CURVES_FILE).write_text(image, encoding="utf-8")
        complete_readme(partial / "README.md", run, bool(image))
        if legacy or onnx:
            assert model.max_seq_length is not None  # the encoder sets it
            rewrite_as_legacy(partial, model.max_seq_length, flag="--legacy" if legacy else "--format onnx")
        if onnx:
            difference = write_onnx(model, partial)
            print(f"onnx: {out / ONNX_FILE}, opset {OPSET}, embeddings differ from torch's by {difference:.1e} at most")
        share_weights(partial)
        if out.exists():
            os.replace(out, older)
        os.replace(partial, out)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
