"""Reading from the Hugging Face hub without a network."""

from contextlib import suppress
from http.client import HTTPException
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PATIENCE_SECONDS = 4


def go_offline_if_unreachable() -> None:
    """Let this process read local copies alone if the hub does not answer in 4 seconds: it would retry for longer."""
    from huggingface_hub import constants

    answers = []

    def ask() -> None:
        with suppress(OSError, HTTPException):
            with suppress(HTTPError):  # an answer too
                urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=PATIENCE_SECONDS).close()
            answers.append(True)

    if not constants.HF_HUB_OFFLINE:
        asking = Thread(target=ask, daemon=True)  # the timeout of urlopen begins anew with each address of the hub
        asking.start()
        asking.join(PATIENCE_SECONDS)
        constants.HF_HUB_OFFLINE = not answers
