"""The plans and configurations that come with the package, by name."""

from pathlib import Path


def shipped_folder() -> Path:
    """Folder of the shipped files: ``configs`` in the installed package, or that of the repository in a checkout."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "configs"


def shipped_files(kind: str = "") -> dict[str, Path]:
    """The shipped files by name, as ``compare/quick``.

    Args:
        kind: ``compare`` for plans, ``model`` or ``data`` for configurations, whose names are then without it; empty
            for all.

    Example:
        >>> sorted(shipped_files("model"))
        ['foct', 'pradot', 'wt_flow']
    """
    folder = shipped_folder() / kind
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def shipped_file(name: str, kind: str = "") -> Path:
    """Path of a shipped file.

    Args:
        name: Its name.
        kind: As for :func:`shipped_files`.

    Raises:
        FileNotFoundError: If none has this name.
    """
    files = shipped_files(kind)
    if name not in files:
        folder = shipped_folder() / kind
        msg = f"there is no file {name}, and none of this name among {', '.join(files)}, which lie in {folder}"
        raise FileNotFoundError(msg)
    return files[name]
