"""The differences to Lightning's hook order that are meant, each as a change that makes the two records equal.

Their reasons stand in docs/design/001-hook-order.md, under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hook_record import Event
from hook_scenarios import RESUMED

Events = list[Event]
CHECKPOINTERS = ("checkpointer", "model_checkpoint")


@dataclass(frozen=True)
class Deviation:
    """`theirs` and `ours` change the two records; with all deviations applied they are equal."""

    name: str
    theirs: Callable[[Events], Events] = list
    ours: Callable[[Events], Events] = list


def blocks(events: Events, depth: int | None = None) -> list[Events]:
    """`events` cut before each one that is not within the one before: a call with all that happened inside it."""
    level = min((event.depth for event in events), default=0) if depth is None else depth
    cut: list[Events] = []
    for event in events:
        if event.depth <= level or not cut:
            cut.append([event])
        else:
            cut[-1].append(event)
    return cut


def nested(events: Events, change: Callable[[list[Events]], list[Events]]) -> Events:
    """`events` with `change` applied to the blocks of each level, the innermost first."""
    inner = [[block[0], *(nested(block[1:], change) if len(block) > 1 else [])] for block in blocks(events)]
    return [event for block in change(inner) for event in block]


def checkpointers_last(level: list[Events]) -> list[Events]:
    ordered: list[Events] = []
    for block in level:
        here = block[0]
        if here.owner == "module" and here.hook not in ("on_save_checkpoint", "on_load_checkpoint"):
            waiting = []
            while ordered and ordered[-1][0].owner in CHECKPOINTERS and ordered[-1][0].hook == here.hook:
                waiting.insert(0, ordered.pop())
            ordered += [block, *waiting]
        else:
            ordered.append(block)
    return ordered


def without(owner: str, *hooks: str) -> Callable[[Events], Events]:
    """Leave out these calls; what happened inside them stays."""
    return lambda events: [e for e in events if e.owner != owner or e.hook not in hooks]


def is_call(block: Events, owner: str, hook: str) -> bool:
    return (block[0].owner, block[0].hook) == (owner, hook)


def optimizers_inside_setup(level: list[Events]) -> list[Events]:
    """`configure_optimizers` right after `strategy.setup`, put inside it."""
    merged: list[Events] = []
    for block in level:
        if merged and is_call(block, "module", "configure_optimizers") and is_call(merged[-1], "strategy", "setup"):
            merged[-1] = [*merged[-1], *(event._replace(depth=event.depth + 1) for event in block)]
        else:
            merged.append(block)
    return merged


def strategy_torn_down_late(level: list[Events]) -> list[Events]:
    """`strategy.teardown` moved before the loggers' ``finalize("success")`` that follows it."""
    moved: list[Events] = []
    torn: list[Events] = []
    for block in level:
        if is_call(block, "strategy", "teardown"):
            torn.append(block)
            continue
        if is_call(block, "logger", "finalize") and block[0].given == ("success",):
            moved += torn
            torn = []
        moved.append(block)
    return [*moved, *torn]


def unbroken(events: Events) -> Events:
    """A resumed run's record after `on_train_start` replaced by what the unbroken run did after that save."""
    at = next((i for i, event in enumerate(events) if event.owner == RESUMED), None)
    if at is None:
        return events
    whole, again = blocks(events[:at]), blocks(events[at + 1 :])
    saved = next(i for i, block in enumerate(whole) if any(_saves(event, events[at].hook) for event in block))
    begun = max(i for i, block in enumerate(again) if block[0].hook == "on_train_start")
    return [event for block in [*whole, [events[at]], *again[: begun + 1], *whole[saved + 1 :]] for event in block]


def _saves(event: Event, name: str) -> bool:
    return (event.owner, event.hook) == ("strategy", "save_checkpoint") and name in event.given


def loggers_not_before_states(level: list[Events]) -> list[Events]:
    """No `logger.save` right before states are asked for."""
    after = [*level[1:], None]
    return [
        block
        for block, following in zip(level, after, strict=True)
        if not (is_call(block, "logger", "save") and following is not None and following[0].hook == "state_dict")
    ]


