"""Studies of ``tools/lab/quality.py``: their variants, as arguments of the script that trains them."""

import dataclasses

_GAP = ["--refresh-gap", "25"]
_LAZY = ["--recipe", "q-galore", *_GAP]
_PLUS = ["--recipe", "galore+"]
_FACTORS = ["--recipe", "gradnormlorp", "--rank", "0.25"]
_MERGED = [*_FACTORS, "--refresh-gap", "50", "--part", "merge_factors=true"]
_SMALL = ["--model", "tools/lab/llama-3m.json"]
_GALORE, _FAST = ["--recipe", "galore"], ["--lr", "4e-3"]
_ROTATE = ["--part", "moments_on_refresh=rotate"]
_DROP, _NO_HEADS = ["--part", "residual=drop"], ["--part", "cross_head=null"]
_RECTIFIED = ["--part", "residual_variant=rectified"]


def _density(share: float) -> list[str]:
    return ["--part", f"residual_density={share}"]


def _by_seed(variants: dict[str, list[str]], seeds: str) -> dict[str, list[str]]:
    """Returns each variant with each seed (a digit of ``seeds``); names omit seed 0."""
    return {
        name if seed == "0" else f"{name}, seed {seed}": [*parts, "--seed", seed]
        for seed in seeds
        for name, parts in variants.items()
    }


