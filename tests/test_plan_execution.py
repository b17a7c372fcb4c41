"""The plan is what runs: batches are held to it, it can be made late, saved, read and run again, and is checked."""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

import galore_fx
from galore_fx.plan_record import Plan
from galore_fx.planner import activation_search, budget_search, verify_peak
from galore_fx.planner.activation_search import largest_peak
from galore_fx.planner.batch_guard import PlannedBatch
from galore_fx.planner.verify_peak import counted_peak, kept_bytes
from galore_fx.runtime.measure import peak_watch
from tests.models import adamw, backward, batches, largest_error, llama, trainer

IDS = batches(1, 8, 48)[0]
SAMPLE = {"input_ids": IDS, "labels": IDS}
# Nothing left open, where what is chosen is not the subject: each choice is another lowering.
SETTLED = {"rank": 8, "update": "deferred", "activation_budget": 1.0, "optimizer": adamw()}
BATCHES = [{"input_ids": ids, "labels": ids} for ids in batches(4, 8, 48)]


def small(layers=1):
    return llama(layers, hidden=64)


def losses(model):
    found = []
    for batch in BATCHES:
        loss = model(**batch).loss
        loss.backward()
        model.galore_fx.optimizer.step()
        found.append(loss.item())
    return found


@pytest.fixture
def two_shares(monkeypatch):
    """Keep all or the least: what is chosen among is not the subject here, and each share is another lowering."""
    for module in (budget_search, activation_search):
        monkeypatch.setattr(module, "ACTIVATION_BUDGETS", (1.0, 0.0))


def test_a_larger_batch_than_planned_is_refused_and_a_smaller_one_trains():
    model = galore_fx.compile(small(1), "1GB", sample=SAMPLE, **SETTLED)
    smaller = IDS[:2, :16]
    model(input_ids=smaller, labels=smaller).loss.backward()
    longer = batches(1, 4, 49)[0]
    with pytest.raises(galore_fx.UsageError, match=r"input_ids of shape \(4, 49\) was \(8, 48\) in the sample"):
        model(input_ids=longer, labels=longer)
    with torch.no_grad():
        assert model(input_ids=longer).logits.shape[1] == 49, "evaluation is not held to it"


def test_an_argument_that_the_sample_has_not_is_refused_only_where_the_step_would_not_fit():
    """Trainer hands over the number of labels, a collator what it likes."""
    number, mask = torch.tensor(60), torch.ones_like(IDS)
    tight = galore_fx.plan(small(1), sample=SAMPLE, **SETTLED).peak_bytes
    model = galore_fx.compile(small(1), tight, sample=SAMPLE, **SETTLED)
    model(**SAMPLE, num_items_in_batch=number).loss.backward()
    told = r"attention_mask of shape \(8, 48\) was not in the sample .* with it a step takes .* Give galore_fx.compile"
    with pytest.raises(galore_fx.UsageError, match=told):
        model(**SAMPLE, attention_mask=mask)
    roomy = galore_fx.compile(small(1), "1GB", sample=SAMPLE, **SETTLED)
    roomy(**SAMPLE, num_items_in_batch=number, attention_mask=mask).loss.backward()
    exact = galore_fx.plan(small(1), sample={**SAMPLE, "attention_mask": mask}, **SETTLED).peak_bytes
    assert roomy.galore_fx.plan.peak_bytes == pytest.approx(exact, abs=64)


def test_a_new_argument_is_planned_at_the_size_of_the_sample(monkeypatch):
    """The first batch may be short: what is simulated is the largest one, and a longer one is not refused."""
    simulated = []
    plan = galore_fx.plan(small(1), "1GB", sample=SAMPLE, **SETTLED)

    def replan(args, kwargs):
        bound = inspect.signature(hf.LlamaForCausalLM.forward).bind(None, *args, **kwargs).arguments
        named = {**bound, **bound.get("kwargs", {})}
        simulated.append({name: tuple(v.shape) for name, v in named.items() if isinstance(v, torch.Tensor)})
        return plan

    planned = PlannedBatch(small(1), {"input_ids": (8, 48), "labels": (8, 48)}, replan)

    def call(batch, length, **more):
        ids = IDS[:batch, :length]
        planned((), {"input_ids": ids, "labels": ids, **{k: make(ids) for k, make in more.items()}})

    call(4, 20, attention_mask=torch.ones_like)
    assert simulated == [{name: (8, 48) for name in ("input_ids", "labels", "attention_mask")}]
    call(8, 48, attention_mask=torch.ones_like)
    call(8, 30)
    assert len(simulated) == 1
    call(8, 48, index=lambda ids: torch.arange(len(ids)), attention_mask=torch.ones_like)
    assert len(simulated) == 2 and simulated[1]["index"] == (8,)
    call(8, 48, index=lambda ids: torch.arange(100))  # grows without the batch: simulated again
    assert len(simulated) == 3 and simulated[2]["index"] == (100,)
    with pytest.raises(galore_fx.UsageError, match=r"input_ids of shape \(8, 48\) was \(8, 40\) in the sample"):
        PlannedBatch(small(1), {"input_ids": (8, 40)}, replan)((IDS,), {})