def without_rehearsal(level: list[Events]) -> list[Events]:
    """No `storage.check`, nor what was asked for the checkpoint that it checks."""
    left: list[Events] = []
    for block in level:
        if is_call(block, "storage", "check"):
            while left and left[-1][0].hook in ("state_dict", "on_save_checkpoint"):
                left.pop()
        else:
            left.append(block)
    return left


def callbacks_loading(events: Events) -> Events:
    """No `load_state_dict` of callbacks in a run that is no fit."""
    if any(event.hook in ("on_fit_start", "on_train_batch_end") for event in events):
        return events
    return [e for e in events if e.hook != "load_state_dict" or e.owner == "data"]


def saved_once(level: list[Events]) -> list[Events]:
    """Of two saves in a row, the second under the name of the last, only the first."""
    left: list[Events] = []
    for block in level:
        left.append(block)
        if is_call(block, "logger", "after_save_checkpoint"):
            begins = [i for i, b in enumerate(left) if is_call(b, "logger", "after_save_checkpoint")]
            if len(begins) > 1 and any(_saves(b[0], "last.ckpt") for b in left[begins[-2] :]):
                del left[begins[-2] + 1 :]
    return left


def last_at_the_end(events: Events) -> Events:
    """No save under the name of the last inside `on_train_epoch_end`."""
    return [
        event
        for block in blocks(events)
        for event in (block[:1] if block[0].hook == "on_train_epoch_end" and _of_the_last(block) else block)
    ]


def _of_the_last(block: Events) -> bool:
    return any(_saves(event, "last.ckpt") for event in block)


def states_at_a_cut(level: list[Events]) -> list[Events]:
    """No `state_dict` of callbacks right before the end of an epoch."""
    left: list[Events] = []
    for block in level:
        if block[0].hook == "on_train_epoch_end":
            while left and left[-1][0].hook == "state_dict":
                left.pop()
        left.append(block)
    return left


def sanity_check_after_resume(events: Events) -> Events:
    """A resumed run without its sanity check; the loaders that it asked for stay, after the training loaders."""
    at = next((i for i, event in enumerate(events) if event.owner == RESUMED), len(events))
    level = blocks(events[at + 1 :])
    stages = [dict(block[0].seen).get("stage") for block in level]
    if "sanity_check" not in stages:
        return events
    asked = next(block for block in level if block[0].hook == "val_dataloader")
    left = [block for block, stage in zip(level, stages, strict=True) if stage != "sanity_check"]
    begun = next(i for i, block in enumerate(left) if block[0].hook == "train_dataloader")
    early = as_if_asked_with(asked, left[begun][0])
    return [*events[: at + 1], *(event for b in [*left[: begun + 1], early, *left[begun + 1 :]] for event in b)]


def as_if_asked_with(block: Events, trained: Event) -> Events:
    """`val_dataloader` as it is where it follows `train_dataloader`."""
    seen = tuple((name, "validate" if name == "stage" else value) for name, value in trained.seen)
    return [event._replace(seen=seen) for event in block]


def told_of_an_exception(events: Events) -> Events:
    """From `on_exception` on: not the stage and the mode."""
    at = next((i for i, event in enumerate(events) if event.hook == "on_exception"), len(events))
    return [blind(event, "stage", "train_mode") if i >= at else event for i, event in enumerate(events)]


def training_put_back(events: Events) -> Events:
    """No `on_validation_model_train` right before `on_exception`."""
    at = next((i for i, event in enumerate(events) if event.hook == "on_exception"), 0)
    cut = at and events[at - 1].hook == "on_validation_model_train"
    return told_of_an_exception([*events[: at - 1], *events[at:]] if cut else events)


def values_of_a_sanity_check(events: Events) -> Events:
    return [blind(event, "metrics") if ("stage", "sanity_check") in event.seen else event for event in events]


def blind(event: Event, *names: str) -> Event:
    """`event` without some of what is seen from inside it."""
    return event._replace(seen=tuple((name, value) for name, value in event.seen if name not in names))


def first_of_an_epoch(events: Events) -> Events:
    return [blind(event, "last_batch") if event.hook == "on_train_epoch_start" else event for event in events]


