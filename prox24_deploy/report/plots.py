"""Plots as inline SVG: no script, no request, readable by a screen reader.

Every plot is a small drawing of fixed width, so that its text keeps its size on a telephone and
many of them fill a wide screen; colours come from the style sheet of the page. Marks differ in form
as well as in colour.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape

from prox24_deploy.core.records import CurvePoint, LatencyRow, LayerRecord, Sensitivity, Timing
from prox24_deploy.core.recovery import RecoverResult, RecoveryPoint
from prox24_deploy.report.checks import row_name

WIDTH = 320
PLOT_LEFT = 46
PLOT_RIGHT = WIDTH - 12
# Of a digit on an axis, in the fonts that browsers have; other characters are narrower in the mean.
WIDEST = 7

FEWEST_TICKS, MOST_LOG_TICKS = 3, 6
GOLDEN = (math.sqrt(5) - 1) / 2

Scale = Callable[[float], float]


def error_plots(layers: Sequence[LayerRecord]) -> list[str]:
    """One drawing for each kind of layer: error against block, calibration beside held-out.

    All share one logarithmic axis, so that kinds compare; a skipped layer is a cross on the floor.
    A layer outside the blocks has no place on the axis: the tables name it.
    """
    kinds: dict[str, list[tuple[int, LayerRecord]]] = {}
    for layer in layers:
        block, kind = split_name(layer.name)
        if block is not None:
            kinds.setdefault(kind, []).append((block, layer))
    axis = _log_axis(layers)
    blocks = [block for members in kinds.values() for block, _ in members]
    span = (min(blocks), max(blocks)) if blocks else (0, 0)
    return [
        _error_plot(f"errors-{index}", kind, members, axis, span)
        for index, (kind, members) in enumerate(kinds.items())
    ]


def split_name(name: str) -> tuple[int | None, str]:
    """Block number and kind: "encoder.layer.3.attention.query" is block 3 of "attention.query".

    Later numbers become stars, so that all experts of a block share one kind. A name with no number
    has no block and is its own kind.
    """
    match = re.search(r"(?:^|\.)(\d{1,9})\.(.+)$", name)
    if match is None:
        return None, name
    return int(match[1]), re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2])


def latency_plot(row: LatencyRow, index: int) -> str:
    """Every kept run of both twins on one axis of milliseconds, with median and 90 % marks."""
    low, high = _latency_range(row)
    ticks = nice_ticks(low, high)
    scale = _linear(low, high, 12, PLOT_RIGHT)
    body = [_vertical_grid(ticks, scale, 10, 128, lambda tick: f"{tick:g}")]
    body += _strip("dense", row.dense, scale, 10, high)
    body += _strip("sparse", row.sparse, scale, 68, high)
    body.append(_text(WIDTH / 2, 156, "milliseconds", "axis", "middle"))
    described = "; ".join(
        f"{name}: median {timing.median_ms:.4g} ms, 90 % within {timing.p90_ms:.4g} ms"
        for name, timing in (("dense", row.dense), ("sparse", row.sparse))
    )
    title = f"Latency of {row_name(row)}"
    return _svg(f"latency-{index}", 160, title, described, body)


def sensitivity_plot(found: Sensitivity) -> str:
    """Loss of the model against the share of weights pruned, with the limit and what was chosen."""
    total = sum(layer.weights for layer in found.layers)
    low, high = _loss_range(found)
    top, bottom = 12, 150
    across, up = _linear(0, 1, PLOT_LEFT, PLOT_RIGHT), _linear(low, high, bottom, top)
    body = []
    for tick in nice_ticks(low, high):
        body.append(_line(PLOT_LEFT, up(tick), PLOT_RIGHT, up(tick), "grid"))
        body.append(_text(PLOT_LEFT - 6, up(tick) + 4, f"{tick:g}", "axis", "end"))
    body += [
        _text(
            across(percent / 100),
            bottom + 17,
            f"{percent} %",
            "axis",
            "end" if percent == 100 else "middle",
        )
        for percent in (0, 25, 50, 75, 100)
    ]
    if found.max_loss is not None:
        body.append(_line(PLOT_LEFT, up(found.max_loss), PLOT_RIGHT, up(found.max_loss), "p90"))
    spots = [(across(p.weights / total), up(p.loss.value)) for p in found.curve]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(across(0), up(0)), *spots])
    body.append(f'<polyline points="{path}" class="curve"/>')
    for (x, y), point in zip(spots, found.curve, strict=True):
        error = up(0) - up(point.loss.standard_error)
        # A form of its own for what was chosen, not only a colour.
        style = "chosen" if point.layers == found.chosen else "calibration"
        body.append(_line(x, y - error, x, y + error, "stem"))
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if style == "chosen" else 3}" '
            f'class="{style}"><title>{escape(_point_words(point))}</title></circle>'
        )
    described = "; ".join(_point_words(point) for point in found.curve)
    return _svg("sensitivity", 172, f"{found.metric} against weights pruned", described, body)


def recovery_plot(found: RecoverResult) -> str:
    """Loss against steps, of what was trained on and withheld, with the step that was kept."""
    top, bottom = 12, 150
    losses = [loss for p in found.curve for loss in (p.trained, p.withheld) if loss is not None]
    high = 1.05 * max(losses) or 1.0
    across = _linear(0, found.curve[-1].step or 1, PLOT_LEFT, PLOT_RIGHT - 8)
    up = _linear(0, high, bottom, top)
    body = []
    for tick in nice_ticks(0, high):
        body.append(_line(PLOT_LEFT, up(tick), PLOT_RIGHT, up(tick), "grid"))
        body.append(_text(PLOT_LEFT - 6, up(tick) + 4, f"{tick:g}", "axis", "end"))
    body.append(_text(PLOT_LEFT, bottom + 17, "step 0", "axis"))
    body.append(_text(PLOT_RIGHT, bottom + 17, str(found.curve[-1].step), "axis", "end"))
    watched = [(p.step, p.withheld) for p in found.curve if p.withheld is not None]
    path = " ".join(f"{across(step):.1f},{up(loss):.1f}" for step, loss in watched)
    body.append(f'<polyline points="{path}" class="curve"/>')
    for point in found.curve:
        title = f"<title>{escape(_recovery_words(point))}</title>"
        for loss, style in ((point.trained, "calibration"), (point.withheld, "held-out")):
            if loss is None:
                continue
            # A form of its own for what was kept, not only a colour.
            chosen = style == "held-out" and point.step == found.kept
            body.append(
                f'<circle cx="{across(point.step):.1f}" cy="{up(loss):.1f}" '
                f'r="{5 if chosen else 3}" class="{"chosen" if chosen else style}">{title}</circle>'
            )
    described = "; ".join(map(_recovery_words, found.curve))
    return _svg("recovery", 172, f"{found.loss} against steps of recovery", described, body)


def _recovery_words(point: RecoveryPoint) -> str:
    parts = {"trained": point.trained, "withheld": point.withheld}
    told = ", ".join(f"{name} {loss:.4g}" for name, loss in parts.items() if loss is not None)
    return f"step {point.step}: {told}"


def bar_plot(name: str, title: str, bars: Sequence[tuple[str, float, str, str]]) -> str:
    """Horizontal bars from zero; each bar is (label, value, value in words, style class)."""
    largest = max((value for _, value, _, _ in bars), default=0) or 1
    body = []
    for row, (label, value, words, style) in enumerate(bars):
        top = 8 + 42 * row
        length = (WIDTH - 2) * value / largest
        body += [
            _text(1, top + 11, label, "label"),
            _text(WIDTH - 1, top + 11, words, "value", "end"),
            f'<rect x="1" y="{top + 17}" width="{length:.1f}" height="11" class="{style}"/>',
        ]
    described = "; ".join(f"{label}: {words}" for label, _, words, _ in bars)
    return _svg(name, 8 + 42 * len(bars), title, described, body)


def trend_plot(name: str, points: Sequence[tuple[str, float]], index: int) -> str:
    """One figure over accepted releases, the oldest first; the last point is this build."""
    values = [value for _, value in points]
    spread = max(values) - min(values)
    # Rounding is no trend.
    spread = spread if spread > 1e-9 * max(map(abs, values)) else 0.0
    margin = 0.1 * spread or 0.05 * abs(values[0]) or 1.0
    low, high = min(values) - margin, max(values) + margin
    top, bottom = 12, 112
    ticks = {tick: f"{tick:.7g}" for tick in nice_ticks(low, high)}
    left = max(PLOT_LEFT, 8 + WIDEST * max(map(len, ticks.values()), default=0))
    across = _linear(0, len(points) - 1, left + 8, PLOT_RIGHT - 8)
    up = _linear(low, high, bottom, top)
    body = []
    for tick, label in ticks.items():
        body.append(_line(left, up(tick), PLOT_RIGHT, up(tick), "grid"))
        body.append(_text(left - 6, up(tick) + 4, label, "axis", "end"))
    spots = [(across(i), up(value)) for i, value in enumerate(values)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    body.append(f'<polyline points="{path}" class="curve"/>')
    for (x, y), (label, value) in zip(spots, points, strict=True):
        # A form of its own for this build, not only a colour.
        last = (x, y) == spots[-1]
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if last else 3}" '
            f'class="{"chosen" if last else "calibration"}">'
            f"<title>{escape(f'{label}: {value:.6g}')}</title></circle>"
        )
    body.append(_text(left, bottom + 17, points[0][0], "axis"))
    body.append(_text(PLOT_RIGHT, bottom + 17, points[-1][0], "axis", "end"))
    described = "; ".join(f"{label}: {value:.6g}" for label, value in points)
    return _svg(f"trend-{index}", bottom + 22, f"{name} over releases", described, body)


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers within [low, high], about `about` of them and never fewer than three.

    They are multiples of 1, 2 or 5 times a power of ten.
    """
    step = _nice_step((high - low) / about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first + 1 < FEWEST_TICKS:
        return nice_ticks(low, high, 2 * about)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _nice_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def _error_plot(
    name: str,
    kind: str,
    members: Sequence[tuple[int, LayerRecord]],
    axis: tuple[float, float, Sequence[float]],
    span: tuple[int, int],
) -> str:
    top, bottom = 44, 164
    across = _linear(span[0], span[1], PLOT_LEFT + 8, PLOT_RIGHT - 8)
    up = _logarithmic(axis[0], axis[1], bottom, top)
    body = [_text(0, 13, kind, "heading"), _text(0, 28, "relative squared error", "axis")]
    for tick in axis[2]:
        body.append(_line(PLOT_LEFT, up(tick), PLOT_RIGHT, up(tick), "grid"))
        body.append(_text(PLOT_LEFT - 6, up(tick) + 4, f"{tick:g}", "axis", "end"))
    body += [
        _text(across(block), bottom + 17, str(block), "axis", "middle")
        for block in _block_ticks(span)
    ]
    body.append(_text(PLOT_LEFT - 6, bottom + 17, "block", "axis", "end"))
    body += [_error_mark(layer, across(block), up, bottom) for block, layer in members]
    described = "; ".join(_error_words(layer) for _, layer in members)
    return _svg(name, 186, f"Error per block of {kind}", described, body)


def _error_mark(layer: LayerRecord, x: float, up: Scale, bottom: float) -> str:
    title = f"<title>{escape(_error_words(layer))}</title>"
    if layer.relative_error is None:
        cross = f"M{x - 3:.1f} {bottom - 7}l6 6m-6 0l6 -6"
        return f'<g>{title}<path d="{cross}" class="skipped"/></g>'
    y = up(layer.relative_error)
    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="calibration"/>']
    if layer.held_out_error is not None:
        held = up(layer.held_out_error)
        marks.insert(0, _line(x, y, x, held, "stem"))
        marks.append(f'<circle cx="{x:.1f}" cy="{held:.1f}" r="3.4" class="held-out"/>')
    return f"<g>{title}{''.join(marks)}</g>"


def _error_words(layer: LayerRecord) -> str:
    if layer.relative_error is None:
        return f"{layer.name}: {layer.status}, {layer.reason or 'error not known'}"
    held = "" if layer.held_out_error is None else f", held-out {layer.held_out_error:.3g}"
    return f"{layer.name}: calibration {layer.relative_error:.3g}{held}"


def _log_axis(layers: Sequence[LayerRecord]) -> tuple[float, float, list[float]]:
    """Ends and ticks of an axis of errors; an error of zero lies on the floor of the plot.

    The ends are 1, 2 or 5 times powers of ten, at least three of them apart. So are the ticks,
    unless they crowd: then they are 1 and 5 times the powers, or the powers alone.
    """
    pairs = [(layer.relative_error, layer.held_out_error) for layer in layers]
    errors = [error for pair in pairs for error in pair if error] or [0.01, 1.0]
    powers = range(math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors))) + 1)
    steps = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    low = max(step for step in steps if step <= min(errors))
    high = min(step for step in steps if step >= max(errors) and step > low)
    first, last = steps.index(low), steps.index(high)
    while last - first + 1 < FEWEST_TICKS:
        # One above and one below in turns, as far as there are any.
        first, last = max(first - 1, 0), min(last + (first == 0), len(steps) - 1)
    within = steps[first : last + 1]
    every = [step for step in within if step not in steps[1::3]]
    powers_alone = [step for step in within if step in steps[::3]]
    ticks = next(
        (t for t in (within, every, powers_alone) if len(t) <= MOST_LOG_TICKS), powers_alone
    )
    return within[0], within[-1], ticks


