"""The type checker that jaxtyping's import hook puts on every function of vlm."""

from typing import Any, Self

from beartype import BeartypeConf, beartype

# Where a float is asked for, an int is welcome, as in Python itself.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Any) -> Any:
    """beartype, except for `Self`: that needs the class, and the hook has functions."""
    hints = getattr(function, "__annotations__", {})
    function.__annotations__ = {
        name: Any if hint is Self else hint for name, hint in hints.items()
    }
    return checked(function)