def known_before_the_first_step(events: Events) -> Events:
    """A resumed run up to its `on_train_start`: not what is known of the epoch and its values."""
    at = next((i for i, event in enumerate(events) if event.owner == RESUMED), len(events))
    begun = [i for i, event in enumerate(events) if i > at and event.hook == "on_train_start"]
    return [blind(e, "epoch", "metrics") if begun and at < i <= begun[-1] else e for i, e in enumerate(events)]


def gradients_until_zeroed(events: Events) -> Events:
    """A resumed run up to where gradients are zeroed anyway: not whether there are any."""
    at = next((i for i, event in enumerate(events) if event.owner == RESUMED), len(events))
    ends = ("optimizer_zero_grad", "on_validation_model_zero_grad")
    zeroed = next((i for i, event in enumerate(events) if i > at and event.hook in ends), at)
    return [blind(event, "gradients") if at < i <= zeroed else event for i, event in enumerate(events)]


def validation_data_early(level: list[Events]) -> list[Events]:
    """The first `val_dataloader` moved to `train_dataloader`, where it comes later than `on_train_start`."""
    names = [block[0].hook for block in level]
    if "val_dataloader" not in names or "on_train_start" not in names:
        return level
    at = names.index("val_dataloader")
    if at < names.index("on_train_start"):
        return level
    begun = names.index("train_dataloader")
    early = as_if_asked_with(level[at], level[begun][0])
    rest = [*level[:at], *level[at + 1 :]]
    return [*rest[: begun + 1], early, *rest[begun + 1 :]]


def without_key(events: Events) -> Events:
    def plain(value: object) -> object:
        return value.replace(" milepost", "") if isinstance(value, str) and value.startswith("{") else value

    return [event._replace(given=tuple(plain(value) for value in event.given)) for event in events]


def without_options(events: Events) -> Events:
    return [e._replace(given=e.given[:2]) if (e.owner, e.hook) == ("storage", "save_checkpoint") else e for e in events]


DEVIATIONS = [
    Deviation("Checkpointers come last", theirs=lambda events: nested(events, checkpointers_last)),
    Deviation("Optimizers after the strategy", ours=lambda events: nested(events, optimizers_inside_setup)),
    Deviation(
        "The strategy is torn down after the hooks", theirs=lambda events: nested(events, strategy_torn_down_late)
    ),
    Deviation("Storage is asked", ours=without("storage", "exists", "list", "verify")),
    Deviation("The key milepost", ours=without_key),
    Deviation("The data module edits checkpoints", ours=without("data", "on_save_checkpoint", "on_load_checkpoint")),
    Deviation("Storage options where given", theirs=without_options),
    Deviation("States where an epoch is cut", ours=lambda events: nested(events, states_at_a_cut)),
    Deviation("Loggers write before a save", ours=lambda events: nested(events, loggers_not_before_states)),
    Deviation("A rehearsal before the first step", ours=lambda events: nested(events, without_rehearsal)),
    Deviation("No sanity check after a resume", theirs=sanity_check_after_resume),
    Deviation("A resumed run goes on as the unbroken one", theirs=unbroken),
    Deviation("Training is put back before an exception", theirs=told_of_an_exception, ours=training_put_back),
    Deviation("Callbacks keep their state in an evaluation", theirs=callbacks_loading),
    Deviation("One write for two names", theirs=lambda e: nested(e, saved_once), ours=without("storage", "link")),
    Deviation("The last is the last", ours=last_at_the_end),
    Deviation("Validation data at the start", theirs=lambda events: nested(events, validation_data_early)),
    Deviation("All loaders of a sanity check count", theirs=values_of_a_sanity_check, ours=values_of_a_sanity_check),
    Deviation("No last batch before the first", theirs=first_of_an_epoch, ours=first_of_an_epoch),
    Deviation("Values are known after a resume", theirs=known_before_the_first_step, ours=known_before_the_first_step),
    Deviation("Spent gradients are not saved", theirs=gradients_until_zeroed, ours=gradients_until_zeroed),
]


def aligned(theirs: Events, ours: Events, deviations: list[Deviation]) -> tuple[Events, Events]:
    """Both records after `deviations`."""
    for deviation in deviations:
        theirs, ours = deviation.theirs(theirs), deviation.ours(ours)
    return theirs, ours
