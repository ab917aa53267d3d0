"""What we tell the model libraries, whichever module loads them first."""


def quiet_libraries() -> None:
    """Switches off the progress bars of diffusers and transformers, which would be written into the log."""
    import diffusers.utils
    import transformers.utils

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
