"""What a user meets first: settings, bad input, the plan."""

import copy
import json

import pytest
import torch
from torch import nn

import galore_fx
from galore_fx.assembly.plan_parameters import projected_dim
from galore_fx.units import format_bytes, parse_bytes
from tests.models import adamw, batches, llama


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("16GB", 16 * 10**9), ("16 GiB", 2**34), ("1.5gb", 1_500_000_000), ("512MiB", 2**29), (12345, 12345), ("7B", 7)],
)
def test_budgets_people_write(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["16", "16 apples", "-1GB", "0GB", "nanGB", "", "GB", 0, -5, 1.5, True, None, "1e400GB"]
)
def test_budgets_that_are_none(text):
    with pytest.raises(galore_fx.SettingError, match="budget"):
        parse_bytes(text)


def test_bytes_are_printed_in_binary_units():
    assert [format_bytes(n) for n in (17, 2048, 3 * 2**30)] == ["17 B", "2.00 KiB", "3.00 GiB"]


BAD_SETTINGS = [
    ({"recipe": "galor"}, "unknown recipe 'galor'; available: auto, fira, full, galore, "),
    ({"rnak": 4}, "unknown override rnak=4; a recipe has rank"),
    ({"granularity": 4}, "projects the parts of a dimension with one random basis, and basis='subspace-iteration'"),
    ({"granularity": 0}, "granularity=0 must be an int of at least 1"),
    ({"lazy_threshold": 1.5}, "lazy_threshold=1.5 must be a number from 0 to 1"),
    ({"lazy_queue": 0}, "lazy_queue=0 must be an int of at least 1"),
    ({"lazy_statistic": "angle"}, "lazy_statistic='angle' is not one of overlap, first-vector"),
    ({"rank": 0}, "rank=0 must be at least 1"),
    ({"rank": -3}, "rank=-3 must be at least 1"),
    ({"rank": "many"}, "rank='many' is not a number"),
    ({"rank": 1.5}, "rank=1.5"),
    ({"rank": float("nan")}, "rank=nan"),
    ({"basis": "qr"}, "basis='qr' is not one of svd, subspace-iteration"),
    ({"project": "left"}, "project='left' is not one of shorter, input, output"),
    ({"refresh_gap": 0}, "refresh_gap=0 must be an int of at least 1"),
    ({"scale": float("inf")}, "scale=inf must be a finite number above 0"),
    ({"update": "now"}, "update='now' is not one of deferred, in-backward"),
    ({"update": "in-backward", "max_grad_norm": 1.0}, "needs all gradients at once"),
    ({"budget": "16 apples"}, "budget '16 apples' is not"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=[str(s) for s, _ in BAD_SETTINGS])
def test_bad_settings_name_the_value_and_change_nothing(settings, message):
    model = llama(1)
    before = _fingerprint(model)
    with pytest.raises(galore_fx.SettingError, match=message.replace("(", r"\(")):
        galore_fx.compile(model, optimizer=adamw(), **settings)
    assert _fingerprint(model) == before


def _fingerprint(model):
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    return attributes, hooks, {name: p.sum().item() for name, p in model.named_parameters()}


def _foreign():
    return torch.optim.AdamW(llama(1).parameters())


def _partial(model):
    return torch.optim.AdamW(list(model.parameters())[:-1])


def _used(model):
    optimizer = torch.optim.AdamW(model.parameters())
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: _foreign(), "are not trained parameters of this model"),
        (_partial, "1 trained parameters are not in the AdamW given .*lm_head.weight"),
        (_used, "has already stepped"),
        (lambda model: "adamw", "'adamw' is not a torch.optim class"),
        (lambda model: lambda params: torch.optim.AdamW(params), "is not a torch.optim class"),
        (lambda model: torch.optim.LBFGS, "LBFGS"),
        (lambda model: torch.optim.Adafactor, "Adafactor keeps 'row_var'"),
    ],
)
def test_wrong_optimizers_are_refused_and_change_nothing(make, message):
    model = llama(1)
    optimizer = make(model)
    before = _fingerprint(model)
    with pytest.raises(galore_fx.OptimizerError, match=message):
        galore_fx.compile(model, optimizer=optimizer)
    assert _fingerprint(model) == before


def test_an_adagrad_that_is_new_is_none_that_has_stepped():
    model = llama(1)
    galore_fx.compile(model, optimizer=torch.optim.Adagrad(model.parameters()))
    assert model.galore_fx.optimizer.records


