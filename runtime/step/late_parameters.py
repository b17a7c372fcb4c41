"""Parameters that became trainable after compile: unfrozen, exchanged for another one, or added.

The plan covers only the parameters that were trainable at compile. Later ones are trained at full rank, in the param
group that lists them or else in the first one. A warning reports them with the size of their states; another one
reports parameters that have left the model.
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
    """Returns a function that lists the named parameters of a model, without holding it; empty once it is gone."""
    weak = weakref.ref(model)

    def named() -> Iterable[tuple[str, nn.Parameter]]:
        alive = weak()
        return () if alive is None else alive.named_parameters()

    return named


class LateParameters:
    """Adds late parameters to one optimizer.

    Attributes:
        names: names of the parameters that have been added, in order.
        without_gradient: names of the trainable parameters without a gradient in the first update.

    Args:
        named: returns the parameters of the model with their names.
        states: optimizer states, by parameter; a parameter without one is not trained.
        param_groups: param groups of the optimizer.
        take_in: called with each new parameter and its group; creates its state.
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
        """Adds parameters that have become trainable, and warns once of parameters that have left the model.

        Args:
            trained: the parameters of the optimizer.
            name_of: names of projected weights, by ``id``.
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
        """Logs the parameters that the first update did not move, for want of a gradient.

        Args:
            trained: all trainable parameters.
            updated: ``id`` of each updated parameter.
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
        """Adds the parameters with these names in order, as the run did whose state is about to be loaded.

        Returns:
            A function that undoes the additions.

        Raises:
            OptimizerError: a parameter is trained from the start here, so its state has a different position.
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
