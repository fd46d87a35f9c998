"""Draw the panels of a Grafana dashboard from a Prometheus, without Grafana, into one picture."""

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.dates import AutoDateLocator, DateFormatter
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, MultipleLocator
    from PIL import Image
except ImportError:
    raise SystemExit("draw_panels: error: there is no matplotlib here: pip install matplotlib") from None

DASHBOARD = Path(__file__).parent / "grafana" / "dashboards" / "melt-serve.json"
COLUMNS = 24
"""Columns of Grafana's grid."""
UNIT_WIDTH, UNIT_HEIGHT = 0.66, 0.38
"""Inches of one cell of that grid."""
POINTS = 240
"""Points of a line, at most about."""

EXAMPLES = """\
examples:
  prometheus --config.file deploy/prometheus/prometheus.yml --storage.tsdb.path /tmp/tsdb
  python deploy/draw_panels.py                                  # the last half hour, to panels.png
  python deploy/draw_panels.py --minutes 5 --out five.png
  python deploy/draw_panels.py --var 'instance=gpu-1:8000|gpu-2:8000'
"""


class DrawError(RuntimeError):
    """Panels that could not be drawn; the message says why."""


@dataclass(frozen=True)
class Window:
    """The time that is shown, in seconds since 1970, and what Grafana would derive from it."""

    start: float
    end: float
    scrape_interval: float

    @property
    def step(self) -> float:
        """Seconds between two points."""
        return max(1.0, self.scrape_interval, math.ceil((self.end - self.start) / POINTS))

    @property
    def variables(self) -> dict[str, str]:
        """Grafana's own variables, by name."""
        rate = max(4 * self.scrape_interval, self.step + self.scrape_interval)
        return {"__rate_interval": f"{math.ceil(rate)}s", "__range": f"{math.ceil(self.end - self.start)}s"}

    @property
    def times(self) -> np.ndarray:
        """Times of the points, in seconds since 1970."""
        return np.arange(self.start, self.end + self.step / 2, self.step)