def test_models_and_samples_that_cannot_be_compiled():
    with pytest.raises(galore_fx.ModelError, match="Embedding has no trainable linear layer"):
        galore_fx.compile(nn.Embedding(8, 8))
    with pytest.raises(galore_fx.ModelError, match="a str is not an nn.Module"):
        galore_fx.compile("llama")
    model = llama(1)
    before = _fingerprint(model)
    with pytest.raises(galore_fx.ModelError, match="does not accept the sample .*pixels"):
        galore_fx.compile(model, sample={"pixels": torch.zeros(1, 3)}, optimizer=adamw())
    assert _fingerprint(model) == before
    galore_fx.compile(model, sample={"input_ids": batches(1)[0]}, optimizer=adamw())
    with pytest.raises(galore_fx.ModelError, match="compiled already"):
        galore_fx.compile(model)


def test_the_plan_counts_what_the_optimizer_then_holds():
    model = llama(2)
    plan = galore_fx.plan(model, recipe="galore", rank=8, optimizer=adamw())
    galore_fx.compile(model, recipe="galore", rank=8, optimizer=adamw())
    states = model.galore_fx.optimizer.state.values()
    bases = sum(s["basis"].nbytes for s in states if "basis" in s)
    others = sum(v.nbytes for s in states for k, v in s.items() if k != "basis")
    assert plan.categories["bases"] == bases
    assert plan.categories["optimizer_state"] == others
    assert plan.categories["weights"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert plan == model.galore_fx.plan


def test_the_plan_goes_through_json():
    plan = galore_fx.plan(llama(1), "1GB", rank=8, optimizer=adamw())
    assert galore_fx.Plan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    assert data["peak_is"] == "lower bound" and data["fits"] is None
    with pytest.raises(galore_fx.SettingError, match="not a plan"):
        galore_fx.Plan.from_json('{"peak_bytes": 3}')


def test_the_table_names_what_is_not_counted():
    table = galore_fx.plan(llama(1), "1GB", optimizer=adamw()).table()
    for word in ("weights", "activations", "not counted", "budget", "7 of 12 parameters projected"):
        assert word in table


def test_a_budget_that_cannot_hold_what_is_kept_is_refused():
    model = llama(1)
    before = _fingerprint(model)
    with pytest.raises(galore_fx.BudgetError, match=r"100\.00 KiB cannot hold .*weights .*rank"):
        galore_fx.compile(model, 100 * 1024, optimizer=adamw())
    assert _fingerprint(model) == before


def test_recipe_full_projects_nothing_and_is_the_users_optimizer():
    model, reference = llama(1), llama(1)
    galore_fx.compile(model, recipe="full", optimizer=adamw(weight_decay=0.1))
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.1)
    for ids in batches(3):
        for each, optimizer in ((model, model.galore_fx.optimizer), (reference, plain)):
            each(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert model.galore_fx.stats()["projected"] == []
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert (p - q).norm() < 1e-5 * q.norm()


def test_the_rank_is_clamped_and_reported():
    model = llama(1)
    galore_fx.compile(model, rank=10_000, optimizer=adamw())
    assert set(model.galore_fx.stats()["rank"].values()) == {64}
    plan = galore_fx.plan(copy.deepcopy(llama(1)), rank=0.5, optimizer=adamw())
    assert {p.rank for p in plan.parameters if p.rank} == {32}


def test_frozen_and_tied_weights_are_left_to_what_they_are():
    model = llama(2, tie_word_embeddings=True)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    plan = galore_fx.plan(model, rank=8, optimizer=adamw())
    names = [p.name for p in plan.parameters]
    assert not any(name.startswith("model.layers.0") for name in names)
    assert sum(p.rank is not None for p in plan.parameters) == 7
    assert names.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in names


def test_which_dimension_shrinks():
    from galore_fx.passes.model_graph.find_regions import LinearWeight
    from galore_fx.recipes.presets import resolve_recipe

    def dim(shape, in_first, project):
        weight = LinearWeight("w", nn.Parameter(torch.zeros(shape)), in_first)
        return projected_dim(weight, resolve_recipe("galore", {"project": project})).value

    assert [dim(s, False, "shorter") for s in ((6, 4), (4, 6), (5, 5))] == ["cols", "rows", "cols"]
    assert (dim((6, 4), False, "input"), dim((6, 4), True, "input")) == ("cols", "rows")
    assert (dim((6, 4), False, "output"), dim((6, 4), True, "output")) == ("rows", "cols")
