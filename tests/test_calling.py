"""Ways of calling a model, each compared with the plain model: its loss, every gradient, and no full one."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

import galore_fx
from galore_fx.passes.model_graph.linear_cross_entropy import linear_cross_entropy
from galore_fx.runtime.meter import count_memory
from tests.models import adamw, assert_gradients_equal, backward, batches, llama


def pair(plain, **settings):
    """A compiled model and a plain one with equal weights."""
    reference = copy.deepcopy(plain)
    settings = {"rank": 4, "refresh_gap": 100, "optimizer": adamw(), "strict": True, **settings}
    return galore_fx.compile(plain, **settings), reference


def assert_same(model, reference, call, tolerance=1e-4):
    """Runs both once, forward and backward, and compares."""
    losses = []
    for each in (model, reference):
        torch.manual_seed(7)
        loss = call(each)
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert_gradients_equal(model, reference, tolerance)


def step_both(model, reference):
    """One update, after which the plain model goes on from the compiled one's weights."""
    model.galore_fx.optimizer.step()
    reference.load_state_dict(model.state_dict())
    reference.zero_grad()


def causal(ids, **settings):
    return lambda model: model(input_ids=ids, labels=ids, **settings).loss


def enable_checkpointing(model):
    """transformers' switch, by its newer name where it has one."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("update", ["deferred", "in-backward"])
def test_transformers_gradient_checkpointing(update):
    plain = llama(2)
    enable_checkpointing(plain)
    model, reference = pair(plain, update=update)
    ids = batches(2)
    if update == "deferred":
        for each in ids:
            assert_same(model, reference, causal(each))
            step_both(model, reference)
    else:
        deferred = galore_fx.compile(copy.deepcopy(reference), rank=4, refresh_gap=100, optimizer=adamw())
        for each in ids:
            for trained in (model, deferred):
                backward(trained, each)
                trained.galore_fx.optimizer.step()
        for p, q in zip(model.parameters(), deferred.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert model.galore_fx.stats()["num_region_graphs"] == 1


def test_gradient_checkpointing_keeps_less():
    ids = batches(1, 8, 64)[0]
    kept = []
    for checkpointing in (False, True):
        plain = llama(2, hidden=32)
        if checkpointing:
            enable_checkpointing(plain)
        model = galore_fx.compile(plain, rank=4, optimizer=adamw())
        for _ in range(3):
            backward(model, ids)
            model.galore_fx.optimizer.step()
        kept.append(_bytes_kept_by_a_forward(model, ids))
    assert kept[1] < 0.5 * kept[0]


def _bytes_kept_by_a_forward(model, ids):
    losses = []  # what was saved lives as long as the loss
    return count_memory(lambda: losses.append(causal(ids)(model)), torch.device("cpu")).kept_bytes


class Blocks(nn.Module):
    """Linear blocks that the user checkpoints, shares, breaks or skips as a test needs."""

    def __init__(self, block=None, count=2, call=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        make = block or (lambda: nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24)))
        self.blocks = nn.ModuleList([make() for _ in range(count)])
        self.call = call

    def forward(self, x):
        for block in self.blocks:
            x = x + self.call(block, x)
        return x.square().mean()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpoints_around_blocks_by_the_user(use_reentrant):
    model, reference = pair(Blocks(call=lambda block, x: checkpoint(block, x, use_reentrant=use_reentrant)))
    for x in torch.randn(2, 6, 24):
        assert_same(model, reference, lambda each, x=x: each(x.requires_grad_()))
        step_both(model, reference)


def test_use_cache_is_ignored_in_training_and_said():
    model, reference = pair(llama(2))
    ids = batches(1)[0]
    with pytest.warns(UserWarning, match="use_cache=True is ignored in training"):
        assert_same(model, reference, causal(ids, use_cache=True))
    assert model(input_ids=ids, labels=ids).past_key_values is None


def test_changing_lengths_and_refreshes():
    model, reference = pair(llama(1), refresh_gap=3)
    lengths = (16, 24, 40, 9, 24, 33, 16)
    for length in lengths:
        assert_same(model, reference, causal(batches(1, 2, length, seed=length)[0]))
        step_both(model, reference)
    stats = model.galore_fx.stats()
    assert stats["num_region_graphs"] <= 2, "one for the first length, one for all others"
    assert stats["num_refreshes"] > 14


def test_autocast_to_bfloat16():
    model, reference = pair(llama(1))
    ids = batches(1)[0]

    def call(each):
        with torch.autocast("cpu", torch.bfloat16):
            return causal(ids)(each)

    assert_same(model, reference, call, tolerance=2e-2)
    assert all(record.leaf.grad.dtype is torch.float32 for record in model.galore_fx.optimizer.records)
    # Without autocast the same model runs in float32 again, and not in the form compiled under autocast.
    model.zero_grad(), reference.zero_grad()
    assert_same(model, reference, causal(ids), tolerance=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_draws_what_the_plain_model_draws(checkpointing):
    call = (
        (lambda block, x: checkpoint(block, x, use_reentrant=False)) if checkpointing else (lambda block, x: block(x))
    )
    block = lambda: nn.Sequential(nn.Linear(24, 40), nn.Dropout(0.3), nn.Linear(40, 24))  # noqa: E731
    model, reference = pair(Blocks(block, call=call))
    with inductor_config.patch(fallback_random=True):
        assert_same(model, reference, lambda each: each(torch.ones(6, 24)))


def test_tied_weights():
    class Tied(Blocks):
        def __init__(self):
            super().__init__()
            self.blocks[1][2].weight = self.blocks[0][2].weight

    model, reference = pair(Tied())
    assert len(model.galore_fx.stats()["projected"]) == 3
    for x in torch.randn(2, 6, 24):
        assert_same(model, reference, lambda each, x=x: each(x))
        step_both(model, reference)
    tied, plain = pair(llama(1, tie_word_embeddings=True))
    assert_same(tied, plain, causal(batches(1)[0]))


def test_frozen_parameters_get_nothing_and_stay():
    plain = llama(3)
    plain.model.embed_tokens.requires_grad_(False)
    plain.model.layers[0].requires_grad_(False)
    plain.model.layers[1].mlp.requires_grad_(False)
    before = {name: p.clone() for name, p in plain.named_parameters() if not p.requires_grad}
    model, reference = pair(plain)
    assert len(model.galore_fx.stats()["projected"]) == 4 + 7
    for ids in batches(2):
        assert_same(model, reference, causal(ids))
        step_both(model, reference)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_a_block_used_twice_in_one_forward():
    model, reference = pair(Blocks(count=1, call=lambda block, x: block(block(x))))
    assert_same(model, reference, lambda each: each(torch.ones(6, 24)))


@pytest.mark.parametrize("shape", [(6, 24), (2, 3, 24), (24,)], ids=["2-D", "3-D", "1-D"])
def test_inputs_of_any_rank(shape):
    model, reference = pair(Blocks(count=1))
    assert_same(model, reference, lambda each: each(torch.linspace(-1, 1, 24).expand(shape)))


def test_a_model_without_repeated_blocks():
    torch.manual_seed(0)
    model, reference = pair(nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)).train())
    assert_same(model, reference, lambda each: each(torch.ones(3, 24)).square().mean())


def test_two_compiled_models_take_turns():
    first, second = pair(llama(2)), pair(llama(2), rank=8, update="deferred")
    for ids in batches(2):
        for model, reference in (first, second):
            assert_same(model, reference, causal(ids))
            step_both(model, reference)
    assert first[0].galore_fx.stats()["rank"] != second[0].galore_fx.stats()["rank"]


class SelfAttention(nn.Module):
    def __init__(self, need_weights=False, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True, **settings)
        self.need_weights = need_weights

    def forward(self, x):
        out, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return out if weights is None else out + weights.mean()


class CrossAttention(SelfAttention):
    def forward(self, x):
        return self.attention(x, x.flip(1)[..., : self.attention.kdim], x.cos()[..., : self.attention.vdim])[0]


class SharedKeyValue(SelfAttention):
    def forward(self, x):
        memory = x.flip(1)
        return self.attention(x, memory, memory)[0]


@pytest.mark.parametrize(
    ("make", "num_projected"),
    [
        (SelfAttention, 2),
        (lambda: SelfAttention(need_weights=True, add_bias_kv=True), 2),
        (SharedKeyValue, 2),
        (CrossAttention, 2),
        (lambda: CrossAttention(kdim=12, vdim=16), 4),
    ],
    ids=["self", "self with weights", "shared key and value", "cross", "cross with own widths"],
)
def test_multi_head_attention(make, num_projected):
    model, reference = pair(Blocks(make, count=1))
    assert len(model.galore_fx.stats()["projected"]) == num_projected
    for x in torch.randn(2, 3, 5, 24):
        assert_same(model, reference, lambda each, x=x: each(x))
        step_both(model, reference)


def test_torchs_encoder_layers():
    layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    model, reference = pair(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train())
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    call = lambda each: each(torch.linspace(-1, 1, 360).view(3, 5, 24), mask=mask).cos().mean()  # noqa: E731
    assert_same(model, reference, call)
    assert len(model.galore_fx.stats()["projected"]) == 8


def test_a_packed_weight_with_a_basis_of_its_rows_is_projected_from_its_full_gradient():
    """The one case where cross-attention cannot split R; the numbers are right, and it says so."""
    model, reference = pair(Blocks(CrossAttention, count=1), project="output")
    for each in (model, reference):
        each(torch.linspace(-1, 1, 360).view(3, 5, 24)).backward()
    with pytest.warns(UserWarning, match="full gradient of blocks.0.attention.in_proj_weight was formed"):
        model.galore_fx.optimizer._collect()
    assert_gradients_equal(model, reference)


# Fallback.


class Broken(nn.Module):
    """A block with a graph break: the graph cannot go on after a number is read from a tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        y = self.first(x)
        torch._dynamo.graph_break()
        return self.second(y.relu())


