"""
Rewards by a vision-language model behind an OpenAI-compatible `/v1/chat/completions`, as vLLM and SGLang serve it.

One request an image. An answer that cannot be read gives NaN, never a number; so does an image whose request fails in
every try or is refused for what it holds (status 400, 413, 422: a prompt that is too long, say). What would be so for
every image is raised. Which failures are tried again says [`~trl_dgpo.rewards.http.JSONService`].
"""

import logging
import math
import re
import urllib.parse
from functools import partial
from typing import Any

from PIL import Image

from .http import JSONService, ServiceError, ServiceUnavailableError, check_image_format, encode_picture


logger = logging.getLogger(__name__)

# Refusals for what a single request holds.
_OF_ONE_IMAGE = (400, 413, 422)
# Characters of an unreadable answer that the log shows.
_EXCERPT = 300
# Mean colour of CLIP's pictures, by which LLaVA-like models pad.
_MEAN_COLOUR = (122, 116, 104)

_UNIFIED_MODELS = {
    "1.5": "CodeGoat24/UnifiedReward-7b-v1.5",
    "2.0": "CodeGoat24/UnifiedReward-2.0-qwen3vl-2b",
}
_UNIFIED_KINDS = ("Alignment", "Coherence", "Style")
_UNIFIED_QUESTIONS = {
    "1.5": (
        "Below are a text caption and a picture that was generated from it. Judge the picture by two criteria. "
        "Alignment: does it show the objects, attributes and relations that the caption names? Quality: is it "
        "sharp, natural and pleasing, without artefacts? Weigh both and assign a score from 1 to 5, in steps as fine "
        "as you like, after 'Final Score:'.\nText Caption: [{prompt}]"
    ),
    "2.0": (
        "Below are a text caption and a picture that was generated from it. Rate the picture in three respects, each "
        "from 1 to 5: how well it matches the caption, how coherent its objects and their arrangement are, and how "
        "good its style is. Answer with three lines:\nAlignment Score (1-5): X\nCoherence Score (1-5): Y\n"
        "Style Score (1-5): Z\nText Caption: [{prompt}]"
    ),
}
# A number of 1 to 5, not the beginning of a longer one.
_ONE_TO_FIVE = r"\s*([1-4](?:\.\d+)?|5(?:\.0+)?)(?!\.?\d)"

_LEVELS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}
# Spaces as tokenizers write them.
_SPACES = " \u2581\u0120"
# Below this probability of the five words together, the model is saying something else.
_LEAST_MASS = 0.01


