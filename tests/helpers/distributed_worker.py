"""One of the ranks of test_distributed.py: what torchrun starts there. Arguments: a folder, then names of cases.

A case that this rank is through with leaves a file in the folder; the first that fails ends the run.
"""

import copy
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import TINY, drop_in, stock_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, _fully_shard, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import SiglipVisionConfig

from siglip_fast import SiglipVisionModel

FULL = StateDictOptions(full_state_dict=True)
HOOKED = "a FSDPSiglipEncoderLayer has forward hooks"
GATHERED = "the parameters are FSDP's, gathered for the time of a call"


def stock_and_fast() -> tuple[nn.Module, SiglipVisionModel]:
    stock = stock_model(SiglipVisionConfig(**TINY), "sdpa")
    return stock, drop_in(stock)


def images(seed: int) -> Tensor:
    """Other images on every rank, so that gradients which were not synchronised are noticed."""
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2 * seed + dist.get_rank()))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    loss = model(images(seed)).pooler_output.square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def outputs(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        output = model(images(100))
    return [output.last_hidden_state, output.pooler_output]


def differ(a: list[Tensor], b: list[Tensor]) -> bool:
    return any((x - y).abs().max() > 1e-2 for x, y in zip(a, b, strict=True))


def assert_same_on_every_rank(tensor: Tensor) -> None:
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    assert all(torch.equal(tensor, other) for other in gathered)


def ddp() -> None:
    """Training as stock's; evaluation, with and without the wrapper, fused and on the weights of the moment."""
    stock, fast = stock_and_fast()
    models = [DistributedDataParallel(model) for model in (stock, fast)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    before = outputs(stock)
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model.train(), optimizer, seed)
        if seed != 1:  # also evaluate in training mode
            models[1].eval()
        expected = outputs(stock)
        assert differ(expected, before), "the weights did not change, so nothing could be stale"
        before = expected
        fast.strict = True  # raises where it would not be fused
        for model in (models[1], fast):
            torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)
        fast.strict = False
    for (name, parameter), own in zip(stock.named_parameters(), fast.parameters(), strict=True):
        assert torch.equal(parameter, own), name
        assert_same_on_every_rank(own.detach())


def fsdp_root() -> None:
    _trains_and_evaluates(fully_shard, GATHERED)


def fsdp_root_stays_gathered() -> None:
    _trains_and_evaluates(lambda model: fully_shard(model, reshard_after_forward=False), GATHERED)


def fsdp_layers() -> None:
    _trains_and_evaluates(_shard_layers, HOOKED)


def fsdp_layers_bf16() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    _trains_and_evaluates(lambda model: _shard_layers(model, mp_policy=policy), HOOKED)


def _shard_layers(model: nn.Module, **kwargs) -> None:
    for layer in getattr(model, "vision_model", model).encoder.layers:
        fully_shard(layer, **kwargs)
    fully_shard(model, **kwargs)


def _trains_and_evaluates(shard: Callable[[nn.Module], object], reason: str) -> None:
    models = stock_and_fast()
    for model in models:
        shard(model)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    before = outputs(models[0])
    for seed in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model.train(), optimizer, seed)
            model.train(seed == 1)  # also evaluate in training mode
        expected, got = map(outputs, models)
        assert differ(expected, before), "the weights did not change, so nothing could be stale"
        before = expected
        assert all(map(torch.equal, got, expected))
        with torch.no_grad():
            assert reason in models[1].why_not(images(100))
    assert any(reason in message for message in LOGGED), LOGGED
    _assert_same_state(*models)


def _assert_same_state(stock: nn.Module, fast: nn.Module) -> None:
    for model in (stock, fast):
        model.reshard()
    assert list(get_model_state_dict(fast)) == list(get_model_state_dict(stock))
    states = [get_model_state_dict(model, options=FULL) for model in (stock, fast)]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


def edited_between_evals() -> None:
    """Weights loaded into the shards between two evaluations, at whatever level FSDP was applied."""
    # Freed and allocated again, gathered parameters may get their old addresses; here, to be sure, they keep them.
    _fully_shard._fsdp_param.free_storage = lambda tensor: None
    for inside in (False, True):
        stock, fast = stock_and_fast()
        root = nn.Sequential(fast) if inside else fast
        fully_shard(root)
        for _ in range(3):
            torch.testing.assert_close(outputs(root), outputs(stock), rtol=1e-4, atol=1e-4)
            state = {name: -value for name, value in stock.state_dict().items()}
            stock.load_state_dict(state)
            root.reshard()
            set_model_state_dict(fast, copy.deepcopy(state), options=FULL)


def checkpoint() -> None:
    """What a sharded stock model saved, a sharded drop-in loads, and the other way round."""
    for i, (source, target) in enumerate((stock_and_fast(), stock_and_fast()[::-1])):
        for model in (source, target):
            _shard_layers(model)
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.zero_()
        folder = FOLDER / f"checkpoint{i}"
        dcp.save(get_model_state_dict(source), checkpoint_id=folder)
        state = get_model_state_dict(target)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(target, state)
        _assert_same_state(source, target)
        assert all(map(torch.equal, outputs(target), outputs(source)))


class Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        LOGGED.append(record.getMessage())


LOGGED: list[str] = []

if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    logging.getLogger("siglip_fast").addHandler(Messages())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for case in sys.argv[2:]:
        globals()[case]()
        (FOLDER / f"{case}-{os.environ['RANK']}").touch()
    dist.destroy_process_group()
