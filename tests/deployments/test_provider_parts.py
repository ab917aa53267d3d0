"""What goes to a provider's model and what comes back, without a provider."""

import io
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import av
import numpy as np
import pytest

from db.providers import ApiModel, ApiProvider
from deployments.provider.api import OutputUnreadable, Remote
from deployments.provider.inputs import build, facts, input_hash, refusals, task_of
from deployments.provider.outputs import encode, host_allowed
from deployments.provider.run import cost
from deployments.storing import Finishing, Marking
from models.catalog import Format, default_for, resolve
from models.media import encode_mp4, probe, read_xmp
from models.params import GivenParams, resolve_params


def model(**changes: Any) -> ApiModel:
    provider = ApiProvider(
        id=uuid4(),
        name="replicate",
        base_url=None,
        auth_scheme="bearer",
        auth_header_name="Authorization",
        secret_name=None,
        is_active=True,
        output_hosts=(),
        nsfw_allowed=False,
    )
    values: dict[str, Any] = {"modality": "video", "model_family": "wan", "version": "0" * 32, "is_active": True}
    values |= {"input_defaults": {}, "capabilities": {}, "pricing": {}}
    return ApiModel(**({"id": uuid4(), "provider": provider, "model_key": "m"} | values | changes))


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://replicate.delivery/a.png", True),
        ("https://X.Replicate.Delivery/a.png", True),
        ("https://a.b.replicate.delivery/a.png", True),
        ("https://evilreplicate.delivery/a.png", False),
        ("https://replicate.delivery.example/a.png", False),
        ("https://replicate.delivery@example.com/a.png", False),
        ("https://example.com/?replicate.delivery", False),
        ("data:image/png;base64,AAAA", False),
        ("https://[::1/a.png", False),
        ("", False),
    ],
)
def test_outputs_come_from_the_named_hosts(url: str, allowed: bool) -> None:
    assert host_allowed(url, ("replicate.delivery", "*.replicate.delivery", "", "*.")) is allowed


def test_parameters_go_under_the_models_names() -> None:
    job_type = resolve("video_fast")
    defaults = default_for(job_type.family)
    params = resolve_params(job_type, GivenParams(prompt="p", seed=0, frames=33), defaults).params
    mappings = {"frames": "length", "prompt": "text"}
    one = model(
        capabilities={
            "input_key_mappings": mappings,
            "allowed_input_keys": ["text", "length", "seed", "shift"],
            "scheduler_aliases": {defaults.scheduler: "theirs"},
        },
        input_defaults={"shift": 3.0, "safety": True},
    )
    given = build(one, params, "words", {})
    assert given == {"text": "words", "length": 33, "seed": 0, "shift": params.shift, "safety": True}
    assert facts(one, given) == {"length": 33, "seed": 0, "shift": params.shift, "safety": True}
    wrong = refusals(one, {"prompt": "p", "frames": 33, "width": 480, "scheduler": defaults.scheduler, "loras": ()})
    assert [(error.field, error.code) for error in wrong] == [("width", "unsupported"), ("scheduler", "choice")]


def test_an_input_is_known_again_however_its_numbers_are_written() -> None:
    one = model()
    first = {"prompt": "p", "guidance_scale": 7.0, "seed": 3, "image": "https://a/1"}
    again = {"seed": 3, "guidance_scale": 7, "image": "https://a/2", "prompt": "p"}
    assert input_hash(one, first) == input_hash(one, again)
    assert input_hash(one, first) != input_hash(one, first | {"seed": 4})


def test_the_tasks_have_the_names_of_the_rows() -> None:
    assert [task_of(out, ref) for out in Format for ref in (False, True)] == ["t2i", "i2i", "t2v", "i2v"]


def remote(seconds: float | None) -> Remote:
    return Remote("a", "succeeded", None, {}, ("x", "y"), seconds, None, False)


def test_a_cost_is_what_is_known_and_else_null() -> None:
    assert cost({"usd_per_second": 0.5, "usd_per_output": 0.1}, remote(2.0)) == 1.2
    assert cost({"usd_per_prediction": 0.25}, remote(None)) == 0.25
    assert cost({"usd_per_second": 0.5}, remote(None)) is None
    assert cost({}, remote(2.0)) is None
    assert cost({"usd_per_second": "much"}, remote(2.0)) is None


def film(frames: int = 9) -> bytes:
    pictures = np.zeros((frames, 32, 48, 3), np.uint8)
    pictures[:, :, :, 1] = np.arange(frames)[:, None, None] * 180 // max(9, frames)
    return encode_mp4(pictures, 16)


def test_a_video_is_decoded_marked_and_keeps_its_pictures() -> None:
    data = film()
    made = encode(data, "video", 7, "m", Finishing(Marking("<x:xmpmeta/>")), 1_000_000)
    assert (made.asset_type, made.extension, made.seed, made.manifest) == ("video", "mp4", 7, None)
    assert (made.facts.frames, made.facts.width, made.facts.height) == (9, 48, 32)
    assert "xmpmeta" in (read_xmp(made.data) or "")
    assert probe(made.data).frames == 9
    assert made.thumbnail


@pytest.mark.parametrize("kind", ["cut", "picture", "large", "nothing"])
def test_a_video_that_will_not_do_is_refused(kind: str) -> None:
    data = {"cut": film()[:600], "picture": b"\x89PNG", "large": film(), "nothing": b""}[kind]
    with pytest.raises(OutputUnreadable):
        encode(data, "video", None, "m", Finishing(Marking()), 100 if kind == "large" else 1_000_000)


def test_what_a_classifier_says_is_kept_with_the_file() -> None:
    from models.moderation import ContentRefused, Decision, Judgement

    class Judging:
        def judge(self, generation: Any) -> list[Judgement]:
            assert generation.images
            return [Judgement(Decision.REJECT, "classifier:x", 0.9) for _ in generation.images]

    judge: Any = Judging()
    held = encode(film(), "video", None, "m", Finishing(Marking(), judge, keep_rejected=True), 1_000_000)
    assert SimpleNamespace(**vars(held)).judgement.decision is Decision.REJECT
    with pytest.raises(ContentRefused):
        encode(film(), "video", None, "m", Finishing(Marking(), judge, keep_rejected=False), 1_000_000)


def test_a_classifier_sees_all_of_a_video_that_does_not_say_how_long_it_is() -> None:
    from models.moderation import Decision, Judgement

    whole, streamed = io.BytesIO(film(100)), io.BytesIO()
    options = {"movflags": "frag_keyframe+empty_moov"}
    with av.open(whole) as given, av.open(streamed, "w", format="mp4", options=options) as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    shades: list[int] = []

    class Judging:
        def judge(self, generation: Any) -> list[Judgement]:
            shades.extend(picture.getpixel((24, 16))[1] for picture in generation.images or ())
            return [Judgement(Decision.APPROVE, "classifier:x", 0.9) for _ in generation.images or ()]

    judge: Any = Judging()
    with av.open(io.BytesIO(streamed.getvalue())) as container:
        assert container.streams.video[0].frames == 0
    encode(streamed.getvalue(), "video", None, "m", Finishing(Marking(), judge), 1_000_000)
    assert 8 <= len(shades) <= 16
    assert max(shades) - min(shades) > 80
