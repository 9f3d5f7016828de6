"""What the result of an evaluation says, in tables of texts: the same for a terminal, a Markdown file and a page.

The result is what ``metrics.json`` holds (docs/evaluation.md). Its ``scores`` are by resolution; those of a folder of pictures,
which has none, are taken as of one without a name. A score is an object with ``value``, ``standard_error`` and ``interval``, or a
plain number, as older files have. What is of another form is left out. Called by `score_report` and `sweeps`;
`tracked` by `evaluate`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.markup import cell

TRAINED, UNTRAINED, REFERENCE = "trained", "untrained", "reference"
"""Whose scores: the model's, and those of the yardsticks."""
_YARDSTICKS = {UNTRAINED: "untrained network", REFERENCE: "real pictures"}

INTERVAL = "95 % interval: where another draw of as many pictures would put the score, with the reference as it is"
_ALIKE = 0.1  # medians of distances that differ by less count as equal
_LOWER_IS_BETTER = ("fid", "fd", "kid", "kd", "cmmd")
_ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Score:
    """A number, with what is known of its chance."""

    value: float
    interval: tuple[float, float] | None = None
    deviation: float | None = None
    "Over splits or subsets, as other tools print it."

    @classmethod
    def read(cls, entry: object) -> "Score | None":
        """Of an entry of the result; None where there is no finite value."""
        if not isinstance(entry, Mapping):
            value = finite(entry)
            return None if value is None else cls(value)
        value = finite(entry.get("value"))
        if value is None:
            return None
        ends = entry.get("interval")
        found = [finite(end) for end in ends] if isinstance(ends, list | tuple) else []
        match found:
            case [float(low), float(high)]:
                return cls(value, (low, high), finite(entry.get("deviation")))
        return cls(value, None, finite(entry.get("deviation")))

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.interval is None else (self.interval[1] - self.interval[0]) / 2


Named = dict[str, Score]
"Scores by name."
Tree = dict[str, dict[str, Named]]
"Whose scores -> resolution as text, empty where there is none -> scores."


class Table(NamedTuple):
    """Texts; the first cell of a row names it."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    prose: bool = False
    "Whether the cells are words and not numbers."


def finite(value: object) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(tree: object, key: str) -> Mapping[str, Any]:
    """An entry of a tree that is a mapping; an empty one where there is none of the kind."""
    found = tree.get(key) if isinstance(tree, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def read_scores(scores: Mapping[str, Any]) -> Tree:
    """The scores of a result, of a setting of its sweep, or of an older one."""
    sizes = {key: value for key, value in scores.items() if str(key).isdigit()} or {"": scores}
    tree: Tree = {}
    for kind in (TRAINED, *_YARDSTICKS):
        for size, entries in sizes.items():
            named = _named(entries if kind == TRAINED else mapping(entries, kind))
            if named:
                tree.setdefault(kind, {})[str(size)] = named
    return tree


def _named(entries: object) -> Named:
    if not isinstance(entries, Mapping):
        return {}
    found = {name: Score.read(entry) for name, entry in entries.items()}
    return {str(name): score for name, score in found.items() if score is not None}


def is_distance(name: str) -> bool:
    """Whether a score is a Frechet distance, of whatever extractor."""
    return name.startswith(("fid", "fd")) and not name.endswith("_infinity")


def is_inception_score(name: str) -> bool:
    """Whether a score is one of the Inception score's kind; older files have its deviation beside it."""
    return (name == "is" or name.startswith("is_")) and not name.endswith("_std")


def first(tree: Tree, rule: Callable[[str], bool]) -> str | None:
    """The first name in the result that a rule fits."""
    everywhere = (scores for sizes in tree.values() for scores in sizes.values())
    return next((name for scores in everywhere for name in scores if rule(name)), None)


def label(name: str) -> str:
    """A score's name; Inception's with the published weights have the published ones."""
    return {"fid": "FID", "is": "IS", "clip_score": "CLIP score", "cmmd": "CMMD"}.get(name, name)


def direction(name: str) -> str:
    """Which way is better."""
    return "lower is better" if name.startswith(_LOWER_IS_BETTER) else "higher is better"


def size_label(size: str) -> str:
    """A resolution as text."""
    return f"{size} px" if size else "pictures"


def with_half(score: Score | None) -> str:
    """12.35 ± 0.41: value and half of its interval."""
    if score is None:
        return _ABSENT
    if not score.half:
        return cell(score.value)
    digits = _decimals(score.value, score.half)
    return f"{score.value:,.{digits}f} ± {score.half:,.{digits}f}"


def with_interval(score: Score | None) -> str:
    """12.35 (11.94 to 12.76): value and interval."""
    if score is None or score.interval is None or not score.half:
        return with_half(score)
    digits = _decimals(score.value, score.half)
    low, high = score.interval
    return f"{score.value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _decimals(value: float, half: float) -> int:
    """As many as show two digits of the interval, up to six of the value."""
    most = 5 - (math.floor(math.log10(abs(value))) if value else 0)
    return max(0, min(1 - math.floor(math.log10(half)), most))


def headline(tree: Tree, shown: Callable[[Score | None], str]) -> Table:
    """The table in the paper's shape: a row a resolution, Frechet distance and Inception-style score."""
    rows = [
        (size_label(size), *cells)
        for size, cells in _headline_cells(tree.get(TRAINED, {}), tree, shown)
    ]
    return Table(("resolution", *map(label, columns(tree))), rows)


