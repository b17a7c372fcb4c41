"""What would train a compiled model wrongly in silence is refused, or named."""

import functools
import gc
import weakref

import pytest
import torch

import galore_fx
from tests.models import adamw, backward, batches, largest_error, llama, train

pytestmark = pytest.mark.usefixtures("without_kernels")


def compiled(**settings):
    return galore_fx.compile(llama(1), optimizer=adamw(), rank=8, **settings)


def test_another_optimizer_over_projected_weights_is_refused_and_one_over_others_is_not():
    model, other = compiled(), llama(1)
    stranger = torch.optim.AdamW(model.parameters())
    backward(model, batches(1)[0])
    with pytest.raises(galore_fx.UsageError, match=r"this AdamW would not train .*q_proj.weight.*optimizers=\("):
        stranger.step()
    torch.optim.SGD([model.lm_head.weight], lr=0.1).step()
    backward(other, batches(1)[0])
    torch.optim.AdamW(other.parameters()).step()
    model.galore_fx.optimizer.step()


def test_a_scaler_is_refused():
    model, scaler = compiled(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    ids = batches(1)[0]
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    with pytest.raises(galore_fx.UsageError, match="GradScaler unscales the gradients of parameters"):
        scaler.step(model.galore_fx.optimizer)
    model.zero_grad()
    train(model, batches(1))


def test_a_scaler_over_a_model_at_full_rank_is_torchs():
    def run(model, optimizer):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for ids in batches(2):
            scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()

    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    model, plain = galore_fx.compile(llama(1), optimizer=sgd, recipe="full"), llama(1)
    run(model, model.galore_fx.optimizer)
    run(plain, sgd(plain.parameters()))
    assert largest_error(model, plain) < 1e-5


def test_an_optimizer_that_wraps_ours_is_let_through():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            super().__init__(optimizer.param_groups, {})

        def step(self, closure=None):
            self.optimizer.step()

    model = compiled()
    backward(model, batches(1)[0])
    Lookahead(model.galore_fx.optimizer).step()
    assert model.galore_fx.stats()["num_updates"] == 1


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation, arXiv:2010.01412, as it is commonly written."""

    def __init__(self, base):
        self.base_optimizer = base
        super().__init__(base.param_groups, {"rho": 0.05})

    def _with_gradient(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self):
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._with_gradient()])
        self.moved = [(p, p.grad * (0.05 / norm)) for p in self._with_gradient()]
        for p, step in self.moved:
            p.add_(step)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p, step in self.moved:
            p.sub_(step)
        self.base_optimizer.step()

    def step(self, closure=None):
        self.second_step()


def test_a_wrapper_that_moves_weights_along_their_gradients_is_refused():
    model = compiled()
    backward(model, batches(1)[0])
    with pytest.raises(galore_fx.UsageError, match=r"this SAM moves weights along their \.grad.*recipe='full'"):
        SAM(model.galore_fx.optimizer).step()


def test_weights_that_someone_moves_without_the_projected_ones_are_named():
    model, ids = compiled(), batches(2)
    train(model, ids[:1])
    sam = SAM(model.galore_fx.optimizer)
    backward(model, ids[1])
    sam.first_step()
    backward(model, ids[1])
    with pytest.warns(UserWarning, match=r"all 5 parameters at full rank were changed .* none of the 7 projected"):
        sam.second_step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, ids)
    model.load_state_dict(state)  # all of them: nothing to say
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)  # one of them: somebody's own business
    train(model, ids)


def test_sam_over_a_model_at_full_rank_is_torchs():
    def run(model, optimizer):
        for ids in batches(2):
            sam = SAM(optimizer)
            backward(model, ids)
            sam.first_step()
            backward(model, ids)
            sam.second_step()
            model.zero_grad()

    sgd, _projected = functools.partial(torch.optim.SGD, lr=0.1), compiled()
    model, plain = galore_fx.compile(llama(1), optimizer=sgd, recipe="full"), llama(1)
    run(model, model.galore_fx.optimizer)
    run(plain, sgd(plain.parameters()))
    assert largest_error(model, plain) < 1e-5


def test_an_optimizer_that_is_kept_keeps_no_model():
    model = compiled()
    train(model, batches(1))
    optimizer, alive = model.galore_fx.optimizer, weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    assert optimizer.param_groups


@pytest.mark.parametrize("settings", [{}, {"weight_bits": 8}], ids=["plain", "8 bits"])
def test_a_compiled_model_stays_where_it_is(settings):
    model = compiled(**settings)
    assert model.to("cpu") is model and model.to(torch.float32) is model and model.cpu() is model
    train(model, batches(1))
    if not settings:
        assert all(p.is_shared() for p in model.share_memory().parameters())
    for move in (lambda: model.to(torch.bfloat16), model.half, lambda: model.to_empty(device="cpu")):
        with pytest.raises(galore_fx.UsageError, match=r"cannot become .* Move and cast it before galore_fx.compile"):
            move()
    train(model, batches(1))


def test_training_in_eval_mode_is_named_once_and_evaluation_is_not():
    model, ids = compiled(), batches(1)[0]
    model.eval()(input_ids=ids)
    train(model.train(), [ids])
    model.eval()(input_ids=ids)
    backward(model.train(), ids)
    model.eval().galore_fx.optimizer.step()  # evaluated between backward and step
    backward(model, ids)
    with pytest.warns(UserWarning, match=r"is trained in eval mode.*Call model.train\(\)"):
        model.galore_fx.optimizer.step()
    train(model, [ids])


def test_inputs_of_a_backward_that_leave_the_projected_gradients_out_are_named():
    model, ids = compiled(), batches(1)[0]
    model(input_ids=ids, labels=ids).loss.backward(inputs=list(model.parameters()))
    with pytest.warns(UserWarning, match=r"no projected weight got a gradient.*leave inputs out"):
        model.galore_fx.optimizer.step()


def test_the_instance_that_was_given_takes_no_more_groups():
    model = llama(1)
    head = model.lm_head.weight
    instance = torch.optim.AdamW([p for p in model.parameters() if p is not head])
    head.requires_grad_(False)
    galore_fx.compile(model, optimizer=instance)
    with pytest.raises(galore_fx.UsageError, match="add all groups before galore_fx.compile"):
        instance.add_param_group({"params": [head]})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: galore_fx.plan(m, device="tpu"), "SettingError", "device='tpu' is not 'cpu' or 'cuda'"),
        (lambda m: galore_fx.compile(m, plan="{}"), "SettingError", "plan='{}' is a str; galore_fx.plan makes plans"),
        (lambda m: galore_fx.compile(m, recipe=["galore"]), "SettingError", r"unknown recipe \['galore'\]"),
        (lambda m: galore_fx.compile(m, "16 gigs"), "SettingError", "or auto for what the device has"),
        (lambda m: galore_fx.compile(m.requires_grad_(False)), "ModelError", "no parameter .* has requires_grad=True"),
        (
            lambda m: galore_fx.compile(m, optimizer=functools.partial(torch.optim.AdamW, differentiable=True)),
            "OptimizerError",
            "differentiable=True keeps a graph",
        ),
    ],
)
def test_values_that_are_none(call, error, message):
    with pytest.raises(getattr(galore_fx, error), match=message):
        call(llama(1))


def test_an_edited_plan_is_refused_when_it_is_read():
    text = galore_fx.plan(llama(1)).to_json()
    for old, new in (('"rank"', '"ranc"'), ('"activation_policy": [', '"activation_policy": [0.5, ')):
        assert old in text
        with pytest.raises(galore_fx.SettingError, match="not a plan that galore_fx wrote"):
            galore_fx.Plan.from_json(text.replace(old, new, 1))
