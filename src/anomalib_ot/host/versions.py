"""Whether the installed packages are of versions that this one works with."""

from importlib import metadata

from packaging.requirements import Requirement


def require_versions() -> None:
    """Refuse installed packages of versions that this one's own metadata excludes, before they fail in other words.

    Raises:
        ImportError: If there are any; it names them, and the versions that would do.
    """
    wrong = []
    for line in metadata.requires("anomalib-ot") or ():
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            # The import names it; another package may stand in for it.
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append((f"{needed.name}{needed.specifier}", f"{needed.name} {found}"))
    if wrong:
        needs, finds = (", ".join(column) for column in zip(*wrong, strict=True))
        commands = " ".join(f'"{each}"' for each, _ in wrong)
        msg = f"anomalib-ot needs {needs}, but {finds} is installed; run: pip install {commands}"
        raise ImportError(msg)
