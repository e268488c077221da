"""The words of the loop: prompt, feedback and chat template, each in one place.

The base model's training, SFT, GRPO and the closed loop all build their turns here. A difference of one token
between training and evaluation costs a small model many points, so nobody else writes a prompt.
"""

from pathlib import Path

from ivt_utils.boxes import Box, format_answer
from ivt_utils.schema import Step

PROMPT = (
    "Locate the object that the expression refers to. Expression: ",
    '. Answer with its box as {"bbox_2d": [x1, y1, x2, y2]}, integers 0 to 1000.',
)
FEEDBACK = "This is the image with your last box. Look whether it fits the expression, and answer again."
FEEDBACK_NO_BOX = "Your last answer held no valid box, so none is shown. Answer again."

# A corrective trace says what is wrong with the box that is shown, and what to do about it.
PROBLEMS = {
    "too far left": "move right",
    "too far right": "move left",
    "too high": "move down",
    "too low": "move up",
    "too narrow": "make it wider",
    "too wide": "make it narrower",
    "too short": "make it taller",
    "too tall": "make it shorter",
}
TRACE_OPENS, TRACE_FITS = "It is", "It fits: keep it."

# How the micro student's pretraining goes on after an answer, as every VLM has met it: without an image, the same
# answer again; with another image, the same expression there. Both kinds hold the words of the feedback, so that the
# words do not say which of the two is meant, and together they hold those of the traces: the loop says nothing in
# unknown words. But no correction of a trace, nor four words of the rest in a row. The words of the micro student's
# tokenizer come from here and from the expressions.
AGAIN = (
    "Say it again.",
    "Once more, please.",
    "Please keep to your last answer.",
    "Your answer was short, so repeat it.",
    "It was none too far off: say it once more.",
    "I held no pen: tell me again.",
    "What was shown as your valid answer?",
    "I make notes: repeat your answer.",
)
ANOTHER = (
    "And in this image?",
    "This image is another one. Answer, please.",
    "And the same expression with another image.",
    "Which box fits here?",
    "Another image. Look, and answer.",
    "Say whether and where this one shows it.",
    "Things move: some up, some down, some left, some right.",
    "Be it high or low, wide or narrow, tall or short: where now?",
    "Here some are wider, some narrower, some taller, some shorter. And now?",
    "Your last box was in another image. Answer again, please.",
    "And again, with this image.",
    "It held in the last image. And in this one?",
    "Say it again, now in this image.",
    "Your expression, with the last image: and here?",
    "What is valid here? Look, please, whether your box fits.",
    "Another image is shown, no more the last. Answer, as in your last.",
    "It was shown in the last one, so where is it now?",
    "Please answer again: none of the last is valid here.",
)


def chat_template() -> str:
    """Return the Jinja chat template that the loop, SFT and GRPO share."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def question(image, expression: str) -> dict:
    """Return the first user turn: the image (None for a follow-up about the same image) and the prompt."""
    return follow_up(image, PROMPT[0] + expression + PROMPT[1])


def follow_up(image, phrase: str) -> dict:
    """Return a user turn that goes on with the chat: of AGAIN without an image, of ANOTHER with one."""
    text = {"type": "text", "text": phrase}
    return {"role": "user", "content": [text] if image is None else [{"type": "image", "image": image}, text]}


def feedback_content(image, box: Box | None) -> list[dict]:
    """Return the content of a feedback turn: `image` with the box already drawn (bare when `box` is None)."""
    text = FEEDBACK if box is not None else FEEDBACK_NO_BOX
    return [{"type": "image", "image": image}, {"type": "text", "text": text}]


def feedback(image, box: Box | None) -> dict:
    """Return the feedback as a user turn; GRPO sends the same content as a tool turn."""
    return {"role": "user", "content": feedback_content(image, box)}


def answer_text(box: Box, trace: str = "") -> str:
    """Return an answer: the optional short trace, then the JSON box."""
    return f"{trace} {format_answer(box)}" if trace else format_answer(box)


def answer(text: str) -> dict:
    """Return an assistant turn."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def transcript(image, expression: str, steps: list[Step], draw) -> list[dict]:
    """Return the whole chat of a trajectory: question, then answer and feedback in turn, ending on an answer.

    `steps` are dicts with "text" and "box"; `draw(image, box)` returns the image shown as feedback to a box.
    """
    messages = [question(image, expression)]
    for i, step in enumerate(steps):
        if i:
            previous = steps[i - 1]["box"]
            messages.append(feedback(draw(image, previous), previous))
        messages.append(answer(step["text"]))
    return messages


def split_images(chat: list[dict]) -> dict:
    """Return a chat as the trainers want it: "messages" whose image parts are empty, and the "images" in order."""
    parts = [part for message in chat for part in message["content"]]
    messages = [
        {
            "role": message["role"],
            "content": [{"type": part["type"], "text": part.get("text")} for part in message["content"]],
        }
        for message in chat
    ]
    return {"messages": messages, "images": [part["image"] for part in parts if part["type"] == "image"]}