def test_the_trainer_trains_within_a_budget_and_a_sample(tmp_path):
    model = galore_fx.compile(small(1), "1GB", sample=SAMPLE, micro_batches=2, **{**SETTLED, "update": "deferred"})
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    trainer(model, tmp_path, batches(1, 32, 48)[0], max_steps=2, **settings).train()
    assert model.galore_fx.stats()["num_updates"] == 2


@pytest.mark.usefixtures("two_shares")
def test_without_a_sample_the_first_batch_is_planned_before_it_runs():
    model, loose = small(2), galore_fx.plan(small(2), sample=SAMPLE, optimizer=adamw(), rank=8)
    galore_fx.compile(model, int(0.85 * loose.peak_bytes), optimizer=adamw(), rank=8, update="deferred")
    assert model.galore_fx.plan.prediction is None
    model(input_ids=IDS, labels=IDS).loss.backward()
    plan = model.galore_fx.plan
    assert plan.fits and min(plan.activation_policy) < 1.0 and plan.recipe.rank == 8
    assert counted_peak(model, SAMPLE) == pytest.approx(plan.peak_bytes, abs=64)
    larger = batches(1, 8, 49)[0]
    with pytest.raises(galore_fx.UsageError, match="was .8, 48. in the sample"):
        model(input_ids=larger, labels=larger)


def test_the_first_batch_decides_how_many_blocks_refresh_at_once():
    wanted = {"recipe": "galore", "update": "deferred", "activation_budget": 1.0, "optimizer": adamw()}
    ids = batches(1, 3, 32)[0]
    sample = {"input_ids": ids, "labels": ids}
    make = functools.partial(llama, 3, hidden=64)
    peaks = [galore_fx.plan(make(), sample=sample, refresh_limit=limit, **wanted).peak_bytes for limit in (None, 1)]
    if peaks[0] == peaks[1]:
        pytest.fail("the refresh is not the highest moment")
    model = galore_fx.compile(make(), peaks[1], **wanted)
    for _ in range(2):
        backward(model, ids)
        model.galore_fx.optimizer.step()
    assert model.galore_fx.plan.recipe.refresh_limit == 1
    assert model.galore_fx.stats()["num_refreshes"] == 2 * 7, "one block of three in each update"


def test_a_first_batch_that_does_not_fit_is_refused_before_it_runs():
    model = small()
    galore_fx.compile(model, "2MB", optimizer=adamw(), rank=8, update="deferred", state_bits=32, activation_budget=1.0)
    with pytest.raises(galore_fx.BudgetError, match="would fit: a budget of .*; batch . instead of 8"):
        model(input_ids=IDS, labels=IDS)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("two_shares")
def test_a_budget_is_met_without_loss_and_a_plan_read_from_json_recreates_the_run():
    settings = {"optimizer": adamw(), "rank": 8}
    loose = galore_fx.plan(small(2), sample=SAMPLE, **settings)
    budget = int(0.8 * loose.peak_bytes)
    planned = galore_fx.compile(small(2), budget, sample=SAMPLE, strict=True, **settings)
    plan = planned.galore_fx.plan
    assert plan.fits and plan.peak_bytes <= budget and min(plan.activation_policy) < 1.0
    assert any("recomputed" in words for words in plan.chosen)
    again = galore_fx.compile(small(2), plan=galore_fx.Plan.from_json(plan.to_json()), optimizer=adamw())
    plain = galore_fx.compile(small(2), strict=True, **settings)
    assert again.galore_fx.plan == plan
    assert losses(again) == losses(planned)
    losses(plain)
    assert largest_error(planned, plain) < 1e-6, "neither recomputation nor the update mode changes a number"
    # The first model that trains in a process has been seen to hold seven numbers longer.
    assert counted_peak(again, SAMPLE) == pytest.approx(plan.peak_bytes, abs=64)


def test_a_plan_for_something_else_is_refused():
    plan = galore_fx.plan(small(), optimizer=adamw())
    with pytest.raises(galore_fx.ModelError, match="made for other blocks: 1 in the plan, 2 in this model"):
        galore_fx.compile(small(2), plan=plan, optimizer=adamw())
    with pytest.raises(galore_fx.ModelError, match="made for other optimizer: AdamW in the plan, SGD"):
        galore_fx.compile(small(), plan=plan, optimizer=torch.optim.SGD)
    with pytest.raises(galore_fx.SettingError, match="budget, overrides cannot be given beside it"):
        galore_fx.compile(small(), "1GB", plan=plan, rank=4)


