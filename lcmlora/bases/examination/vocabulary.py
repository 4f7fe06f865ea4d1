"""Checks of a base's tokenizer: it gives different captions different tokens, and fits its text encoder."""

from __future__ import annotations

from pathlib import Path

from lcmlora.bases.examination.library_config import DigestInput, LibraryConfig, read_object, read_small_file
from lcmlora.bases.examination.structure import TextConfig
from lcmlora.errors import UserError
from lcmlora.io import faults
from lcmlora.io.parsing import Malformed, decoded

# Two captions without a common word, in letters that every vocabulary has.
_PROBES = ("a red apple on the table", "two old boats under blue sky")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
# Embeddings are padded to a multiple of 64 or 128 at most. A vocabulary below this share of the embedding's rows is
# another model's.
_MIN_FILLED = 0.9


def examine_tokenizer(folder: Path, encoder: TextConfig, *, pooled: bool = False) -> DigestInput:
    """Returns what decides the tokens of a text: vocabulary, merges, special tokens, maximal length.

    Args:
        folder: the tokenizer's folder, such as BASE/tokenizer.
        encoder: the configuration of the text encoder that reads the tokens.
        pooled: the base uses that encoder's pooled embedding, which is taken at the end-of-text token.

    Raises:
        UserError: files are missing or damaged, or the tokenizer does not fit the encoder.
    """
    vocabulary, merges = _files(folder)
    if not (folder / "tokenizer_config.json").exists():
        raise UserError(f"{folder}: has no tokenizer_config.json, which tells how many tokens a caption may have")
    length = _max_length(folder / "tokenizer_config.json", encoder)
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        rows = tokenizer(list(_PROBES), padding="max_length", truncation=True, max_length=length).input_ids
        special = {key: getattr(tokenizer, key) for key in _SPECIAL}
        known_tokens = tokenizer.get_vocab()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers is Rust, whose panics are no Exception
        raise UserError(f"{folder}: transformers cannot read it: {faults.chain(error)}") from error
    if any(value is None for value in special.values()):
        raise UserError(f"{folder}/tokenizer_config.json: has no bos_token, eos_token, pad_token or unk_token")
    size, last = encoder.vocab_size, max(known_tokens.values(), default=0)
    if last >= size:
        raise UserError(
            f"{folder}: its vocabulary goes up to token {last}, and the text encoder's embedding has {size} rows; "
            "expected the tokenizer that the text encoder was trained with"
        )
    if len(known_tokens) < _MIN_FILLED * size:
        raise UserError(
            f"{folder}: has a vocabulary of {len(known_tokens)} tokens, and the text encoder's embedding {size} rows; "
            "expected the tokenizer that the text encoder was trained with"
        )
    words = [[token for token in row if token not in special.values()] for row in rows]
    if words[0] == words[1] or not all(words) or any(len(row) != length for row in rows):
        raise UserError(
            f"{folder}: makes the same tokens of different captions, {_PROBES[0]!r} and {_PROBES[1]!r}; its vocabulary "
            "is not the one that the text encoder was trained with"
        )
    if pooled:
        _check_end(folder, encoder, rows, special["eos_token_id"])
    return {"vocabulary": known_tokens | vocabulary, "merges": merges, "length": length} | special


def _files(folder: Path) -> tuple[dict[str, int], list[list[str]]]:
    """Returns vocabulary and merges: of tokenizer.json if the folder has one, as transformers does."""
    combined, parts = folder / "tokenizer.json", [folder / "vocab.json", folder / "merges.txt"]
    for path in (combined, *parts, folder / "tokenizer_config.json"):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to nothing; get the file again")
    if combined.exists():
        model = read_object(combined).get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise UserError(f"{combined}: model: expected the byte-pair encoding (BPE) of CLIP")
        return _checked(combined, model.get("vocab"), model.get("merges"))
    if missing := [path.name for path in parts if not path.exists()]:
        effect = "; without them every caption becomes the same tokens" if len(missing) == 2 else ""
        raise UserError(
            f"{folder}: has no {' and '.join(missing)}, and no tokenizer.json that would hold them{effect}; get it "
            "again"
        )
    try:
        lines = decoded(read_small_file(parts[1])).splitlines()
    except Malformed as error:
        raise UserError(f"{parts[1]}: {error}") from None
    merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    return _checked(folder, read_object(parts[0]), merges)


def _checked(place: Path, vocabulary: object, merges: object) -> tuple[dict[str, int], list[list[str]]]:
    if not isinstance(vocabulary, dict) or not all(type(n) is int and n >= 0 for n in vocabulary.values()):
        raise UserError(f"{place}: its vocabulary: expected the number of each token")
    if not vocabulary or not isinstance(merges, list) or not merges:
        raise UserError(f"{place}: has an empty vocabulary or no merges; get it again")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{place}: its vocabulary: two tokens have the same number")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(t, str) for t in p) for p in pairs):
        raise UserError(f"{place}: its merges: expected pairs of tokens")
    for one, other in pairs:
        if missing := next((token for token in (one, other, one + other) if token not in vocabulary), None):
            raise UserError(f"{place}: merges name {missing[:60]!r}, which the vocabulary does not have; get it again")
    return vocabulary, pairs


def _max_length(path: Path, encoder: TextConfig) -> int:
    config = LibraryConfig.read(path)
    class_name = str(config.get("tokenizer_class", "CLIPTokenizer"))
    if class_name not in ("CLIPTokenizer", "CLIPTokenizerFast"):
        raise UserError(f"{path}: tokenizer_class is {class_name[:100]!r}; expected CLIPTokenizer")
    length, most = config.get("model_max_length"), encoder.max_position_embeddings
    if type(length) is not int or not 3 <= length <= most:
        raise UserError(
            f"{path}: model_max_length is {str(length)[:40]}; expected the {most} tokens that the text encoder reads "
            "(max_position_embeddings), or fewer"
        )
    return length


def _check_end(folder: Path, encoder: TextConfig, rows: list[list[int]], end: int) -> None:
    """Raises UserError if the text encoder does not find the end of a text, where it takes its pooled embedding.

    Transformers looks for the token `eos_token_id`; if that is 2, as in the published configurations, for the highest.
    """
    for row in rows:
        sought = max(row) if encoder.eos_token_id == 2 else encoder.eos_token_id
        if not isinstance(sought, int) or sought not in row or row.index(sought) != row.index(end):
            raise UserError(
                f"{folder}: ends a text with token {end}, and the text encoder looks for {sought} (eos_token_id in its "
                "config.json), so that all captions would have one pooled embedding"
            )
