"""Judges that answer in words: what they are asked, how they are read, and NaN for all that cannot be read."""

import base64
import io
import logging
import math
import pickle

import numpy as np
import pytest
from fault_server import by_request, drip, faults, hang_up, reply, slow
from PIL import Image

import trl_dgpo.rewards.http as client_http
from trl_dgpo.rewards.chat import ChatJudge, DeQAScore, UnifiedReward
from trl_dgpo.rewards.http import ServiceError, ServiceUnavailableError


SECRET = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch):
    monkeypatch.setattr(client_http, "_BACKOFF", 0.01)


def noise(width=24, height=24):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def says(text):
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


def ranks(probabilities):
    top = [{"token": token, "logprob": math.log(p)} for token, p in probabilities.items()]
    return says(" ?") | {"choices": [says(" ?")["choices"][0] | {"logprobs": {"content": [{"top_logprobs": top}]}}]}


def judge(server, kind=ChatJudge, **options):
    first = ("judge-7b", "Is this {prompt}?") if kind is ChatJudge else ()
    url = server if isinstance(server, str) else server.url
    return kind(url, *first, **{"timeout": 5.0, "retries": 1} | options)


def value(answer, kind=ChatJudge, **options):
    answer = says(answer) if isinstance(answer, str) else answer
    with faults(reply(answer)) as server:
        [reward] = judge(server, kind, **options)(["a dog"], [noise()])
    return reward


def test_what_is_asked():
    with faults(reply(says("<Score>3</Score>"))) as server:
        assert judge(server)(["{a} dog"], [noise()], text=["x"]) == [3.0]
    [(call, _, body)] = server.requests
    assert call == "POST /v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge-7b", 0, 1024)
    [message] = body["messages"]
    image, text = message["content"]
    assert text == {"type": "text", "text": "Is this {a} dog?"}
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), np.asarray(noise()))


def test_every_image_gets_its_own_answer():
    def act(handler):
        prompt = handler.body["messages"][0]["content"][1]["text"]
        number = int(prompt.removeprefix("Is this ").removesuffix("?"))
        slow(0.1 * (number % 2), reply(says(f"<Score>{number}</Score>")))(handler)

    with faults(act) as server:
        assert judge(server)([str(i) for i in range(20)], [noise()] * 20) == [float(i) for i in range(20)]
        assert judge(server)([], []) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<Thought>fine</Thought><Score>4</Score>", 4.0),
        ("<Score> 3.5 </Score> or <Score>1</Score>", 3.5),
        ("4", math.nan),
        ("<Score>four</Score>", math.nan),
        ("<Score>4", math.nan),
        ("", math.nan),
    ],
)
def test_answers(answer, expected):
    assert value(answer) == pytest.approx(expected, nan_ok=True)


def test_a_question_may_have_braces():
    with faults(reply(says('{"score": 2}'))) as server:
        reward = ChatJudge(server.url, "judge", 'Answer {"score": n} for {prompt}', pattern=r'"score": (\d)')
        assert reward(["a {dog}"], [noise()]) == [2.0]
    assert server.requests[0][2]["messages"][0]["content"][1]["text"] == 'Answer {"score": n} for a {dog}'


def test_own_pattern():
    assert value("7 of 10", pattern=r"^(\d+) of 10$") == 7.0
    assert math.isnan(value("x", pattern=r"x|(\d+)"))  # the group takes no part
    assert math.isnan(value("x", pattern=r"(x)"))


def test_an_answer_that_is_not_read_is_shown_once(caplog):
    with faults(reply(says("I cannot judge\nthis."))) as server:
        assert all(map(math.isnan, judge(server)(["p"] * 3, [noise()] * 3)))
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "3 of 3 answers" in record.getMessage()
    assert "I cannot judge\\nthis." in record.getMessage()
    assert math.isnan(value(says(None)))


@pytest.mark.parametrize(
    "act",
    [
        slow(9.0, reply(says("<Score>0</Score>"))),
        drip(0.05),
        hang_up,
        reply(b"", 500),
        reply(b"too long", 400),
        reply(b"", 413),
        reply(b"", 422),
    ],
)
def test_troubles_of_one_image_are_nan(act, caplog):
    good = by_request(lambda body: says("<Score>5</Score>"))

    def choose(handler):
        (act if "bad" in handler.body["messages"][0]["content"][1]["text"] else good)(handler)

    with faults(choose) as server:
        rewards = judge(server, timeout=0.6)(["good", "bad", "good"], [noise()] * 3)
    assert rewards[::2] == [5.0, 5.0]
    assert math.isnan(rewards[1])
    [record] = [record for record in caplog.records if record.levelno > logging.INFO]
    assert record.levelno == logging.ERROR
    assert "1 of 3 images" in record.getMessage()


