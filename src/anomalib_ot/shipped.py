"""The plans and configurations in the package, by name."""

from pathlib import Path


def shipped_folder() -> Path:
    """Folder of the shipped files: ``configs`` in the installed package, or in the repository for a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def shipped_files(kind: str = "") -> dict[str, Path]:
    """The shipped files by name, such as ``compare/quick``.

    Args:
        kind: ``compare`` for plans, ``model`` or ``data`` for configurations; the names are then without this prefix.
            Empty for all files.

    Example:
        >>> sorted(shipped_files("model"))
        ['duo', 'foct', 'pradot', 'wt_flow']
    """
    folder = shipped_folder() / kind
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def shipped_file(name: str, kind: str = "") -> Path:
    """Path of a shipped file.

    Args:
        name: Name of the file.
        kind: As in :func:`shipped_files`.

    Raises:
        FileNotFoundError: If no shipped file has this name.
    """
    files = shipped_files(kind)
    if name not in files:
        folder = shipped_folder() / kind
        msg = f"there is no file {name}, and no shipped file of this name; choose from {', '.join(files)} in {folder}"
        raise FileNotFoundError(msg)
    return files[name]
