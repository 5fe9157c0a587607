"""The backbone as an ONNX graph beside the torch weights, compared with them before anybody gets it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

FILE = "onnx/model.onnx"  # where sentence-transformers looks
OPSET = 18  # the newest that torch's exporter writes without converting; onnxruntime reads it from 1.14 on
TOLERANCE = 1e-4  # of an embedding whose largest entry is 1 at most, of a larger one times that entry
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TRACED = ["The first of two texts.", "The second one is longer than the first: it has more pieces to be counted."]
# A batch with padding, a text alone, and one that is cut at max_length.
_COMPARED = [
    ["Yes.", "A doctor bought the blue car at dawn.", "מה השעה?", "東京は雨です。", "Ünïcödé & numbers 3.14159, 42!"],
    ["One text alone."],
    ["many words " * 200, "few words"],
]


def refuse_missing_packages() -> None:
    """Before any work is done.

    Raises:
        ValueError: what exports and runs the graph is not installed.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"--format onnx needs {' and '.join(missing)}, which this environment lacks: "
            "pip install 'siamese-trainer[onnx]'"
        )


def write_onnx(model: SentenceTransformer, folder: Path) -> float:
    """Write the first module of a model as ``folder/onnx/model.onnx``, float32; pooling and what follows stay modules.

    Inputs are what the tokenizer gives of input_ids, attention_mask and token_type_ids, (S, L) int64 each; the output
    is last_hidden_state, (S, L, H) float32. S texts and L pieces are free.

    Returns:
        The largest difference between embeddings by onnxruntime and by torch, over texts of several lengths.

    Raises:
        ValueError: torch's exporter can't take the backbone, or the difference is above `TOLERANCE`.
    """
    transformer: Any = model[0]
    features = model.preprocess(_TRACED)
    names = [name for name in _INPUTS if name in features]
    path = folder / FILE
    path.parent.mkdir(parents=True)
    kind = transformer.model.config.model_type
    try:
        with _quiet():
            program = torch.onnx.export(
                _Backbone(transformer.model, names).eval(),
                tuple(features[name] for name in names),
                input_names=names,
                output_names=["last_hidden_state"],
                dynamic_shapes=(tuple({0: "batch", 1: "length"} for _ in names),),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            _forget_sources(program.model)
            program.save(path)
        difference, largest = _compare(model, path, names)
    except Exception as error:  # of torch.export, torch.onnx and onnxruntime, each with classes of its own
        inner: BaseException = error
        while inner.__cause__ is not None:  # the outer ones say how to debug an exporter
            inner = inner.__cause__
        cause = " ".join(str(inner).split())[:200]
        raise ValueError(f"--format onnx: torch can't export the backbone '{kind}': {cause}; leave it out") from error
    allowed = TOLERANCE * max(1.0, largest)
    if not difference <= allowed:  # nan too
        raise ValueError(
            f"--format onnx: embeddings by onnxruntime differ from torch's by {difference:.2g}, more than "
            f"{allowed:.2g}: the graph of '{kind}' is wrong, so nothing was written; leave it out"
        )
    return difference


class _Backbone(nn.Module):
    """Positional tensors in, one tensor out, as a graph has them."""

    def __init__(self, backbone: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = names
        # Decoders would give the keys and values of every layer too.
        self.options = {"use_cache": False} if getattr(backbone.config, "use_cache", False) else {}

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.backbone(**dict(zip(self.names, inputs, strict=True)), **self.options).last_hidden_state


def _forget_sources(graph_model: Any) -> None:
    """Torch notes the line of code behind each node: paths of the machine that exported."""
    for graph in (graph_model.graph, *(function.graph for function in graph_model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


@torch.no_grad()
def _compare(model: SentenceTransformer, path: Path, names: Sequence[str]) -> tuple[float, float]:
    """The largest difference of embeddings, and the largest entry of torch's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Left to itself it takes all cores and waits on them in circles: 190 s instead of 14 on a busy machine.
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    differences, sizes = [], []
    for texts in _COMPARED:
        features = model.preprocess(texts)
        wanted = model(dict(features))["sentence_embedding"]
        (hidden,) = session.run(None, {name: features[name].numpy() for name in names})
        found: dict[str, Any] = {**features, "token_embeddings": torch.from_numpy(hidden)}
        for module in list(model)[1:]:
            found = module(found)
        differences.append((found["sentence_embedding"] - wanted).abs().max())
        sizes.append(wanted.abs().max())
    return torch.stack(differences).max().item(), torch.stack(sizes).max().item()  # nan stays nan


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on torchvision and on its own future."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        noisy.setLevel(level)