def test_a_block_with_a_graph_break_trains_uncompiled_and_is_named_once():
    model, reference = pair(Blocks(Broken), strict=False, refresh_gap=2)
    xs = torch.randn(4, 6, 24)
    with pytest.warns(UserWarning, match=r"block blocks.0 \(Broken\) could not be captured as one graph: .*break"):
        assert_same(model, reference, lambda each: each(xs[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in xs:
            step_both(model, reference)
            assert_same(model, reference, lambda each, x=x: each(x))
    stats = model.galore_fx.stats()
    assert stats["num_refreshes"] > 4 and stats["num_region_graphs"] == 0
    assert list(stats["uncompiled"]) == ["blocks.0", "blocks.1"]


def test_a_fallen_back_block_under_checkpoints():
    call = lambda block, x: checkpoint(block, x, use_reentrant=False)  # noqa: E731
    model, reference = pair(Blocks(Broken, call=call), strict=False)
    with pytest.warns(UserWarning, match="could not be captured"):
        assert_same(model, reference, lambda each: each(torch.ones(6, 24)))


def test_transformers_checkpointing_of_a_fallen_back_block():
    plain = llama(1)
    enable_checkpointing(plain)
    original = plain.model.layers[0].mlp.forward

    def broken(x):
        torch._dynamo.graph_break()
        return original(x)

    reference = copy.deepcopy(plain)
    plain.model.layers[0].mlp.forward = broken
    model = galore_fx.compile(plain, rank=4, refresh_gap=100, optimizer=adamw())
    with pytest.warns(UserWarning, match="could not be captured"):
        assert_same(model, reference, causal(batches(1)[0]))
    assert model.model.layers[0].gradient_checkpointing


def test_a_weight_read_by_something_else_falls_back_with_the_right_gradient():
    class Regularised(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.weight.square().sum()

    model, reference = pair(Regularised(16, 24).train(), strict=False)
    x = torch.ones(3, 16)
    with pytest.warns(UserWarning, match=r"the model \(Regularised\).*weight is read by .*not a linear layer"):
        for each in (model, reference):
            each(x).sum().backward()
    with pytest.warns(UserWarning, match="full gradient of weight was formed"):
        model.galore_fx.optimizer._collect()
    assert_gradients_equal(model, reference)


def test_strict_makes_a_fallback_an_error():
    model = galore_fx.compile(Blocks(Broken), rank=4, strict=True)
    with pytest.raises(galore_fx.CaptureError, match="block blocks.0"):
        model(torch.ones(6, 24))


def test_a_blocks_own_error_is_the_one_that_is_seen():
    model = galore_fx.compile(Blocks(), rank=4)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model(torch.ones(6, 23))
    assert model(torch.ones(6, 24)).requires_grad
    assert model.galore_fx.stats()["uncompiled"] == {}, "one bad batch does not end compilation"


def test_eval_with_grad_projects_too():
    model, reference = pair(llama(1))
    model.eval(), reference.eval()
    assert_same(model, reference, causal(batches(1)[0]))


@pytest.mark.parametrize("switch", ["autograd", "graphs"])
def test_unsupported_modes_are_refused_by_name(switch):
    if switch == "autograd":
        patch, match = torch._dynamo.config.patch(compiled_autograd=True), "compiled autograd is on"
    else:
        patch, match = inductor_config.patch({"triton.cudagraphs": True}), "CUDA graphs are on"
    model = galore_fx.compile(Blocks(), rank=4)
    with patch:
        with pytest.raises(galore_fx.SettingError, match=match):
            galore_fx.compile(Blocks(), rank=4)
        with pytest.raises(galore_fx.SettingError, match=match):
            model(torch.ones(6, 24))


def test_linears_without_anything_between_them():
    block = lambda: nn.Sequential(nn.Linear(24, 8, bias=False), nn.Linear(8, 24), nn.Linear(24, 24))  # noqa: E731
    for recipe in ("auto", "galore"):
        model, reference = pair(Blocks(block), recipe=recipe)
        for x in torch.randn(2, 6, 24):
            for each in (model, reference):
                each(x).backward()
            model.galore_fx.optimizer._collect()
            assert_gradients_equal(model, reference)
            step_both(model, reference)


def test_a_reentrant_checkpoint_recomputes_the_same_dropout():
    call = lambda block, x: checkpoint(block, x, use_reentrant=True)  # noqa: E731
    block = lambda: nn.Sequential(nn.Linear(24, 40), nn.Dropout(0.5), nn.Linear(40, 24))  # noqa: E731
    model, reference = pair(Blocks(block, call=call))
    assert_same(model, reference, lambda each: each(torch.ones(6, 24, requires_grad=True)))


def test_products_with_keywords_in_an_uncompiled_block():
    class Keywords(Broken):
        def forward(self, x):
            torch._dynamo.graph_break()
            hidden = torch.mm(x, mat2=self.first.weight.T)
            return torch.addmm(input=self.second.bias, mat1=hidden, mat2=self.second.weight.T)

    model, reference = pair(Blocks(Keywords, count=1), strict=False)
    with pytest.warns(UserWarning, match="could not be captured"):
        for each in (model, reference):
            each(torch.ones(6, 24)).backward()
    with pytest.warns(UserWarning, match="full gradient of .* was formed"):
        model.galore_fx.optimizer._collect()
    assert_gradients_equal(model, reference)


def test_a_bad_batch_and_a_copy_keep_the_chunked_loss():
    model = galore_fx.compile(llama(1), rank=4, optimizer=adamw())
    ids = batches(1)[0]
    with pytest.raises((RuntimeError, ValueError)):
        model(input_ids=ids, labels=ids[:2])
    assert model(input_ids=ids, labels=ids).logits is None
    with pytest.warns(UserWarning, match="copy of a model"):
        again = galore_fx.compile(copy.deepcopy(model), rank=4, optimizer=adamw())
    assert again(input_ids=ids, labels=ids).logits is None


def test_the_chunked_loss_under_autocast_with_a_low_precision_input():
    head = nn.Linear(16, 50)
    x, target = torch.randn(6, 16), torch.arange(6)
    grads = []
    for fused in (True, False):
        hidden = x.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            if fused:
                loss = linear_cross_entropy(hidden, head.weight, head.bias, target, -100, "mean")
            else:
                loss = nn.functional.cross_entropy(head(hidden).float(), target)
        head.zero_grad()
        loss.backward()
        grads.append((hidden.grad.float(), head.weight.grad.clone()))
    for ours, plain in zip(*grads, strict=True):
        assert (ours - plain).norm() < 2e-2 * plain.norm()
