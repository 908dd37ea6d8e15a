"""The table of all images of a fit."""

import csv
import io

from .handed_over import HandedOver

TABLE = "images.csv"


def table(handed: HandedOver) -> str:
    """A row for each image: whether it is used, why not, and the p-value of its calibration."""
    look = handed.look
    notes = {finding.path: finding.detail for finding in reversed(look.inspection.findings)}
    notes |= dict.fromkeys((each.path for each in look.suspects), "It looks unlike the other images.")
    p_values = dict(handed.calibration.p_values)
    used = {*look.used}
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("path", "used", "p_value", "finding"))
    for path in sorted({*notes, *used}):
        p_value = f"{p_values[path]:.4g}" if path in p_values else ""
        writer.writerow((path, "yes" if path in used else "no", p_value, notes.get(path, "")))
    return file.getvalue()
