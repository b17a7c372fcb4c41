"""Defines ``Recipe``, the treatment of weights as a set of orthogonal parts. Published systems are named recipes.

The field of each part declares its values, effect and conditions (parts.py). Rules between parts are a table in
checks.py.
"""

import dataclasses
import math
from typing import Literal

from galore_fx.recipes.parts import bits, flag, number, one_of, part, positive, rank_or_share, whole_number

Project = Literal["shorter", "input", "output"]
Basis = Literal["svd", "subspace-iteration", "random"]
CrossHead = Literal["query-key", "query-key-value", "query-key-shared", "query-key-value-shared"]
MomentsOnRefresh = Literal["keep", "rotate", "reset"]
Residual = Literal["drop", "sparse", "scaled"]
ResidualVariant = Literal["rectified", "additive", "scaled"]
Refresh = Literal["fixed", "lazy", "lotus"]
LazyStatistic = Literal["overlap", "first-vector"]
WeightNorm = Literal["row", "column"]
Sides = Literal["one", "two"]
Update = Literal["deferred", "in-backward"]
Rounding = Literal["stochastic", "nearest"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A value for every part; all fields but the first two are also keyword overrides of ``plan`` and ``compile``.

    Attributes:
        name: name of the recipe it is derived from.
        projects: whether weights of linear layers are trained in a subspace at all.
        rank: columns of each basis, an int or a fraction of the weight's shorter side; at most the shorter side.
        project: the dimension that shrinks to the rank: the shorter side (GaLore, Zhao et al. 2024, arXiv:2403.03507,
            section 4.2), the layer's inputs, or its outputs.
        basis: exact SVD of the gradient; subspace iteration, warm-started from the old basis; or random orthonormal
            columns from a fixed seed.
        iterations: subspace iterations per refresh, one in each of as many consecutive updates, each with the gradient
            of its own batch.
        oversampling: random columns of the sketch in addition to the basis; the leading ones of all are kept (Halko,
            Martinsson, Tropp 2011, section 4.2).
        granularity: c, the number of parts of the projected dimension that share one basis of rank / c columns. G
            (m, n) is projected as (m c, n / c) (VLoRP, arXiv:2505.01744). ``rank`` is the total of the parts, VLoRP's
            memory budget M = c r. In force is the largest common divisor of dimension and rank that is at most c.
        cross_head: roles of the attention weights (queries, keys, values) that take their basis from the gradient of
            one head, or of as many as the rank needs, drawn anew at each refresh (GaLore+, Liao et al. 2024,
            arXiv:2412.19820; reconstructed). With "-shared" the basis of the queries also serves keys (and values) of
            the same rank that read the same input; basis and X P are then stored once. Needs ``project="input"``.
            Weights without recognised heads are projected as ordinary matrices.
        refresh: when a basis is renewed: at a fixed gap; lazily, at a gap per weight that doubles while its subspace is
            stable (Q-GaLore, arXiv:2407.08296, section 3.2); or when the gradient inside the subspace has stopped
            moving (Lotus, arXiv:2602.01233, algorithm 1), checked every ``lotus_interval`` updates.
        moments_on_refresh: optimizer states are kept as they are (GaLore), rotated into the new basis (LDAdam, Robert
            et al. 2024, arXiv:2410.16103), or reset.
        refresh_gap: updates between two refreshes of one basis (GaLore's T).
        lazy_statistic: share of the new gradient's energy in the old subspace, above chance level (ours); or |cos|
            between the first vectors of two bases (Q-GaLore).
        lazy_threshold: mean of the statistic at or above which the gap doubles.
        lazy_queue: number of refreshes in that mean (Q-GaLore: 5).
        lazy_limit: the largest gap, as a multiple of ``refresh_gap``.
        lotus_threshold: mean displacement per update of the unit projected gradient below which a basis is renewed
            (Lotus's gamma: 0.005 to 0.02).
        lotus_interval: updates between two checks (Lotus's eta: 25 to 100).
        stagger: whether the layers refresh one after the other over the gap, instead of all in the same step.
        refresh_limit: most blocks that refresh in the same update, None for all that are due; the others wait for their
            turn. The memory that a refresh needs beyond a steady step (sketches, or full gradients for an SVD) is then
            alive for that many blocks only.
        refresh_limit_bytes, refresh_limit_s: the same limit, in bytes and seconds that the blocks' refreshes add to a
            step (galore_fx/assembly/refresh_cost.py: bytes are an upper bound, seconds assume a nominal rate).
        residual: treatment of the gradient outside the subspace. "drop" discards it (GaLore). "sparse" trains some of
            its entries with moments of their own (GaLore+; reconstructed, see runtime/remainder/sparse.py). "scaled"
            applies all of it, scaled as the optimizer scales the rest (Fira, Chen et al. 2024, arXiv:2410.01623), and
            needs ``update="in-backward"``. It works from dY and X, and forms a gradient only for an exact SVD (one
            weight's at a time), in a block that is uncompiled or under hooks on saved tensors, and for a weight that
            has gradient hooks or is not read by one linear layer alone, once before an update.
        residual_density: share of the trained entries: as many columns in each block of 64 rows.
        residual_variant: at these entries "rectified" replaces the back-projected step by that of full-rank training;
            "additive" adds the optimizer's step on the error of the projection; "scaled" adds the error itself, scaled
            as in Fira, without states.
        residual_warm_up: updates in which the entries are learnt from their errors and do not yet change the weight.
            All columns have been tried after about 2.4 / residual_density updates.
        weight_norm: "row" or "column" freezes the blocks' linear weights and trains a low-rank change and a magnitude
            for each row or column of the sum (GradNormLoRP, Huang et al. 2024, arXiv:2412.19616; reconstructed, see
            runtime/layers/normalized_linear.py). ``rank`` is that of the factors, whose gradients are projected to as
            many dimensions.
        sides: "two" projects both sides of a factor's gradient, "one" only the shorter side.
        factor_scale: scale of the low-rank change.
        merge_factors: whether after each ``refresh_gap`` the change is added to the frozen weight and the factors start
            anew (ours, for training from random weights).
        weight_bits: 8 to store projected weights, or the frozen ones of ``weight_norm``, as codes (Q-GaLore, Zhang et
            al. 2024, arXiv:2407.08296, section 3.4), which are dequantised for each product. A weight whose number of
            elements is not a multiple of 256 keeps its dtype.
        rounding: rounding of an updated weight, projected or not, to the 16 or 8 bits of its storage. Rounding to the
            nearest, as in torch's optimizers, loses steps that are small relative to the weight (in bfloat16 most of
            them at learning rates below 1e-3). Stochastic rounding keeps them on average; its direction depends on a
            seed, the update and the element (runtime/formats/counter_rng.py), so a resumed run rounds the same way.
            float32 weights are not rounded.
        basis_bits: 4 (Q-GaLore) or 8 to store the bases as codes; a quantised basis is orthonormal to a few percent.
        state_bits: 8 for block-wise quantised states (Dettmers et al. 2022, arXiv:2110.02861; tensors of fewer than
            4096 elements stay in float32), 32 for float32, None for the weight's dtype (float32 for float16 weights,
            since squares of gradients underflow in float16).
        scale: factor of the back-projected update (GaLore's alpha).
        update: whether parameters are updated in ``optimizer.step()``, or each inside the backward that completes its
            gradient.
        max_grad_norm: 2-norm to which the gradients are clipped; None for no clipping.
        activation_budget: AOTAutograd's memory budget for each block, from 0 (the bytes of the block's inputs) to 1
            (the bytes that its default partition saves). A lower value need not lower the peak memory.
    """

    name: str
    projects: bool = True
    rank: int | float = part(0.25, rank_or_share(), "columns of a basis, or a fraction of the shorter side")
    project: Project = part("shorter", one_of(Project), "the side of a weight that shrinks to the rank")
    basis: Basis = part("subspace-iteration", one_of(Basis), "how a basis is found")
    iterations: int = part(
        1,
        whole_number(1),
        "iterations of the subspace method at a refresh, one in each of so many updates",
        simulated=1,
    )
    oversampling: int = part(0, whole_number(0), "random columns that a sketch has besides the basis")
    granularity: int = part(1, whole_number(1), "parts of the projected side that share one small random basis (VLoRP)")
    cross_head: CrossHead | None = part(
        None, one_of(CrossHead, or_none=True), "roles whose heads share one basis, found from drawn heads (GaLore+)"
    )
    refresh: Refresh = part(
        "fixed",
        one_of(Refresh),
        "when a basis is renewed: at a gap, at gaps that grow (Q-GaLore), when used up (Lotus)",
    )
    moments_on_refresh: MomentsOnRefresh = part(
        "keep", one_of(MomentsOnRefresh), "what becomes of the optimizer's states with a new basis"
    )
    refresh_gap: int = part(50, whole_number(1), "updates between two refreshes of a basis", simulated=10**9)
    lazy_statistic: LazyStatistic = part(
        "overlap", one_of(LazyStatistic), "what tells a lazy refresh that a subspace has stayed", of_projection=False
    )
    lazy_threshold: float = part(
        0.6,
        number("a number from 0 to 1", lambda value: 0.0 <= value <= 1.0),
        "mean of the statistic from which on a lazy gap doubles",
        of_projection=False,
    )
    lazy_queue: int = part(5, whole_number(1), "refreshes over which that mean is taken", of_projection=False)
    lazy_limit: int = part(16, whole_number(1), "the largest lazy gap, in refresh_gaps", of_projection=False)
    lotus_threshold: float = part(
        0.01, positive(), "mean displacement of an update below which a basis is used up", simulated=0.0
    )
    lotus_interval: int = part(50, whole_number(1), "updates between two looks at the displacement", simulated=1)
    stagger: bool = part(True, flag(), "whether layers take turns in refreshing over the gap", one_graph=False)
    refresh_limit: int | None = part(
        None,
        whole_number(1, none="all that are due"),
        "blocks whose bases may be renewed in the same update",
        of_projection=False,
        simulated=None,
        one_graph=None,
    )
    refresh_limit_bytes: int | None = part(
        None,
        whole_number(1, none="no limit"),
        "bytes that refreshes may add to an update",
        simulated=None,
        one_graph=None,
    )
    refresh_limit_s: float | None = part(
        None, positive(or_none=True), "seconds that refreshes may add to an update", simulated=None, one_graph=None
    )
    residual: Residual = part(
        "drop",
        one_of(Residual),
        "the gradient outside the subspace: dropped, some entries trained, or all of it scaled",
    )
    residual_density: float = part(
        0.02,
        number("a share of a weight's entries, above 0 and at most 1", lambda value: 0.0 < value <= 1.0),
        "share of a weight's entries that are trained besides",
    )
    residual_variant: ResidualVariant = part(
        "rectified",
        one_of(ResidualVariant),
        "what is done at these entries: full-rank steps, steps on the error, or it",
    )
    residual_warm_up: int = part(120, whole_number(1), "updates in which the entries are learnt", simulated=0)
    weight_norm: WeightNorm | None = part(
        None,
        one_of(WeightNorm, or_none=True),
        "freezes the weights and trains a low-rank change and a magnitude for each row or column (GradNormLoRP)",
        of_projection=False,
    )
    sides: Sides = part("two", one_of(Sides), "sides of a factor's gradient that are projected", of_projection=False)
    factor_scale: float = part(1.0, positive(), "scale of the low-rank change", of_projection=False)
    merge_factors: bool = part(
        False, flag(), "whether each gap adds the change to the frozen weight", of_projection=False
    )
    weight_bits: int | None = part(None, bits(8), "bits of projected weights, stored in groups of 256")
    rounding: Rounding = part(
        "stochastic", one_of(Rounding), "how an updated weight gets back into 16 or 8 bits", of_projection=False
    )
    basis_bits: int | None = part(None, bits(4, 8), "bits of the bases, stored in groups of 256")
    state_bits: int | None = part(
        None, bits(8, 32), "bits of the optimizer's states, 8 in blocks of 256", of_projection=False
    )
    scale: float = part(0.25, positive(), "factor of the back-projected update (GaLore's alpha)")
    update: Update = part(
        "deferred",
        one_of(Update),
        "updates in step(), or each inside the backward: least memory, but no accumulation and no clipping",
        of_projection=False,
        one_graph="deferred",
    )
    max_grad_norm: float | None = part(
        None, positive(or_none=True), "2-norm that the gradients are clipped to", of_projection=False
    )
    activation_budget: float = part(
        1.0,
        number("a number from 0 (recompute) to 1 (keep)", lambda value: 0.0 <= value <= 1.0),
        "share of a block's activations that is kept; the rest is recomputed",
        of_projection=False,
    )

    def rank_in_force(self, shape: tuple[int, int]) -> int:
        """Returns the rank for a weight of this shape: from 1 up to its shorter side."""
        shorter = min(shape)
        wanted = round(self.rank * shorter) if isinstance(self.rank, float) else self.rank
        return max(1, min(wanted, shorter))

    def granularity_in_force(self, basis: tuple[int, int]) -> int:
        """Returns the number of parts of a basis (size, rank): the largest common divisor up to ``granularity``."""
        common = math.gcd(*basis)
        return max(parts for parts in range(1, min(self.granularity, common) + 1) if common % parts == 0)
