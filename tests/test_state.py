"""State is tensors and numbers; a resumed run is bit-identical to one that never stopped."""

import copy
import io

import pytest
import torch

import galore_fx
from tests.models import adamw, backward, batches, largest_error, llama

pytestmark = pytest.mark.usefixtures("without_kernels")


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _train(model, scheduler, ids):
    for batch in ids:
        backward(model, batch)
        model.galore_fx.optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("galore", torch.bfloat16), pytest.param("auto", torch.float32, marks=pytest.mark.kernels)]
)
def test_resume_in_the_middle_of_a_refresh_interval_is_bit_identical(recipe, dtype):
    def make():
        model = galore_fx.compile(
            llama(2).to(dtype), recipe=recipe, rank=8, refresh_gap=4, optimizer=adamw(weight_decay=0.1)
        )
        return model, torch.optim.lr_scheduler.StepLR(model.galore_fx.optimizer, 2, 0.5)

    ids = batches(10)
    straight, scheduler = make()
    _train(straight, scheduler, ids)

    stopped, scheduler = make()
    _train(stopped, scheduler, ids[:6])
    saved = _through_a_file([stopped.state_dict(), stopped.galore_fx.optimizer.state_dict(), scheduler.state_dict()])
    resumed, scheduler = make()
    resumed.load_state_dict(saved[0])
    resumed.galore_fx.optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    assert all(
        value.dtype == (torch.float32 if value.ndim == 0 else dtype)
        for state in resumed.galore_fx.optimizer.state.values()
        for value in state.values()
    )
    _train(resumed, scheduler, ids[6:])
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert straight.galore_fx.stats()["num_refreshes"] == resumed.galore_fx.stats()["num_refreshes"]


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model = galore_fx.compile(llama(1), rank=8, optimizer=adamw())
    other = galore_fx.compile(llama(1), rank=4, optimizer=adamw())
    backward(other, batches(1)[0])
    other.galore_fx.optimizer.step()
    before = copy.deepcopy(model.galore_fx.optimizer.state_dict())
    with pytest.raises(galore_fx.OptimizerError, match="does not fit"):
        model.galore_fx.optimizer.load_state_dict(other.galore_fx.optimizer.state_dict())
    with pytest.raises(galore_fx.OptimizerError, match="not saved by galore_fx"):
        plain = torch.optim.AdamW(llama(1).parameters())
        model.galore_fx.optimizer.load_state_dict(plain.state_dict())
    after = model.galore_fx.optimizer.state_dict()
    assert before["galore_fx"] == after["galore_fx"]
    for i, state in before["state"].items():
        assert all(torch.equal(value, after["state"][i][name]) for name, value in state.items())


def test_the_weights_are_plain_transformers_weights(tmp_path):
    model = galore_fx.compile(llama(1), rank=8, optimizer=adamw())
    backward(model, batches(1)[0])
    model.galore_fx.optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert largest_error(loaded, model) == 0.0


def test_a_schedulers_learning_rate_is_live_and_retraces_nothing():
    model = galore_fx.compile(llama(1), rank=8, optimizer=adamw(lr=1e-2))
    optimizer = model.galore_fx.optimizer
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    ids = batches(1)[0]
    for _ in range(3):
        backward(model, ids)
        optimizer.step()
        scheduler.step()
    traces = model.galore_fx.stats()["num_update_graphs"]
    assert traces == 2, "one for projected parameters, one for the others"
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    backward(model, ids)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.galore_fx.stats()["num_update_graphs"] == traces


def test_the_users_own_instance_refuses_to_step_and_shares_its_groups():
    model = llama(1)
    instance = torch.optim.AdamW(model.parameters(), lr=1e-3)
    galore_fx.compile(model, rank=8, optimizer=instance)
    with pytest.raises(galore_fx.UsageError, match="model.galore_fx.optimizer"):
        instance.step()
    instance.param_groups[0]["lr"] = 0.5
    assert model.galore_fx.optimizer.param_groups[0]["lr"] == 0.5
