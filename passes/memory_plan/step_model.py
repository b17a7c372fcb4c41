"""Models the memory and time of a whole step as sums over its blocks, from simulated steps of a short model.

    live bytes at an event = persistent + saved by the blocks that wait for their backward
                           + left by finished blocks (gradients; in evaluation the cache) + the rest

In a row of equal blocks the rest does not depend on which block runs. The second block of a short row takes the same as
every block of a long row except the first and the last. So steps of three equal blocks, simulated once per share of
activations that a block may keep, give the events of a step of any number of blocks under any policy. The result equals
a simulation of all blocks to the byte (tests/test_planner.py).
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from galore_fx.passes.memory_plan.activation_policy import MomentBytes, PolicyProblem
from galore_fx.passes.memory_plan.block_calls import Call, Scene, scene_at
from galore_fx.passes.memory_plan.storage_counter import Moment
from galore_fx.plan_record import Prediction

Sizes = dict[str, int]


@dataclasses.dataclass(frozen=True)
class PlayedCall:
    """One call of a block in a simulated step.

    Attributes:
        block: index of the simulated block.
        number: number of earlier calls of this block in the step.
        saves: whether the call has a backward.
        saved: bytes by category that its forward allocates and that live when the first backward of a block begins.
        left: bytes by category that stay alive when all blocks are finished.
        seconds: its time by phase.
    """

    block: int
    number: int
    saves: bool
    saved: Sizes
    left: Sizes
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class PlayedScene:
    """The highest event of a phase with the same state of all calls.

    Attributes:
        phase: forward, backward, update, refresh or eval.
        scene: the state of all calls.
        rest: bytes by category, without persistent, saved and left bytes.
    """

    phase: str
    scene: Scene
    rest: Sizes


@dataclasses.dataclass(frozen=True)
class PlayedStep:
    """One simulated step of the short model.

    Attributes:
        name: "", "refreshing " or "eval".
        calls: calls of its blocks.
        scenes: its states with their highest events, in temporal order.
        seconds: time outside blocks by phase.
    """

    name: str
    calls: tuple[PlayedCall, ...]
    scenes: tuple[PlayedScene, ...]
    seconds: dict[str, float]


def played_step(
    name: str,
    calls: Sequence[Call],
    moments: Sequence[Moment],
    saved: Sequence[Sizes],
    left: Sequence[Sizes],
    costs: Sequence[tuple[int, str, float]],
) -> PlayedStep:
    """Groups the events of a simulated step by phase and state of the calls, and keeps the highest of each group.

    Args:
        name: name of the step.
        calls: calls of blocks.
        moments: live bytes after each event.
        saved, left: bytes by category for each call.
        costs: (event, phase, seconds) of each operation.
    """
    highest: dict[tuple[str, Scene], Sizes] = {}
    for moment in moments:
        scene = scene_at(list(calls), moment)
        known = [*(saved[i] for i in scene.saving), *(left[i] for i in scene.done)]
        rest = _total([moment.categories], known)
        key = moment.phase, scene
        if key not in highest or sum(rest.values()) > sum(highest[key].values()):
            highest[key] = rest
    scenes = tuple(PlayedScene(phase, scene, rest) for (phase, scene), rest in highest.items())
    by_call: list[dict[str, float]] = [{} for _ in calls]
    elsewhere: dict[str, float] = {}
    for number, phase, seconds in costs:
        found = next((i for i, call in enumerate(calls) if _covers(call, number)), None)
        spent = elsewhere if found is None else by_call[found]
        spent[phase] = spent.get(phase, 0.0) + seconds
    played = tuple(
        PlayedCall(call.block, call.number, call.backward is not None, saved[i], left[i], by_call[i])
        for i, call in enumerate(calls)
    )
    return PlayedStep(name, played, scenes, elsewhere)


def _covers(call: Call, number: int) -> bool:
    return any(span is not None and span[0] <= number < span[1] for span in (call.forward, call.backward))


@dataclasses.dataclass(frozen=True)
class _Moment:
    """One event of the whole step; ``rest`` and saved bytes are by alternative."""

    phase: str
    running: int | None
    saving: tuple[tuple[int, tuple[Sizes, ...]], ...]
    left: Sizes
    rest: tuple[Sizes, ...]

    def sizes(self, choice: Sequence[int]) -> Sizes:
        own = self.rest[choice[self.running]] if self.running is not None else _highest(self.rest)
        return _total([self.left, own, *(saved[choice[block]] for block, saved in self.saving)])


class StepModel:
    """Steps of a model with any number of blocks.

    Attributes:
        shares: the alternatives: shares of activations that a block may keep.

    Args:
        played: steps of the short model by the share of activations that its blocks keep; the same steps in the same
            order for each share.
        members: for each block of the short model, the blocks that it represents.
        persistent: bytes by category that live through the whole step.
        update_scale: elements of all parameters divided by the elements of the short model's.
        refresh_limit: most blocks that refresh in one step; None for all, as in the simulated steps.
    """

    def __init__(
        self,
        played: Mapping[float, Sequence[PlayedStep]],
        members: Sequence[Sequence[int]],
        persistent: Sizes,
        update_scale: float,
        refresh_limit: int | None,
    ) -> None:
        self.shares = tuple(played)
        self._played, self._members, self._persistent = played, members, persistent
        self._update_scale = update_scale
        self._num_blocks = sum(map(len, members))
        self._refresh_limit = refresh_limit if refresh_limit is not None and refresh_limit < self._num_blocks else None
        self._moments = [moment for index in range(len(played[self.shares[0]])) for moment in self._expand(index)]

    def problem(self) -> PolicyProblem:
        """Returns the problem of choosing a share for each block; alternatives are indices of ``shares``."""
        kept = sum(self._persistent.values())
        seconds = [
            tuple(sum(self._block_seconds(block, share).values()) for share in self.shares)
            for block in range(self._num_blocks)
        ]
        moments = []
        for moment in self._moments:
            saving = tuple((b, tuple(sum(sizes.values()) for sizes in saved)) for b, saved in moment.saving)
            fixed = kept + sum(moment.left.values())
            own = tuple(fixed + sum(sizes.values()) for sizes in moment.rest)
            moments.append(MomentBytes(saving, moment.running, own if moment.running is not None else (max(own),)))
        return PolicyProblem(tuple(seconds), tuple(moments))

    def prediction(self, choice: Sequence[int], uncaptured: tuple[str, ...]) -> Prediction:
        """Predicts peak, phases, categories and times under a choice of one alternative per block.

        Args:
            choice: an index of ``shares`` for each block.
            uncaptured: names of the blocks that run uncompiled.
        """
        kept = sum(self._persistent.values())
        phases, peak, categories = {"load": kept}, kept, dict(self._persistent)
        timeline = []
        for moment in self._moments:
            sizes = _total([self._persistent, moment.sizes(choice)])
            total = sum(sizes.values())
            phases[moment.phase] = max(phases.get(moment.phase, 0), total)
            if total > peak:
                peak, categories = total, sizes
            if not moment.phase.startswith("refresh") and moment.phase != "eval":
                timeline.append((moment.phase, sizes))
        phases["save"] = kept
        return Prediction(
            peak, phases, categories, tuple(timeline), uncaptured, self._seconds(choice), dict(self._persistent)
        )

    def _seconds(self, choice: Sequence[int]) -> dict[str, float]:
        """Returns the seconds of a steady step by phase; backward time above the fastest share's is recomputation."""
        steady = self._played[self.shares[0]][_STEADY]
        found = dict(steady.seconds)
        if "update" in found:
            found["update"] *= self._update_scale
        for block, option in enumerate(choice):
            times = self._block_seconds(block, self.shares[option])
            least = min(self._block_seconds(block, share).get("backward", 0.0) for share in self.shares)
            recomputed = times.get("backward", 0.0) - least
            if recomputed > 0:
                times = {**times, "backward": least, "recompute": recomputed}
            for phase, seconds in times.items():
                found[phase] = found.get(phase, 0.0) + seconds
        return found

    def _block_seconds(self, block: int, share: float) -> dict[str, float]:
        short = next(i for i, members in enumerate(self._members) if block in members)
        found: dict[str, float] = {}
        for call in self._played[share][_STEADY].calls:
            if call.block == short:
                for phase, seconds in call.seconds.items():
                    found[phase] = found.get(phase, 0.0) + seconds
        return found

    def _expand(self, index: int) -> Iterator[_Moment]:
        """Yields the events of one step, each simulated one once for every block that the running block represents."""
        steps, steady = self._steps(index), self._steps(_STEADY)
        rests, steady_rests = _rests(steps), _rests(steady)
        is_limited = self._refresh_limit is not None and index == _REFRESHING
        for played in steps[0].scenes:
            key = played.phase, played.scene
            rest = tuple(found.get(key, {}) for found in rests)
            name = played.phase if played.phase in ("refresh", "eval") else steps[0].name + played.phase
            scene = played.scene
            members: Sequence[int | None] = (None,)
            if scene.running is not None:
                members = self._members[steps[0].calls[scene.running].block]
                if scene.runs_backward:
                    members = members[::-1]
            for block in members:
                found = self._scene_of_blocks(steps[0].calls, scene, block)
                if not is_limited:
                    yield _moment(name, steps, found, rest)
                    continue
                assert self._refresh_limit is not None
                others = _costliest(found, steps, steady)
                at_once = self._refresh_limit - (block is not None)
                yield _moment(name, steps, found, rest, steady, {block, *others[:at_once]})
                if block is not None and key in steady_rests[0]:  # this block is steady while others refresh
                    rest_of_steady = tuple(rest.get(key, {}) for rest in steady_rests)
                    yield _moment(name, steps, found, rest_of_steady, steady, {*others[: self._refresh_limit]})

    def _steps(self, index: int) -> list[PlayedStep]:
        """Returns one step for each share."""
        return [self._played[share][index] for share in self.shares]

    def _scene_of_blocks(self, calls: Sequence[PlayedCall], scene: Scene, running: int | None) -> "_BlockScene":
        """Returns the state of the whole model while ``running`` runs, a block that the simulated one represents."""
        saving = [(call, block) for call in scene.saving for block in self._members[calls[call].block]]
        done = [(call, block) for call in scene.done for block in self._members[calls[call].block]]
        if scene.running is not None and running is not None:
            # In the row of the running block, earlier blocks have run forward; in a backward, later ones are finished.
            others = self._members[calls[scene.running].block]
            before = [(scene.running, block) for block in others if block < running]
            (saving if calls[scene.running].saves else done).extend(before)
            if scene.runs_backward:
                done += [(scene.running, block) for block in others if block > running]
        return _BlockScene(running, saving, done)


