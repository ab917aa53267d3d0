"""LoRAs in real tiny pipelines, from real files: what they change, what they leave alone, and what stays in memory."""

import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from models.generation import Cancelled
from models.lora.adapters import Adapters
from models.lora.files import LoraInvalid, LoraNoRoom, ProfileLoras
from models.lora.loras import LoraSource, LoraUse
from models.lora.rows import AdapterSet, applied
from tests.models.lora_making import make_lora

ROOMY = 1 << 30
TOLERANCE = 1e-5
UNET_ONLY = ("unet",)

# --- parts ------------------------------------------------------------------------------------------------


def load(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl: Path) -> Any:
    return load(tiny_sdxl)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> dict[str, Path]:
    folder, untouched = tmp_path_factory.mktemp("loras"), load(tiny_sdxl)

    def make(name: str, seed: int, **options: Any) -> Path:
        return make_lora(folder / f"{name}.safetensors", untouched, seed, **options)

    good = {
        "ink": make("ink", 1),
        "oil": make("oil", 2, style="diffusers", rank=6),
        "wash": make("wash", 3, rank=2, alpha=2.0, parts=UNET_ONLY),
        "soft": make("soft", 4, rank=2, parts=UNET_ONLY, dtype=torch.float16),
        "words": make("words", 5, parts=("text_encoder", "text_encoder_2")),
        # of a few layers each, the same and others
        "dot": make("dot", 11, parts=UNET_ONLY, within="mid_block", style="diffusers"),
        "dash": make("dash", 12, parts=UNET_ONLY, within="mid_block", style="diffusers"),
        "line": make("line", 13, parts=("unet", "text_encoder"), within="layers.0", style="diffusers"),
    }
    other = {"unet.down_blocks.9.attentions.0.to_q.lora_A.weight": torch.ones(2, 8)}
    other["unet.down_blocks.9.attentions.0.to_q.lora_B.weight"] = torch.ones(8, 2)
    wrong_shape = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.ones(2, 7)}
    wrong_shape["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = torch.ones(7, 2)
    bad = {
        "partly_other": make("partly_other", 6, style="diffusers", parts=UNET_ONLY, extra=other),
        "wrong_shape": make("wrong_shape", 7, style="diffusers", extra=wrong_shape),
        "not_finite": make("not_finite", 8, size=float("inf"), parts=UNET_ONLY),
        "dora": make("dora", 9, extra={"lora_unet_mid_block.dora_scale": torch.ones(3)}),
        "empty": make("empty", 10, parts=()),
        "torn": folder / "torn.safetensors",
        "pickle": folder / "pickle.safetensors",
    }
    bad["torn"].write_bytes(good["ink"].read_bytes()[:-1000])
    torch.save({"a": torch.ones(1)}, bad["pickle"])
    return good | bad


@pytest.fixture
def registry(files: dict[str, Path]) -> ProfileLoras:
    return ProfileLoras({name: LoraSource(source=str(path)) for name, path in files.items()})


@pytest.fixture
def adapters(pipeline: Any, registry: ProfileLoras) -> Iterator[Adapters]:
    adapters = Adapters(pipeline, registry, ROOMY)
    yield adapters
    for loaded in adapters._loaded.values():
        loaded.leases = 0  # of a test that failed
    adapters.clear()


def uses(*names: str, weight: float = 1.0) -> tuple[LoraUse, ...]:
    return tuple(LoraUse(name=name, weight=weight) for name in names)


def arguments(rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(99)
    return {
        "sample": torch.randn(rows, 4, 8, 8, generator=generator),
        "timestep": torch.linspace(900, 10, rows),
        "encoder_hidden_states": torch.randn(rows, 77, 64, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, 32, generator=generator),
            "time_ids": torch.rand(rows, 6, generator=generator) * 64,
        },
    }


def row(of: dict[str, Any], number: int) -> dict[str, Any]:
    return {k: row(v, number) if isinstance(v, dict) else v[number : number + 1] for k, v in of.items()}


def forward(pipeline: Any, given: dict[str, Any], sets: list[AdapterSet]) -> torch.Tensor:
    with applied(pipeline.unet, sets):
        output: torch.Tensor = pipeline.unet(**given).sample
    return output


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def names_of_parameters(pipeline: Any) -> set[str]:
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    return {f"{number}.{name}" for number, part in enumerate(parts) for name, _ in part.named_parameters()}


def stock_with(folder: Path, files: dict[str, Path], weights: dict[str, float]) -> Any:
    """The stock pipeline with LoRAs, by its own means alone."""
    stock = load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, of each LoRA after the first
        for name in weights:
            stock.load_lora_weights(str(files[name]), adapter_name=name)
    stock.set_adapters(list(weights), list(weights.values()))
    return stock


# --- equality ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{"ink": 0.7}, {"wash": 0.5, "oil": -1.3}, {"soft": 2.0}], ids=str)
def test_rows_of_one_set_get_the_bits_of_the_stock_pipeline(
    tiny_sdxl: Path, files: dict[str, Path], adapters: Adapters, weights: dict[str, float]
) -> None:
    given, stock = arguments(3), stock_with(tiny_sdxl, files, weights)
    base = adapters._pipeline.unet(**given).sample
    with adapters.acquire(tuple(LoraUse(name=name, weight=weight) for name, weight in weights.items())) as lease:
        ours = forward(adapters._pipeline, given, [lease.adapters] * 3)
    assert torch.equal(ours, stock.unet(**given).sample)
    assert difference(ours, base) > 0.01


def test_rows_with_different_loras_equal_each_alone(
    tiny_sdxl: Path, files: dict[str, Path], adapters: Adapters
) -> None:
    """Linear and convolution layers, two formats, several ranks and weights, two LoRAs at once, and none."""
    wanted: list[dict[str, float]] = [
        {"ink": 1.0},
        {"ink": 0.4},
        {},
        {"oil": -0.5, "wash": 1.5},
        {"wash": 1.5, "oil": -0.5},
        {"soft": 2.0},
        {"ink": 1.0},
    ]
    given = arguments(len(wanted))
    leases = [adapters.acquire(tuple(LoraUse(name=n, weight=w) for n, w in one.items())) for one in wanted]
    together = forward(adapters._pipeline, given, [lease.adapters for lease in leases])
    for number, one in enumerate(wanted):
        stock = stock_with(tiny_sdxl, files, one) if one else load(tiny_sdxl)
        alone = stock.unet(**row(given, number)).sample
        assert difference(together[number : number + 1], alone) < TOLERANCE, one
        ours = forward(adapters._pipeline, row(given, number), [leases[number].adapters])
        assert torch.equal(ours, alone), one
    for lease in leases:
        lease.release()


def test_rows_without_loras_beside_others_are_the_base_models(adapters: Adapters) -> None:
    given, unet = arguments(4), adapters._pipeline.unet
    base = unet(**given).sample
    with adapters.acquire(uses("ink")) as lease:
        mixed = forward(adapters._pipeline, given, [(), lease.adapters, lease.adapters, ()])
        assert difference(mixed[[0, 3]], base[[0, 3]]) < TOLERANCE
        assert difference(mixed[1:3], base[1:3]) > 0.01
        assert torch.equal(forward(adapters._pipeline, given, [()] * 4), base)


def test_a_forward_outside_of_the_context_is_the_base_models(adapters: Adapters) -> None:
    given, unet = arguments(2), adapters._pipeline.unet
    base = unet(**given).sample
    with adapters.acquire(uses("ink", "oil")) as lease:
        assert torch.equal(unet(**given).sample, base)
        with pytest.raises(RuntimeError), applied(unet, [lease.adapters] * 2):
            raise RuntimeError
        assert torch.equal(unet(**given).sample, base)


def test_text_encoders_run_with_the_loras_of_the_request_only(
    tiny_sdxl: Path, files: dict[str, Path], adapters: Adapters
) -> None:
    def encode(pipeline: Any) -> torch.Tensor:
        found = pipeline.encode_prompt("a red fox in the snow", do_classifier_free_guidance=False)
        return torch.cat([found[0].flatten(), found[2].flatten()])

    pipeline = adapters._pipeline
    base = encode(pipeline)
    with adapters.acquire((LoraUse(name="words", weight=0.8), LoraUse(name="ink"))) as lease:
        with adapters.encoding(lease.adapters):
            changed = encode(pipeline)
        with adapters.encoding(()):
            assert torch.equal(encode(pipeline), base)
        assert torch.equal(encode(pipeline), base)
    assert torch.equal(changed, encode(stock_with(tiny_sdxl, files, {"words": 0.8, "ink": 1.0})))
    assert difference(changed, base) > 0.01


def test_text_is_not_encoded_without_a_lora_that_has_gone_meanwhile(adapters: Adapters) -> None:
    lease = adapters.acquire(uses("ink"))
    lease.release()  # a cancel, while the text waits for its turn
    adapters.clear()
    with pytest.raises(Cancelled), adapters.encoding(lease.adapters):
        pytest.fail("this would be kept as the text with the LoRA")


def test_whole_pictures_equal_those_of_the_stock_pipeline(
    tiny_sdxl: Path, files: dict[str, Path], adapters: Adapters
) -> None:
    options = {"width": 64, "height": 64, "num_inference_steps": 3, "output_type": "latent"}

    def picture(pipeline: Any) -> torch.Tensor:
        latents: torch.Tensor = pipeline("a fox", generator=torch.Generator().manual_seed(3), **options).images
        return latents

    stock, pipeline = stock_with(tiny_sdxl, files, {"ink": 0.6}), adapters._pipeline
    lease = adapters.acquire(uses("ink", weight=0.6))
    # the pipeline makes forwards of two rows, guided and not, which both have the set
    with adapters.encoding(lease.adapters), applied(pipeline.unet, [lease.adapters] * 2):
        ours = picture(pipeline)
    lease.release()
    assert torch.equal(ours, picture(stock))


def test_a_layer_that_sees_several_entries_for_each_row_gives_each_its_own(adapters: Adapters) -> None:
    unet = adapters._pipeline.unet
    with adapters.acquire(uses("ink")) as lease:
        layer = next(part for name, part in unet.named_modules() if name.endswith("to_q"))
        x = torch.randn(6, layer.in_features)
        base = layer(x)
        with applied(unet, [(), lease.adapters]):
            mixed = layer(x)
            with pytest.raises(RuntimeError, match="rows"):
                layer(x[:5])
    changed = (mixed != base).any(dim=-1)
    assert changed.tolist() == [False, False, False, True, True, True]


def test_compiled_regions_follow_the_loras(adapters: Adapters, tiny_sdxl: Path) -> None:
    """The compiler guards what a layer adds: it must not go on with the code of another set."""
    compiled = load(tiny_sdxl)
    compiled.unet.compile_repeated_blocks(backend="eager")
    beside, given = Adapters(compiled, adapters._registry, ROOMY), arguments(2)

    def difference_now(*rows: tuple[LoraUse, ...]) -> float:
        outputs = []
        for each in (adapters, beside):
            leases = [each.acquire(row) for row in rows]
            outputs.append(forward(each._pipeline, given, [lease.adapters for lease in leases]))
            for lease in leases:
                lease.release()
        return difference(*outputs)

    assert difference_now((), ()) < TOLERANCE
    assert difference_now(uses("dot"), uses("dot")) < TOLERANCE
    assert difference_now(uses("dot", weight=0.5), ()) < TOLERANCE
    assert difference_now((), ()) < TOLERANCE
    beside.clear()
    assert difference_now((), ()) < TOLERANCE
    assert difference_now(uses("dash"), uses("dash")) < TOLERANCE


def test_two_names_of_one_file_add_their_weights(files: dict[str, Path], adapters: Adapters) -> None:
    adapters._registry = ProfileLoras({name: LoraSource(source=str(files["ink"])) for name in ("first", "second")})
    given = arguments(1)
    with adapters.acquire(uses("first", "second", weight=0.5)) as lease, adapters.acquire(uses("first")) as one:
        assert torch.equal(*(forward(adapters._pipeline, given, [held.adapters]) for held in (lease, one)))
        assert adapters.names_loaded == {"first", "second"}
        assert adapters.loads == 1


def test_loading_and_evicting_between_the_forwards_of_a_request_changes_nothing_for_it(
    adapters: Adapters,
) -> None:
    given, pipeline = arguments(2), adapters._pipeline
    lease = adapters.acquire(uses("oil"))
    before = forward(pipeline, given, [lease.adapters] * 2)
    adapters.budget_bytes = adapters.bytes_loaded + bytes_of(adapters, "wrong_shape")
    for name in ("ink", "wash", "soft", "ink"):
        adapters.acquire(uses(name)).release()
        assert torch.equal(forward(pipeline, given, [lease.adapters] * 2), before), name
    with pytest.raises(LoraInvalid):
        adapters.acquire(uses("wrong_shape"))
    assert torch.equal(forward(pipeline, given, [lease.adapters] * 2), before)
    assert adapters.evictions > 0


# --- the cache --------------------------------------------------------------------------------------------


def bytes_of(adapters: Adapters, *names: str) -> int:
    """What the tensors of the files take."""
    return sum(4 * adapters._registry.file(name).numbers for name in names)


def test_the_least_recently_used_goes_first(adapters: Adapters) -> None:
    adapters.budget_bytes = bytes_of(adapters, "ink", "wash", "words")
    for name in ("ink", "wash", "words", "ink"):
        adapters.acquire(uses(name)).release()
    assert adapters.names_loaded == {"ink", "wash", "words"}
    adapters.acquire(uses("soft")).release()
    assert adapters.names_loaded == {"ink", "words", "soft"}
    assert (adapters.loads, adapters.hits, adapters.evictions) == (4, 1, 1)


def test_what_a_lease_holds_is_never_evicted(adapters: Adapters) -> None:
    adapters.budget_bytes = bytes_of(adapters, "oil")
    held = [adapters.acquire(uses("ink")), adapters.acquire(uses("ink"))]
    adapters.acquire(uses("wash")).release()
    for _ in range(2):
        with pytest.raises(LoraNoRoom) as refused:
            adapters.acquire(uses("oil"))
        assert refused.value.retryable
        assert adapters.names_loaded == {"ink", "wash"}  # nothing was thrown out in vain
        held.pop().release()
    adapters.acquire(uses("oil")).release()
    assert adapters.names_loaded == {"oil"}


def test_a_lease_released_twice_counts_once(adapters: Adapters) -> None:
    first, second = adapters.acquire(uses("ink")), adapters.acquire(uses("ink"))
    first.release()
    first.release()
    adapters.budget_bytes = bytes_of(adapters, "ink")
    with pytest.raises(LoraNoRoom):
        adapters.acquire(uses("wash"))
    second.release()
    adapters.acquire(uses("wash")).release()


def test_a_refused_request_holds_nothing(adapters: Adapters) -> None:
    with pytest.raises(LoraInvalid):
        adapters.acquire(uses("ink", "wash", "wrong_shape"))
    adapters.budget_bytes = bytes_of(adapters, "oil")
    adapters.acquire(uses("oil")).release()
    assert adapters.names_loaded == {"oil"}


def test_a_request_larger_than_the_cache_is_refused_for_good(adapters: Adapters) -> None:
    adapters.acquire(uses("wash")).release()
    adapters.budget_bytes = bytes_of(adapters, "ink", "wash") - 1
    with pytest.raises(LoraInvalid, match="the cache is") as refused:
        adapters.acquire(uses("ink", "wash"))
    assert not refused.value.retryable
    assert adapters.names_loaded == {"wash"}


def test_bytes_are_those_of_the_tensors(adapters: Adapters) -> None:
    with adapters.acquire(uses("ink", "soft")):
        unet, texts = adapters._pipeline.unet, (adapters._pipeline.text_encoder, adapters._pipeline.text_encoder_2)
        tensors = [t for part in (unet, *texts) for name, t in part.named_parameters() if ".lora_" in name]
        assert adapters.bytes_loaded == sum(t.numel() * t.element_size() for t in tensors)
        assert {t.requires_grad for t in tensors} == {False}


def test_an_evicted_lora_is_freed(adapters: Adapters) -> None:
    with adapters.acquire(uses("ink")) as lease:
        parameters = adapters._pipeline.unet.named_parameters()
        tensors = [weakref.ref(t) for name, t in parameters if f".{lease.adapters[0][0]}." in name]
    assert tensors
    adapters.budget_bytes = bytes_of(adapters, "oil")
    adapters.acquire(uses("oil")).release()
    gc.collect()
    assert [tensor() for tensor in tensors if tensor() is not None] == []


def test_the_base_model_comes_back_to_the_bit_and_to_the_module(adapters: Adapters) -> None:
    given, pipeline = arguments(2), adapters._pipeline
    parameters, base = names_of_parameters(pipeline), pipeline.unet(**given).sample
    texts = {name: tensor.clone() for name, tensor in pipeline.text_encoder_2.state_dict().items()}
    adapters.acquire(uses("ink", "oil")).release()
    assert names_of_parameters(pipeline) != parameters
    adapters.clear()
    assert (adapters.bytes_loaded, adapters.names_loaded) == (0, frozenset())
    assert names_of_parameters(pipeline) == parameters
    assert torch.equal(pipeline.unet(**given).sample, base)
    assert all(torch.equal(tensor, texts[name]) for name, tensor in pipeline.text_encoder_2.state_dict().items())
    assert not any(part._forward_hooks for part in pipeline.unet.modules())


def test_memory_stays_flat_over_200_leases(adapters: Adapters) -> None:
    adapters.budget_bytes = bytes_of(adapters, "dot", "line")
    order = ["dot", "dash", "line", "line", "dash"]

    def objects() -> tuple[int, int]:
        gc.collect()
        # by type: asking the objects themselves wakes things that complain about being asked
        found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor | torch.nn.Module)]
        return len(found), sum(t.numel() for t in found if isinstance(t, torch.Tensor))

    counts = []
    for cycle in range(200):
        adapters.acquire(uses(order[cycle % len(order)])).release()
        if cycle in (99, 199):
            counts.append(objects())
    assert counts[0] == counts[1]
    assert adapters.evictions > 50


