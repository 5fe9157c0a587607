"""ZeRO 1, 2, 3: the run and the checkpoint of DDP, with less memory on each rank.

Lightning's own DeepSpeed strategy refuses CPUs, saves shards that only the same number of ranks can read, and casts
weights and buffers to half precision. This one keeps everything that DDP does except who holds what: parameters stay
fp32 (autocast makes bf16 of them, as under DDP), a checkpoint is the dict that DDP writes, and is read back whatever
the strategy or the number of ranks.
"""

from __future__ import annotations

import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from trainer.distributed import gather

# Elements of one reduction: large enough for full bandwidth, and a buffer of 200 MB that does not outgrow the model.
BUCKET_ELEMENTS = 50_000_000


class ZeRO(DDPStrategy):
    """Shares training state out over the ranks: DeepSpeed's ZeRO.

    Args:
        stage: what is shared out; 1 optimizer state, 2 also gradients, 3 also parameters.
        offload: keep optimizer state (stage 3: parameters too) in the memory of the host, and step there.
        live_parameters: elements that a rank holds whole at a time under stage 3: memory against traffic.
    """

    def __init__(self, stage: Literal[1, 2, 3] = 2, offload: bool = False, live_parameters: int = 30_000_000) -> None:
        super().__init__()
        if live_parameters < 0:
            raise ValueError(f"trainer.strategy: ZeRO live_parameters is {live_parameters}; it must be 0 or more")
        self.stage = stage
        self.offload = offload
        self.live_parameters = live_parameters
        self._groups: list[list[nn.Parameter]] = []  # as configure_optimizers made them
        self._arrived: list[str] = []  # weights of this step's gradients, in the order in which these came
        self._hooks: list[RemovableHandle] = []
        self._linear = F.linear

    @property
    def identity(self) -> str:
        """What a checkpoint says about the strategy of its run."""
        return f"zero-{self.stage}"

    # -- setting up ---------------------------------------------------------------------------------------

    @staticmethod
    def refuse_settings(trainer: Trainer, precision: str) -> None:
        """Raises ValueError where a run can't have this precision, or its way of clipping."""
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f"trainer.precision is {precision}; ZeRO runs in 32-true or bf16-mixed")
        if trainer.gradient_clip_algorithm not in (None, "norm"):
            raise ValueError("trainer.gradient_clip_algorithm stays norm under ZeRO, which clips by nothing else")

    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        self.refuse_settings(self.lightning_module.trainer, str(self.precision_plugin.precision))
        super().setup_environment()
        if self.root_device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when deepspeed is imported
        os.environ["LOCAL_RANK"] = str(self.local_rank)  # read by the engine; not every launcher sets it
        # What it says concerns nobody who did not write its config.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        import deepspeed

        deepspeed.utils.logging.logger.setLevel(logging.ERROR)
        # None of its own operations is used, and on a CPU it would compile one at every first start.
        deepspeed.ops.__compatible_ops__ = {}

    def configure_ddp(self) -> None:
        """Nothing: the engine is made once there is an optimizer."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Hand the whole module and its optimizer to the engine, which shares them out.

        The module is not built in pieces (``deepspeed.zero.Init``), because backbones are loaded and vocabularies
        compacted whole. So a checkpoint's weights are loaded before, as under DDP; its moments after.
        """
        import deepspeed

        module = self.lightning_module
        assert module is not None
        if single := [name for name, p in module.named_parameters() if p.requires_grad and p.dim() == 0]:
            raise ValueError(f"{single[0]} has no length, so ZeRO can't share it out: make it of shape (1,)")
        super().setup_optimizers(trainer)
        (optimizer,) = self.optimizers
        groups = [list(group["params"]) for group in optimizer.param_groups]
        self.model, shared, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=list(chain.from_iterable(groups)),
            config=self._engine_config(trainer),
        )
        self._groups, self.optimizers = groups, [shared]
        for name, parameter in module.named_parameters() if self.world_size > 1 else ():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._arrived.append(name))
                self._hooks.append(hook)

    def _engine_config(self, trainer: Trainer) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            "allgather_bucket_size": BUCKET_ELEMENTS,
            # By default whatever is used again within 10^9 elements stays: of these models, everything.
            "stage3_max_live_parameters": self.live_parameters,
            "stage3_max_reuse_distance": self.live_parameters,
            "stage3_prefetch_bucket_size": self.live_parameters // 3,
            "stage3_param_persistence_threshold": self.live_parameters // 300,
        }
        if self.offload:
            place = {"device": "cpu", "pin_memory": self.root_device.type == "cuda"}
            zero |= {"offload_optimizer": place} | ({"offload_param": place} if self.stage == 3 else {})
        return {
            "train_micro_batch_size_per_gpu": 1,  # only for its own speed log
            "gradient_clipping": trainer.gradient_clip_val or 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,  # SGD
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW runs on CPUs, and needs no compiler
            # The engine turns off an autocast that it does not know. No module is "safe": gradients are summed in fp32.
            "torch_autocast": {
                "enabled": self.precision_plugin.precision == "bf16-mixed",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }

    @property
    def engine(self) -> Any:
        """The module wrapped by DeepSpeed, which is imported only by a run that uses it."""
        return self.model

    def teardown(self) -> None:
        super().teardown()
        if self._groups:
            self.engine.destroy()
            F.linear = self._linear  # stage 3 puts its own in place, for the whole process
        for hook in self._hooks:
            hook.remove()

    # -- one step -----------------------------------------------------------------------------------------

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        plugin, module = self.precision_plugin, self.lightning_module
        assert module is not None
        self.engine.backward(plugin.pre_backward(closure_loss, module))
        return plugin.post_backward(closure_loss, module)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        output = self.precision_plugin._wrap_closure(self.lightning_module, optimizer, closure)
        self._refuse_mixed_gradients(self.lightning_module.trainer.global_step)
        self.engine.step()  # clips, too
        return output

    def _refuse_mixed_gradients(self, step: int) -> None:
        """The engine adds up flat buffers of gradients and does not look whose they are. Stage 1 fills them in an order
        of its own, with what a rank has. Stages 2 and 3 go by the order in which gradients come; stage 3 sorts a
        buffer, but which gradients are in it, and which weights are gathered next, hangs on the order.

        Raises:
            SharedError: ranks have gradients of different weights, or had them in different orders. A collective.
        """
        arrived = sorted(self._arrived) if self.stage == 1 else self._arrived
        checksum = zlib.crc32("\n".join(arrived).encode())
        largest, smallest = gather.start_max([checksum, -checksum], self.root_device)()
        self._arrived = []
        if largest == -smallest:
            return
        first, *others = gather.gather_objects(arrived)
        rank, other = next((rank, other) for rank, other in enumerate(others, 1) if other != first)
        pairs = zip_longest(first, other, fillvalue="no weight")
        ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
        raise gather.SharedError(
            f"step {step + 1}: ZeRO adds up the gradient of {ours} on rank 0 and that of {theirs} on rank {rank}, for "
            "the ranks' graphs differ; no weight was changed. Take DDP (configs/hardware/ddp.yaml)"
        )

    def gradient_norm(self) -> Tensor:
        """Global norm before clipping, inf if it is not finite, equal on all ranks; between backward and step only.
        A collective."""
        from deepspeed.runtime.utils import combine_grad_norm_groups

        shared = self.engine.optimizer
        groups = shared._get_norm_groups() if self.stage == 3 else [shared.scaled_global_norm()]
        return combine_grad_norm_groups(groups).to(self.root_device)

    # -- the whole of what is shared out ------------------------------------------------------------------

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of all that ``state_dict`` holds; a value lives until the next. A collective."""
        import deepspeed

        assert self.lightning_module is not None
        shared = dict(self.lightning_module.named_parameters()) if self.stage == 3 else {}
        for name, value in self.lightning_module.state_dict().items():
            if name in shared:
                with deepspeed.zero.GatheredParameters([shared[name]]):
                    yield name, shared[name].detach()
            else:
                yield name, value

    def whole_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and mean over ranks of each parameter's gradient before clipping, between backward and step only.
        A collective."""
        from deepspeed.utils import safe_get_full_grad

        assert self.lightning_module is not None
        for name, parameter in self.lightning_module.named_parameters():
            if parameter.requires_grad:
                yield name, safe_get_full_grad(parameter)

    # -- checkpoints --------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What DDP would give, in rank 0's host memory; nothing on other ranks. A collective."""
        return keep_on_first_rank(self.whole_weights())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """What the optimizer of configure_optimizers would give, in rank 0's host memory. A collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self.engine.optimizer.optimizer
        self._link_state()
        kept = inner.state.get(self._shares[0], {})
        state = {
            number: keep_on_first_rank(
                (key, safe_get_full_optimizer_state(parameter, key) if value.dim() else value)
                for key, value in kept.items()
            )
            for number, parameter in enumerate(chain.from_iterable(self._groups) if kept else ())
        }
        numbers = iter(range(sum(map(len, self._groups))))
        groups = [
            {**group, "params": [next(numbers) for _ in parameters]}
            for group, parameters in zip(inner.param_groups, self._groups, strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's share of what DDP, or any stage on any number of ranks, saved."""
        (saved,) = checkpoint["optimizer_states"]
        inner = self.engine.optimizer.optimizer
        sizes, saved_sizes = ([len(g) for g in self._groups], [len(g["params"]) for g in saved["param_groups"]])
        if sizes != saved_sizes:
            raise ValueError(
                f"the checkpoint's optimizer has groups of {saved_sizes} parameters, this run's has {sizes}: "
                "go on with the model and the optimizer settings that it was saved with"
            )
        for group, theirs in zip(inner.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in theirs.items() if key != "params"})
        state = saved["state"]
        if not state:
            return
        for share in self._shares:
            inner.state[share] = {
                key: torch.zeros_like(share) if value.dim() else value.to(share.device, copy=True)
                for key, value in state[0].items()
            }
        self._link_state()
        for number, parameter in enumerate(chain.from_iterable(self._groups)):
            for key, value in state[number].items():
                if value.dim():
                    self._take_share(parameter, key, value)

    def _link_state(self) -> None:
        """Tell parameters where their state is; DeepSpeed does it once, too early for all groups but the first."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.stage < 3:
            for parameters, share in zip(self._groups, self._shares, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, share, self.engine.optimizer.optimizer.state)

    def _take_share(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
        else:  # its setter of the whole cannot divide a number of elements that the ranks do not
            size = parameter.partition_numel()  # type: ignore[attr-defined]
            part = value.flatten()[self.global_rank * size :][:size]
            safe_set_local_optimizer_state(parameter, F.pad(part, (0, size - part.numel())), key)

    @property
    def _shares(self) -> list[Tensor]:
        """What this rank's inner optimizer steps: flat fp32 shares, one or more a group."""
        shared = self.engine.optimizer
        return shared.fp32_partitioned_groups_flat if self.stage == 3 else shared.single_partition_of_fp32_groups


