"""Explains the terms of a report to readers who have not trained models; shown at a click."""

_NAT = (
    "A nat is the unit of surprise: a loss of 0 means that the model was sure of each word, and each 0.7 more that it "
    "gave the right one half the chance."
)
_EXPLAINED = {
    "exact_match": "The share of answers that equal the reference, but for white space and how accents are coded.",
    "token_f1": "How many words an answer shares with its reference, from none to all: half right counts as half.",
    "loss": f"How surprised the model is by the right answer, on average over its tokens (pieces of words). {_NAT}",
    "perplexity": "e to the power of the loss: among so many equally likely tokens the model seems to choose.",
    "answer_loss": f"How surprised the model is by a whole right answer. {_NAT}",
    "prompt_gain": "How much less the model is surprised by an answer behind its own prompt than behind another "
    "record's. Near 0 it does not look at the question: it has learned answers, or the data pairs them wrongly. "
    f"{_NAT}",
    "answer_prompt_gain": f"The prompt gain of a whole answer, not of a token. {_NAT}",
    "general_loss": "The loss on text that has nothing to do with the training. Where it rises, the model forgets. "
    f"{_NAT}",
    "kl_from_base": "How far the answers to prompts of no domain have moved from the base's own: 0 where nothing has "
    f"changed. {_NAT}",
}


def explained(metric: str) -> str:
    """The explanation of a metric in plain words; empty if its name says enough."""
    return _EXPLAINED.get(metric, "")
