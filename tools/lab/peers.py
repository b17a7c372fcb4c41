"""Runs ``tools/train.py``'s job with peers on the same model and tokens: LoRA (peft) and the released galore-torch.

    python -m tools.lab.peers lora --lr 5e-3 --steps 600            pip install -e '.[peers]'
    python -m tools.lab.peers galore_torch --lr 2e-3 --steps 600    pip install -e '.[dev]'

The arguments after the peer are the same as for ``tools/train.py``; rank, gap and scale are the recipes' defaults. LoRA
has adapters of rank 16 on all linear layers of the blocks. Its embedding and head are trained in full, as a model with
random weights needs.
"""

import functools
import sys
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from galore_fx.cli import train
from galore_fx.cli.user_input import InputError, run_command
from galore_fx.passes.model_graph.find_regions import find_regions
from galore_fx.runtime.measure.meter import count_memory, tensor_bytes

RANK, GAP, SCALE = 0.25, 200, 0.25
LORA_RANK = 16


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Trains; returns held-out and training loss in nats per token, and the counted peak in bytes.

    Raises:
        InputError: the first argument is not a peer.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    peer = given.pop(0) if given else ""
    if peer not in PEERS:
        raise InputError(f"{peer!r} is no peer; there are {', '.join(PEERS)}")
    arguments = train.parse_arguments(given)
    torch.manual_seed(arguments.seed)
    model, sequences, _ = train.model_and_text(arguments)
    model, optimizer = PEERS[peer](model.train(), arguments.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(train.schedule, steps=arguments.steps))
    loss = torch.tensor(0.0)

    def step(number: int) -> None:
        nonlocal loss
        ids = sequences.batch(number, arguments.batch, arguments.seed)
        out = model(input_ids=ids, labels=ids).loss
        out.backward()
        loss = out.detach()
        optimizer.step()
        optimizer.zero_grad()

    transient = 0
    bar = tqdm(range(arguments.steps), desc=peer, unit="step", disable=None)
    for number in bar:
        if number in (0, train.COUNTED_STEP):  # a refreshing and a steady step
            counted = count_memory(functools.partial(step, number), torch.device("cpu"))
            transient = max(transient, counted.transient_peak_bytes)
        else:
            step(number)
        scheduler.step()
        bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
    kept = tensor_bytes([*model.parameters(), *model.buffers(), *_states(optimizer)])
    held_out = train.evaluate(model, sequences.held_out, arguments.batch, torch.device("cpu"))
    print(f"held-out loss {held_out:.3f} nats/token")
    return {"held_out_loss": held_out, "train_loss": float(loss), "counted_peak_bytes": kept + transient}


def _lora(model: Any, lr: float) -> tuple[Any, torch.optim.Optimizer]:
    from peft import LoraConfig, get_peft_model

    names = sorted({w.name.split(".")[-2] for region in find_regions(model) for w in region.weights})
    outside = [p for p in model.parameters() if not any(p is w.weight for r in find_regions(model) for w in r.weights)]
    model = get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=names))
    for parameter in outside:
        parameter.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)


def _galore_torch(model: nn.Module, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    from galore_torch import GaLoreAdamW

    projected = [w.weight for region in find_regions(model) for w in region.weights]
    others = [p for p in model.parameters() if not any(p is q for q in projected)]
    rank = round(RANK * min(projected[0].shape))
    group = {"params": projected, "rank": rank, "update_proj_gap": GAP, "scale": SCALE, "proj_type": "std"}
    return model, GaLoreAdamW([{"params": others}, group], lr=lr, weight_decay=0.0, no_deprecation_warning=True)


def _states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Returns the state tensors of either peer: moments, and the basis inside galore_torch's projector."""
    found = []
    for state in optimizer.state.values():
        values = [*state.values(), getattr(state.get("projector"), "ortho_matrix", None)]
        found += [value for value in values if isinstance(value, torch.Tensor)]
    return found


PEERS = {"lora": _lora, "galore_torch": _galore_torch}


if __name__ == "__main__":
    run_command("peers", main)
