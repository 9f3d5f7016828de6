"""What pages and drawings look like: CSS, with colours for light and dark surroundings.

Lines have classes: ``kind-0`` ... for kinds, in Okabe and Ito's colours (https://jfly.uni-koeln.de/color/), and ``order-0`` ...
for what has an order, in viridis; both can be told apart by people who see fewer colours. Called by `charts` and by those who
make pages.
"""

import re
from collections.abc import Mapping

NUM_COLORS = 8
"""Classes ``kind-0`` ... and ``order-0`` ..."""

_COLORS = {
    "ink": ("#1c1c22", "#e8e8ee"),
    "faint": ("#66666f", "#a0a0ac"),
    "rule": ("#e4e4ea", "#33333c"),
    "paper": ("#ffffff", "#141418"),
    "card": ("#fafafc", "#1b1b21"),
    "accent": ("#0072b2", "#6cb8ec"),
    "good": ("#00704f", "#2fc79b"),
    "bad": ("#c0341d", "#ff7a5c"),
}
"""Of pages by the names of their CSS variables: in light surroundings and in dark ones."""

_PALETTES = {
    "kind": (
        ("#0072b2", "#d55e00", "#00805e", "#b0558a", "#a87400", "#2b8fc4", "#5b5b66", "#7a4fd0"),
        ("#4aa8e8", "#ff8a3d", "#2fc79b", "#e693c4", "#f0b429", "#8fd3ff", "#b9b9c6", "#b79bff"),
    ),
    "order": (
        ("#440154", "#46327e", "#365c8d", "#277f8e", "#1fa187", "#3fa85b", "#7fa51e", "#b59a00"),
        ("#9a6ff0", "#7c8cf2", "#5aa5e6", "#3cbccb", "#35cfa5", "#66db7d", "#a8e04f", "#f5e626"),
    ),
}
"""Of lines on white, and on black."""

_PAGE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { max-width: 1320px; margin: 0 auto; padding: 16px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 8px 0 16px; font-size: 26px; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 19px; }
.state { margin-left: 6px; padding: 2px 10px; border: 1px solid; border-radius: 12px; vertical-align: 4px;
  font-size: 13px; font-weight: 500; white-space: nowrap; color: var(--faint); }
.state.fin { color: var(--good); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 12px 24px; margin: 0; }
dt { color: var(--faint); font-size: 13px; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
progress { width: 100%; height: 6px; accent-color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 20px 0; padding: 10px 0;
  border: solid var(--rule); border-width: 1px 0; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
section { margin: 0 0 36px; }
.note, footer, figcaption span { color: var(--faint); font-size: 13.5px; }
.note { margin: 0 0 12px; max-width: 85ch; }
.bad { color: var(--bad); overflow-wrap: anywhere; }
.charts, .pictures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); }
figure { margin: 0; }
.chart { padding: 10px 10px 6px; border: 1px solid var(--rule); border-radius: 8px; background: var(--card); }
figcaption { margin-bottom: 6px; overflow-wrap: anywhere; }
.pictures figcaption { color: var(--faint); font-size: 13.5px; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th:first-child, .prose th, .prose td { text-align: left; }
.prose td { white-space: normal; overflow-wrap: anywhere; }
th:first-child { font-weight: 500; }
thead th { color: var(--faint); font-weight: 500; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; padding: 12px; border: 1px solid var(--rule); border-radius: 8px; background: var(--card);
  font: 13px/1.45 ui-monospace, monospace; }
@media print { nav { display: none; } td { white-space: normal; } .chart, figure { break-inside: avoid; } }
svg { display: block; width: 100%; height: auto; }
"""

_DRAWN = """
svg { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .faint { fill: var(--faint); }
svg .small { font-size: 10.5px; }
svg .rule { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .dots { fill: none; stroke-width: 5; stroke-linecap: round; }
svg .bars { fill: none; stroke-width: 1.2; opacity: .55; }
svg .dashed { stroke-dasharray: 5 4; }
svg .band { stroke: none; opacity: .18; }
svg .area { stroke: var(--card); stroke-width: .7; opacity: .9; }
svg .broken { stroke: var(--bad); stroke-width: 1.6; fill: none; }
svg .card { fill: var(--card); stroke: var(--rule); }
"""


def page_style() -> str:
    """CSS of a page, with charts in it or not."""
    light, dark = (
        "".join(f"--{name}: {color}; " for name, color in _colors(dark).items())
        for dark in (False, True)
    )
    variables = f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
    return variables + _PAGE + _DRAWN + _color_classes()


def file_style() -> str:
    """CSS of a drawing that is a file of its own: without variables, which not every program knows."""
    light, dark = map(_resolved, (False, True))
    return f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n"


def _resolved(dark: bool) -> str:
    colors = _colors(dark)
    return re.sub(r"var\(--([\w-]+)\)", lambda name: colors[name[1]], _DRAWN + _color_classes())


def _colors(dark: bool) -> Mapping[str, str]:
    """Every colour by its name."""
    ours = {
        f"{name}-{number}": color
        for name, both in _PALETTES.items()
        for number, color in enumerate(both[dark])
    }
    return {name: both[dark] for name, both in _COLORS.items()} | ours


def _color_classes() -> str:
    """CSS rules that give lines and areas their colours."""
    names = [f"{name}-{number}" for name in _PALETTES for number in range(NUM_COLORS)]
    return "".join(
        f"svg .{name} {{ stroke: var(--{name}); }} svg .{name}.fill {{ fill: var(--{name}); }}\n"
        for name in names
    )


def ordered_colors(count: int) -> list[str]:
    """Classes of so many lines that have an order, as far apart as can be."""
    return [f"order-{round(i * (NUM_COLORS - 1) / max(count - 1, 1))}" for i in range(count)]
