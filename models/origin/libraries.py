"""What we tell the model libraries, whichever module loads them first, and which they are."""

import importlib.metadata
from collections.abc import Mapping
from functools import cache

LIBRARIES = ("torch", "diffusers", "transformers", "peft")


@cache
def library_versions() -> Mapping[str, str]:
    """The versions of the libraries that a result depends on, by name. Read once: it takes 20 ms."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def quiet_libraries() -> None:
    """Switches off what diffusers and transformers write into the log: progress bars, and warnings, of which some
    quote the prompt."""
    import diffusers.utils
    import transformers.utils

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
