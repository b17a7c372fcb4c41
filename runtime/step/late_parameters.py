"""Parameters that a model has come to train since it was compiled: unfrozen, put in another's place, or added.

A plan knows only what was trained when it was made. What comes later is trained at full rank, in the group that lists
it or else in the first one, and is named once with what its states take; what has left the model is named, too.
"""

import logging
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn

from galore_fx.errors import OptimizerError
from galore_fx.units import format_bytes

_LOGGER = logging.getLogger(__name__)
NamedParameters = Callable[[], Iterable[tuple[str, nn.Parameter]]]


def parameters_of(model: nn.Module) -> NamedParameters:
    """The model's parameters by name, as long as it lives; the model is not held."""
    weak = weakref.ref(model)

    def named() -> Iterable[tuple[str, nn.Parameter]]:
        alive = weak()
        return () if alive is None else alive.named_parameters()

    return named


class LateParameters:
    """Those of one optimizer.

    Attributes:
        names: of the parameters that have been taken in, in that order.
        without_gradient: names of the trainable parameters that got no gradient in the first update.

    Args:
        named: the model's parameters.
        states: of the optimizer; a parameter that has none is not trained.
        param_groups: of the optimizer.
        take_in: called with each new parameter and its group; makes its state and hooks.
    """

    def __init__(
        self,
        named: NamedParameters,
        states: MutableMapping[Tensor, dict[str, Any]],
        param_groups: list[dict[str, Any]],
        take_in: Callable[[nn.Parameter, dict[str, Any]], None],
    ) -> None:
        self.names: list[str] = []
        self.without_gradient: list[str] = []
        self._named, self._states, self._groups, self._take_in = named, states, param_groups, take_in
        self._told_of_lost = False
        self._appended: set[int] = set()

    def look(self, trained: Collection[nn.Parameter], name_of: Mapping[int, str]) -> None:
        """Takes in what the model has come to train, and names what it has lost.

        Args:
            trained: the optimizer's parameters.
            name_of: names of projected weights, by identity.

        """
        named = dict(self._named())
        if not named:
            return
        new = {name: p for name, p in named.items() if p.requires_grad and p not in self._states}
        for name, parameter in new.items():
            self._add(name, parameter)
        if new:
            size = sum(value.nbytes for p in new.values() for value in self._states[p].values())
            warnings.warn(
                f"{len(new)} parameters were unfrozen, exchanged or added since compile and are trained at full rank "
                f"from now on, with {format_bytes(size)} of states that no plan has counted: {_some(new)}. To project "
                "them, compile when they are unfrozen",
                stacklevel=5,
            )
        here = {id(parameter) for parameter in named.values()}
        lost = [name_of.get(id(p), f"one of shape {tuple(p.shape)}") for p in trained if id(p) not in here]
        if lost and not self._told_of_lost:
            self._told_of_lost = True
            warnings.warn(
                f"{len(lost)} parameters that were compiled are no longer in the model, nor trained: {_some(lost)}",
                stacklevel=5,
            )

    def name_unmoved(self, trained: Iterable[nn.Parameter], updated: Collection[int]) -> None:
        """Says which parameters the first update has left where they were, since they got no gradient.

        Args:
            trained: those that might have.
            updated: identities of those that did.
        """
        unmoved = {id(parameter) for parameter in trained if id(parameter) not in updated}
        self.without_gradient = [name for name, p in self._named() if id(p) in unmoved]
        if self.without_gradient:
            _LOGGER.warning(
                "%d trainable parameters got no gradient in the first update and did not move: %s",
                len(self.without_gradient),
                _some(self.without_gradient),
            )

    def take_again(self, names: Iterable[str]) -> Callable[[], None]:
        """Takes in the parameters of these names in this order, as the run did whose state is to be loaded.

        Returns:
            What undoes it.

        Raises:
            OptimizerError: one of them was trained from the start here, so that it stands elsewhere among the states.
        """
        named, taken = dict(self._named()), list(self.names)
        for name in names:
            if name in named and named[name] not in self._states:
                self._add(name, named[name])
            elif name not in self.names:
                raise OptimizerError(
                    f"{name} was unfrozen after compile in the run whose state this is, and is trained from the start "
                    "here: compile with it frozen, as then, load the state, and unfreeze it"
                )

        def go_back() -> None:
            for name in self.names[len(taken) :]:
                self._remove(named[name])
            self.names[:] = taken

        return go_back

    def _add(self, name: str, parameter: nn.Parameter) -> None:
        group = next((g for g in self._groups if any(p is parameter for p in g["params"])), None)
        if group is None:
            group = self._groups[0]
            group["params"].append(parameter)
            self._appended.add(id(parameter))
        self._take_in(parameter, group)
        self.names.append(name)

    def _remove(self, parameter: nn.Parameter) -> None:
        del self._states[parameter]
        if id(parameter) in self._appended:
            self._appended.remove(id(parameter))
            group = self._groups[0]["params"]
            del group[next(i for i, each in enumerate(group) if each is parameter)]


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")
