"""A job's enhancement strategy, which says in one word what `enhance` and `compel_enabled` say in two."""

from models.catalog import FAMILIES, JobType
from models.params import FieldError, InvalidParams

STRATEGIES = {"none": (False, False), "qwen": (True, False), "compel": (False, True), "hybrid": (True, True)}
"""Whether the language model rewrites the prompt, and whether Compel weighs it."""

FIELD = "enhancement_strategy"


def read_strategy(
    strategy: str | None, job_type: JobType, enhance: bool | None, compel: bool | None, *, enhanced: bool
) -> tuple[bool | None, bool | None]:
    """`enhance` and `compel_enabled` as the strategy wants them; as they were where there is none.

    `enhanced` says that the caller brings an enhanced prompt. Raises `InvalidParams` for what contradicts the strategy.
    """
    if strategy is None:
        return enhance, compel
    if strategy not in STRATEGIES:
        raise _refused(f"must be one of {', '.join(STRATEGIES)}", "choice")
    by_model, by_compel = STRATEGIES[strategy]
    if by_compel and not FAMILIES[job_type.family].takes_compel:
        raise _refused(f"{job_type.name} knows no prompt weights", "unsupported")
    if job_type.enhanced and not by_model:
        raise _refused(f"{job_type.name} always enhances", "conflict")
    if by_model and enhanced:
        raise _refused("an enhanced prompt is given", "conflict")
    for name, given, wanted in (("enhance", enhance, by_model), ("compel_enabled", compel, by_compel)):
        if given is not None and given is not wanted:
            raise _refused(f"{strategy} is against the {name} that is given", "conflict")
    return by_model, by_compel


def _refused(message: str, code: str) -> InvalidParams:
    return InvalidParams([FieldError(FIELD, message, code)])