def test_a_plan_for_another_device_is_run_with_a_warning():
    ids = torch.zeros((1, 8), dtype=torch.long)
    plan = galore_fx.plan(llama(1), sample={"input_ids": ids, "labels": ids}, optimizer=adamw(), device="cuda")
    assert plan.device == "cuda" and Plan.from_json(plan.to_json()) == plan
    with pytest.warns(UserWarning, match="made for cuda and the model is on cpu"):
        galore_fx.compile(llama(1), optimizer=adamw(), plan=plan)


def test_auto_takes_what_the_device_has():
    plan = galore_fx.plan(small(), "auto", sample=SAMPLE, optimizer=adamw())
    assert 10**8 < plan.budget_bytes < 10**13 and plan.fits
    with torch.device("meta"):
        model = small()
    with pytest.raises(galore_fx.SettingError, match="asks the model's device, which is meta"):
        galore_fx.plan(model, "auto", optimizer=adamw())


def test_a_reserve_is_kept_free():
    plan = galore_fx.plan(small(), "1GB", sample=SAMPLE, **SETTLED, reserve="10MB")
    assert plan.fits and plan.reserve_bytes == 10**7
    assert plan.peak_bytes == plan.prediction.peak_bytes + 10**7 and plan.categories["reserve"] == 10**7
    assert largest_peak(10**9, "cpu", 10**7) == largest_peak(10**9, "cuda", 10**7) == 10**9 - 10**7
    assert largest_peak(10**9, "cpu", None) == 10**9 and largest_peak(10**9, "cuda", None) < 4 * 10**8
    with pytest.raises(galore_fx.SettingError, match="reserve 'much'"):
        galore_fx.plan(small(), "1GB", sample=SAMPLE, **SETTLED, reserve="much")


def test_enforcing_needs_a_gpu_and_says_so():
    with pytest.raises(galore_fx.SettingError, match="enforce=True needs a model on a CUDA device"):
        galore_fx.compile(small(), "1GB", optimizer=adamw(), enforce=True)
    with pytest.raises(galore_fx.SettingError, match="enforce=True needs a budget"):
        galore_fx.compile(small(), optimizer=adamw(), enforce=True)


class _Told:
    """A meter that says what it is told."""

    def __init__(self, num_bytes):
        self.num_bytes = num_bytes

    def start(self):
        pass

    def stop(self):
        return self.num_bytes


@pytest.mark.parametrize("excess", [0, 10**6])
def test_a_step_that_exceeds_its_plan_is_warned_of_with_the_category(excess, recwarn):
    model = galore_fx.compile(small(), "1GB", sample=SAMPLE, **SETTLED)
    prediction = model.galore_fx.plan.prediction
    kept = kept_bytes(model, model.galore_fx.optimizer)
    assert all(kept[name] == prediction.kept[name] for name in kept)
    watch = peak_watch.PeakWatch(
        _Told(prediction.peak_bytes + excess),
        prediction.peak_bytes,
        kept,
        lambda: {**kept, "bases": kept["bases"] + 640},
        0.01,
    )
    model.forward.check._watch = watch
    model.galore_fx.optimizer.register_step_post_hook(lambda *_: watch.step_ends())
    losses(model)
    found = [str(w.message) for w in recwarn if "was planned for" in str(w.message)]
    assert watch.measured_bytes == prediction.peak_bytes + excess
    assert len(found) == (excess > 0)
    if excess:
        assert "bases +640, activations, loss, workspace or other tensors +999360" in found[0]


def test_the_peak_is_watched_on_a_gpu_only():
    model = galore_fx.compile(small(), "1GB", sample=SAMPLE, **SETTLED)
    assert verify_peak.watch_peak(model, model.galore_fx.optimizer, model.galore_fx.plan) is None


_PLAN_AND_TRAIN = """
import json, sys
from tests.test_plan_execution import SAMPLE, adamw, counted_peak, galore_fx, losses, small
settings = {"rank": 8, "update": "deferred", "activation_budget": 0.2}
model = galore_fx.compile(small(), "1GB", sample=SAMPLE, optimizer=adamw(), **settings)
plan = model.galore_fx.plan
trained = losses(model)
counted = [counted_peak(model, SAMPLE)] if sys.argv[1:] else []
print(json.dumps([plan.activation_policy, plan.peak_bytes, trained, *counted]))
"""


def test_a_second_process_plans_and_trains_the_same_from_one_compile_cache(tmp_path):
    """What the first has compiled is found by the second: neither may be given the other's kernels or none."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", _PLAN_AND_TRAIN]
    runs = [
        subprocess.run([*command, *more], env=environment, cwd=root, capture_output=True, text=True, check=True)
        for more in ([], ["and count"])
    ]
    first, second = (json.loads(run.stdout) for run in runs)
    assert first == second[:3] and first[0] == [0.2]
    assert second[3] == pytest.approx(second[1], abs=64)
