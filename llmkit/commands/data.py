"""Define the commands `llmkit data` and `llmkit tokenizer`."""

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from llmkit.commands.show import (
    MOST,
    AsJson,
    Command,
    ConfigArg,
    MaxBadFraction,
    Override,
    check_is_new,
    progress_printer,
    show,
    terminal_text,
    to_stderr,
)
from llmkit.config.defaults import MAX_BAD_FRACTION, PATTERN, VOCAB_SIZE

NEAREST = 10  # tokens that `tokenizer show --near` lists
SAMPLE = "def main(argv=None):\n    return 0\n"
TextKey = Annotated[str, typer.Option(help="Name of the text field in JSONL, CSV and Parquet.")]

data_app = typer.Typer(help="Build and inspect training data.", no_args_is_help=True, rich_markup_mode=None)
tokenizer_app = typer.Typer(help="Train and inspect tokenizers.", no_args_is_help=True, rich_markup_mode=None)


@data_app.command("build", cls=Command)
def data_build(
    config: ConfigArg,
    o: Override = [],
    dry_run: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Only try this many documents of each source.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Clean, filter, deduplicate and tokenize the sources of CONFIG."""
    from llmkit.corpus.build import build_corpus, try_corpus
    from llmkit.screen import format_markdown

    loaded = load(config, o, for_training=False)
    section = loaded.data
    if dry_run:
        text, funnel = try_corpus(section, dry_run, where=loaded.where)
        show({"funnel": funnel}, as_json) if as_json else print(terminal_text(format_markdown(text)))
        return
    manifest = build_corpus(section, say=progress_printer(as_json), where=loaded.where)
    if as_json:
        show(manifest, as_json)
    else:
        print(terminal_text(format_markdown((Path(section.dir) / "report.md").read_text(encoding="utf-8"))))
        same = f"{config}" + "".join(f" -o {shlex.quote(override)}" for override in o)  # without -o: another build
        print(f"next: llmkit data inspect {same} --dropped 20")
        trains = loaded.model or loaded.init_from
        print(f"      llmkit pretrain {same}" if trains else "      add `model:` and `train:` (llmkit init pretrain)")


@data_app.command("report", cls=Command)
def data_report(
    folder: Annotated[Path, typer.Argument(help="The data.dir of a build, or its config.")], as_json: AsJson = False
) -> None:
    """Print the report of a finished build again."""
    from llmkit.config.load import load_config
    from llmkit.corpus.build import check_corpus, read_manifest
    from llmkit.screen import format_markdown

    if folder.is_file():
        section = load_config(folder, for_training=False).data
        check_corpus(section)
        folder = Path(section.dir)
    manifest = read_manifest(folder)
    report = terminal_text(format_markdown((folder / "report.md").read_text(encoding="utf-8", errors="replace")))
    show(manifest, as_json) if as_json else print(report)


def load(config: Path, overrides: list[str], for_training: bool) -> Any:
    """Load a config, and find the questions that its data are searched for."""
    from llmkit.config.load import load_config

    loaded = load_config(config, overrides, for_training=for_training)
    if loaded.data.decontaminate is None:  # the next import takes a second
        return loaded
    from llmkit.tasks.questions import name_question_files

    return name_question_files(loaded)


@data_app.command("inspect", cls=Command)
def data_inspect(
    config: ConfigArg,
    o: Override = [],
    rows: Annotated[int | None, typer.Option(min=1, max=MOST, help="Show this many rows; default: 2.")] = None,
    step: Annotated[
        int | None, typer.Option(min=0, max=MOST, help="Begin with the batch of this step, counted from 0.")
    ] = None,
    id: Annotated[str | None, typer.Option(help="Show why this document was kept or dropped.")] = None,
    dropped: Annotated[int, typer.Option(min=0, max=MOST, help="Show this many dropped documents.")] = 0,
    kept: Annotated[int, typer.Option(min=0, max=MOST, help="Show this many kept documents.")] = 0,
    rule: Annotated[str | None, typer.Option(help="With --dropped: only documents dropped by this rule.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as training will see them, with targets in colour, or documents and why they were kept or dropped."""
    from llmkit.errors import UserError

    for_training = not (id or dropped or kept)
    loaded = load(config, o, for_training=for_training)
    if rule and not dropped:
        raise UserError("--rule needs --dropped", fix=f"--dropped 20 --rule {rule}")
    if (id is not None) + bool(dropped or kept) + (rows is not None or step is not None) > 1:
        what = "--rows and --step, --id, and --dropped or --kept show different things"
        raise UserError(what, fix="choose one of them")
    if not for_training:
        inspect_documents(loaded.data, id, dropped, kept, rule, as_json)
        return
    from llmkit.data.inspect import (
        format_labelled,
        format_rows,
        format_trees,
        inspect_labelled,
        inspect_rows,
        inspect_trees,
    )
    from llmkit.parallel.world import start_world
    from llmkit.training.prepare import prepare

    run = prepare(loaded, start_world(), keep=False, say=progress_printer(as_json))
    batches = run.batches("train", run.config.train.global_batch_size)
    batch, tokenizer = batches.rows_from(step or 0, rows or 2), run.data.tokenizer
    if run.config.data.kind == "labelled":
        shown = inspect_labelled(batch, tokenizer, run.data.labels, tags=run.head.kind == "tag")
        show({"rows": shown}, as_json) if as_json else print(terminal_text(format_labelled(shown, tokenizer)))
        return
    if batch.records is not None:
        shown = [tokenizer.decode(ids[:n].tolist()) for ids, n in zip(batch.input_ids, batch.lengths, strict=True)]
        if as_json:
            pairs = zip(shown, batch.records, strict=True)
            show({"rows": [{"prompt": text, "record": record} for text, record in pairs]}, as_json)
        else:
            print("\n".join(f"--- prompt {i}\n{terminal_text(text)}" for i, text in enumerate(shown)))
        return
    if batch.answers is not None or batch.input_ids.ndim == 3:
        shown, form = inspect_trees(batch, tokenizer), format_trees
    else:
        shown, form = inspect_rows(batch, tokenizer, run.model_config.kind), format_rows
    if as_json:
        show({"rows": shown}, as_json)
    else:
        print(form(shown, tokenizer, colour=sys.stdout.isatty()))


def inspect_documents(data: Any, id: str | None, dropped: int, kept: int, rule: str | None, as_json: bool) -> None:
    """Print what happened to one document, or samples of the dropped and the kept ones."""
    from llmkit.corpus.build import check_corpus
    from llmkit.corpus.lookup import explain_document, sample_documents

    check_corpus(data)
    if id:
        found = explain_document(data, id)
        if as_json:
            show(found, as_json)
        else:
            show({k: v for k, v in found.items() if k not in ("scores", "text")} | found["scores"], as_json)
            print(f"\n{beginning(found['text'], 2000)}")
        return
    samples = [*sample_documents(data, dropped, kept=False, rule=rule), *sample_documents(data, kept, kept=True)]
    if as_json:
        show({"documents": samples}, as_json)
        return
    if not samples:
        print("there is no such document")
    for sample in samples:
        print(terminal_text("--- {id}: {why}".format(**sample)))
        print(beginning(sample["text"], 1000) + "\n")


def beginning(text: str, length: int) -> str:
    """Return the first characters of an untrusted text for the terminal, and how many are left out."""
    left = len(text) - length
    return terminal_text(text[:length]) + (f"\n... {left:,} more characters (--json shows all)" if left > 0 else "")


@tokenizer_app.command("train", cls=Command)
def tokenizer_train(
    sources: Annotated[list[str], typer.Argument(help="Files, folders or globs.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("tokenizer"),
    kind: Annotated[str, typer.Option(help="bpe, unigram, wordpiece or char.")] = "bpe",
    extend: Annotated[Path | None, typer.Option(help="Add tokens to this BPE instead of training a new one.")] = None,
    vocab_size: Annotated[
        int, typer.Option(min=259, max=2**24, help="Tokens of the result, all kinds counted.")
    ] = VOCAB_SIZE,
    pattern: Annotated[str, typer.Option(help="How text is split: gpt2, llama3, qwen2 or a regex.")] = PATTERN,
    normalize: Annotated[list[str], typer.Option(help="lowercase, nfc, nfd, nfkc, strip_accents; repeatable.")] = [],
    special: Annotated[list[str], typer.Option(help="A further special token. May be repeated.")] = [],
    text_key: TextKey = "text",
    max_bad_fraction: MaxBadFraction = MAX_BAD_FRACTION,
    as_json: AsJson = False,
) -> None:
    """Train a tokenizer on files, or add tokens to an existing one."""
    from llmkit.corpus.clean import extract_article
    from llmkit.errors import UserError
    from llmkit.files import write_beside
    from llmkit.readers.documents import read_texts
    from llmkit.readers.tally import Tally
    from llmkit.tokenizer.load import load_tokenizer
    from llmkit.tokenizer.train import extend_bpe, train_tokenizer

    check_is_new(out)
    tally, skipped, say = Tally(), Counter(), progress_printer(as_json)
    texts = read_texts(sources, text_key, tally, skipped, extract_article)
    if extend:
        given = {
            "--kind": kind != "bpe",
            "--pattern": pattern != PATTERN,
            "--normalize": normalize,
            "--special": special,
        }
        if ignored := [option for option, is_given in given.items() if is_given]:
            raise UserError(f"{ignored[0]} has no effect with --extend", fix="leave it out: the base tokenizer decides")
        tokenizer = extend_bpe(load_tokenizer(extend), texts, vocab_size, say=say)
    else:
        options = {"vocab_size": vocab_size, "pattern": pattern, "normalize": normalize, "special_tokens": special}
        tokenizer = train_tokenizer(texts, kind, say=say, **options)
    tally.check(max_bad_fraction, fix="repair the files, or raise --max-bad-fraction")
    with write_beside(out) as folder:
        tokenizer.save(folder)
    result = {"written": f"{out}/tokenizer.json", "vocabulary": len(tokenizer)}
    if len(tokenizer) != vocab_size:
        result["asked for"] = f"{vocab_size}, but there was nothing more to learn from the texts"
    if tally.bad:
        result["bad records"] = tally.describe()
    if skipped:
        result["skipped files"] = ", ".join(f"{number} {reason}" for reason, number in skipped.items())
    show(result, as_json)


@tokenizer_app.command("show", cls=Command)
def tokenizer_show(
    tokenizer: Annotated[Path, typer.Argument(help="A tokenizer.json, or a folder with one.")],
    texts: Annotated[list[str], typer.Argument(help="Text, or files, folders and globs.")] = [SAMPLE],
    beside: Annotated[str | None, typer.Option(help="A tokenizer to compare: a path, or a hub id like gpt2.")] = None,
    near: Annotated[str | None, typer.Option(help="A word: the tokens nearest to it in the model's embedding.")] = None,
    text_key: TextKey = "text",
    as_json: AsJson = False,
) -> None:
    """Show how a tokenizer splits texts, and how well it compresses each text or file."""
    if near is not None:
        show_nearest(tokenizer, near, as_json)
        return
    from llmkit.data.inspect import format_tokens, is_path, measure_compression
    from llmkit.screen import format_table
    from llmkit.tokenizer.load import fetch_tokenizer, load_tokenizer
    from llmkit.tokenizer.spell import LEGEND, spell_tokens

    loaded = load_tokenizer(tokenizer)
    rows = measure_compression(loaded, fetch_tokenizer(beside) if beside else None, texts, text_key)
    if as_json:
        for row, text in zip(rows, texts, strict=True):
            row |= {} if is_path(text) else {"ids": loaded.encode(text)}
        show({"vocabulary": len(loaded), "sources": rows}, as_json)
        return
    shown = [text for text in texts if not is_path(text)]
    for text in shown:
        print(format_tokens(spell_tokens(loaded, loaded.encode(text)), colour=sys.stdout.isatty()) + "\n")
    if shown:
        print(f"{LEGEND}\n")
    print(terminal_text(format_table(rows)))
    print(f"vocabulary: {len(loaded)}")


def show_nearest(model: Path, word: str, as_json: bool) -> None:
    """Print the tokens that are nearest to a word in the embedding of a model."""
    from llmkit.evals.embeddings import nearest_tokens
    from llmkit.screen import format_table
    from llmkit.storage.locate import load_located, locate, read_located_head

    located = locate(model)
    to_stderr(located.choice)
    loaded, tokenizer = load_located(located, merge=True, head=read_located_head(located))
    found = nearest_tokens(loaded, tokenizer, word, NEAREST)
    if as_json:
        show(found, as_json)
        return
    print(terminal_text("nearest to " + " ".join(map(repr, found["word"]))))
    print(terminal_text(format_table([row | {"token": repr(row["token"])} for row in found["nearest"]])))
