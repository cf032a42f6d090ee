"""A tokenizer with one id per character, so that expectations can be written by hand."""

from __future__ import annotations

ROLES = {"system": 10, "user": 11, "assistant": 12, "ipython": 13}


class CharTokenizer:
    """Characters are their code points; a message is its role's id, its characters, and eot."""

    bos_id, eos_id, eot_id, pad_id = 1, 2, 3, 4

    def __init__(self, max_seq_len=None, fingerprint="chars"):
        self.max_seq_len = max_seq_len
        self.fingerprint = fingerprint
        self.calls = 0

    def encode(self, text, add_bos=True, add_eos=True):
        self.calls += 1
        return [1] * add_bos + [ord(c) for c in text] + [2] * add_eos

    def tokenize_messages(self, messages, add_generation_prompt=False):
        self.calls += 1
        tokens, masked = [1], [True]
        for message in messages:
            body = [*map(ord, message.content), 3]
            tokens += [ROLES[message.role], *body]
            masked += [True] + [message.masked] * len(body)
        return tokens, masked


def text(ids):
    """The characters among ids."""
    return "".join(chr(i) for i in ids if i >= 32)
