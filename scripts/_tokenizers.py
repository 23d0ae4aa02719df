"""Tokenizers of the embedded models: a word of the emoji grammar is one token, others are spelt."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from customized_grpo.data.emoji.world import all_words

MAX_TOKENS = 30  # the longest sentence of the grammar, with its end token


def t5_tokenizer() -> T5Tokenizer:
    """Unigram model: specials, whole words, then single printable characters as a fallback."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -8.0)]
    pieces += [("\u2581" + word, -1.0) for word in all_words() if word != ","]
    pieces += [(chr(code), -10.0 if chr(code) != "," else -1.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE trained until every word of the grammar is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        end_of_word_suffix="</w>",
        special_tokens=[*alphabet, *(c + "</w>" for c in alphabet)],  # fixed ids: ties break alike
        min_frequency=1,
        show_progress=False,
    )
    bpe.train_from_iterator(all_words(), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS + 2)
