"""What a short model cannot stand for is played whole; odd models and calls are planned or refused in words."""

import functools

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

import galore_fx
from galore_fx.assembly.request import Request
from galore_fx.planner.activation_search import deciding
from galore_fx.planner.verify_peak import counted_peak
from galore_fx.simulation.simulator import StepSimulator
from tests.calls import Blocks
from tests.models import adamw

X = torch.ones(32, 24)


class Residual(nn.Module):
    def __init__(self, power=1):
        super().__init__()
        self.first, self.second, self.power = nn.Linear(24, 40), nn.Linear(40, 24), (power,)

    def forward(self, x):
        hidden = self.first(x).relu()
        return x + self.second(hidden ** self.power[0])


class Chain(Blocks):
    """Blocks one after the other, with nothing between them."""

    def __init__(self, block=Residual, count=6, call=lambda block, x: block(x)):
        super().__init__(block, count, call)

    def forward(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return x.square().mean()


class ByPlace(Chain):
    def forward(self, x):
        for i in range(6):
            x = self.blocks[i](x)
        return x.square().mean()


class Between(Chain):
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x.cos()).sin()
        return x.square().mean()


class Mixed(Chain):
    def __init__(self):
        super().__init__()
        for index, block in enumerate(self.blocks):
            block.power = (3 if index in (2, 3) else 1,)


def reentrant():
    return Chain(call=lambda block, x: checkpoint(block, x, use_reentrant=True))


@pytest.mark.parametrize(
    ("make", "is_short"),
    [(Chain, True), (ByPlace, False), (Between, False), (Mixed, True), (reentrant, False)],
    ids=["plain", "by place", "between", "mixed", "reentrant"],
)
def test_a_short_model_is_played_where_it_can_stand_for_the_whole(make, is_short):
    request = Request(optimizer=adamw()(make().parameters()), overrides={"rank": 4})
    x = (X.clone().requires_grad_(),)
    peaks = []
    for short in (True, False):
        simulator = StepSimulator(make(), x, keep_logits=False, micro_batches=1, device="cpu")
        model = simulator.train(deciding(request), short=short).model([1.0])
        peaks.append(model.prediction((0,) * 6, ()).phases)
        if short:
            assert simulator.is_additive == is_short
    assert peaks[0] == peaks[1]


def test_a_head_that_compiles_again_in_the_second_step_is_predicted_to_the_byte():
    def make():
        config = hf.BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        torch.manual_seed(0)
        return hf.BertForSequenceClassification(config).train()

    sample = {"input_ids": torch.full((4, 64), 7), "labels": torch.zeros(4, dtype=torch.long)}
    plan = galore_fx.plan(make(), sample=sample, rank=4, optimizer=adamw())
    model = galore_fx.compile(make(), strict=True, rank=4, optimizer=adamw())
    assert counted_peak(model, sample) == plan.peak_bytes


def test_a_first_batch_is_known_by_the_names_of_its_arguments():
    model = galore_fx.compile(Chain(count=1), "1GB", optimizer=adamw(), rank=4)
    model(X).backward()
    assert model.galore_fx.plan.batch == {"x": (32, 24)}
    model.galore_fx.optimizer.step()
    model(x=X[:8]).backward()
    with pytest.raises(galore_fx.UsageError, match="x of shape .33, 24. was .32, 24. in the sample"):
        model(torch.ones(33, 24))


def test_where_a_second_dimension_is_no_sequence_only_the_batch_is_offered():
    model = Chain(count=1)
    kept = galore_fx.plan(model, optimizer=adamw(), rank=4).peak_bytes
    plan = galore_fx.plan(model, 6 * kept, sample=(torch.ones(300, 24),), optimizer=adamw(), rank=4)
    assert plan.fits is False
    assert [words.split()[0] for words in plan.nearest] == ["a", "batch"]


class TwoOutputs(Chain):
    def forward(self, x):
        return x.detach(), {"loss": super().forward(x)}


@pytest.mark.parametrize("make", [TwoOutputs, Chain], ids=["in a dict in a tuple", "itself"])
def test_the_loss_is_found_in_the_output(make):
    plan = galore_fx.plan(make(count=1), sample=(X,), optimizer=adamw(), rank=4)
    assert plan.phases["backward"] > plan.phases["load"] and plan.prediction.seconds["backward"] > 0


def test_an_output_without_a_loss_is_said():
    class Nothing(Chain):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(galore_fx.ModelError, match="no tensor that a backward could start from"):
        galore_fx.plan(Nothing(count=1), sample=(X,), optimizer=adamw(), rank=4)


def test_planning_leaves_what_a_forward_keeps_alone():
    class Caching(Chain):
        kept = None

        def forward(self, x):
            self.kept = x + 1
            return super().forward(self.kept)

    model = Caching(count=1)
    galore_fx.plan(model, sample=(X,), optimizer=adamw(), rank=4)
    assert model.kept is None


def test_a_plan_counts_the_states_of_the_optimizer_that_it_was_made_for():
    plan = galore_fx.plan(Chain(count=1), optimizer=torch.optim.SGD, rank=4)
    with pytest.raises(galore_fx.ModelError, match="made for other parameters"):
        galore_fx.compile(Chain(count=1), plan=plan, optimizer=functools.partial(torch.optim.SGD, momentum=0.9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"micro_batches": 0}, "micro_batches=0 must be an int of at least 1"),
        ({"micro_batches": 2, "update": "in-backward"}, "micro_batches=2 accumulate gradients"),
        ({"reserve": "abc"}, "reserve 'abc'"),
    ],
)
def test_bad_settings_are_refused_before_the_model_changes(settings, message):
    model = Chain(count=1)
    with pytest.raises(galore_fx.SettingError, match=message):
        galore_fx.compile(model, "1GB", optimizer=adamw(), **settings)
    assert "forward" not in vars(model.blocks[0])
