"""What to do to each weight, as data: a ``Recipe`` is a set of orthogonal parts, a published system a named value.

part          values
rank          int, or fraction of the shorter side
project       shorter (GaLore's rule) | input | output
basis         svd | subspace-iteration; iterations, oversampling: of the latter
cross_head    query-key | query-key-value: one head's basis for all heads of these; None: each weight its own
refresh       fixed | lazy: a basis whose subspace stays is renewed less and less often | lotus: where the gradient
              inside its subspace has stopped moving
refresh_gap   updates between two refreshes of the same basis; the first such gap where they are lazy
moments_on_refresh  keep | rotate | reset: the optimizer's states when their basis is exchanged
lazy_statistic  overlap | first-vector: what tells that a subspace stays
lazy_threshold  from where on it does, 0 to 1
lazy_queue    refreshes whose mean statistic decides
lazy_limit    the largest gap, in multiples of refresh_gap
lotus_threshold, lotus_interval  displacement of an update below which a basis is renewed, and how often it is asked
stagger       spread the refreshes of the layers over the gap
refresh_limit blocks whose bases may be renewed in the same update; None: all that are due
residual      drop | sparse | scaled: the part of the gradient outside the subspace; sparse: some entries are trained
              besides; scaled: it is applied as the optimizer scales the rest
residual_density  share of a weight's entries that are
residual_variant  rectified | additive: full-rank steps at the entries, or steps on what the subspace misses there
residual_warm_up  updates in which the entries are learnt
weight_norm   row | column: weights are frozen, a low-rank change and a magnitude are trained; None: not
sides         one | two: of a factor's gradient that are projected; factor_scale: of the change
merge_factors add the change to the frozen weight with each gap, for training from scratch
weight_bits   8: projected weights in groups of 256 with a scale and a zero point; None: as the model has them
rounding      stochastic | nearest: of weights in 8 bits
basis_bits    4: two in a byte, in groups of 256; 8; None: as the weight
state_bits    8: the optimizer's states in blocks of 256; 32: float32; None: as the weight
scale         GaLore's alpha: a fractional learning rate of what is projected
update        deferred | in-backward
activation_budget  share of a block's activations that is kept, the rest is recomputed: 1.0 keeps all, 0.0 none
max_grad_norm clip the gradients before each update; None: no clipping (deferred only)
"""

import dataclasses
import math
from typing import Any, Literal, get_args

from galore_fx.errors import SettingError