class ChatJudge:
    """
    Reward that a vision-language model gives by answering a question about each image.

    Its value is the number that `pattern` finds in the answer. What a model is asked is part of the reward: give the
    question, the model and its revision beside every figure.

    Args:
        base_url (`str`):
            Where the server is, e.g. `"http://127.0.0.1:8000/v1"`; `/v1` is added where the url has no path.
        model (`str`):
            Name of the model, as the server lists it.
        question (`str`):
            What is asked, below the image; `{prompt}` stands for the image's prompt.
        pattern (`str`, *optional*, defaults to `r"<Score>\\s*(\\d+(?:\\.\\d+)?)\\s*</Score>"`):
            Regular expression with one group, the number; the first place where it matches counts.
        name (`str`, *optional*, defaults to `"vlm_judge"`):
            Name in the log.
        max_tokens (`int`, *optional*, defaults to `1024`):
            Longest answer.
        image_size (`int`, *optional*):
            Side in pixels that images are scaled to; their own size if not given.
        image_format (`str`, *optional*, defaults to `"png"`):
            `"png"` or `"jpeg"` (quality 95).
        api_key_env (`str`, *optional*):
            Environment variable that holds the key; it is never logged.
        timeout (`float`, *optional*, defaults to `60.0`):
            Seconds for one try as a whole.
        retries (`int`, *optional*, defaults to `8`):
            Further tries.
        max_concurrency (`int`, *optional*, defaults to `32`):
            Requests under way at one time.

    Raises:
        `ValueError`: if an argument is out of its range.
    """

    input_type = "pil"

    def __init__(
        self,
        base_url: str,
        model: str,
        question: str,
        *,
        pattern: str = r"<Score>\s*(\d+(?:\.\d+)?)\s*</Score>",
        name: str = "vlm_judge",
        max_tokens: int = 1024,
        image_size: int | None = None,
        image_format: str = "png",
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 8,
        max_concurrency: int = 32,
    ):
        if not question.strip():
            raise ValueError("`question` is empty; give the words that the model is asked.")
        if (groups := re.compile(pattern).groups) != 1:
            raise ValueError(f"`pattern` {pattern!r} has {groups} groups; it must have one, the number.")
        if max_tokens < 1:
            raise ValueError(f"`max_tokens` is {max_tokens}; it must be at least 1.")
        if image_size is not None and image_size < 1:
            raise ValueError(f"`image_size` is {image_size}; it must be at least 1, or None.")
        check_image_format(image_format)
        self.model = model
        self.question = question
        self.pattern = pattern
        self.max_tokens = max_tokens
        self.image_size = image_size
        self.image_format = image_format
        if not urllib.parse.urlsplit(base_url).path.strip("/"):
            base_url = base_url.rstrip("/") + "/v1"
        self._service = JSONService(
            base_url, timeout=timeout, retries=retries, max_concurrency=max_concurrency, api_key_env=api_key_env
        )
        self.__name__ = name

    def __call__(self, prompts: list[str], completions: list[Image.Image], **columns: Any) -> list[float]:
        bodies = [
            partial(self._request, picture, prompt) for picture, prompt in zip(completions, prompts, strict=True)
        ]
        rewards, lost, unread = [], [], []
        for reply in self._service.post("/chat/completions", bodies):
            if isinstance(reply, ServiceError) and reply.status not in _OF_ONE_IMAGE:
                raise reply
            if isinstance(reply, (ServiceError, ServiceUnavailableError)):
                lost.append(reply)
                rewards.append(math.nan)
                continue
            choice = self._choice(reply)
            rewards.append(self._value(choice))
            if math.isnan(rewards[-1]):
                unread.append(choice)
        if lost:
            logger.error("Reward `%s`: %d of %d images get NaN: %s", self.__name__, len(lost), len(prompts), lost[0])
        if unread:
            logger.warning(
                "Reward `%s`: %d of %d answers could not be read; their images get NaN. The first ended by %r: %r",
                *(self.__name__, len(unread), len(prompts), unread[0].get("finish_reason")),
                _text(unread[0])[-_EXCERPT:],
            )
        return rewards

    def check(self) -> None:
        """
        Ask the server whether it is there and has the model.

        Raises:
            `ServiceUnavailableError`: if not (a `ConnectionError`).
        """
        try:
            models = [entry["id"] for entry in self._service.get("/models")["data"]]
        except (ServiceError, ServiceUnavailableError) as error:
            reason = str(error)
        except (KeyError, TypeError) as error:
            reason = f"{self._service.url}/models is no list of models ({error!r})"
        else:
            if self.model in models:
                return
            reason = f"it has no model {self.model!r} but {models[:10]}"
        raise ServiceUnavailableError(
            f"Reward `{self.__name__}` has no model server at {self._service.url}: {reason}. Start one with vLLM or "
            f"SGLang, whichever serves {self.model}, or correct `base_url` or `model`."
        )

    def _request(self, picture: Image.Image, prompt: str) -> dict[str, Any]:
        """Body of one image's request."""
        if self.image_size is not None:
            picture = picture.resize((self.image_size, self.image_size))
        url = f"data:image/{self.image_format};base64,{encode_picture(picture, self.image_format)}"
        question = self.question.replace("{prompt}", prompt)  # not `format`: a question may have other braces
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def _value(self, choice: dict[str, Any]) -> float:
        """What an answer is worth; NaN if it cannot be read."""
        return _number(self.pattern, _text(choice))

    def _choice(self, reply: Any) -> dict[str, Any]:
        try:
            choice = reply["choices"][0]
            choice["message"].get("content")
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ServiceError(
                f"{self._service.url}/chat/completions replied without an answer ({error!r}): {str(reply)[:200]!r}"
            ) from None
        return choice


class UnifiedReward(ChatJudge):
    r"""
    UnifiedReward (arXiv 2503.05236): a vision-language model that was trained to judge generated images.

    Version 1.5 answers with one score of 1 to 5 (`Final Score: 3.5`; Flow-GRPO and DGPO report it so, 3.3 to 3.7 for
    today's models). Version 2.0 gives three (alignment, coherence, style), whose mean is the reward. Models:
    `CodeGoat24/UnifiedReward-7b-v1.5`, `CodeGoat24/UnifiedReward-2.0-qwen3vl-2b` (also 8b and 32b); their pages give
    the licence.

    The question is our own wording of the published criteria: pass the model page's as `question` for figures to be
    compared with others'. As in Flow-GRPO's server, the picture for 1.5 is scaled to 512 x 512 and sent as PNG; for
    2.0 it is sent at its own size, as JPEG (quality 95). A missing score is NaN, where the published code gives 0, and
    so is one outside 1 to 5.

    Args:
        base_url (`str`):
            See [`ChatJudge`].
        version (`str`, *optional*, defaults to `"1.5"`):
            `"1.5"` or `"2.0"`.
        model (`str`, *optional*):
            Name of the model, as the server lists it; the one above for the version if not given.
        question (`str`, *optional*):
            What is asked; `{prompt}` stands for the image's prompt.
        normalize (`bool`, *optional*, defaults to `False`):
            On the reference's training scale: `score / 5` for 1.5, `(mean - 1) / 4` for 2.0.
        **service:
            `api_key_env`, `timeout`, `retries`, `max_concurrency` and `max_tokens` of [`ChatJudge`].

    Raises:
        `ValueError`: if an argument is out of its range.
    """

    def __init__(
        self,
        base_url: str,
        *,
        version: str = "1.5",
        model: str | None = None,
        question: str | None = None,
        normalize: bool = False,
        **service: Any,
    ):
        if version not in _UNIFIED_MODELS:
            raise ValueError(f"`version` is {version!r}; it must be one of {list(_UNIFIED_MODELS)}.")
        super().__init__(
            base_url,
            model or _UNIFIED_MODELS[version],
            question or _UNIFIED_QUESTIONS[version],
            name="unified_reward",
            pattern="Final Score:" + _ONE_TO_FIVE,
            image_size=512 if version == "1.5" else None,
            image_format="png" if version == "1.5" else "jpeg",
            **service,
        )
        self.version = version
        self.normalize = normalize

    def _value(self, choice: dict[str, Any]) -> float:
        answer = _text(choice)
        if self.version == "1.5":
            score = _number(self.pattern, answer)
            return score / 5 if self.normalize else score
        scores = [_number(rf"{kind} Score(?: \(1-5\))?:{_ONE_TO_FIVE}", answer) for kind in _UNIFIED_KINDS]
        score = sum(scores) / len(scores)
        return (score - 1) / 4 if self.normalize else score


