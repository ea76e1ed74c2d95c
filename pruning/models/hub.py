"""Model files from the hub, and for each way in which the hub refuses them, what to do."""
from __future__ import annotations

import warnings
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple

from pruning import UserError, offline_by

REMEDIES = {  # the status that the hub answers with -> what that means and what to do
    401: "the hub shows it only to people it knows. Check the name; if it is right, accept the licence on {page} and "
         "log in with `hf auth login`",
    403: "your account may not read it: accept the licence on {page}, and log in with `hf auth login`",
    404: "the hub has no such model: check the name",
    429: "the hub had too many requests from here: wait some minutes, then give the same command again",
}


def fetch_folder(model: str) -> Tuple[Path, Dict[str, Any]]:
    """Return the folder with the files of a hub model, fetched if they are not here, and its model_index.json.

    Parts that are left out (see left_out) are not fetched. Raises UserError with the remedy if the hub refuses.
    """
    from diffusers import DiffusionPipeline

    with asking(f"cannot fetch model {model!r}", model):
        config = dict(DiffusionPipeline.load_config(model))
        return Path(DiffusionPipeline.download(model, use_safetensors=True, **left_out(config))), config


@contextmanager
def asking(what: str, model: str) -> Iterator[None]:
    """Inside the block, the hub's libraries print nothing, and what they raise is a UserError with the remedy."""
    from huggingface_hub.utils import logging

    logging.set_verbosity(CRITICAL)  # it logs each time it tries again
    try:
        with warnings.catch_warnings():  # the hub warns about its own arguments
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the hub, the network and the disk each raise exceptions of their own
        raise UserError(f"{what}: {remedy(error, model)}") from error


def left_out(config: Dict[str, Any]) -> Dict[str, Any]:
    """Return the components that a pipeline is loaded without, each as None.

    A safety checker blackens pictures, and a metric would take the black for damage. diffusers demands every other
    component unless it is named as None: Stable Diffusion 3 without its T5, say.
    """
    absent = {name: None for name, value in config.items() if value == [None, None]}
    unchecked = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in config else {}
    return {**absent, **unchecked}


def remedy(error: BaseException, model: str) -> str:
    """Return what went wrong at the hub and what to do about it, in words."""
    from huggingface_hub import constants
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    chain = list(_causes(error))
    for cause in chain:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            return f"it has no {_file(cause)}, so it is not a diffusers pipeline in safetensors"
        if status in REMEDIES:
            return REMEDIES[status].format(page=f"{constants.ENDPOINT}/{model}")
        if status and status >= 500:
            return f"the hub answers with error {status}: give the same command again later"
    if offline_by():
        return (f"it is not on this machine, and {offline_by()} forbids the network: unset that variable, or fetch the "
                f"model first with pruning/prefetch.py")
    if any(isinstance(cause, OSError) and cause.errno == 28 for cause in chain):
        return f"no space is left on the disk of {constants.HF_HUB_CACHE}; HF_HOME names another folder"
    kinds = {kind.__name__ for cause in chain for kind in type(cause).__mro__}
    if kinds & {"ChunkedEncodingError", "IncompleteRead", "ProtocolError", "RemoteProtocolError", "ReadError",
                "ReadTimeout"}:
        return "the connection was cut: give the same command again, which continues the download"
    if kinds & {"ConnectionError", "ConnectError", "TransportError", "NetworkError", "LocalEntryNotFoundError"}:
        return (f"{constants.ENDPOINT} cannot be reached. Without a network, fetch the model on a machine that has "
                f"one, with `hf download {model} --local-dir FOLDER`, and give the folder: --model FOLDER")
    return first_line(error)


def _causes(error) -> Iterator[BaseException]:
    """Yield the error and what led to it, the deepest cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _file(error: BaseException) -> str:
    """Return the name of the file that the hub does not have."""
    url = str(getattr(getattr(error, "response", None), "url", "")).partition("?")[0]
    return url.rpartition("/")[2] or "such file"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop, or the error's class if it has no text.

    If the line ends with a colon, the next one belongs to it.
    """
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return (f"{first} {others[0].strip()}" if first.endswith(":") and others else first).rstrip(".")
