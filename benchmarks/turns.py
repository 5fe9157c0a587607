"""Two or more fits as live processes that take turns: one steps, the others wait.

Imports, models and data are paid for once, and a machine that drifts drifts for all of them. The clock is that of the
process that hands out the turns.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shapes import Shape

SEED = 42
SIDES = ("ours", "default", "best", "compiled")  # ours, and the settings of sentence-transformers (see peer.py)
_PATIENCE_S = 3600


@dataclass(frozen=True)
class Job:
    """What one side does.

    Attributes:
        side: of SIDES.
        turns: steps of each turn; the first is the warm-up, and no turn is timed before all sides have ended it.
        data, cache: the folder of data, and where tokens and random models are kept.
        threads: of torch; None: its own choice.
        rank, ranks, port: of a run of several processes, which meet at this port.
    """

    side: str
    shape: Shape
    precision: str
    turns: tuple[int, ...]
    data: Path
    cache: Path
    threads: int | None = None
    rank: int = 0
    ranks: int = 1
    port: int = 0


class Side:
    """A process with a fit that steps when it is told to."""

    def __init__(self, job: Job, log: Path) -> None:
        self.job, self.log = job, log
        context = start_method()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(job, theirs, str(log)), daemon=False)
        self._process.start()
        theirs.close()

    def wait(self) -> Any:
        """The end of the turn that is under way, or of the fit.

        Raises:
            SystemExit: the fit failed.
        """
        try:
            if not self._pipe.poll(_PATIENCE_S):
                raise EOFError
            kind, value = self._pipe.recv()
        except EOFError:
            kind, value = "failed", "the process died, or was silent for an hour"
        if kind == "failed":
            self.stop()
            raise SystemExit(f"{self.job.side} failed: {value}\n{self.log.read_text(errors='replace')[-3000:]}")
        return value

    def go(self) -> None:
        """Let it take its next turn, or end."""
        self._pipe.send("go")

    def join(self) -> None:
        """Let it end in order."""
        self._process.join(30)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def take_turn(ranks: Sequence[Side]) -> float:
    """Seconds of the next turn of all ranks of a fit."""
    start = time.perf_counter()
    for side in ranks:
        side.go()
    for side in ranks:
        side.wait()
    return time.perf_counter() - start


def results(ranks: Sequence[Side]) -> list[dict[str, Any]]:
    """What the ranks of a fit measured of themselves, once all turns are over."""
    for side in ranks:
        side.go()
    found = [side.wait() for side in ranks]
    for side in ranks:
        side.join()
    return found


def start_method() -> Any:
    """Processes are copies of one that has imported everything."""
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([here, str(Path(here).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peer"])
    return context


def prepare_environment(threads: int | None) -> None:
    """Before the first side: what its libraries read once."""
    if threads:
        os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="true", HF_DATASETS_DISABLE_PROGRESS_BARS="1")


# -- inside the process of a side ------------------------------------------------------------------------------


def _write_to(log: str) -> None:
    """Let all that this process prints go into a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _serve(job: Job, pipe: Connection, log: str) -> None:
    _write_to(log)
    try:
        pipe.send(("done", run(job, pipe)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()[-3000:]))