class DeQAScore(ChatJudge):
    r"""
    DeQA-Score (arXiv 2501.11561): quality of a picture, whatever its prompt, as the mean level of what a model would
    say next.

    With `p` the model's probabilities of the words excellent, good, fair, poor, bad (5, 4, 3, 2, 1) after "The quality
    of the image is":

        score = sum_i level_i p_i / sum_i p_i

    which is the softmax over the five logits. A server gives the 20 likeliest tokens; a word that is not among them
    counts as 0, which is off by less than the last of them. Departures: words count with and without a space before
    them, where the published code takes one token id each; and where the five have less than 0.01 together the model
    is saying something else, so that the reward is NaN.

    Range 1 to 5 (4.0 to 4.4 for today's models). Model `zhiyuanyou/DeQA-Score-Mix3` (its code is MIT), whose own code
    needs transformers 4.36: whoever serves it must take its architecture (mPLUG-Owl2) and keep the published template.
    Any other model will do for the recipe (Q-Align's), but its number is not DeQA's. The picture is padded to a square
    with CLIP's mean colour, as published.

    Args:
        base_url (`str`):
            See [`ChatJudge`]. The server must know `continue_final_message`, as vLLM and SGLang do.
        model (`str`, *optional*, defaults to `"zhiyuanyou/DeQA-Score-Mix3"`):
            Name of the model, as the server lists it.
        normalize (`bool`, *optional*, defaults to `False`):
            On the reference's training scale, `score / 5`.
        **service:
            `api_key_env`, `timeout`, `retries`, `max_concurrency` and `image_format` of [`ChatJudge`].

    Raises:
        `ValueError`: if an argument is out of its range.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str = "zhiyuanyou/DeQA-Score-Mix3",
        normalize: bool = False,
        **service: Any,
    ):
        super().__init__(
            base_url,
            model,
            "How would you rate the quality of this image?",
            name="deqa",
            max_tokens=1,
            **service,
        )
        self.normalize = normalize

    def _request(self, picture: Image.Image, prompt: str) -> dict[str, Any]:
        body = super()._request(_padded(picture), prompt)
        body["messages"][0]["content"].reverse()  # the question stands above the image
        body["messages"].append({"role": "assistant", "content": "The quality of the image is"})
        return body | {
            "continue_final_message": True,
            "add_generation_prompt": False,
            "logprobs": True,
            "top_logprobs": 20,
        }

    def _value(self, choice: dict[str, Any]) -> float:
        try:
            tokens = [
                (str(top["token"]), float(top["logprob"])) for top in choice["logprobs"]["content"][0]["top_logprobs"]
            ]
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ServiceError(
                f"{self._service.url} replied without log-probabilities ({error!r}): {str(choice)[:200]!r}"
            ) from None
        found = [
            (_LEVELS[word], math.exp(min(value, 0.0)))
            for token, value in tokens
            if (word := token.strip(_SPACES)) in _LEVELS
        ]
        mass = sum(p for _, p in found)
        score = sum(level * p for level, p in found) / mass if mass >= _LEAST_MASS else math.nan
        return score / 5 if self.normalize else score


def _text(choice: dict[str, Any]) -> str:
    return str(choice["message"].get("content") or "")


def _number(pattern: str, answer: str) -> float:
    match = re.search(pattern, answer)
    try:
        return float(match[1]) if match else math.nan
    except (TypeError, ValueError):  # the group took no part, or found what is no number
        return math.nan


def _padded(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGB", (side, side), _MEAN_COLOUR)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square
