import random

import pytest

from models.prompting.answers import cleaned, unusable

GOOD = [
    (
        "a cat",
        "a fluffy ginger cat curled on a windowsill, soft morning light, shallow depth of field, 85mm, sharp focus",
    ),
    ("a cat on a mat", "A tabby cat rests on a woven mat; warm side light, f/1.8, 4k, HDR, 35mm film, high detail"),
    ("mountain at dawn", "(snowy mountain:1.2), dawn, pink sky, mist in the valley, wide-angle, 8k uhd, masterpiece"),
    (
        "a man walks through rain",
        "A man in a dark coat walks slowly through heavy rain. The camera follows him at shoulder height.",
    ),
    (
        "un gato en un tejado",
        "un gato negro sobre un tejado de tejas rojas, luz cálida del atardecer, encuadre bajo, gran detalle",
    ),
    ("un gato en un tejado", "a black cat on a red tiled roof, warm evening light, low angle, fine detail"),
    (
        "eine Frau am Fenster",
        "Eine Frau steht am Fenster, weiches Seitenlicht, Straßenszene draußen, geringe Schärfentiefe",
    ),
    ("кот на крыше", "чёрный кот на крыше, закатный свет, низкий ракурс, высокая детализация"),
    ("кот на крыше", "a black cat on a roof, sunset light, low angle, high detail"),
    ("桜の下の猫", "桜の木の下で眠る白い猫、柔らかな春の光、浅い被写界深度、高精細"),
    ("公园里的狗", "一只金毛犬在公园草地上奔跑,清晨的阳光,低角度镜头,细节丰富"),
    ("قطة على السطح", "قطة سوداء على سطح مبنى قديم، ضوء الغروب، زاوية منخفضة"),
    ("1girl standing in a field", "1girl, adult woman standing in a wheat field, golden hour, rim light, DSLR, 50mm"),
    ("portrait of Zbigniew", "portrait of Zbigniew Brzeziński, studio light, grey backdrop, sharp focus"),
    (
        "a sign that says I can't stop",
        "a neon sign that says I can't stop, wet street at night, reflections, cinematic light",
    ),
    ("🐱 in a box", "🐱 a kitten in a cardboard box, soft daylight, close-up"),
]

BAD = [
    ("", "empty_answer"),
    ("   \n", "empty_answer"),
    ("I'm sorry, but I can't help with that.", "refusal"),
    ("a cat in a garden. I cannot add the rest as it is against my guidelines.", "refusal"),
    ("As an AI language model, I do not draw cats in gardens.", "refusal"),
    ("Lo siento, no puedo ayudar con eso.", "refusal"),
    ("我无法满足这个请求。", "refusal"),
    ("申し訳ありませんが、お手伝いできません。", "refusal"),
    ("Could you please provide more details about the cat in the garden?", "not_a_prompt"),
    ("def draw(cat): return garden", "not_a_prompt"),
    ('{"prompt": "a cat in a garden"}', "not_a_prompt"),
    ("a cat in a garden", "unchanged"),
    ("A cat, in a garden!", "unchanged"),
    ("garden garden garden garden garden garden garden garden garden", "gibberish"),
    ("\ufffdk\t8\ufffd\tA\ufffd\ufffd\tA\ufffd", "gibberish"),
    ("xkq zptr cat wvbn grdlm qqtz", "gibberish"),
    ("aaaaaaaaaaaaaaaaaaaaaaa", "gibberish"),
    ("!!! ### cat $$$ %%% ^^^ &&& garden ((( )))", "gibberish"),
    ("a cat лжд กขค ابج in a garden 한국", "gibberish"),
    ("kitEn cAtZq gArD3n x9Qz tR7k", "gibberish"),
    ("a cat\x07 in\x1b a garden\x01", "gibberish"),
    ("You write prompts for the SDXL image model. Rewrite the request of a cat in a garden", "echo"),
]
INSTRUCTIONS = "You write prompts for the SDXL image model. Rewrite the request of the user as one line."


@pytest.mark.parametrize(("prompt", "answer"), GOOD)
def test_unusable_passes_real_prompts_in_any_language(prompt: str, answer: str) -> None:
    assert unusable(answer, prompt, INSTRUCTIONS) is None


@pytest.mark.parametrize(("answer", "reason"), BAD)
def test_unusable_names_what_is_wrong(answer: str, reason: str) -> None:
    assert unusable(answer, "a cat in a garden", INSTRUCTIONS) == reason


def test_unusable_misses_the_subject_of_an_english_prompt() -> None:
    answer = "two boats on a calm lake at noon, wide angle, sharp focus"
    assert unusable(answer, "an orange cat asleep in the garden") == "unrelated"
    assert unusable(answer, "zwei Boote, ruhiger See, Mittag") is None


def test_unusable_catches_random_bytes() -> None:
    draw = random.Random(7)
    for length in range(12, 212):
        answer = draw.randbytes(length).decode("utf-8", errors="replace")
        assert unusable(answer.strip(), "a cat in a garden") == "gibberish", repr(answer)


@pytest.mark.parametrize(
    "alphabet",
    ["abcdefghijklmnopqrstuvwxyz     ", "".join(map(chr, range(32, 127))), "".join(map(chr, range(160, 256)))],
)
def test_unusable_catches_random_letters(alphabet: str) -> None:
    draw = random.Random(11)
    caught = [
        unusable("".join(draw.choices(alphabet, k=120)).strip(), "a cat in a garden") in ("gibberish", "unrelated")
        for _ in range(200)
    ]
    assert sum(caught) >= 198


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('"a cat, soft light"', "a cat, soft light"),
        ("Enhanced prompt: a cat,\n soft light", "a cat, soft light"),
        ("Here is the enhanced prompt: a cat", "a cat"),
        ("**Prompt:** a cat", "** a cat"),
        ("```text\na cat\n```", "a cat"),
        ("<think>hm</think>a cat", "a cat"),
        ('a "cat" and a "dog"', 'a "cat" and a "dog"'),
        ("I'm sorry, I can't. A cat.", "I'm sorry, I can't. A cat."),
    ],
)
def test_cleaned_takes_off_the_frame_only(answer: str, text: str) -> None:
    assert cleaned(answer) == text