@dataclasses.dataclass(frozen=True)
class _BlockScene:
    """The state of all calls in terms of the whole model's blocks.

    Attributes:
        running: the running block; None between blocks.
        saving: calls with live saved bytes: (index in the simulated step, block).
        done: finished calls, likewise.
    """

    running: int | None
    saving: list[tuple[int, int]]
    done: list[tuple[int, int]]


def _moment(
    phase: str,
    steps: Sequence[PlayedStep],
    scene: _BlockScene,
    rest: tuple[Sizes, ...],
    steady: Sequence[PlayedStep] = (),
    renewed: Collection[int | None] = (),
) -> _Moment:
    """Builds an event of the whole step.

    Args:
        phase: name of the phase.
        steps: the step for each share.
        scene: the state of all calls.
        rest: bytes that are neither persistent, saved nor left, for each share.
        steady: the steady step for each share, for blocks not in ``renewed``; () if all blocks follow ``steps``.
        renewed: blocks that refresh.
    """

    def of(block: int) -> Sequence[PlayedStep]:
        return steady if steady and block not in renewed else steps

    saved = tuple((block, tuple(step.calls[call].saved for step in of(block))) for call, block in scene.saving)
    left = _total([of(block)[0].calls[call].left for call, block in scene.done])
    return _Moment(phase, scene.running, saved, left, rest)