def _loss_range(found: Sensitivity) -> tuple[float, float]:
    """From zero, or less where pruning helped by chance, to the highest point or the limit."""
    errors = [point.loss.standard_error for point in found.curve]
    values = [point.loss.value for point in found.curve]
    high = max(value + error for value, error in zip(values, errors, strict=True))
    low = min(value - error for value, error in zip(values, errors, strict=True))
    return min(low, 0.0), 1.05 * max(high, found.max_loss or 0.0, 1e-6)


def _point_words(point: CurvePoint) -> str:
    return (
        f"{point.layers} layers, {point.weights:,} weights: {point.loss.value:.4g} ± "
        f"{point.loss.standard_error:.2g}"
    )


def _block_ticks(span: tuple[int, int]) -> list[int]:
    if span[1] - span[0] <= 11:
        return list(range(span[0], span[1] + 1))
    return [int(tick) for tick in nice_ticks(span[0], span[1], 6)]


def _latency_range(row: LatencyRow) -> tuple[float, float]:
    """From the fastest run to the 99 % mark, or less: rare spikes must not squeeze the rest."""
    low = min(*row.dense.samples_ms, *row.sparse.samples_ms, row.dense.median_ms)
    high = max(min(t.p99_ms, 5 * t.p90_ms - 4 * t.median_ms) for t in (row.dense, row.sparse))
    margin = 0.04 * (high - low) or 0.05 * high or 1.0
    return max(low - margin, 0.0), high + margin