@pytest.mark.parametrize(
    "act",
    [
        reply(b"", 401),
        reply(b"", 404),
        reply(b"<html>"),
        reply([]),
        reply({}),
        reply({"choices": []}),
        reply({"choices": [{}]}),
        reply({"choices": [{"message": "text"}]}),
        reply(b'{"choices": [{"message": {"content": NaN}}]}'),
    ],
)
def test_troubles_of_all_images_are_raised(act):
    with faults(act) as server, pytest.raises(ServiceError, match="/v1/chat/completions"):
        judge(server)(["p"], [noise()])
    assert len(server.requests) == 1


def test_the_check_at_the_start():
    with faults(reply({"data": [{"id": "other"}, {"id": "judge-7b"}]})) as server:
        judge(server).check()
        assert server.requests[0][0] == "GET /v1/models"
    for models in (reply({"data": [{"id": "other"}]}), reply({"data": 3}), reply([]), reply(b"", 401)):
        with faults(models) as server, pytest.raises(ServiceUnavailableError, match="whichever serves judge-7b"):
            judge(server).check()
    with pytest.raises(ConnectionError, match=r"no model server at http://127\.0\.0\.1:1/v1"):
        judge("http://127.0.0.1:1").check()


def test_a_url_with_a_path_is_kept():
    with faults(reply(says("<Score>1</Score>"))) as server:
        judge(f"{server.url}/gateway/v1/")(["p"], [noise()])
        assert server.requests[0][0] == "POST /gateway/v1/chat/completions"


def test_the_key_is_in_no_log_no_error_and_no_copy(monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    caplog.set_level("DEBUG")
    with faults(reply(f"key {SECRET}?".encode(), 503), reply(f"key {SECRET}?".encode(), 401)) as server:
        client = pickle.loads(pickle.dumps(judge(server, api_key_env="JUDGE_KEY")))
        with pytest.raises(ServiceError, match=r"key \*\*\*\?") as caught:
            client(["p"], [noise()])
        with pytest.raises(ServiceUnavailableError) as checked:
            client.check()
    assert [headers["Authorization"] for _, headers, _ in server.requests] == [f"Bearer {SECRET}"] * 3
    assert SECRET not in f"{caught.value!r} {checked.value!r} {caplog.text} {vars(client)} {vars(client._service)}"


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (ChatJudge, says(f"You sent Bearer {SECRET}")),  # the log shows the answer
        (ChatJudge, {"error": f"wrong key {SECRET}"}),  # the error does
        (ChatJudge, f"wrong key {SECRET}".encode()),
        (DeQAScore, says(f"wrong key {SECRET}")),
    ],
)
def test_a_key_that_comes_back_with_status_200_is_shown_nowhere(monkeypatch, caplog, kind, answer):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    caplog.set_level("DEBUG")
    with faults(reply(answer)) as server:
        client = judge(server, kind, api_key_env="JUDGE_KEY")
        try:
            client(["p"], [noise()])
        except ServiceError as error:
            logging.getLogger("test").error("%s", error)
        with pytest.raises(ServiceUnavailableError) as checked:
            client.check()
    assert "***" in caplog.text
    assert SECRET not in f"{caplog.text} {checked.value!r}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": r"\d+"}, "has 0 groups"),
        ({"pattern": r"(\d)(\d)"}, "has 2 groups"),
        ({"max_tokens": 0}, "`max_tokens` is 0"),
        ({"image_size": 0}, "`image_size` is 0"),
        ({"image_format": "bmp"}, "`image_format` is 'bmp'"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "`api_key_env` is 'NOT_SET_ANYWHERE'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        judge("http://host", **options)
    with pytest.raises(ValueError, match="`question` is empty"):
        ChatJudge("http://host", "model", " ")


# UnifiedReward.


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The dog is fine.\nFinal Score: 4", 4.0),
        ("Final Score:3.75.", 3.75),
        ("Final Score: 5.0", 5.0),
        ("Final Score: 1/5", 1.0),
        ("Final Score: 0", math.nan),
        ("Final Score: 5.5", math.nan),
        ("Final Score: 45", math.nan),
        ("Final Score: 10", math.nan),
        ("Score: 4", math.nan),
    ],
)
def test_unified_reward_1_5(answer, expected):
    assert value(answer, UnifiedReward) == pytest.approx(expected, nan_ok=True)
    assert value(answer, UnifiedReward, normalize=True) == pytest.approx(expected / 5, nan_ok=True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Alignment Score (1-5): 5\nCoherence Score (1-5): 3\nStyle Score (1-5): 2.5", 3.5),
        ("Alignment Score (1-5): 1\nCoherence Score (1-5): 1\nStyle Score (1-5): 1", 1.0),
        ("Alignment Score: 2\nCoherence Score: 3\nStyle Score: 4", 3.0),
        ("Alignment Score (1-5): 5\nCoherence Score (1-5): 3", math.nan),
        ("Alignment Score (1-5): 5\nCoherence Score (1-5): 3\nStyle Score (1-5): 6", math.nan),
    ],
)
def test_unified_reward_2_0(answer, expected):
    assert value(answer, UnifiedReward, version="2.0") == pytest.approx(expected, nan_ok=True)
    normalized = value(answer, UnifiedReward, version="2.0", normalize=True)
    assert normalized == pytest.approx((expected - 1) / 4, nan_ok=True)