def _costliest(scene: _BlockScene, steps: Sequence[PlayedStep], steady: Sequence[PlayedStep]) -> list[int]:
    """Returns the other blocks whose refresh takes more memory than a steady step, by the difference, highest first."""
    more: dict[int, int] = {}
    for call, block in scene.saving:
        pairs = zip(steps, steady, strict=True)
        saved = (_size(a.calls[call].saved) - _size(b.calls[call].saved) for a, b in pairs)
        more[block] = more.get(block, 0) + max(saved)
    for call, block in scene.done:
        left = _size(steps[0].calls[call].left) - _size(steady[0].calls[call].left)
        more[block] = more.get(block, 0) + left
    return sorted((b for b, size in more.items() if size > 0 and b != scene.running), key=lambda b: -more[b])


def _rests(steps: Sequence[PlayedStep]) -> list[dict[tuple[str, Scene], Sizes]]:
    return [{(s.phase, s.scene): s.rest for s in step.scenes} for step in steps]


def _size(sizes: Sizes) -> int:
    return sum(sizes.values())


_STEADY, _REFRESHING = 0, 1  # positions of the simulated steps


def _total(added: Sequence[Sizes], taken: Sequence[Sizes] = ()) -> Sizes:
    found: Sizes = {}
    for sizes in added:
        for key, size in sizes.items():
            found[key] = found.get(key, 0) + size
    for sizes in taken:
        for key, size in sizes.items():
            found[key] = found.get(key, 0) - size
    return found


def _highest(alternatives: Sequence[Sizes]) -> Sizes:
    return max(alternatives, key=lambda sizes: sum(sizes.values()))
