"""How each BPE vocabulary splits text before it merges: one table, keyed by `tokenizer.ggml.pre`.

The rules are facts of the vocabularies, as their own tokenizer.json files (Kimi's, Bailing's: Python files)
state them; the names are those that GGUF files carry, and the comment at each entry says the model whose file
the rule comes from. A name that is not here is refused, because a wrong rule gives wrong ids and no error:
"default" is what converters wrote where they did not know the rule, and "whitespace" drops what it splits at.
Normalizers (the NFC of Qwen2 and of the GPT-NeoX family) are not part of a GGUF and, as in llama.cpp, not
applied to one. Imports nothing of tinyllm. Used by from_gguf.py and to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (  # words that break where lower case turns to upper
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_SEED_CODER = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_UFAKZEKA = rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_SPACES}"  # Qwen2's, where ' begins a suffix and no contraction
_MINICPM5 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_SPACES}"
_JAIS2 = (  # runs of spaces in powers of two
    rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|\s*[\r\n]+"
    + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
    + r"|\s{1,2}(?!\S)|\s{1}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
# For words the file has (?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+, the same texts, which it can read in one way only.
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}(?:[\p{{L}}\p{{M}}]| \p{{L}})*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_GPT4O = rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{_PATHS}|{_SPACES}"
_YOUTU = rf"{_CASED % (_CONTRACTIONS + '?', _CONTRACTIONS + '?')}|\p{{N}}|{_PATHS}|{_SPACES}"
_KIMI = (  # GPT-4o's words without Chinese characters, which are a word by themselves
    r"\p{Han}+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    rf"{_CONTRACTIONS}?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SYMBOLS}|{_SPACES}"
)
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_PATHS}|{_SPACES}"

# The cased letters that DeepSeek LLM lists one range after the other.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_SPARK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
)
_CJK_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_YOUTU_SCRIPTS = (  # Korean; punctuation of Chinese texts; Bopomofo; Chinese and Japanese
    "[\uac00-\ud7a3\u3131-\u318e]+"
    "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    f"|[\u3105-\u312f]+|{_CJK_AND_KANA}"
)
_AFMOE_SCRIPTS = (  # Chinese, Japanese, Thai, Lao, Khmer, Burmese, Korean
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
# Digits by three from the right, 1|234|567, in steps that take a time that grows with the text and no faster.
_THREES = (r"\p{N}+", r"\A\p{N}{1,2}(?=(?:\p{N}{3})+\z)", r"\p{N}{3}")
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


@dataclass(frozen=True)
class PreTokenizerRule:
    """`build` makes the splitter. `ignore_merges`: a piece that is itself a token is that token, whatever the
    merges say. `add_bos`: a BOS is due where the file does not say. `is_byte_level` False: the vocabulary
    spells characters as they are, a space as "▁", and bytes that no token has as "<0x0A>"; it is not split.
    `lstrip`: tokens that take the white space before them."""

    build: Callable[[], PreTokenizer]
    ignore_merges: bool = False
    add_bos: bool = False
    is_byte_level: bool = True
    lstrip: tuple[str, ...] = ()


def _gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _bytes() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _whole() -> PreTokenizer:
    return pre_tokenizers.Sequence([])


def _punctuation() -> PreTokenizer:
    return pre_tokenizers.Punctuation(behavior="isolated")


def _split(pattern: str) -> PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _digits() -> PreTokenizer:
    return pre_tokenizers.Digits(individual_digits=True)


def _sequence(*steps: Callable[[], PreTokenizer] | str) -> Callable[[], PreTokenizer]:
    return lambda: pre_tokenizers.Sequence([_split(s) if isinstance(s, str) else s() for s in steps])


def _falcon() -> PreTokenizer:
    # Digits are cut after the bytes were spelled out, as in Falcon's own file.
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            _gpt2(),
            pre_tokenizers.Digits(individual_digits=False),
            _split("[0-9][0-9][0-9]"),
        ]
    )


_FAMILIES: list[tuple[str, PreTokenizerRule]] = [
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        PreTokenizerRule(_sequence(_LLAMA3, _bytes), ignore_merges=True, add_bos=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizerRule(_sequence(_LLAMA3, _bytes))),
    (
        "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2",
        PreTokenizerRule(_sequence(_QWEN2, _bytes)),
    ),
    ("qwen35", PreTokenizerRule(_sequence(_QWEN35, _bytes))),
    ("seed-coder", PreTokenizerRule(_sequence(_SEED_CODER, _bytes))),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", PreTokenizerRule(_sequence(_GPT4O, _bytes))),
    ("tekken", PreTokenizerRule(_sequence(_TEKKEN, _bytes), ignore_merges=True, add_bos=True)),
    (
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4",
        PreTokenizerRule(_gpt2),
    ),
    (
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
        PreTokenizerRule(_sequence(_digits, _gpt2)),
    ),
    ("falcon", PreTokenizerRule(_falcon)),
    (
        "deepseek-llm",
        PreTokenizerRule(
            _sequence(
                "[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                rf"\s?[{_DEEPSEEK_PUNCTUATION}]+",
                r"\s+$",
                _DEEPSEEK_CJK,
                _digits,
                _bytes,
            )
        ),
    ),
    (
        "deepseek-coder",
        PreTokenizerRule(_sequence("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, _digits, _bytes)),
    ),
    (
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        PreTokenizerRule(_sequence(r"\p{N}{1,3}", _CJK_AND_KANA, _DEEPSEEK_V3, _bytes)),
    ),
    ("glm4 glm5", PreTokenizerRule(_sequence(_LLAMA3, _bytes), ignore_merges=True)),  # THUDM/glm-4-9b-hf
    # inceptionai/Jais-2-8B-Chat
    ("jais-2", PreTokenizerRule(_sequence(_JAIS2, _bytes))),
    # openbmb/MiniCPM5-1B
    ("minicpm5", PreTokenizerRule(_sequence(r"\p{N}{1,3}", _MINICPM5, _bytes), ignore_merges=True)),
    # ufakai/ufakzeka-1
    ("ufakzeka", PreTokenizerRule(_sequence(_UFAKZEKA, _bytes))),
    # poolside/Laguna-XS.2
    ("laguna", PreTokenizerRule(_sequence(r"[^\n]+|[\n]+", _QWEN2, _bytes))),
    # inclusionAI/Ling-lite
    ("bailingmoe bailingmoe2 llada-moe", PreTokenizerRule(_sequence(_BAILING, _bytes))),
    # LGAI-EXAONE/K-EXAONE-236B-A23B
    ("exaone-moe", PreTokenizerRule(_sequence(_EXAONE_MOE, _bytes))),
    # ibm-granite/granite-embedding-97m-multilingual-r2
    ("granite-embed-multi-97m", PreTokenizerRule(_sequence(_GPT4O, _bytes), ignore_merges=True)),
    # CohereLabs/tiny-aya-base, CohereLabs/North-Mini-Code-1.0
    (
        "tiny_aya cohere2moe",
        PreTokenizerRule(_sequence(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O, _bytes)),
    ),
    # tencent/Youtu-LLM-2B
    ("youtu", PreTokenizerRule(_sequence(_YOUTU_SCRIPTS, _YOUTU, _bytes), ignore_merges=True)),
    # moonshotai/Kimi-K2-Base, tokenization_kimi.py
    ("kimi-k2", PreTokenizerRule(_sequence(_KIMI, _bytes))),
    # XHToken/Spark-X2.5-1.7B
    (
        "spark2_5",
        PreTokenizerRule(_sequence(r"\p{N}{1,3}", _CJK_AND_KANA, _SPARK, r"\p{N}", _bytes)),
    ),
    # arcee-ai/Trinity-Tokenizer
    ("afmoe", PreTokenizerRule(_sequence(*_THREES, _AFMOE_SCRIPTS, _DEEPSEEK_V3, _bytes))),
    # UW/OLMo2-8B-SuperBPE-t180k: words run on over spaces
    ("superbpe", PreTokenizerRule(_sequence(r"\p{N}+", r"(?=(\d{3})+(?!\d))", _bytes))),
    # bigscience/bloom, LumiOpen/Poro-34B-chat, TurkuNLP/gpt3-finnish-small
    ("bloom poro-chat gpt3-finnish", PreTokenizerRule(_sequence(_BLOOM, _bytes))),
    # LumiOpen/Viking-7B
    ("viking", PreTokenizerRule(_sequence(_BLOOM, _digits, _bytes))),
    # facebook/chameleon-7b: sentinels and images are tokens of their own
    (
        "chameleon",
        PreTokenizerRule(
            _sequence(
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                _digits,
                _punctuation,
                _gpt2,
            ),
            add_bos=True,
        ),
    ),
    # Encoders: jinaai/jina-embeddings-v2-base-es, jinaai/jina-reranker-v1-tiny-en,
    # sentence-transformers/stsb-roberta-base; answerdotai/ModernBERT-base
    (
        "jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code roberta-bpe",
        PreTokenizerRule(_gpt2, lstrip=("<mask>",)),
    ),
    ("modern-bert", PreTokenizerRule(_gpt2, lstrip=("[MASK]",))),
    # google/gemma-4-31B-it, ibm-granite/granite-embedding-311m-multilingual-r2
    (
        "gemma4 granite-embed-multi-311m",
        PreTokenizerRule(_whole, add_bos=True, is_byte_level=False),
    ),
    ("sarvam-moe", PreTokenizerRule(_whole, is_byte_level=False)),  # sarvamai/sarvam-30b
]

PRE_TOKENIZERS: dict[str, PreTokenizerRule] = {
    name: rule for names, rule in _FAMILIES for name in names.split()
}
