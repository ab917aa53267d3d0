"""Chats as a model reads them: templates that fit, names filled in, a history within its budget."""

from pathlib import Path

import pytest

from models.fields import InvalidParams
from models.params import ContentMode
from models.policy import check_prompt
from models.prompting.dialogue import (
    MESSAGE_TOKENS,
    ByteCounter,
    Cast,
    ChatTemplate,
    Person,
    builtin_chat_templates,
    clean_message,
    mode_clause,
    select_chat_template,
    system_prompt,
    within_budget,
)
from models.prompting.prompts import NoTemplate, TokenCounter
from models.samples.tiny import ensure_tiny
from models.writing.language import Message

ADA = Person("Ada", "a painter", "calm", "grew up at sea", "slowly", mood="tired", voice_examples=("Well.", "So."))


def talk(exchanges: int, length: int = 10) -> list[Message]:
    return [
        Message("user" if number % 2 == 0 else "assistant", str(number // 2) * length)
        for number in range(2 * exchanges)
    ]


def template(name: str, use_case: str, mode: ContentMode = "sfw") -> ChatTemplate:
    return ChatTemplate(name, use_case, mode, "text", 100)


# --- templates


def test_builtin_templates_come_in_both_modes_and_end_with_theirs() -> None:
    found = builtin_chat_templates()
    assert {one.use_case for one in found} == {
        "chat_general",
        "chat_creative",
        "chat_admin",
        "chat_sdxl_conversion",
        "character_roleplay",
    }
    assert len(found) == 10
    assert all(one.system_prompt.endswith(mode_clause(one.content_mode)) for one in found)


def test_the_fitting_template_is_chosen() -> None:
    for mode in ("sfw", "nsfw"):
        chosen, misfit = select_chat_template(builtin_chat_templates(), "chat_creative", mode)  # type: ignore[arg-type]
        assert (chosen.name, chosen.content_mode, misfit) == ("CHAT_CREATIVE", mode, None)


def test_the_general_template_stands_in_and_that_is_told() -> None:
    only = [template("a", "chat_general"), template("b", "chat_admin")]
    assert select_chat_template(only, "chat_creative", "sfw") == (only[0], "use_case")
    assert select_chat_template(only, "chat_creative", "nsfw") == (only[0], "use_case,content_mode")


def test_a_template_of_the_use_case_goes_before_one_of_the_mode() -> None:
    both = [template("a", "chat_general", "nsfw"), template("b", "chat_creative", "sfw")]
    assert select_chat_template(both, "chat_creative", "nsfw") == (both[1], "content_mode")


def test_an_sfw_chat_never_gets_an_nsfw_template() -> None:
    with pytest.raises(NoTemplate):
        select_chat_template([template("a", "chat_general", "nsfw")], "chat_general", "sfw")


# --- names


def test_names_are_filled_in() -> None:
    text = (
        "You are {{character_name}}, {{ character_description }}. {{user_name}} is here; {{user_pronoun_subject}} asks."
    )
    made = system_prompt(text, Cast(ADA, Person("Tom", gender="male")))
    assert (made.text, made.unfilled) == ("You are Ada, a painter. Tom is here; he asks.", ())


def test_lines_of_which_nothing_is_known_go_and_their_names_are_told() -> None:
    made = system_prompt(
        "You are {{character_name}}.\n\nMood: {{mood}}\n\nScene: {{scene_context}}", Cast(Person("Ada"))
    )
    assert (made.text, made.unfilled) == ("You are Ada.", ("mood", "scene_context"))


def test_a_name_that_nobody_knows_is_told() -> None:
    assert system_prompt("Hello {{weather}} there.", Cast()).unfilled == ("weather",)


def test_a_template_without_names_gets_a_paragraph_on_the_character() -> None:
    made = system_prompt("Be kind.", Cast(ADA))
    assert made.text == "Be kind.\n\nYou speak as Ada. a painter calm grew up at sea slowly tired"


def test_names_in_a_characters_own_words_are_not_filled_in() -> None:
    made = system_prompt("{{character_name}}: {{character_description}}", Cast(Person("Ada", "likes {{user_name}}")))
    assert made.text == "Ada: likes"


def test_the_scene_and_its_people_are_added() -> None:
    cast = Cast(None, Person("Tom", "a sailor"), (Person("Eve", "a cook"), Person("Al")), "a harbour", "brief")
    assert system_prompt("Be kind.", cast).text.split("\n\n") == [
        "Be kind.",
        "Tom, who speaks to you: a sailor",
        "Also there, Eve: a cook",
        "Also there, Al",
        "The scene: a harbour",
        "Style of your answers: brief",
    ]


def test_everything_that_people_wrote_is_there_for_the_policy() -> None:
    cast = Cast(ADA, Person("Tom", "a sailor"), (Person("Eve", "a cook", instructions="stay"),), "a harbour", "brief")
    for text in ("a painter", "grew up at sea", "Well.", "a sailor", "a cook", "stay", "a harbour", "brief"):
        assert text in cast.texts()


def test_our_own_roleplay_prompt_reads_well_and_passes_the_policy() -> None:
    chosen, _ = select_chat_template(builtin_chat_templates(), "character_roleplay", "sfw")
    made = system_prompt(chosen.system_prompt, Cast(ADA))
    assert made.text.startswith("You are Ada and speak to the user.")
    assert "{{" not in made.text
    check_prompt(made.text, "sfw")


# --- budget


def test_everything_is_kept_where_there_is_room() -> None:
    messages, kept = within_budget(ByteCounter(), "system", talk(3), "now?", 1000) or ([], -1)
    assert kept == 6
    assert [message.role for message in messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert (messages[0].content, messages[-1].content) == ("system", "now?")


@pytest.mark.parametrize("room", range(0, 130, 3))
def test_the_budget_is_kept_and_whole_exchanges_with_it(room: int) -> None:
    history, fixed = talk(3), len("system") + len("now?") + 3 * MESSAGE_TOKENS
    messages, kept = within_budget(ByteCounter(), "system", history, "now?", fixed + room) or ([], -1)
    # an exchange takes two messages of 10 bytes
    assert kept == 2 * min(3, room // (2 * (10 + MESSAGE_TOKENS)))
    assert messages[1:-1] == history[6 - kept :]


def test_a_message_that_does_not_fit_alone_has_no_messages() -> None:
    assert within_budget(ByteCounter(), "system", talk(3), "now?" * 100, 300) is None


def test_a_message_in_between_does_not_let_older_ones_in() -> None:
    history = [Message("user", "a"), Message("assistant", "b"), Message("user", "c" * 500), Message("assistant", "d")]
    messages, kept = within_budget(ByteCounter(), "s", history, "now?", 300) or ([], -1)
    assert (kept, len(messages)) == (0, 2)


def test_the_allowance_for_a_message_covers_the_chat_template(tiny_root: Path) -> None:
    from transformers import AutoTokenizer

    folder = ensure_tiny("qwen", tiny_root)
    tokenizer, counter = AutoTokenizer.from_pretrained(folder), TokenCounter.from_pretrained(folder, subfolder="")
    messages, _ = within_budget(counter, "a system prompt", talk(4), "and now?", 10_000) or ([], 0)
    told = [{"role": message.role, "content": message.content} for message in messages]
    encoded = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=True)["input_ids"]
    words = sum(counter.count(message.content) for message in messages)
    assert words < len(encoded) <= words + MESSAGE_TOKENS * (len(messages) + 1)


def test_bytes_are_never_fewer_than_tokens(tiny_root: Path) -> None:
    counter = TokenCounter.from_pretrained(ensure_tiny("qwen", tiny_root), subfolder="")
    for text in ("plain words", "Straße und Äpfel", "灯台", "🙂🙂"):
        assert counter.count(text) <= ByteCounter().count(text)


# --- messages


@pytest.mark.parametrize(
    ("given", "kept"), [(" hello ", "hello"), ("a\r\nb\rc", "a\nb\nc"), ("\tx\ty\n", "x\ty"), ("a  b", "a  b")]
)
def test_a_message_keeps_its_lines(given: str, kept: str) -> None:
    assert clean_message("message", given) == kept


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (None, "type"),
        (5, "type"),
        ("", "missing"),
        ("\u200b \n", "missing"),
        ("a\0", "characters"),
        ("\ud800", "characters"),
        ("y" * 8001, "length"),
    ],
)
def test_a_message_that_can_not_be_kept_is_refused(given: object, code: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        clean_message("message", given)
    assert [(error.field, error.code) for error in caught.value.errors] == [("message", code)]
