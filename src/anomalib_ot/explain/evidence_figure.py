"""The figure of the evidence for the score of an image."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import AutoLocator, MaxNLocator
from torch import Tensor

from anomalib_ot.drawing.figures import BLUE, ORANGE, OUTLINE, new_figure, show_image, show_map

from .evidence import Evidence, own_extent, verdict_of

_BINS = 12


def draw_evidence(evidence: Evidence) -> Figure:
    """Draw the image with its anomalous regions, the map, the rank among normal images, and the contributions.

    Args:
        evidence: Evidence from :func:`~anomalib_ot.explain.evidence.evidence_of`.

    Returns:
        The figure. Scores are on the scale of ``predict``, but not clipped to [0, 1]. The maps of the contributions are
        raw and share one colour scale. Their titles give their shares of the score.
    """
    parts = evidence.contributions if len(evidence.contributions) > 1 else {}
    figure, panels = new_figure(1 + bool(parts), max(3, len(parts)), _summary(evidence))
    first, *rest = panels
    _draw_regions(first[0], evidence)
    above = evidence.pixel_scale.threshold
    rule = "" if above is None else f" (above {above:.2g} anomalous)"
    show_map(first[1], evidence.pixel_scale.shown(evidence.map), f"anomaly map{rule}, + the highest pixel")
    _mark(first[1], evidence.map)
    _draw_place(first[2], evidence)
    limits = (0.0, max((float(each.map.max()) for each in parts.values()), default=0.0))
    for panel, (name, part) in zip(rest[0] if rest else [], parts.items(), strict=False):
        show_map(panel, part.map, f"{name}:\n{evidence.share(name):.0%} of the score", limits)
        _mark(panel, evidence.map)
    for panel in (*first[3:], *(rest[0][len(parts) :] if rest else [])):
        panel.set_visible(False)
    return figure


def _summary(evidence: Evidence) -> str:
    known = verdict_of(evidence.picture.label)
    verdict = verdict_of(evidence.is_anomalous)
    parts = [
        f"score {evidence.score_in_words()}",
        f"prediction {verdict}" if verdict else "",
        f"label {known}" if known else "",
    ]
    return f"{evidence.picture.name}: {', '.join(part for part in parts if part)}"


def _draw_regions(panel: Axes, evidence: Evidence) -> None:
    """Draw the image in pixels of its file, with the boxes and highest scores of its regions."""
    regions = evidence.regions or ()
    title = "no threshold, no regions" if evidence.regions is None else f"{len(regions)} regions above the threshold"
    show_image(panel, evidence.picture.image, "1 region above the threshold" if len(regions) == 1 else title)
    left, top, right, bottom = evidence.picture.extent or own_extent(evidence.picture)
    panel.images[0].set_extent((left, right, bottom, top))
    panel.set_aspect("equal")
    for region in regions:
        x0, y0, x1, y1 = region.box
        panel.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=OUTLINE, linewidth=1.2))
        panel.text(
            x0, y0, f"{region.score:.3g}", va="bottom", color="white", backgroundcolor="#000a", fontsize="x-small"
        )


def _mark(panel: Axes, anomaly_map: Tensor) -> None:
    row, column = divmod(int(anomaly_map.argmax()), anomaly_map.shape[1])
    panel.plot(column, row, "+", color=OUTLINE, markersize=9)


def _draw_place(panel: Axes, evidence: Evidence) -> None:
    """Draw the histogram of the normal scores, with the score of the image and the threshold."""
    panel.set_xlabel("score (predict clips it to 0 and 1)", fontsize="small")
    panel.xaxis.set_major_locator(AutoLocator())
    panel.tick_params(labelsize="x-small")
    # Not clipped, so that a score far above all others differs from one just above them.
    shown = evidence.scale.shown
    if evidence.normal:
        normal = [shown(each) for each in evidence.normal]
        panel.hist(normal, _BINS, color=BLUE, label=f"{len(normal)} normal images")
        panel.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    if evidence.threshold is not None:
        panel.axvline(evidence.threshold, color="grey", linestyle="--", label=f"threshold {evidence.threshold:.2g}")
    panel.axvline(shown(evidence.raw_score), color=ORANGE, linewidth=2, label="this image")
    panel.margins(y=0.25)
    panel.legend(fontsize="x-small", loc="upper center")
    title = f"no p-value:\n{evidence.why_no_p_value}"
    if evidence.p_value is not None:
        above = sum(each >= evidence.raw_score for each in evidence.normal)
        title = f"{above} of {len(evidence.normal)} normal images score as high:\n{evidence.p_value_in_words()}"
    panel.set_title(title, fontsize="small")
