"""Basis sources by name: the sources that a recipe may select, and all sources that graphs may contain."""

from galore_fx.runtime.subspace.basis_heads import HeadBasis
from galore_fx.runtime.subspace.basis_iteration import IteratedBasis
from galore_fx.runtime.subspace.basis_random import RandomBasis
from galore_fx.runtime.subspace.basis_source import BasisSource
from galore_fx.runtime.subspace.basis_svd import ExactBasis

OF_RECIPE: dict[str, type[BasisSource]] = {source.name: source for source in (ExactBasis, IteratedBasis, RandomBasis)}
SOURCES: dict[str, type[BasisSource]] = {**OF_RECIPE, HeadBasis.name: HeadBasis}