# --- files that can't be used -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["partly_other", "wrong_shape", "not_finite", "dora", "empty", "torn", "pickle"])
@pytest.mark.parametrize("beside", [(), ("oil",)], ids=["alone", "beside another"])
def test_a_bad_file_fails_its_own_request_and_leaves_the_rest_intact(
    adapters: Adapters, name: str, beside: tuple[str, ...]
) -> None:
    given, pipeline = arguments(2), adapters._pipeline
    base = pipeline.unet(**given).sample
    with adapters.acquire(uses(*beside)) as lease:
        with_it = forward(pipeline, given, [lease.adapters] * 2)
        loaded, parameters = adapters.bytes_loaded, names_of_parameters(pipeline)
        with pytest.raises(LoraInvalid) as refused:
            adapters.acquire(uses(name))
        assert not refused.value.retryable
        assert refused.value.message.startswith(f"{name}: ")
        assert adapters.bytes_loaded == loaded
        assert names_of_parameters(pipeline) == parameters
        assert torch.equal(forward(pipeline, given, [lease.adapters] * 2), with_it)
        assert torch.equal(pipeline.unet(**given).sample, base)


def test_a_lora_of_another_architecture_is_refused(adapters: Adapters, tmp_path: Path, tiny_wan: Path) -> None:
    path = make_lora(tmp_path / "wan.safetensors", load(tiny_wan), 1, parts=("transformer",), style="diffusers")
    adapters._registry = ProfileLoras({"wan": LoraSource(source=str(path))})
    with pytest.raises(LoraInvalid, match="another model"):
        adapters.acquire(uses("wan"))


