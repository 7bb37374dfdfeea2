"""Prompts: the tasks that PaliGemma is trained on, and what users get wrong.

Built in notebooks/30_inference.ipynb: edit it there, then run `make export`.
"""

import re
from typing import Any

__all__ = ["check_prompt", "check_decoder", "prompt_warnings"]

# First words of the prompts; the last four are known to `pt` checkpoints only.
TASKS = ("caption", "answer", "detect", "segment", "cap", "describe", "ocr", "question")
# Second words of `caption` and `answer`: the languages of Crossmodal-3600.
LANGUAGES = """ar bn cs da de el en es fa fi fil fr he hi hr hu id it iw ja ko mi nl no
pl pt quz ro ru sv sw te th tr uk vi zh""".split()


def check_prompt(prompt: str) -> str:
    """The prompt's first word, its task; ValueError for a prompt that asks nothing."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be a string, not {type(prompt).__name__}")
    task, *names = prompt.replace(";", " ").split() or [""]
    if not task:
        raise ValueError('the prompt is empty: say what to ask, as in "caption en"')
    if task in ("detect", "segment") and not names:
        raise ValueError(f'{task} what? Name it, as in "{task} owl"')
    return task


def check_decoder(prompt: str, decoder: Any) -> None:
    """Raise ValueError for `segment …` without a mask decoder."""
    if check_prompt(prompt) == "segment" and not callable(decoder):
        raise ValueError("segment needs the mask decoder: see load_mask_decoder")


def prompt_warnings(prompt: str) -> list[str]:
    """What to know about a prompt that PaliGemma may not take as it was meant."""
    task, *words = prompt.split()
    rest, meant = " ".join(words), task.rstrip(":").lower()
    names = [name for name in re.split(r"\s*(?:[,;]|\band\b)\s*", rest) if name]
    if task in ("detect", "segment") and len(names) > rest.count(";") + 1:
        return [f'only ";" separates names: write "{task} {" ; ".join(names)}"']
    if task in ("caption", "answer") and not {*words[:1]} & {*LANGUAGES}:
        asked = "" if task == "caption" else f" {rest or 'is it red?'}"
        return [f'a language comes after {task}: "{task} en{asked}"']
    hint = 'try "caption en", "detect owl" or "answer en is there an owl?"'
    hint = f'write "{meant} {rest}"' if meant in TASKS else hint
    unknown = f"{task!r} isn't a task that PaliGemma is trained on: {hint}"
    return [] if task in TASKS else [unknown]
