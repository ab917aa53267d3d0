from models.writing.waiting import JOB_HANDICAP_SECONDS, WaitingLine


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def order(line: WaitingLine[str]) -> list[str]:
    return [line.pop() for _ in range(len(line))]


def test_chat_goes_before_jobs_and_the_older_before_the_younger() -> None:
    clock = Clock()
    line: WaitingLine[str] = WaitingLine(clock)
    for name, priority in (("job 1", "job"), ("chat 1", "chat"), ("job 2", "job"), ("chat 2", "chat")):
        line.add(name, 10, priority)  # type: ignore[arg-type]
        clock.now += 1
    assert order(line) == ["chat 1", "chat 2", "job 1", "job 2"]


def test_a_job_is_overtaken_by_no_chat_that_came_too_late() -> None:
    clock = Clock()
    line: WaitingLine[str] = WaitingLine(clock)
    line.add("job", 10, "job")
    clock.now += JOB_HANDICAP_SECONDS - 0.1
    line.add("in time", 10, "chat")
    clock.now += 0.2
    line.add("too late", 10, "chat")
    assert order(line) == ["in time", "job", "too late"]


def test_the_line_counts_its_tokens_and_lets_anybody_leave() -> None:
    line: WaitingLine[str] = WaitingLine()
    for tokens, name in ((3, "a"), (5, "b"), (7, "c")):
        line.add(name, tokens, "chat")
    assert (line.tokens, line.head()) == (15, ("a", 3))
    assert line.remove("b")
    assert not line.remove("b")
    assert line.tokens == 10
    assert sorted(line) == ["a", "c"]
    assert line.clear() == ["a", "c"]
    assert (line.tokens, len(line), line.head()) == (0, 0, None)