def _strip(name: str, timing: Timing, scale: Scale, top: float, high: float) -> list[str]:
    middle = top + 36
    shown = [value for value in timing.samples_ms if value <= high]
    beyond = len(timing.samples_ms) - len(shown)
    median, most = (
        f"{ms:.4g}" if ms < 1e4 else f"{ms:.0f}" for ms in (timing.median_ms, timing.p90_ms)
    )
    words = f"median {median}, 90 % within {most} ms"
    dots = "".join(
        f'<circle cx="{scale(value):.1f}" cy="{middle + 18 * _jitter(index):.1f}" r="1.8"/>'
        for index, value in enumerate(shown)
    )
    marks = [
        _text(12, top + 12, name, "label"),
        _text(WIDTH - 12, top + 12, words, "value", "end"),
        f'<g class="run {name}">{dots}</g>',
        _line(scale(timing.median_ms), middle - 15, scale(timing.median_ms), middle + 15, "median"),
        _line(scale(timing.p90_ms), middle - 15, scale(timing.p90_ms), middle + 15, "p90"),
    ]
    if beyond:
        marks.append(_text(WIDTH, middle + 18, f"{beyond} slower", "axis", "end"))
    return marks


def _jitter(index: int) -> float:
    """Evenly spread numbers in [-0.5, 0.5) without a random generator."""
    return index * GOLDEN % 1 - 0.5


def _vertical_grid(
    ticks: Iterable[float], scale: Scale, top: float, bottom: float, label: Callable[[float], str]
) -> str:
    return "".join(
        _line(scale(tick), top + 18, scale(tick), bottom, "grid")
        + _text(scale(tick), bottom + 14, label(tick), "axis", "middle")
        for tick in ticks
    )


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    """Map [low, high] to [start, end]; a range of one point goes to the middle."""
    if high == low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    scale = _linear(math.log10(low), math.log10(high), start, end)
    return lambda value: scale(math.log10(max(value, low)))


def _svg(name: str, height: float, title: str, described: str, body: Sequence[str]) -> str:
    return (
        f'<svg role="img" aria-labelledby="{name}-title {name}-desc" width="{WIDTH}" '
        f'height="{height:g}" viewBox="0 0 {WIDTH} {height:g}">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(described)}</desc>{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'
