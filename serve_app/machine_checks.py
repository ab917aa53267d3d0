"""Checks of the machine: versions, memory, cards, weights and ports. Nothing is loaded and no network is used."""

import errno
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from deployments.settings import Settings
from models.profile import Card, Profile, fits, weights_present
from serve_app.findings import Finding, fail, ok, warn

GIB = 2**30
RAY_SERIES = "2.60"  # as in pyproject.toml
HTTP_PORT, DASHBOARD_PORT = 8000, 8265
PROCESS_GIB = 1.0  # a replica that has imported torch and diffusers holds a little less


def check_python(_: Settings) -> Iterator[Finding]:
    """The interpreter is one that the project is tested on."""
    found = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield ok("python", f"Python {found}")
    else:
        yield fail("python", f"Python {found} is not supported", "Use Python 3.11, 3.12 or 3.13.")


def check_ray(_: Settings) -> Iterator[Finding]:
    """Ray is installed in the series that the project is pinned to."""
    try:
        found = version("ray")
    except PackageNotFoundError:
        yield fail("ray", "Ray is not installed", f"Install ray[serve]=={RAY_SERIES}.*")
        return
    if found.startswith(RAY_SERIES + "."):
        yield ok("ray", f"Ray {found}")
    else:
        yield fail("ray", f"Ray {found} is not the series {RAY_SERIES}", f"Install ray[serve]=={RAY_SERIES}.*")


def check_host(settings: Settings) -> Iterator[Finding]:
    """CPU cores, and memory for one process per model and for weights that are held outside the card."""
    profile = settings.loaded_profile
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores >= 2:
        yield ok("cpu", f"{cores} CPU cores")
    else:
        yield warn(
            "cpu", "1 CPU core", "Give it 2 or more: the API, upkeep and every model are processes of their own."
        )
    free = psutil.virtual_memory().available / GIB
    weights = sum(spec.disk_gib for spec in profile.models.values() if spec.device != "cuda" or spec.offload == "model")
    wanted = weights + PROCESS_GIB * len(profile.models)
    if free >= wanted:
        yield ok("memory", f"{free:.1f} GiB of memory are free; the profile {profile.name} wants about {wanted:.1f}")
    else:
        yield warn(
            "memory",
            f"{free:.1f} GiB of memory are free; the profile {profile.name} wants about {wanted:.1f}",
            "Free memory or use a smaller profile; replicas that run out are killed.",
        )


def cards() -> tuple[list[Card], str | None]:
    """The NVIDIA cards of this machine and the driver's version; no cards and None where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return [], None
    try:
        found = []
        for number in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(number)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = _text(pynvml.nvmlDeviceGetName(handle))
            found.append(Card(name, memory.total / GIB, memory.free / GIB))
        return found, _text(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def check_cards(settings: Settings) -> Iterator[Finding]:
    """The cards that there are, and whether the profile's models fit on them (by the profile's figures)."""
    found, driver = cards()
    for number, card in enumerate(found):
        total, free = f"{card.total_gib:.1f} GiB", f"{card.free_gib:.1f} free"
        yield ok("gpu", f"card {number}: {card.name}, {total}, {free}, driver {driver}")
    if not found:
        needing = [spec.family.value for spec in settings.loaded_profile.models.values() if spec.device == "cuda"]
        if needing:
            advice = "Install the NVIDIA driver, or use a profile for the CPU."
            yield fail("gpu", f"no NVIDIA card was found, which {', '.join(needing)} need", advice)
        else:
            yield ok("gpu", "no NVIDIA card; the profile needs none")
    yield from fit(settings.loaded_profile, found)


def fit(profile: Profile, cards: list[Card]) -> Iterator[Finding]:
    """One finding for each model of the profile: where it would go."""
    for report in fits(profile, cards):
        message = f"{report.family.value} ({report.model_name}): {report.reason}"
        if report.fits:
            yield ok("fit", message)
        else:
            yield fail(
                "fit", message, "Free the card, use a smaller profile, or set offload: model in a profile of your own."
            )


def check_weights(settings: Settings) -> Iterator[Finding]:
    """The weights are on this machine, or there is room to download them."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    missing = 0.0
    for spec in settings.loaded_profile.models.values():
        found = weights_present(spec)
        name = f"{spec.family.value} ({spec.model_name})"
        if found == "tiny":
            yield ok("weights", f"{name}: tiny random weights, built on the spot")
        elif found is not None:
            yield ok("weights", f"{name}: in {found}")
        elif offline:
            yield fail("weights", f"{name}: missing, and HF_HUB_OFFLINE is set", f"Download {spec.source} first.")
        else:
            missing += spec.disk_gib
            advice = f"The first start downloads {spec.source}; to do it now: hf download {spec.source}"
            yield warn("weights", f"{name}: missing, {spec.disk_gib:g} GiB to download", advice)
    if missing:
        from huggingface_hub.constants import HF_HUB_CACHE

        free = shutil.disk_usage(_existing(Path(HF_HUB_CACHE))).free / GIB
        if free < missing:
            message = f"{free:.1f} GiB of disk are free for {missing:.1f} GiB of weights"
            yield fail("disk", message, "Free the disk of the Hugging Face cache, or set HF_HOME to a larger one.")


def check_ports(_: Settings) -> Iterator[Finding]:
    """The ports of the API and of Ray's dashboard are free."""
    for port, use in ((HTTP_PORT, "the API"), (DASHBOARD_PORT, "Ray's dashboard")):
        problem = port_problem(port)
        if problem is None:
            yield ok("ports", f"port {port} is free for {use}")
        else:
            advice = "Unless that is a cluster of yours that runs already: stop it, or choose another port."
            yield warn("ports", f"port {port}, meant for {use}, is {problem}", advice)


def port_problem(port: int) -> str | None:
    """Why a server on 127.0.0.1 can't have this port; None when it can."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return "in use" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
    return None


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
