"""Check of the versions of installed packages."""

from importlib import metadata

from packaging.requirements import Requirement

# The extra with what the models need. Dependencies of all users have no marker.
_EXTRA = "train"


def require_versions() -> None:
    """Refuse installed packages whose version the metadata of this package excludes, before an import fails.

    Raises:
        ImportError: If there are any. The message names them and the required versions.
    """
    wrong = []
    for line in metadata.requires("anomalib-ot") or ():
        needed = Requirement(line)
        if needed.marker and not needed.marker.evaluate({"extra": _EXTRA}):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:
            # The import of a missing package names it, and another package may provide the same modules.
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append((f"{needed.name}{needed.specifier}", f"{needed.name} {found}"))
    if wrong:
        needs, finds = (", ".join(column) for column in zip(*wrong, strict=True))
        commands = " ".join(f'"{each}"' for each, _ in wrong)
        msg = f"anomalib-ot needs {needs}, but {finds} is installed; run: pip install {commands}"
        raise ImportError(msg)
