"""`python -m melt_serve.train data`: what a run would learn from, before it runs."""

import argparse
import json
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

from melt_serve.bundled import MELT
from melt_serve.terminal import at_least, columns, positive, whole
from melt_serve.train.commands import Commands, new_command

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from melt_serve.train.data.datasets import Corpus
    from melt_serve.train.data.documents import Document
    from melt_serve.train.data.packing import Counts, Packing


DESCRIPTION = """\
Read data once as a run would, and say what is in it: documents, tokens, the share that is learnt, the share of padding,
records that cannot be learnt from, by file and line. Then show one document with what is learnt between ⟦ and ⟧.

FILES are .jsonl or .json files (also .gz), .parquet files, folders that a Hugging Face dataset was saved to
(save_to_disk), or datasets on the hub, OWNER/NAME:SPLIT. A record has `messages` (a chat, with `tools` if you like), of
which the assistant's replies are learnt, or `text`, of which everything is; `conversations`, `prompt` with
`completion`, and `instruction` with `output` are chats, too."""
EXAMPLES = """\
examples:
  python -m melt_serve.train data chats.jsonl --checkpoint ./Ouro-1.4B-Thinking --length 10000 --chunk-size 512
      the paper's packs
  python -m melt_serve.train data chats.jsonl --show 17
      another document, of the checkpoint that comes with the package
  python -m melt_serve.train data ./data/train part-*.parquet --too-long split --json
      several sources; long documents in pieces; ends with one line of JSON

exit codes: 0, all records can be learnt from; 3, some cannot; 1, the data cannot be used at all; 2, wrong words, or
no such checkpoint"""
NAMED = 10
"""Broken records that are named; the others are counted."""
MOST_SHOWN = 4000
"""Characters of the example document, half of them of its end."""


def add_command(commands: Commands) -> None:
    """Add `data` to the commands of `python -m melt_serve.train`."""
    add = new_command(commands, "data", show, "see what a run would learn from", DESCRIPTION, EXAMPLES).add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="see above")
    add("--checkpoint", default=str(MELT), help="its tokenizer, chat template and C (default: the bundled one)")
    add("--length", type=at_least(2), default=10_000, metavar="S", help="tokens of a pack (default: 10000)")
    add("--chunk-size", type=positive, metavar="C", help="default: the checkpoint's, or 512 if it is no MELT")
    add("--too-long", choices=("cut", "split", "drop"), default="cut", help="documents above S tokens (default: cut)")
    add("--streaming", action="store_true", help="read in the files' order, shuffled in windows only")
    add("--window", type=positive, default=1024, metavar="N", help="records packed together (default: 1024)")
    add("--seed", type=int, default=0, help="of the order (default: 0)")
    add(
        "--show",
        type=whole,
        default=0,
        metavar="N",
        help="the record of which to show a document (default: 0, the first)",
    )
    add("--json", action="store_true", help="end with one line of JSON")


