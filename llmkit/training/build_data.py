"""Make a run's data ready: build the corpus or encode the records if that was not done, and open both splits."""

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from llmkit.config.data import CorpusData
from llmkit.config.schema import Config
from llmkit.corpus.build import build_corpus, needs_build
from llmkit.corpus.units import VERSION
from llmkit.data.preferences import must_part
from llmkit.data.splits import Splits, open_corpus, open_labelled, open_prompt_splits, open_records, read_manifest
from llmkit.errors import DataError
from llmkit.models.hf_config import read_config
from llmkit.parallel.world import World
from llmkit.records.build import encode_turns
from llmkit.records.labelled import encode_labelled
from llmkit.records.layouts import CONTINUED
from llmkit.records.preferences import is_continued
from llmkit.records.prompts import TEXT, encode_prompts
from llmkit.tokenizer.chat_template import default_template, describe_template
from llmkit.tokenizer.load import load_tokenizer, read_template
from llmkit.tokenizer.tokenizer import Tokenizer


def open_data(
    config: Config,
    world: World,
    base: Path | None,
    start_id: int | None,
    say: Callable[[str], None],
    *,
    max_new_tokens: int = 0,
    keep: bool = True,
) -> Splits:
    """Open the splits of data.dir, or of fine-tuning records that are encoded with the base's tokenizer.

    start_id  the decoder's first token, for an encoder and a decoder; None: the model is a decoder alone
    max_new_tokens  of an answer to a prompt
    keep      encode records into the run directory; False: into a temporary folder, and replace no build of a corpus
    """
    if isinstance(config.data, CorpusData):
        return open_built_corpus(config, world, say, keep=keep)
    if config.data.kind == "labelled":
        return open_encoded_labels(config, world, base, keep=keep)
    if config.data.kind == "prompts":
        return open_encoded_prompts(config, world, base, max_new_tokens, keep=keep)
    return open_encoded_records(config, world, base, start_id, keep=keep)


def open_built_corpus(config: Config, world: World, say: Callable[[str], None], *, keep: bool) -> Splits:
    """Build the corpus if the config names sources, and open it.

    keep  False: raise DataError if that would replace another build, which runs may have been trained on
    """
    data, folder = config.data, Path(config.data.dir)
    if not keep and (folder / "manifest.json").is_file() and needs_build(data):
        fix = "`llmkit data build` replaces it; or name another data.dir"
        raise DataError("data.dir holds a build with other settings", at=folder, fix=fix)
    if data.sources:
        world.on_main(lambda: build_corpus(data, say=say, where=config.where), builds_data=True)
    if read_manifest(folder).get("version") != VERSION:
        raise DataError("the data was built by another version of llmkit", at=folder, fix="build it again")
    names = [source.name for source in data.sources]
    weights = {source.name: source.weight for source in data.sources if source.weight}
    return open_corpus(
        folder,
        data.seq_len,
        weights=weights,
        document_mask=data.document_mask,
        where=lambda source: config.where(f"data.sources.{names.index(source)}"),
    )


def open_encoded_records(config: Config, world: World, base: Path, start_id: int | None, *, keep: bool) -> Splits:
    """Encode the records, if that is not done, and open them."""
    data, tokenizer = config.data, load_templated(config, base)
    out = Path(config.run_dir) / "data" if keep else temporary_folder()
    apart = config.objective.name == "reward"  # it reads the last token of an answer too
    options = {"seed": config.seed, "form": "rows" if start_id is None else "pairs", "keep": keep}
    if data.kind == "preference":
        options |= {"form": "trees", "single": config.objective.name == "kto", "whole": apart}
        options |= {"apart": must_part(read_config(base).windows, data.row_len)}
    world.on_main(lambda: encode_turns(data, tokenizer, out, **options), builds_data=True)
    report = encode_turns(data, tokenizer, out, **options)  # every rank reads what rank 0 wrote
    layouts = report["found"]["layouts"]
    is_chat = not all(map(is_continued, layouts)) if data.kind == "preference" else set(layouts) != {CONTINUED}
    form = describe_template(tokenizer) if is_chat else ""
    if is_chat:  # checkpoints get the template that was trained with
        tokenizer.chat_template = default_template(tokenizer)
    weights = {source.name: source.weight for source in data.sources if source.weight}
    where = data.path or ", ".join(source.name for source in data.sources)
    where += f" and {data.val_path}" if data.val_path else ""
    return open_records(report, where, tokenizer, start_id, form=form, weights=weights, apart=apart)


def load_templated(config: Config, base: Path) -> Tokenizer:
    """Return the tokenizer of the base with the template and the special tokens that the data section names."""
    tokenizer = load_tokenizer(base)
    tokenizer.add_specials(config.data.special_tokens)
    if config.data.chat_template is not None:
        tokenizer.chat_template = read_template(Path(config.data.chat_template))
    return tokenizer


def open_encoded_prompts(config: Config, world: World, base: Path, max_new_tokens: int, *, keep: bool) -> Splits:
    """Encode the prompts, if that is not done, and open them."""
    data, tokenizer = config.data, load_templated(config, base)
    out = Path(config.run_dir) / "data" if keep else temporary_folder()
    options = {"room": data.seq_len - max_new_tokens, "seed": config.seed, "keep": keep}
    world.on_main(lambda: encode_prompts(data, tokenizer, out, **options), builds_data=True)
    report = encode_prompts(data, tokenizer, out, **options)  # every rank reads what rank 0 wrote
    is_chat = set(report["layouts"]) != {TEXT}
    form = describe_template(tokenizer) if is_chat else ""
    if is_chat:
        tokenizer.chat_template = default_template(tokenizer)
    where = data.path + (f" and {data.val_path}" if data.val_path else "")
    return open_prompt_splits(report, where, tokenizer, form=form)


def open_encoded_labels(config: Config, world: World, base: Path, *, keep: bool) -> Splits:
    """Encode the texts with labels, if that is not done, and open them."""
    data, tokenizer = config.data, load_tokenizer(base)
    out = Path(config.run_dir) / "data" if keep else temporary_folder()
    options = {"task": config.objective.name, "seed": config.seed, "keep": keep}
    world.on_main(lambda: encode_labelled(data, tokenizer, out, **options), builds_data=True)
    report = encode_labelled(data, tokenizer, out, **options)  # every rank reads what rank 0 wrote
    where = data.path + (f" and {data.val_path}" if data.val_path else "")
    return open_labelled(report, where, tokenizer, types=read_config(base).kind == "masked")


def temporary_folder() -> Path:
    """Return a new folder that is deleted when this process ends."""
    folder = tempfile.mkdtemp(prefix="llmkit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