@pytest.mark.parametrize(
    ("version", "size", "image_format", "asks"),
    [("1.5", (512, 512), "PNG", "'Final Score:'"), ("2.0", (40, 30), "JPEG", "Style Score (1-5): Z")],
)
def test_what_unified_reward_asks(version, size, image_format, asks):
    with faults(reply(says(""))) as server:
        judge(server, UnifiedReward, version=version)(["a dog"], [noise(40, 30)])
    body = server.requests[0][2]
    image, text = body["messages"][0]["content"]
    assert text["text"].endswith("Text Caption: [a dog]")
    assert asks in text["text"]
    assert body["model"].startswith("CodeGoat24/UnifiedReward-")
    head, data = image["image_url"]["url"].split(",")
    assert head == f"data:image/{image_format.lower()};base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (picture.size, picture.format) == (size, image_format)


def test_unified_reward_by_other_words():
    with faults(reply(says("Final Score: 2"))) as server:
        reward = judge(server, UnifiedReward, question="Rate [{prompt}]", model="mine", max_tokens=9)
        assert reward(["a dog"], [noise()]) == [2.0]
    body = server.requests[0][2]
    assert (body["model"], body["max_tokens"]) == ("mine", 9)
    assert body["messages"][0]["content"][1]["text"] == "Rate [a dog]"
    with pytest.raises(ValueError, match="`version` is '3'"):
        judge(server, UnifiedReward, version="3")


# DeQA: an expectation over words.


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ({" excellent": 0.2, " good": 0.5, " fair": 0.2, " poor": 0.06, " bad": 0.04}, 1.0 + 2.0 + 0.6 + 0.12 + 0.04),
        ({"good": 0.3, "fair": 0.1}, (4 * 0.3 + 3 * 0.1) / 0.4),  # the missing count as nothing
        ({"▁good": 0.3, "Ġbad": 0.1, " good": 0.1, " very": 0.5}, (4 * 0.4 + 1 * 0.1) / 0.5),
        ({" bad": 1.0}, 1.0),
        ({" excellent": 0.01}, 5.0),
        ({" goodness": 0.5, " the": 0.5}, math.nan),
        ({" The": 0.99, " good": 0.005, " bad": 0.004}, math.nan),  # it says something else
        ({}, math.nan),
    ],
)
def test_deqa(probabilities, expected):
    assert value(ranks(probabilities), DeQAScore) == pytest.approx(expected, nan_ok=True)
    assert value(ranks(probabilities), DeQAScore, normalize=True) == pytest.approx(expected / 5, nan_ok=True)


def test_what_deqa_asks():
    with faults(reply(ranks({" good": 0.9}))) as server:
        assert judge(server, DeQAScore)(["unseen words"], [noise(20, 10)]) == [pytest.approx(4.0)]
    body = server.requests[0][2]
    user, assistant = body["messages"]
    text, image = user["content"]
    assert text["text"] == "How would you rate the quality of this image?"
    assert assistant == {"role": "assistant", "content": "The quality of the image is"}
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    padded = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["image_url"]["url"].split(",")[1]))))
    assert padded.shape == (20, 20, 3)
    np.testing.assert_array_equal(padded[5:15], np.asarray(noise(20, 10)))
    assert (padded[:5] == (122, 116, 104)).all()
    assert (padded[15:] == (122, 116, 104)).all()


@pytest.mark.parametrize(
    "logprobs", [None, {}, {"content": None}, {"content": []}, {"content": [{"top_logprobs": 3}]}]
)
def test_deqa_without_log_probabilities(logprobs):
    answer = says(" good")
    answer["choices"][0]["logprobs"] = logprobs
    with pytest.raises(ServiceError, match="without log-probabilities"):
        value(answer, DeQAScore)


def test_names():
    assert judge("http://host").__name__ == "vlm_judge"
    assert judge("http://host", name="mine").__name__ == "mine"
    assert judge("http://host", UnifiedReward).__name__ == "unified_reward"
    assert judge("http://host", DeQAScore).__name__ == "deqa"