def expect_idle_weights(strategy: Strategy) -> None:
    """Let a step of DDP leave out weights: layers that are dropped, parts of a backbone that no text reaches. They keep
    no gradient where no rank has one, as in one process. To be called before the module is wrapped."""
    if isinstance(strategy, DDPStrategy) and "find_unused_parameters" not in strategy._ddp_kwargs:
        strategy._ddp_kwargs["find_unused_parameters"] = True
        # Most backbones leave out nothing; looking for it takes a walk over the graph and one small reduction a step.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified", category=UserWarning)


def whole_weights(strategy: Strategy) -> Iterable[tuple[str, Tensor]]:
    """Name and value of all that the module's ``state_dict`` holds, under any strategy. A collective."""
    assert strategy.lightning_module is not None
    return strategy.whole_weights() if isinstance(strategy, ZeRO) else strategy.lightning_module.state_dict().items()


def whole_gradients(strategy: Strategy) -> Iterator[tuple[str, Tensor]]:
    """Name and mean over ranks of each parameter's gradient, under any strategy; between backward and step.
    A collective."""
    assert strategy.lightning_module is not None
    if isinstance(strategy, ZeRO):
        yield from strategy.whole_gradients()
    else:
        for name, parameter in strategy.lightning_module.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad


def keep_on_first_rank(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies in the host memory of rank 0; other ranks only take part in the collectives behind ``tensors``."""
    kept = {}
    for name, tensor in tensors:
        if gather.rank() == 0:
            kept[name] = tensor.detach().to("cpu", copy=True)
    return kept