def show(arguments: argparse.Namespace) -> int:
    """Print counts, broken records and an example; return the exit code, 3 where records are broken.

    Raises:
        CheckpointError: there is no looped model's checkpoint to read the records for.
        DataError: there is nothing to learn, or no record to show.
        OSError: files that cannot be read.
    """
    from transformers import AutoTokenizer

    from melt_serve.checkpoint_config import load_config, located_looped
    from melt_serve.train.data.datasets import Corpus
    from melt_serve.train.data.packing import Packing

    checkpoint = located_looped(arguments.checkpoint)
    config = load_config(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    corpus = Corpus(arguments.files)
    packing = Packing(
        length=arguments.length,
        chunk_size=arguments.chunk_size or getattr(config, "chunk_size", None) or 512,
        seed=arguments.seed,
        streaming=arguments.streaming,
        window=arguments.window,
        too_long=arguments.too_long,
        broken="skip",
    )
    counts, broken, lengths = read_once(corpus, tokenizer, packing)
    print(table(counts, lengths, packing))
    for line in broken[:NAMED]:
        print(f"broken: {line}")
    if len(broken) > NAMED:
        print(f"broken: {len(broken) - NAMED:,} more")
    print(f"\n{example(corpus, arguments.show, tokenizer)}")
    if arguments.json:
        print(json.dumps({**asdict(counts), "broken_records": broken, "packing": asdict(packing)}))
    return 3 if broken else 0


def read_once(
    corpus: "Corpus", tokenizer: "PreTrainedTokenizerFast", packing: "Packing"
) -> tuple["Counts", list[str], list[int]]:
    """Read one epoch; return the counts, what is wrong with broken records, and the tokens of each document.

    Raises:
        DataError: there is nothing to learn.
    """
    from tqdm import tqdm

    from melt_serve.train.data.packing import Batches
    from melt_serve.train.data.records import DataError

    broken: list[str] = []
    lengths: list[int] = []
    batches = Batches(corpus, tokenizer, packing, report=lambda record: broken.append(str(record)))
    with tqdm(total=None if packing.streaming else len(corpus), desc="reading", unit="record", leave=False) as bar:
        while batches.next_window():
            lengths += [len(document) for pack in batches.packs for document in pack]
            bar.update(batches.counts.records - bar.n)
    if not lengths:
        raise DataError(broken[0] if broken else "the data has no records that fit")
    return batches.counts, broken, lengths


def table(counts: "Counts", lengths: list[int], packing: "Packing") -> str:
    """Format the counts in columns."""
    ordered = sorted(lengths)
    padding = counts.columns - counts.tokens
    ends = padding - counts.lost_to_grid
    lines = [
        ("records", f"{counts.records:,}", ""),
        ("  broken, left out", f"{counts.broken:,}", f"{counts.broken / counts.records:.1%}"),
        ("documents", f"{counts.documents:,}", ""),
        (f"  longer than {packing.length:,} tokens ({packing.too_long})", f"{counts.too_long:,}", ""),
        ("tokens", f"{counts.tokens:,}", ""),
        ("  learnt", f"{counts.supervised:,}", f"{counts.supervised / counts.tokens:.1%}"),
        (
            f"  learnt beyond the first {packing.chunk_size:,} of a document",
            f"{counts.beyond_first_chunk:,}",
            f"{counts.beyond_first_chunk / max(1, counts.supervised):.1%}",
        ),
        ("  a document, median", f"{ordered[len(ordered) // 2]:,}", ""),
        ("  a document, longest", f"{ordered[-1]:,}", ""),
        (f"packs of {packing.length:,} tokens", f"{counts.packs:,}", ""),
        (
            f"  lost to the grid (C={packing.chunk_size})",
            f"{counts.lost_to_grid:,}",
            percent_of_columns(counts.lost_to_grid, counts),
        ),
        ("  left at the packs' ends", f"{ends:,}", percent_of_columns(ends, counts)),
    ]
    return columns(lines)


def percent_of_columns(padding: int, counts: "Counts") -> str:
    """Format padding as a share of all columns."""
    return f"{padding / counts.columns:.1%}"


def example(corpus: "Corpus", number: int, tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return a record's documents as text, with what is learnt marked.

    Raises:
        DataError: there is no such record, or it is broken.
    """
    from melt_serve.train.data.documents import documents_of
    from melt_serve.train.data.records import BrokenRecord, DataError

    record, _ = next(islice(corpus.stream([]), number, None), (None, None))
    if record is None:
        raise DataError(f"--show {number}: there are not so many records")
    if isinstance(record, BrokenRecord):
        return f"broken: {record}"
    try:
        documents = documents_of(record, tokenizer)
    except BrokenRecord as broken:
        return f"broken: {broken}"
    shown = [f"{record.place}:\n{marked(document, tokenizer)}" for document in documents]
    return "\n\n".join(shown)


def marked(document: "Document", tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the document's text, what is learnt between ⟦ and ⟧; a long one without its middle."""
    learnt = document.supervised.clone()
    learnt[0] = False  # nothing comes before it that could be asked
    text = ""
    for is_learnt, run in groupby(
        zip(learnt.tolist(), document.tokens.tolist(), strict=True), key=lambda pair: pair[0]
    ):
        said = tokenizer.decode([token for _, token in run])
        text += f"⟦{said}⟧" if is_learnt else said
    if len(text) > MOST_SHOWN:
        half = MOST_SHOWN // 2
        text = f"{text[:half]}\n[... {len(text) - MOST_SHOWN:,} characters ...]\n{text[-half:]}"
    return text