class Baton:
    """Called at the end of every step, and at the start; at the end of a turn it waits for the next."""

    def __init__(self, turns: tuple[int, ...], pipe: Connection) -> None:
        self.left, self.pipe = list(turns), pipe
        self.cpu_seconds: list[float] = []
        self.peak_device_mib: float | None = None
        self._began = time.process_time()

    def start(self) -> None:
        if not self.left[0]:  # no warm-up
            self._end_turn()

    def __call__(self) -> None:
        self.left[0] -= 1
        if not self.left[0]:
            self._end_turn()

    def _end_turn(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.cpu_seconds.append(time.process_time() - self._began)
        self.left.pop(0)
        if not self.left:
            self.peak_mib = memory_mib("VmHWM") - memory_mib("RssFile")
            if torch.cuda.is_available():
                self.peak_device_mib = torch.cuda.max_memory_allocated() / 2**20
        self.pipe.send(("over", None))
        self.pipe.recv()
        if len(self.cpu_seconds) == 1:
            reset_peaks()
        self._began = time.process_time()


def memory_mib(name: str) -> float:
    """A line of /proc/self/status: RssAnon (own pages), RssFile (files in memory), VmHWM (peak of all); 0 where the
    kernel does not tell, as in some containers."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    return 0.0


def reset_peaks() -> None:
    """Memory peaks count from now on, so that loading is not in them."""
    import torch

    with suppress(OSError):  # a container may not have it: then the peak is that of the whole run
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def run(job: Job, pipe: Connection) -> dict[str, Any]:
    import torch
    from peer import Fit, fit_ours, fit_peer, in_our_order, load_peer, peer_loss, peer_settings

    if job.threads:
        torch.set_num_threads(job.threads)
    traffic = None
    if job.ranks == 1:  # or the other side would take all GPUs, in one process
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    else:
        from traffic import Traffic, as_rank

        as_rank(job.rank, job.ranks, job.port)
        traffic = Traffic()
    before = memory_mib("RssAnon")  # the libraries, which are the same on all sides
    shape, task = job.shape, job.shape.task
    backbone = shape.backbone(job.data, job.cache)
    baton = Baton(job.turns, pipe)

    def on_start(model: Any) -> None:
        if traffic:
            traffic.watch(model)
        baton.start()

    fit = Fit(
        steps=sum(job.turns),
        seed=SEED,
        precision=job.precision,
        batch_size=shape.batch_size,
        chunked=shape.chunked,
        max_tokens=shape.max_tokens,
        ranks=job.ranks,
        on_start=on_start,
        on_step=baton,
        record_losses=True,
    )
    if job.side == "ours":
        fit_ours(task, job.data, backbone, fit, job.cache / "tokens")
    else:
        fit.settings = peer_settings(job.side, job.precision, shape.max_tokens)
        rows = in_our_order(task.rows(job.data), sum(job.turns), SEED, shape.batch_size)
        model = load_peer(backbone, task.max_length, fit)
        fit_peer(model, peer_loss(task, model, fit), rows, fit, shuffle=False)
    return {
        "cpu_seconds": baton.cpu_seconds,
        "peak_host_mib": baton.peak_mib - before,
        "peak_device_mib": baton.peak_device_mib,
        "libraries_mib": before,
        "losses": fit.losses,
        "tokens": per_turn(fit.tokens, job.turns),
        "flops": per_turn(fit.flops, job.turns),
        "replayed_share": fit.replayed_flops / sum(fit.flops) if fit.flops else None,
        "settings": {"arguments": fit.settings.arguments, "cached": fit.settings.cached}
        | ({"attention": fit.settings.attention} if fit.settings.attention else {}),
        "threads": torch.get_num_threads(),
        "bytes_per_step": {"gradient": traffic.gradient / fit.steps, "all": traffic.all / fit.steps}
        if traffic and fit.steps
        else None,
    }


def per_turn(values: list[int], turns: tuple[int, ...]) -> list[int]:
    """Sums over the steps of each turn."""
    ends = [sum(turns[: i + 1]) for i in range(len(turns))]
    return [sum(values[end - num : end]) for end, num in zip(ends, turns, strict=True)] if values else []


# -- all turns -------------------------------------------------------------------------------------------------


def prepare(job: Job, log: Path) -> dict[str, Any]:
    """Build tokens and random models in a process of its own, so that they are in nobody's memory or time."""
    context = start_method()
    ours, theirs = context.Pipe()
    process = context.Process(target=_prepare, args=(job, theirs, str(log)))
    process.start()
    theirs.close()
    try:
        result: dict[str, Any] = ours.recv()
    except EOFError:
        raise SystemExit(f"preparing failed:\n{log.read_text(errors='replace')[-3000:]}") from None
    process.join()
    return result


def _prepare(job: Job, pipe: Connection, log: str) -> None:
    _write_to(log)
    from peer import Fit, our_data

    from trainer.encoder import EncoderSpec

    task = job.shape.task
    spec = EncoderSpec(job.shape.backbone(job.data, job.cache), max_length=task.max_length)
    data = our_data(task, job.data, spec, Fit(batch_size=job.shape.batch_size, seed=SEED), job.cache / "tokens")
    start = time.perf_counter()
    data.prepare_data()
    seconds = time.perf_counter() - start
    data.setup("fit")
    used = data.used_ids()
    assert used is not None
    pipe.send({"tokenize_s": seconds, "rows": data.sizes[0], "used_pieces": len(used)})


def matrix_rate(precision: str, seconds: float = 0.5) -> float:
    """FLOP/s of products of large square matrices, here and now."""
    import torch

    on_gpu = torch.cuda.is_available()
    size = 8192 if on_gpu else 2048
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device="cuda" if on_gpu else "cpu").to(kind) for _ in range(2))
    out = a @ b
    num, start = 0, 0.0
    while not num or time.perf_counter() - start < seconds:
        if not num:
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
        for _ in range(20 if on_gpu else 1):
            torch.mm(a, b, out=out)
            num += 1
        if on_gpu:
            torch.cuda.synchronize()
    return 2 * size**3 * num / (time.perf_counter() - start)