@dataclass(frozen=True)
class Series:
    """One line of a panel: labels, its name in the legend, and a value for each of the window's points, or NaN."""

    labels: Mapping[str, str]
    name: str
    values: np.ndarray


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture and print which panels had no data; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__
        + " Every query of every panel runs as Grafana would run it; a panel that has no data says so.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prometheus", default="http://localhost:9090", metavar="URL", help="default: %(default)s")
    parser.add_argument("--dashboard", type=Path, default=DASHBOARD, metavar="JSON", help="default: melt-serve's own")
    parser.add_argument("--minutes", type=float, default=30, metavar="N", help="how many to show (default: 30)")
    parser.add_argument(
        "--end", type=float, metavar="SECONDS", help="where they end, in seconds since 1970 (default: now)"
    )
    parser.add_argument(
        "--scrape-interval",
        type=float,
        default=5,
        metavar="SECONDS",
        help="Prometheus's; $__rate_interval is at least four of them (default: 5)",
    )
    parser.add_argument(
        "--var",
        action="append",
        default=[],
        metavar="NAME=REGEX",
        help="what a variable of the dashboard selects (default: everything)",
    )
    parser.add_argument("--out", type=Path, default=Path("panels.png"), metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0 or arguments.scrape_interval <= 0:
        parser.error("--minutes and --scrape-interval must be above 0")
    if not all("=" in word for word in arguments.var):
        parser.error(f"--var takes NAME=REGEX, not {' '.join(arguments.var)}")
    end = arguments.end or time.time()
    window = Window(end - 60 * arguments.minutes, end, arguments.scrape_interval)
    try:
        dashboard = json.loads(arguments.dashboard.read_text())
        variables = {**every(dashboard), **dict(word.split("=", 1) for word in arguments.var)}
        figure, empty = draw(dashboard, arguments.prometheus, window, variables)
        save(figure, arguments.out)
    except KeyboardInterrupt:
        return 130
    except (DrawError, OSError, ValueError) as error:  # ValueError: no JSON, or no such kind of picture
        print(f"draw_panels: error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {len(panels_of(dashboard))} panels")
    for title in empty:
        print(f"no data: {title}")
    return 0


def save(figure: Figure, path: Path) -> None:
    """Save a figure with a palette of few colours, which makes a small file."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    pixels.convert("RGB").quantize(128).save(path, optimize=True)


def panels_of(dashboard: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that have queries, also those inside Grafana's rows."""
    rows = [panel for panel in dashboard["panels"] if panel["type"] == "row"]
    everything = [*dashboard["panels"], *(panel for row in rows for panel in row.get("panels", []))]
    return [panel for panel in everything if panel.get("targets")]


def every(dashboard: Mapping[str, Any]) -> dict[str, str]:
    """Return each of the dashboard's variables with the value that selects everything."""
    return {variable["name"]: ".*" for variable in dashboard["templating"]["list"]}


def fill(expression: str, variables: Mapping[str, str]) -> str:
    """Fill Grafana's variables into an expression.

    Raises:
        DrawError: it names one that has no value.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in variables:
            raise DrawError(f"no value for ${name} in {expression}: the dashboard has {', '.join(sorted(variables))}")
        return variables[name]

    return re.sub(r"\$(?:([A-Za-z_]\w*)|\{(\w+)(?::\w+)?\})", value, expression)


def ask(url: str, expression: str, window: Window, at_the_end: bool = False) -> list[tuple[dict[str, str], list[Any]]]:
    """Ask Prometheus; return labels and (time, value) pairs of each series.

    Args:
        at_the_end: one value only, of the window's end.

    Raises:
        DrawError: Prometheus cannot be reached, or refuses the expression.
    """
    start = window.end if at_the_end else window.start
    query = {"query": expression, "start": start, "end": window.end, "step": window.step}
    try:
        with urllib.request.urlopen(
            f"{url.rstrip('/')}/api/v1/query_range", urllib.parse.urlencode(query).encode(), timeout=60
        ) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise DrawError(f"{url} refuses {expression}: {error.read().decode()}") from None
    except (OSError, ValueError) as error:
        raise DrawError(f"no Prometheus answers at {url} ({error}); name it with --prometheus") from None
    return [(series["metric"], series["values"]) for series in answer["data"]["result"]]


def series_of(panel: Mapping[str, Any], url: str, window: Window, variables: Mapping[str, str]) -> list[Series]:
    """Return the series that all of a panel's queries give."""
    found = []
    for target in panel["targets"]:
        expression = fill(target["expr"], {**variables, **window.variables})
        instant = bool(target.get("instant"))
        for labels, pairs in ask(url, expression, window, instant):
            values = np.full(1 if instant else len(window.times), np.nan)
            for when, value in pairs:
                values[0 if instant else round((when - window.start) / window.step)] = float(value)
            found.append(Series(labels, legend(target["legendFormat"], labels), values))
    return found


def legend(template: str, labels: Mapping[str, str]) -> str:
    """Return the name of a series in the legend, where `{{label}}` stands for that label's value."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), template)


def draw(
    dashboard: Mapping[str, Any], url: str, window: Window, variables: Mapping[str, str]
) -> tuple[Figure, list[str]]:
    """Draw the dashboard as Grafana would lay it out; return the figure and the titles of panels without data."""
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = Figure((COLUMNS * UNIT_WIDTH, height * UNIT_HEIGHT))
    empty = []
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        left, top = at["x"] / COLUMNS, 1 - at["y"] / height
        figure.text(
            left + 0.006,
            top - 0.45 * UNIT_HEIGHT / figure.get_figheight(),
            panel["title"],
            fontsize=11 if panel["type"] == "row" else 9,
            fontweight="bold",
            color="tab:blue" if panel["type"] == "row" else "black",
            verticalalignment="center",
        )
        if panel["type"] == "row":
            continue
        margins = {"left": 0.9, "right": 0.15, "top": 0.9, "bottom": 0.55 if panel["type"] == "heatmap" else 1.5}
        axes = figure.add_axes(
            (
                left + margins["left"] / COLUMNS,
                top - (at["h"] - margins["bottom"]) / height,
                (at["w"] - margins["left"] - margins["right"]) / COLUMNS,
                (at["h"] - margins["top"] - margins["bottom"]) / height,
            )
        )
        found = series_of(panel, url, window, variables)
        if not any(np.isfinite(series.values).any() for series in found):
            empty.append(panel["title"])
            axes.text(0.5, 0.5, "No data", transform=axes.transAxes, horizontalalignment="center", color="gray")
            axes.set_axis_off()
            continue
        DRAWERS[panel["type"]](axes, panel, found, window)
    return figure, empty


def draw_number(axes: Axes, panel: Mapping[str, Any], found: Sequence[Series], window: Window) -> None:
    """Draw a stat panel: one value, in the colour of the step it has reached."""
    defaults, value = panel["fieldConfig"]["defaults"], found[0].values[-1]
    steps = [step for step in defaults["thresholds"]["steps"] if step["value"] is None or value >= step["value"]]
    text = in_unit(defaults["unit"], defaults.get("decimals"))(value)
    axes.text(
        0.45, 0.6, text, fontsize=16, color=steps[-1]["color"], horizontalalignment="center", verticalalignment="center"
    )
    axes.set_axis_off()


def draw_lines(axes: Axes, panel: Mapping[str, Any], found: Sequence[Series], window: Window) -> None:
    """Draw a time series panel: lines, or areas on top of each other."""
    defaults = panel["fieldConfig"]["defaults"]
    times, floor = clock(window.times), np.zeros(len(window.times))
    for series in found:
        look = looks(panel, series.name)
        if defaults["custom"]["stacking"]["mode"] == "normal":
            top = floor + np.nan_to_num(series.values)
            axes.fill_between(times, floor, top, alpha=0.4, label=series.name, linewidth=0, **look)
            floor = top
        else:
            axes.plot(times, series.values, label=series.name, linewidth=1.3, **look)
    highest = max([*floor, *(value for series in found for value in series.values if math.isfinite(value))])
    axes.set_ylim(defaults.get("min"), 1.08 * highest or 1)
    number = in_unit(defaults["unit"], defaults.get("decimals"))
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    if defaults["unit"] == "bytes":
        axes.yaxis.set_major_locator(MultipleLocator(2 ** math.ceil(math.log2(axes.get_ylim()[1] / 5))))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.1),
        ncols=5,
        fontsize=7,
        frameon=False,
        columnspacing=1,
        handlelength=1.3,
    )
    time_axis(axes, window)


def draw_heat(axes: Axes, panel: Mapping[str, Any], found: Sequence[Series], window: Window) -> None:
    """Draw a heatmap panel of a Prometheus histogram: what each bucket holds beyond the one below."""
    buckets = sorted(found, key=lambda series: float(series.labels["le"]))
    upto = np.array([series.values for series in buckets])
    cells = np.diff(upto, axis=0, prepend=0)
    edges = window.times - window.step / 2
    axes.pcolormesh(
        clock(np.append(edges, edges[-1] + window.step)),
        np.arange(len(buckets) + 1) - 0.5,
        np.sqrt(np.where(cells > 0, cells, np.nan)),
        cmap="Oranges",
        vmin=0,
    )
    axes.set_yticks(range(len(buckets)), [f"{float(series.labels['le']):g}" for series in buckets])
    time_axis(axes, window)


DRAWERS: dict[str, Callable[[Axes, Mapping[str, Any], Sequence[Series], Window], None]] = {
    "stat": draw_number,
    "timeseries": draw_lines,
    "heatmap": draw_heat,
}


def looks(panel: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the colour and dashes that the panel wants for the series of this name."""
    look: dict[str, Any] = {}
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"] == {"id": "byName", "options": name}:
            wanted = {each["id"]: each["value"] for each in override["properties"]}
            look["color"] = wanted["color"]["fixedColor"]
            if wanted.get("custom.lineStyle", {}).get("fill") == "dash":
                look["linestyle"] = "--"
    return look


def clock(seconds: np.ndarray) -> np.ndarray:
    """Return the times as dates, which matplotlib labels."""
    return (1000 * seconds).astype("datetime64[ms]")


def time_axis(axes: Axes, window: Window) -> None:
    """Give an axis the window's time, as all panels have it."""
    axes.xaxis.set_major_locator(AutoDateLocator(minticks=3, maxticks=6 if axes.get_position().width < 0.4 else 12))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S" if window.end - window.start < 1800 else "%H:%M"))
    axes.set_xlim(*clock(window.times[[0, -1]]))
    axes.tick_params(labelsize=7, length=2)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def in_unit(unit: str, decimals: int | None = None) -> Callable[[float], str]:
    """Return a function that writes a value of this unit as Grafana would.

    Raises:
        DrawError: a unit that no panel has had so far.
    """

    def digits(value: float) -> str:
        return f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"

    def scaled(value: float, steps: Sequence[tuple[float, str]]) -> str:
        for size, name in reversed(steps):
            if abs(value) >= size:
                return f"{digits(value / size)}{name}"
        return f"{digits(value)}{steps[0][1] if steps[0][0] == 1 else ''}"

    thousands = [(1.0, ""), (1e3, " K"), (1e6, " Mil")]
    if unit.startswith("suffix:"):
        return lambda value: scaled(value, thousands) + unit.removeprefix("suffix:")
    known: dict[str, Callable[[float], str]] = {
        "none": digits,
        "short": lambda value: scaled(value, thousands),
        "bytes": lambda value: scaled(value, [(1.0, " B"), (2.0**10, " KiB"), (2.0**20, " MiB"), (2.0**30, " GiB")]),
        "percentunit": lambda value: f"{digits(100 * value)}%",
        "s": lambda value: scaled(value, [(1e-3, " ms"), (1.0, " s"), (60.0, " min")]) if value else "0 s",
        "reqps": lambda value: scaled(value, thousands) + " req/s",
        "ops": lambda value: scaled(value, thousands) + " ops/s",
    }
    if unit not in known:
        raise DrawError(f"no way to write values in {unit}: known are suffix:... and {', '.join(known)}")
    return known[unit]


if __name__ == "__main__":
    sys.exit(main())
