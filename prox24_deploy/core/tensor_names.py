"""Which tensor of a checkpoint a parameter of the built model is, by their names alone."""

from collections.abc import Collection


def names_like(parameter: str, tensors: Collection[str]) -> list[str]:
    """The tensors that a parameter can be: the one of its name, else those that differ by a prefix.

    A model opened for one task may carry a prefix more or less than the checkpoint it came from
    (`encoder.…` against `bert.encoder.…`).
    """
    if parameter in tensors:
        return [parameter]
    longer = [name for name in tensors if name.endswith(f".{parameter}")]
    return longer + [name for name in tensors if parameter.endswith(f".{name}")]