Project = Literal["shorter", "input", "output"]
Basis = Literal["svd", "subspace-iteration"]
CrossHead = Literal["query-key", "query-key-value"]
MomentsOnRefresh = Literal["keep", "rotate", "reset"]
Residual = Literal["drop", "sparse", "scaled"]
ResidualVariant = Literal["rectified", "additive"]
Refresh = Literal["fixed", "lazy", "lotus"]
LazyStatistic = Literal["overlap", "first-vector"]
WeightNorm = Literal["row", "column"]
Sides = Literal["one", "two"]
Update = Literal["deferred", "in-backward"]
Rounding = Literal["stochastic", "nearest"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One setting of every part; the fields are also the keyword overrides of ``plan`` and ``compile``.

    Attributes:
        name: the recipe it started from.
        projects: whether weights of linear layers are trained in a subspace at all.
        rank: columns of each basis, or the fraction of the weight's shorter side. Clamped to the shorter side.
        project: which dimension shrinks to the rank: the shorter side (GaLore, Zhao et al. 2024,
            arXiv:2403.03507, section 4.2), the layer's inputs, or its outputs.
        basis: exact SVD of the gradient, or the subspace method, warm-started from the old basis.
        iterations: of the subspace method at each refresh, one in each of so many updates in a row, every one with the
            gradient of its own batch.
        oversampling: random columns that the sketch has besides the basis; of all the leading ones are kept (Halko,
            Martinsson, Tropp 2011, section 4.2).
        cross_head: the weights of an attention's queries and keys (and values) find their basis from the gradient of
            one head, or as many as the rank needs, drawn anew at each refresh (GaLore+, Liao et al. 2024,
            arXiv:2412.19820; reconstructed). Needs ``project="input"``. Weights in which the graph shows no heads are
            projected as others are.
        refresh: when a basis is renewed: at a fixed gap; lazily, each weight at a gap of its own that doubles while its
            subspace stays (Q-GaLore, arXiv:2407.08296, section 3.2); or where the gradient inside the subspace has
            stopped moving (Lotus, arXiv:2602.01233, algorithm 1), looked at every ``lotus_interval`` updates.
        moments_on_refresh: with a new basis, states stay as they are (GaLore), are expressed in it (LDAdam, Robert et
            al. 2024, arXiv:2410.16103), or start anew.
        refresh_gap: updates between two refreshes of one basis (GaLore's T).
        lazy_statistic: share of the new gradient's energy that the old subspace holds, beyond chance (ours); or |cos|
            between the first vectors of two bases (Q-GaLore).
        lazy_threshold: mean of the statistic from which on the gap doubles.
        lazy_queue: of how many refreshes the mean is taken (Q-GaLore: 5).
        lazy_limit: the largest gap, as a multiple of ``refresh_gap``.
        lotus_threshold: mean displacement of an update, of the unit projected gradient, below which a basis is
            renewed (Lotus's gamma: 0.005 to 0.02).
        lotus_interval: updates between two decisions (Lotus's eta: 25 to 100).
        stagger: refresh the layers one after the other over the gap, instead of all in the same step.
        refresh_limit: blocks whose bases may be renewed in the same update, None for all that are due; the others wait
            their turn. What a refresh needs beyond a steady step (sketches, or full gradients for an SVD) is then
            alive for so many blocks only.
        residual: what becomes of the gradient outside the subspace: nothing (GaLore), or some entries of it are kept
            and trained with moments of their own (GaLore+; reconstructed, see runtime/sparse_residual.py), or all of it
            is applied, scaled as the optimizer scales the rest (Fira, Chen et al. 2024, arXiv:2410.01623). The latter
            needs ``update="in-backward"`` and forms the full gradients of one block at a time.
        residual_density: share of the entries: so many columns in each block of 64 rows.
        residual_variant: at these entries the step of full-rank training in place of the back-projected one, or the
            optimizer's step on the error of the projection added to it.
        residual_warm_up: updates in which the entries are learnt, from their errors; nothing is added in them.
        weight_norm: "row" or "column": the blocks' linear weights are frozen, and what is trained of them is a low-rank
            change and a magnitude for each row or column of the sum (GradNormLoRP, Huang et al. 2024,
            arXiv:2412.19616; reconstructed, see runtime/normalized_linear.py). ``rank`` is that of the factors, whose
            gradients are projected to as many dimensions.
        sides: of a factor's gradient that are projected: its longer one too, or only the shorter one.
        factor_scale: of the low-rank change.
        merge_factors: with each ``refresh_gap`` the change is added to the frozen weight and the factors start anew
            (ours, for training from random weights).
        weight_bits: 8 to store projected weights as codes (Q-GaLore, Zhang et al. 2024, arXiv:2407.08296, section 3.4);
            they are dequantised for each product. A weight whose elements make no whole groups of 256 stays as it is.
        rounding: how an updated weight gets back into 8 bits. To the nearest, steps that are small beside the grid are
            lost; stochastically, they are kept on average.
        basis_bits: 4 (Q-GaLore) or 8 to store the bases as codes; a quantised basis is orthonormal to a few percent.
        state_bits: 8 for block-wise quantised states (Dettmers et al. 2022, arXiv:2110.02861; tensors of fewer than
            4096 elements stay in float32), 32 for float32, None for the weight's dtype.
        scale: factor of the back-projected update (GaLore's alpha).
        update: all parameters in ``optimizer.step()``, or each inside the backward that completes its gradient.
        max_grad_norm: 2-norm that the gradients are clipped to, or None.
        activation_budget: AOTAutograd's memory budget for each block, 0 to 1: between what the block's inputs take and
            what its default partition saves. Peak memory need not fall with it all the way.
    """

    name: str
    projects: bool = True
    rank: int | float = 0.25
    project: Project = "shorter"
    basis: Basis = "subspace-iteration"
    iterations: int = 1
    oversampling: int = 0
    cross_head: CrossHead | None = None
    refresh: Refresh = "fixed"
    moments_on_refresh: MomentsOnRefresh = "keep"
    refresh_gap: int = 50
    lazy_statistic: LazyStatistic = "overlap"
    lazy_threshold: float = 0.6
    lazy_queue: int = 5
    lazy_limit: int = 16
    lotus_threshold: float = 0.01
    lotus_interval: int = 50
    stagger: bool = True
    refresh_limit: int | None = None
    residual: Residual = "drop"
    residual_density: float = 0.02
    residual_variant: ResidualVariant = "rectified"
    residual_warm_up: int = 100
    weight_norm: WeightNorm | None = None
    sides: Sides = "two"
    factor_scale: float = 1.0
    merge_factors: bool = False
    weight_bits: int | None = None
    rounding: Rounding = "stochastic"
    basis_bits: int | None = None
    state_bits: int | None = None
    scale: float = 0.25
    update: Update = "deferred"
    max_grad_norm: float | None = None
    activation_budget: float = 1.0

    def rank_in_force(self, shape: tuple[int, int]) -> int:
        """The rank used for a weight of this shape: never above its shorter side."""
        shorter = min(shape)
        wanted = round(self.rank * shorter) if isinstance(self.rank, float) else self.rank
        return max(1, min(wanted, shorter))


RECIPES = {
    # Published defaults: Zhao et al. 2024, arXiv:2403.03507, appendix C (T = 200, alpha = 0.25, r = d/4); every
    # layer refreshes in the same update, as in the released optimizer.
    "galore": Recipe("galore", basis="svd", refresh_gap=200, stagger=False),
    # Published defaults: Zhang et al. 2024, arXiv:2407.08296, and its scripts (gap 200, 500 for 7B; rank a quarter of
    # the hidden size but for 130M, where it is 256 of 768; queue of 5). The overlap takes the place of the cosine, with
    # a threshold of its own (docs/quality.md).
    "q-galore": Recipe(
        "q-galore",
        basis="svd",
        refresh="lazy",
        refresh_gap=200,
        stagger=False,
        weight_bits=8,
        basis_bits=4,
        state_bits=8,
    ),
    "full": Recipe("full", projects=False),
    # Reconstructed: Liao et al. 2024, arXiv:2412.19820. Cross-head bases of queries and keys, subspace iteration and
    # sparse residuals are the paper's; the gap and the density are ours (docs/architecture.md).
    "galore+": Recipe("galore+", project="input", cross_head="query-key", residual="sparse", refresh_gap=20),
    # Verified against the paper's algorithm 1, arXiv:2602.01233: randomized refreshes when the gradient has stopped
    # moving. What becomes of the moments is not said there; they are kept, as GaLore's code does.
    "lotus": Recipe("lotus", refresh="lotus", stagger=False),
    # Chen et al. 2024, arXiv:2410.01623: GaLore's settings, and the residual. Updates in the backward are ours.
    "fira": Recipe("fira", basis="svd", refresh_gap=200, stagger=False, residual="scaled", update="in-backward"),
    # Reconstructed: Huang et al. 2024, arXiv:2412.19616, from its summaries; gap and rank as in its scripts.
    "gradnormlorp": Recipe(
        "gradnormlorp", rank=8, basis="svd", weight_norm="row", refresh_gap=250, stagger=False, scale=1.0
    ),
    # Provisional: frequent warm refreshes, since a stale basis loses more than an inexact one.
    "auto": Recipe("auto"),
}
NOT_BUILT_YET = ("galore2", "vlorp")
PARTS_NOT_BUILT_YET = ("granularity",)
_OVERRIDES = tuple(field.name for field in dataclasses.fields(Recipe) if field.name not in ("name", "projects"))


def resolve_recipe(name: str | Recipe, overrides: dict[str, Any]) -> Recipe:
    """The recipe of that name with some parts replaced.

    Raises:
        SettingError: unknown name or part, or a value outside what the part allows; lists what exists.
    """
    if isinstance(name, Recipe):
        recipe = name
    elif name in RECIPES:
        recipe = RECIPES[name]
    elif name in NOT_BUILT_YET:
        raise SettingError(f"recipe {name!r} is planned but not built yet; available: {', '.join(sorted(RECIPES))}")
    else:
        raise SettingError(f"unknown recipe {name!r}; available: {', '.join(sorted(RECIPES))}")
    for key in overrides:
        if key in PARTS_NOT_BUILT_YET:
            raise SettingError(f"override {key}={overrides[key]!r}: this part is planned but not built yet")
        if key not in _OVERRIDES:
            raise SettingError(f"unknown override {key}={overrides[key]!r}; a recipe has {', '.join(_OVERRIDES)}")
    recipe = dataclasses.replace(recipe, **overrides)
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    rank = recipe.rank
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise SettingError(f"rank={rank!r} is not a number; give an int >= 1, or a fraction between 0 and 1")
    if isinstance(rank, int) and rank < 1:
        raise SettingError(f"rank={rank!r} must be at least 1")
    if isinstance(rank, float) and not 0.0 < rank <= 1.0:
        raise SettingError(
            f"rank={rank!r}: as a fraction of the shorter side it must lie in (0, 1]; give an int for more"
        )
    texts = {
        "project": Project,
        "basis": Basis,
        "refresh": Refresh,
        "moments_on_refresh": MomentsOnRefresh,
        "residual": Residual,
        "residual_variant": ResidualVariant,
        "lazy_statistic": LazyStatistic,
        "update": Update,
        "rounding": Rounding,
        "sides": Sides,
    }
    for part, values in texts.items():
        if getattr(recipe, part) not in get_args(values):
            raise SettingError(f"{part}={getattr(recipe, part)!r} is not one of {', '.join(get_args(values))}")
    if recipe.cross_head is not None:
        if recipe.cross_head not in get_args(CrossHead):
            told = ", ".join(get_args(CrossHead))
            raise SettingError(f"cross_head={recipe.cross_head!r} is not one of {told}, or None")
        if recipe.project != "input":
            raise SettingError(
                f"cross_head={recipe.cross_head!r} shares a basis of the layer's inputs among its heads, and "
                f"project={recipe.project!r} may project the outputs; use project='input'"
            )
    for part in ("refresh_gap", "lazy_queue", "lazy_limit", "lotus_interval", "residual_warm_up", "iterations"):
        _check_int(part, getattr(recipe, part), 1)
    _check_subspace(recipe)
    threshold = recipe.lazy_threshold
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0.0 <= threshold <= 1.0:
        raise SettingError(f"lazy_threshold={threshold!r} must be a number from 0 to 1")
    if not isinstance(recipe.stagger, bool):
        raise SettingError(f"stagger={recipe.stagger!r} must be True or False")
    for part, allowed in (("weight_bits", (8,)), ("basis_bits", (4, 8)), ("state_bits", (8, 32))):
        bits = getattr(recipe, part)
        if bits is not None and (bits not in allowed or isinstance(bits, bool)):
            told = ", ".join(map(str, allowed))
            raise SettingError(f"{part}={bits!r} must be {told}, or None for the weight's own dtype")
    for part in ("weight_bits", "basis_bits"):
        if getattr(recipe, part) is not None and not recipe.projects:
            raise SettingError(
                f"{part}={getattr(recipe, part)} is for projected weights, and recipe {recipe.name!r} projects none"
            )
    density = recipe.residual_density
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0.0 < density <= 1.0:
        raise SettingError(f"residual_density={density!r} must be a share of a weight's entries, above 0 and at most 1")
    if recipe.residual == "sparse" and not recipe.projects:
        raise SettingError(f"residual='sparse' is for projected weights, and recipe {recipe.name!r} projects none")
    if recipe.residual == "sparse" and recipe.weight_bits is not None:
        raise SettingError(
            f"residual='sparse' changes single entries of a weight, which weight_bits={recipe.weight_bits} keeps in "
            "groups; use weight_bits=None, or residual='drop'"
        )
    if recipe.residual == "scaled":
        _check_scaled(recipe)
    if recipe.weight_norm is not None:
        _check_normalized(recipe)
    limit = recipe.refresh_limit
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise SettingError(f"refresh_limit={limit!r} must be an int of at least 1, or None for all that are due")
    _check_positive("scale", recipe.scale)
    share = recipe.activation_budget
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
        raise SettingError(f"activation_budget={share!r} must be a number from 0 (recompute) to 1 (keep)")
    if recipe.max_grad_norm is not None:
        _check_positive("max_grad_norm", recipe.max_grad_norm)
        if recipe.update == "in-backward":
            raise SettingError(
                "max_grad_norm needs all gradients at once, which update='in-backward' never holds; "
                "use update='deferred', or max_grad_norm=None"
            )


def _check_subspace(recipe: Recipe) -> None:
    """How a basis is found and when."""
    _check_int("oversampling", recipe.oversampling, 0)
    for part, plain in (("iterations", 1), ("oversampling", 0)):
        number = getattr(recipe, part)
        if number == plain:
            continue
        if recipe.basis == "svd":
            raise SettingError(f"{part}={number} is of basis='subspace-iteration', and basis='svd' has none")
        if recipe.refresh == "lazy" and recipe.lazy_statistic == "overlap":
            raise SettingError(
                f"{part}={number} changes what the overlap of a sketch means; use refresh='fixed' or 'lotus', "
                "lazy_statistic='first-vector', or leave it"
            )
    if recipe.iterations > 1 and recipe.refresh != "fixed":
        raise SettingError(
            f"iterations={recipe.iterations} are updates in a row that follow from a fixed gap; with refresh="
            f"{recipe.refresh!r} use 1"
        )
    if recipe.iterations > recipe.refresh_gap:
        raise SettingError(
            f"iterations={recipe.iterations} take as many updates, and the next refresh is refresh_gap="
            f"{recipe.refresh_gap} updates after the first of them"
        )
    _check_positive("lotus_threshold", recipe.lotus_threshold)
    if recipe.refresh == "lotus" and not recipe.projects:
        raise SettingError(f"refresh='lotus' is for projected weights, and recipe {recipe.name!r} projects none")


def _check_scaled(recipe: Recipe) -> None:
    """Fira's residual needs each full gradient once, where it is made."""
    if not recipe.projects:
        raise SettingError(f"residual='scaled' is for projected weights, and recipe {recipe.name!r} projects none")
    if recipe.update != "in-backward":
        raise SettingError(
            f"residual='scaled' needs the full gradients, and update={recipe.update!r} would hold all of them at once; "
            "use update='in-backward', which holds those of one block"
        )
    if recipe.weight_bits is not None:
        raise SettingError(
            f"residual='scaled' adds to a plain weight, which weight_bits={recipe.weight_bits} has not; use "
            "weight_bits=None, or residual='drop'"
        )


def _check_normalized(recipe: Recipe) -> None:
    """What is trained are factors, and their gradients are small."""
    if recipe.weight_norm not in get_args(WeightNorm):
        raise SettingError(f"weight_norm={recipe.weight_norm!r} is not one of row, column, or None")
    if not recipe.projects:
        raise SettingError(f"weight_norm={recipe.weight_norm!r} trains factors, and recipe {recipe.name!r} has none")
    _check_positive("factor_scale", recipe.factor_scale)
    if not isinstance(recipe.merge_factors, bool):
        raise SettingError(f"merge_factors={recipe.merge_factors!r} must be True or False")
    if recipe.merge_factors and (recipe.refresh != "fixed" or recipe.stagger):
        raise SettingError(
            f"merge_factors=True renews all bases after each gap; use refresh='fixed' and stagger=False (now "
            f"{recipe.refresh!r} and {recipe.stagger})"
        )
    fixed = {"cross_head": None, "residual": "drop", "weight_bits": None, "basis_bits": None, "oversampling": 0}
    if recipe.sides == "two":
        fixed |= {"basis": "svd", "moments_on_refresh": recipe.moments_on_refresh}
        if recipe.moments_on_refresh == "rotate":
            raise SettingError("moments_on_refresh='rotate' knows one basis, and sides='two' has two; use 'keep'")
    for part, only in fixed.items():
        value = getattr(recipe, part)
        if value != only:
            raise SettingError(
                f"{part}={value!r} is for weights trained in a subspace of their own, and weight_norm="
                f"{recipe.weight_norm!r} trains factors of them; use {part}={only!r}"
            )


def _check_int(part: str, number: object, least: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise SettingError(f"{part}={number!r} must be an int of at least {least}")


def _check_positive(part: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise SettingError(f"{part}={value!r} must be a finite number above 0")
