"""A whole step as sums of what its blocks take, from steps of a model of a few blocks.

    one moment = persistent + saved by the blocks that wait for their backward
               + left by the blocks that are over (gradients; in evaluation the cache) + the rest

In a row of equal blocks the rest does not depend on which of them runs: what the second block of a short row takes, all
but the first and last of a long one take. So steps of three equal blocks, played once per share of activations that a
block may keep, give the moments of a step of any number of blocks under any policy. Equal to the byte to a step of all
blocks played as a whole (tests/test_planner.py).
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
    """One call of a block in a played step.

    Attributes:
        block: index of the played block.
        number: how many calls of this block came before it in the step.
        saves: whether it waits for a backward.
        saved: bytes by category that its forward makes and that are alive when the first backward of a block begins.
        left: bytes by category that stay when all blocks are over.
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
    """The highest moment of a scene.

    Attributes:
        phase: forward, backward, update, refresh or eval.
        scene: what goes on.
        rest: bytes by category, without what is persistent, saved or left.
    """

    phase: str
    scene: Scene
    rest: Sizes


@dataclasses.dataclass(frozen=True)
class PlayedStep:
    """One step of the short model.

    Attributes:
        name: "", "refreshing " or "eval".
        calls: of its blocks.
        scenes: in the order of time.
        seconds: time by phase of all that is no block.
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
    """Sorts the moments of a played step by what goes on.

    Args:
        name: of the step.
        calls: of blocks.
        moments: after each event.
        saved, left: for each call bytes by category.
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
    """One moment of the whole step; bytes by alternative where they depend on it."""

    phase: str
    running: int | None
    saving: tuple[tuple[int, tuple[Sizes, ...]], ...]
    left: Sizes
    rest: tuple[Sizes, ...]

    def sizes(self, choice: Sequence[int]) -> Sizes:
        own = self.rest[choice[self.running]] if self.running is not None else _highest(self.rest)
        return _total([self.left, own, *(saved[choice[block]] for block, saved in self.saving)])


class StepModel:
    """Steps of a model of any number of blocks.

    Args:
        played: steps of the short model, for each share of activations that its blocks have kept; equally many for
            each, in the same order.
        members: for each block of the short model the blocks that it stands for.
        persistent: bytes by category that live through the whole step.
        update_scale: elements of all parameters over those of the short model's.
        refresh_limit: how many blocks may renew their bases in the same step, None for all, as they do when played.
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
        """The choice of a share for each block; alternatives are numbered as ``shares``."""
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
        """Peak, phases, categories and times under a choice of one alternative per block."""
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
        """Of a steady step, by phase; what a backward takes above that of the fastest share is recomputation."""
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
        """The moments of one step, each scene once for every block that the running one stands for."""
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
                if block is not None and key in steady_rests[0]:  # it is not its turn, but that of others
                    rest_of_steady = tuple(rest.get(key, {}) for rest in steady_rests)
                    yield _moment(name, steps, found, rest_of_steady, steady, {*others[: self._refresh_limit]})

    def _steps(self, index: int) -> list[PlayedStep]:
        """One step, for each share."""
        return [self._played[share][index] for share in self.shares]

    def _scene_of_blocks(self, calls: Sequence[PlayedCall], scene: Scene, running: int | None) -> "_BlockScene":
        """What is saved and left while a block runs of those that the scene's running one stands for."""
        saving = [(call, block) for call in scene.saving for block in self._members[calls[call].block]]
        done = [(call, block) for call in scene.done for block in self._members[calls[call].block]]
        if scene.running is not None and running is not None:
            # Of the blocks that the running one stands for, those before it have run forward, those behind it backward.
            others = self._members[calls[scene.running].block]
            before = [(scene.running, block) for block in others if block < running]
            (saving if calls[scene.running].saves else done).extend(before)
            if scene.runs_backward:
                done += [(scene.running, block) for block in others if block > running]
        return _BlockScene(running, saving, done)


@dataclasses.dataclass(frozen=True)
class _BlockScene:
    """A scene in terms of the whole model's blocks.

    Attributes:
        running: the block that runs.
        saving: calls, by their number in the played step, whose saved bytes are alive, and the block of each.
        done: calls that are over.
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
    """A moment of a step.

    Args:
        phase: its name.
        steps: for each share the step.
        scene: what goes on.
        rest: for each share all that belongs to no other block.
        steady: where given, what blocks take that are not among ``renewed``.
        renewed: blocks whose bases are renewed.
    """

    def of(block: int) -> Sequence[PlayedStep]:
        return steady if steady and block not in renewed else steps

    saved = tuple((block, tuple(step.calls[call].saved for step in of(block))) for call, block in scene.saving)
    left = _total([of(block)[0].calls[call].left for call, block in scene.done])
    return _Moment(phase, scene.running, saved, left, rest)


def _costliest(scene: _BlockScene, steps: Sequence[PlayedStep], steady: Sequence[PlayedStep]) -> list[int]:
    """The blocks other than the running one, those first that take most more when their bases are renewed."""
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


_STEADY, _REFRESHING = 0, 1  # positions of the played steps


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
