import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from models.denoising.stopwatch import Stopwatch
from models.engine import Cancelled, GenerationRequest, ModelLoadFailed
from models.pipeline import generators, seeds_from
from models.profile import ModelSpec
from models.wan import WAN

Make = Callable[..., GenerationRequest]

_IMPORT_ALL = """
import importlib, pkgutil, sys, models
for module in pkgutil.iter_modules(models.__path__):
    importlib.import_module(f"models.{module.name}")
heavy = {"torch", "diffusers", "transformers", "compel", "av", "ray"} & set(sys.modules)
sys.exit(f"loaded on import: {heavy}" if heavy else 0)
"""


def test_importing_the_package_loads_no_heavy_library() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_seeds_count_up_and_wrap() -> None:
    assert seeds_from(7, 3) == [7, 8, 9]
    assert seeds_from(2**63 - 2, 3) == [2**63 - 2, 2**63 - 1, 0]


def test_generators_take_the_whole_range_of_seeds() -> None:
    assert [generator.initial_seed() for generator in generators([0, 2**63 - 1])] == [0, 2**63 - 1]


def test_stopwatch_measures_each_phase_and_the_whole(recorder: Any, image_request: Make) -> None:
    control = recorder()
    watch = Stopwatch(control, image_request())
    watch.phase("encode")
    watch.phase("denoise")
    timings = watch.stop()
    assert list(timings) == ["encode", "denoise", "total"]
    assert timings["total"] >= timings["encode"] + timings["denoise"] - 0.01
    assert control.phases == ["encode", "denoise"]


def test_generate_before_load_says_so(wan_spec: ModelSpec, tiny_wan: Path, video_request: Make, recorder: Any) -> None:
    with pytest.raises(ModelLoadFailed, match="not loaded"):
        WAN(wan_spec, tiny_wan).generate(video_request(), recorder())


def test_warm_up_runs_at_the_default_size(wan: WAN) -> None:
    wan.warm_up()


@pytest.fixture
def offloaded(wan_spec: ModelSpec, tiny_wan: Path) -> Iterator[WAN]:
    """A model whose parts move between "devices" by accelerate's hooks; here both are the CPU."""
    model = WAN(wan_spec, tiny_wan)
    model.load()
    model.spec = wan_spec.model_copy(update={"offload": "model"})
    model._pipeline.enable_model_cpu_offload(device="cpu")
    yield model
    model._pipeline.remove_all_hooks()


def test_offload_hooks_stay_on_the_pipeline_after_success_and_after_a_cancel(
    wan: WAN, offloaded: WAN, video_request: Make, recorder: Any
) -> None:
    expected = wan.generate(video_request(), recorder()).frames
    with pytest.raises(Cancelled):
        offloaded.generate(video_request(), recorder(raise_at_step=1, error=Cancelled("now")))
    for _ in range(2):
        made = offloaded.generate(video_request(), recorder()).frames
        assert expected is not None
        assert made is not None
        assert (made == expected).all()
        pipeline = offloaded._pipeline
        assert pipeline._all_hooks
        hooks = [part._hf_hook for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae)]
        assert {id(hook) for hook in hooks} == {id(user.hook) for user in pipeline._all_hooks}


def test_attention_preference_keeps_the_other_kernels(wan: WAN, video_request: Make, recorder: Any) -> None:
    plain = wan.generate(video_request(), recorder()).frames
    before = wan.spec
    wan.spec = before.model_copy(update={"attention": "flash"})
    try:
        made = wan.generate(video_request(), recorder())
    finally:
        wan.spec = before
    assert made.settings["attention"] == "flash"
    assert plain is not None
    assert made.frames is not None
    assert abs(made.frames.astype(int) - plain).max() <= 1