# Variants that both GaLore+ studies run with three seeds.
_COMPARED = {
    "galore, lr 4e-3": [*_GALORE, *_FAST],
    "galore, rank 16": [*_GALORE, *_FAST, "--part", "rank=16"],
    "galore+": [*_PLUS, *_FAST],
    "density 0.06": [*_PLUS, *_FAST, *_density(0.06)],
    "without residual": [*_PLUS, *_FAST, *_DROP],
}
# A larger rank and frequent refreshes.
_OFTEN = ["--part", "rank=0.25", "--part", "refresh_gap=20"]
_OFTEN_DENSE = "galore+, rank 0.25, gap 20, density 0.06"
_COMPARED_OFTEN = {
    "rank 64, gap 20": [*_PLUS, *_FAST, *_OFTEN],
    "rank 64, gap 20, density 0.06": [*_PLUS, *_FAST, *_OFTEN, *_density(0.06)],
    "rank 64, gap 20, without residual": [*_PLUS, *_FAST, *_OFTEN, *_DROP],
}


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of runs.

    Attributes:
        name: name on the command line and in the rows.
        title, text: title and text of its section; ``{steps}`` is replaced by the steps.
        steps: training steps of each run.
        against: the variant with whose loss the others are compared.
        variants: arguments of each run by name.
        script: script that trains them: train (peers if the first argument is one), arithmetic or classify.
        further: runs with ``--all`` only: more seeds, ranks, gaps and learning rates.
    """

    name: str
    title: str
    text: str
    steps: int
    against: str
    variants: dict[str, list[str]]
    script: str = "train"
    further: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    @property
    def all_variants(self) -> dict[str, list[str]]:
        """All runs: ``variants`` and ``further``."""
        return self.variants | self.further


_AGAIN = {
    "galore": _GALORE,
    "galore+": _PLUS,
    _OFTEN_DENSE: [*_PLUS, *_OFTEN, *_density(0.06)],
    "fira": ["--recipe", "fira"],
    "gradnormlorp": _FACTORS,
}
# The best variants of the study of all recipes, by seed 0.
_BEST = {
    "gradnormlorp, lr 4e-3": [*_FACTORS, "--lr", "4e-3"],
    "fira, lr 4e-3": ["--recipe", "fira", "--lr", "4e-3"],
    "galore+, lr 4e-3": [*_PLUS, *_FAST],
    f"{_OFTEN_DENSE}, lr 4e-3": [*_PLUS, *_OFTEN, *_density(0.06), *_FAST],
    "galore, lr 4e-3": ["--recipe", "galore", "--lr", "4e-3"],
}


_STUDIES = (
    Study(
        "quantised",
        "Quantised weights, bases and states; lazy refresh",
        "{steps} steps of 8 x 64 tokens, gap 25, learning rate 2e-3. *Stability*: of the weights' last refreshes, "
        "smallest and largest.",
        steps=1500,
        against="galore",
        variants={
            "adamw": ["--recipe", "full"],
            "galore": ["--recipe", "galore", *_GAP],
            "q-galore": _LAZY,
            "q-galore, nearest": [*_LAZY, "--part", "rounding=nearest"],
            "q-galore, fixed gap": [*_LAZY, "--part", "refresh=fixed"],
            "q-galore, first vector": [*_LAZY, "--part", "lazy_statistic=first-vector", "--part", "lazy_threshold=0.4"],
            "q-galore, threshold 0.75": [*_LAZY, "--part", "lazy_threshold=0.75"],
        },
    ),
    Study(
        "galore+",
        "GaLore+: heads, residuals, ranks, gaps",
        "{steps} steps of 8 x 64 tokens, learning rate 4e-3 and seed 0 unless said. `galore`: rank 64 of 256, gap 200. "
        "`galore+`: rank 16, gap 200, one basis for all heads of the queries and one for the keys, moments kept, a "
        "scaled residual for 2 % of the entries. Rows with gap 20 were run with a warm-up of 100 updates.",
        steps=600,
        against="galore, lr 4e-3",
        variants={
            "adamw, lr 5e-4": ["--recipe", "full", "--lr", "5e-4"],
            "adamw, lr 1e-3": ["--recipe", "full", "--lr", "1e-3"],
            "adamw, lr 2e-3": ["--recipe", "full", "--lr", "2e-3"],
            "galore, lr 2e-3": _GALORE,
            "galore, lr 8e-3": [*_GALORE, "--lr", "8e-3"],
            **_COMPARED,
            "one basis a weight": [*_PLUS, *_FAST, *_NO_HEADS],
        },
        further={
            **_by_seed(_COMPARED, "12"),
            "gap 50": [*_PLUS, *_FAST, "--refresh-gap", "50"],
            **_by_seed(
                {
                    f"gap 20, {name}": [*_PLUS, *_FAST, "--refresh-gap", "20", *parts]
                    for name, parts in {"density 0.06": _density(0.06), "without residual": _DROP}.items()
                },
                "012",
            ),
            "rank 64, without residual": [*_PLUS, *_FAST, *_DROP, "--rank", "0.25"],
            "rank 64, density 0.06": [*_PLUS, *_FAST, *_density(0.06), "--rank", "0.25"],
            **_by_seed(_COMPARED_OFTEN, "01"),
            "rank 64, gap 20, one basis a weight": [*_PLUS, *_FAST, *_OFTEN, *_NO_HEADS],
            "rank 64, gap 20, moments rotated, without residual": [*_PLUS, *_FAST, *_OFTEN, *_ROTATE, *_DROP],
            "galore+, lr 2e-3": _PLUS,
            "galore+, lr 8e-3": [*_PLUS, "--lr", "8e-3"],
            **{
                f"rank 64, gap 20, lr 2e-3, without residual{name}": [*_PLUS, *_OFTEN, *_DROP, *parts]
                for name, parts in {"": [], ", one basis a weight": _NO_HEADS, ", moments rotated": _ROTATE}.items()
            },
            **{
                f"rank 64, gap {gap}, lr 2e-3, rectified, moments rotated": [
                    *(*_PLUS, *_RECTIFIED, *_ROTATE),
                    *("--rank", "0.25", "--refresh-gap", gap),
                ]
                for gap in ("5", "20", "50", "200")
            },
        },
    ),
    Study(
        "arithmetic",
        "GaLore+: fine-tuning on word problems",
        "The model is first trained on the text (AdamW, 600 steps), then for {steps} steps on 16 made word problems "
        "each; none of them, nor of the 512 held-out ones, is met twice. *Exact match*: of the whole answer, "
        "greedy. The loss is of the answers' tokens. Learning rate 4e-3 and seed 0 unless said.",
        steps=600,
        against="galore, lr 4e-3",
        script="arithmetic",
        variants={
            "adamw, lr 1e-3": ["--recipe", "full", "--lr", "1e-3"],
            "galore, lr 2e-3": _GALORE,
            **_COMPARED,
            "one basis a weight": [*_PLUS, *_FAST, *_NO_HEADS],
        },
        further={
            **_by_seed(_COMPARED, "12"),
            **_by_seed(_COMPARED_OFTEN, "012"),
            "rank 64, gap 20, one basis a weight": [*_PLUS, *_FAST, *_OFTEN, *_NO_HEADS],
            **_by_seed({"galore, lr 2e-3": _GALORE}, "12"),
        },
    ),
    Study(
        "classification",
        "GradNormLoRP beside LoRA: telling a line's first word",
        "A RoBERTa of 2.6 M parameters, trained on the text by masked tokens (1,000 steps), then for {steps} steps of "
        "32 lines of Python without their first word, which is one of 12; 2,000 held-out lines are of other files. "
        "Embeddings are frozen, rank 8, LoRA by peft (alpha 16, all linear layers), compiled in the same way. 31.8 % "
        "is the most frequent word's share: what a run that does not get away from the start ends with.",
        steps=600,
        against="LoRA, lr 6e-4",
        script="classify",
        variants={
            f"{title}, lr {lr}": ["--way", way, "--lr", lr, *parts]
            for title, way, parts, rates in (
                ("LoRA", "lora", [], ("1e-4", "3e-4", "6e-4", "1e-3")),
                ("gradnormlorp", "gradnormlorp", [], ("1e-3", "3e-3", "6e-3", "1e-2")),
                ("gradnormlorp, one side", "gradnormlorp", ["--part", "sides=one"], ("1e-3", "3e-3")),
            )
            for lr in rates
        },
        further=_by_seed(
            {
                "LoRA, lr 6e-4": ["--way", "lora", "--lr", "6e-4"],
                "gradnormlorp, lr 3e-3": ["--way", "gradnormlorp", "--lr", "3e-3"],
            },
            "12",
        ),
    ),
    Study(
        "recipes",
        "All recipes on one text",
        "A Llama of 3 M parameters (tools/lab/llama-3m.json) from random weights, {steps} steps of 8 x 64 tokens, "
        "learning rate 2e-3 and seed 0 where none is said. Peers: LoRA by peft (rank 16, embedding and head trained in "
        "full) and galore-torch, in eager mode, as they come.\n\n![Held-out loss and peak](recipes.svg)",
        steps=600,
        against="adamw, lr 2e-3",
        variants={
            title: [*parts, *_SMALL]
            for title, parts in {
                "adamw, lr 1e-3": ["--recipe", "full", "--lr", "1e-3"],
                "adamw, lr 2e-3": ["--recipe", "full", "--lr", "2e-3"],
                "adamw, lr 4e-3": ["--recipe", "full", "--lr", "4e-3"],
                "auto": [],
                "galore": ["--recipe", "galore"],
                "galore2": ["--recipe", "galore2"],
                "galore+": _PLUS,
                "q-galore": ["--recipe", "q-galore"],
                "lotus": ["--recipe", "lotus"],
                "fira": ["--recipe", "fira"],
                "gradnormlorp, merged": _MERGED,
                "gradnormlorp": _FACTORS,
                "vlorp, rank 0.25": ["--recipe", "vlorp", "--rank", "0.25"],
                "random bases, gap 200": ["--recipe", "galore", "--part", "basis=random"],
                "LoRA, lr 2e-3": ["lora", "--lr", "2e-3"],
                "LoRA, lr 6e-3": ["lora", "--lr", "6e-3"],
                "galore-torch": ["galore_torch"],
            }.items()
        },
        further={
            title: [*parts, *_SMALL]
            for title, parts in {
                _OFTEN_DENSE: _AGAIN[_OFTEN_DENSE],
                **{f"{name}, lr 4e-3": [*parts, *_FAST] for name, parts in _AGAIN.items()},
                **_by_seed(_BEST, "12"),
            }.items()
        },
    ),
)
STUDIES = {study.name: study for study in _STUDIES}