def yardsticks(tree: Tree, shown: Callable[[Score | None], str]) -> Table:
    """The same columns of what is no model: a network without training, and real pictures."""
    rows = [
        (f"{told}, {size_label(size)}", *cells)
        for kind, told in _YARDSTICKS.items()
        for size, cells in _headline_cells(tree.get(kind, {}), tree, shown)
    ]
    return Table(("yardstick", *map(label, columns(tree))), rows)


def columns(tree: Tree) -> list[str]:
    """Names of the Frechet distance and the Inception-style score, of those that there are."""
    found = (first(tree, rule) for rule in (is_distance, is_inception_score))
    return [name for name in found if name is not None]


def _headline_cells(
    sizes: Mapping[str, Named], tree: Tree, shown: Callable[[Score | None], str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Resolution and texts of those that have any of the columns."""
    names = columns(tree)
    for size, scores in sizes.items():
        if any(name in scores for name in names):
            yield size, tuple(shown(scores.get(name)) for name in names)


def everything(tree: Tree, shown: Callable[[Score | None], str]) -> Table:
    """All scores: a row each, a column a resolution."""
    sizes = list(dict.fromkeys(size for found in tree.values() for size in found))
    rows = []
    for kind, found in tree.items():
        named = [found.get(size, {}) for size in sizes]
        whose = f"{_YARDSTICKS[kind]}: " if kind in _YARDSTICKS else ""
        for name in dict.fromkeys(name for scores in named for name in scores):
            each = [scores.get(name) for scores in named]
            rows.append((whose + label(name), *map(shown, each)))
            deviations = [score and score.deviation for score in each]
            if any(value is not None for value in deviations):
                cells = (_ABSENT if value is None else cell(value) for value in deviations)
                rows.append((f"{whose}{label(name)}, deviation", *cells))
    return Table(("score", *map(size_label, sizes)), rows)


def summary(settings: Mapping[str, Any]) -> str:
    """What was scored, in one line."""
    sampler, steps = settings.get("sampler"), settings.get("num_steps")
    guidance, extractor = settings.get("guidance"), settings.get("extractor")
    split = settings.get("split")
    parts = [
        _count(settings, "num_images", "pictures drawn"),
        _count(settings, "num_references", f"of {split} as reference" if split else "as reference"),
        f"{steps} steps of {sampler}" if sampler and steps else "",
        "" if guidance is None else f"guidance {cell(guidance)}",
        f"features of {extractor}" if extractor else "",
    ]
    return ", ".join(filter(None, parts))


def _count(settings: Mapping[str, Any], key: str, told: str) -> str:
    number = finite(settings.get(key))
    return "" if number is None else f"{number:,.0f} {told}"


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """What must be said about the scores."""
    found = result.get("warnings")
    return [str(warning) for warning in found] if isinstance(found, list | tuple) else []


def memorisation_sentence(memorisation: Mapping[str, Any]) -> str:
    """What the medians of the distances to the nearest training pictures say; empty where they are missing.

    Args:
        memorisation: entry of the result; distances of what was drawn, and of real pictures that were not trained on.
    """
    drawn = finite(memorisation.get("median_distance"))
    real = finite(memorisation.get("median_distance_of_reference"))
    if drawn is None:
        return ""
    number = finite(memorisation.get("num_training_images"))
    size = memorisation.get("resolution")
    told = (
        f"Half of the pictures drawn lie within {cell(drawn)} of the nearest of "
        f"{'all' if number is None else f'{number:,.0f}'} training pictures"
        f"{'' if size is None else f', at {size} px'}"
    )
    if real is None:
        return f"{told}."
    told += f"; of real pictures that were not trained on, within {cell(real)}. "
    if real <= 0:
        return f"{told}The real ones are training pictures themselves, so nothing can be compared."
    closer = 1 - drawn / real
    if closer > _ALIKE:
        return (
            f"{told}What is drawn is {100 * closer:.0f} % closer to the training pictures than real pictures are, as copies "
            "would be: compare the pairs."
        )
    verdict = "farther away than" if closer < -_ALIKE else "about as far away as"
    return (
        f"{told}What is drawn is {verdict} real pictures are: most of it is no copy of a training picture. Single copies "
        "would show in the pairs."
    )


def pairs(memorisation: Mapping[str, Any]) -> Table:
    """Drawn pictures, each with the nearest training picture."""
    head = ("picture", "its caption", "nearest row of training", "its caption", "distance")
    return Table(head, list(_pairs(memorisation.get("nearest"))), prose=True)


def _pairs(nearest: object) -> Iterator[tuple[str, ...]]:
    for drawn in nearest if isinstance(nearest, list) else ():
        neighbours = drawn.get("neighbours") if isinstance(drawn, Mapping) else None
        if not isinstance(neighbours, list) or not neighbours:
            continue
        closest = neighbours[0]
        if isinstance(closest, Mapping):
            values = (closest.get("row"), closest.get("caption"), closest.get("distance"))
            cells = (drawn.get("index"), drawn.get("caption"), *values)
            yield tuple(map(cell, cells))


def tracked(result: Mapping[str, Any]) -> dict[str, float]:
    """The model's scores under flat names, ``evaluate/fid/512``, for what shows a run."""
    sizes = read_scores(mapping(result, "scores")).get(TRAINED, {})
    return {
        "/".join(filter(None, ("evaluate", name, size))): score.value
        for size, scores in sizes.items()
        for name, score in scores.items()
    }
