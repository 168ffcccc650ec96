"""Optional parts of the installation: say in one sentence how to get the one that is missing."""

from __future__ import annotations

import importlib.util

from geoengine.engine.errors import MissingExtraError


def require_extra(extra: str, modules: tuple[str, ...], doing: str) -> None:
    """Raise MissingExtraError unless all `modules` are installed; imports none of them.

    `doing` names the work that needs them, such as "building engines".
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{doing} needs {', '.join(missing)}, which is not installed: "
            f"run `pip install 'geoengine[{extra}]'`"
        )