def test_a_model_with_fused_projections_takes_no_lora(tiny_sdxl: Path, registry: ProfileLoras) -> None:
    pipeline = load(tiny_sdxl)
    pipeline.fuse_qkv_projections(vae=False)
    with pytest.raises(LoraInvalid, match="fused"):
        Adapters(pipeline, registry, ROOMY).acquire(uses("wash"))


def test_a_name_that_the_registry_lost_is_refused(adapters: Adapters) -> None:
    with pytest.raises(LoraInvalid, match="no longer"):
        adapters.acquire(uses("nobody"))


# --- WAN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2])
def test_wan_rows_with_different_loras_equal_each_alone(tiny_wan: Path, tmp_path: Path, experts: int) -> None:
    pipeline = load(tiny_wan)
    if experts == 2:
        pipeline.register_modules(transformer_2=load(tiny_wan).transformer)
    sources = {
        name: LoraSource(
            source=str(
                make_lora(tmp_path / f"{name}.safetensors", pipeline, seed, parts=("transformer",), style="diffusers")
            )
        )
        for seed, name in enumerate(("slow", "grain"))
    }
    adapters = Adapters(pipeline, ProfileLoras(sources), ROOMY)
    generator = torch.Generator().manual_seed(1)
    given = {
        "hidden_states": torch.randn(3, 16, 2, 8, 8, generator=generator),
        "timestep": torch.tensor([900.0, 500.0, 20.0]),
        "encoder_hidden_states": torch.randn(3, 12, 32, generator=generator),
    }
    leases = [adapters.acquire(uses("slow")), adapters.acquire(()), adapters.acquire(uses("grain", weight=-0.5))]
    for name in ("transformer", "transformer_2")[:experts]:
        module = getattr(pipeline, name)
        base = module(**given).sample
        with applied(module, [lease.adapters for lease in leases]):
            together = module(**given).sample
        for number, lease in enumerate(leases):
            with applied(module, [lease.adapters]):
                alone = module(**row(given, number)).sample
            assert difference(together[number : number + 1], alone) < TOLERANCE
            assert (difference(alone, base[number : number + 1]) > 0.01) is bool(lease.adapters)
    numbers = sum(adapters._registry.file(name).numbers for name in sources)
    assert adapters.bytes_loaded == 4 * experts * numbers


# --- what is recorded -------------------------------------------------------------------------------------


def test_a_lease_records_what_was_used(adapters: Adapters) -> None:
    with adapters.acquire((LoraUse(name="ink", weight=0.5), LoraUse(name="wash"))) as lease:
        assert lease.settings == [
            {"name": "ink", "weight": 0.5, "sha256": adapters._registry.file("ink").sha256},
            {"name": "wash", "weight": 1.0, "sha256": adapters._registry.file("wash").sha256},
        ]
    with adapters.acquire(()) as lease:
        assert (lease.adapters, lease.settings) == ((), [])
